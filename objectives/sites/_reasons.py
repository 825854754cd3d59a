"""Every weight of a model, and why it cannot be quantized, as the traced call shows it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from alphasmith.objectives.sites._reach import Unread
from alphasmith.objectives.sites._weights import CHAIN, Operators, Use
from alphasmith.objectives.sites.graph import Graph, Node
from alphasmith.objectives.sites.types import Operator, Weight

#: Part of the name of a parameter that another one is computed from.
_COMPUTED = ".parametrizations."


def weights_of(model: nn.Module, graph: Graph, operators: Operators, unread: Unread) -> tuple[Weight, ...]:
    """Every parameter of two or more dimensions, tied ones once, with the reason why it cannot be quantized.

    Args:
        model: The model.
        graph: The traced call.
        operators: Its operators.
        unread: What the call did not read.
    """
    reasons = _Reasons(model, graph, operators, unread)
    total = sum(tensor.numel() for tensor in model.parameters())
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return tuple(
        Weight(
            name=name,
            aliases=tuple(names[id(tensor)][1:]),
            shape=tuple(tensor.shape),
            share=tensor.numel() / total,
            reason=reasons(name),
        )
        for name, tensor in model.named_parameters()
        if tensor.dim() > 1
    )


class _Reasons:
    def __init__(self, model: nn.Module, graph: Graph, operators: Operators, unread: Unread) -> None:
        self._graph = graph
        self._operators = operators
        self._unread = unread
        self._later = {operator.weight for operator in unread.operators()}
        self._records = {r.weight: (r, u) for r, u in zip(operators.records, operators.uses, strict=True)}
        self._embeddings: dict[str, str] = {}
        first = {id(tensor): name for name, tensor in model.named_parameters()}
        for path, module in model.named_modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                self._embeddings.setdefault(first.get(id(module.weight), ""), path)

    def __call__(self, name: str) -> str:
        """Why a weight cannot be quantized; "" where it can."""
        if name in self._records:
            record, uses = self._records[name]
            return self._raw(record, uses[0]) if record.raw and not record.stacked else ""
        if name in self._later:
            return ""
        if name in self._embeddings:
            return "an embedding: its rows are looked up, not multiplied"
        if name in self._graph.parameters:
            node = next(self._readers(self._graph.parameters[name]), None)
            if node is None:
                return "nothing is computed from it"
            if _COMPUTED in name:
                return f"the weight of {name.partition(_COMPUTED)[0]} is computed from it"
            return f"read by {_called(node)}, which is neither a linear nor a convolution"
        owners = self._unread.owners.get(name, [])
        idle = [owner for owner in owners if owner not in self._graph.modules]
        if idle or not owners:
            return "not reached by the example batch"
        return f"not read by the forward of {owners[0] or 'the model'}"

    def _raw(self, record: Operator, use: Use) -> str:
        embedding = self._embeddings.get(record.weight)
        if embedding is not None:
            return f"its weight is shared with the embedding {embedding}"
        foreign = self._operators.foreign.get(use.key.parameter)
        if foreign:
            return f"its weight is also read by {_called(self._graph.nodes[foreign[0]])}"
        if use.key.transposed:
            return "the weight of a transposed convolution"
        where = self._graph.nodes[use.node].module or "the model"
        if len(self._graph.values[use.key.parameter].shape) > 2 and record.kind == "linear":
            return f"several matrices in one tensor, used by a functional call in {where}"
        return f"used by a functional call in {where}, not by a layer's own forward"

    def _readers(self, value: int) -> Iterator[Node]:
        """Operations that compute with a value, seen through views, casts and copies of it."""
        for index in self._graph.values[value].readers:
            node = self._graph.nodes[index]
            if node.op not in CHAIN:
                yield node
                continue
            for output in node.outputs:
                if output is not None:
                    yield from self._readers(output)


def _called(node: Node) -> str:
    return f"{node.op.strip('_')} in {node.module or 'the model'}"
