"""Which normalization reads what which layer makes, found in one traced call and by no name. Source: claim B-4.

A layer is a convolution, a linear or a recurrent module. A normalization belongs to the layers whose outputs reach it without
passing through another layer or normalization. To a recurrent layer belong the ones inside it, or else the first one behind its
output, linear layers in between allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.graph import Graph, Node, trace

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Products inside a module, as the trace names them.
_PRODUCTS = frozenset({"convolution", "mkldnn_convolution", "addmm", "mm", "bmm", "matmul", "linear"})


@dataclass(frozen=True, kw_only=True)
class NormPlace:
    """Where a normalization stands.

    Attributes:
        name: Its dotted name.
        layers: Convolutions and linear layers that it belongs to, in the order in which they run.
        recurrent: The recurrent layer that it belongs to; empty where there is none.
        after_recurrent: Whether what it reads depends on a recurrent layer.
        alone: The one layer whose output it reads as it is, and nothing else does; empty where there is none.
    """

    name: str
    layers: tuple[str, ...]
    recurrent: str
    after_recurrent: bool
    alone: str


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Layers and normalizations of a model, as one call ran them.

    Attributes:
        norms: In the order in which they run.
        recurrent: Names of the recurrent layers that ran, likewise.
        idle: Names of normalizations that did not run.
    """

    norms: tuple[NormPlace, ...]
    recurrent: tuple[str, ...]
    idle: tuple[str, ...]


def read_structure(model: nn.Module, batch: Batch) -> Structure:
    """Run a model once and tell which normalization belongs to which layer.

    Args:
        model: In evaluation mode; not modified.
        batch: One tiny batch; all its intermediate tensors are held at once.
    """
    return _Reader(model, trace(model, batch)).structure()


def is_recurrent(module: nn.Module) -> bool:
    """An ``nn.LSTM``, ``GRU`` or ``RNN``, its cell, or a module of other operators that has their settings in their place."""
    fused = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    return fused or (hasattr(module, "hidden_size") and hasattr(module, "mode") and hasattr(module, "num_layers"))


class _Reader:
    """Follows values of a traced call from layer to layer."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._graph = graph
        modules = dict(model.named_modules())
        self._recurrent = [name for name, module in modules.items() if is_recurrent(module)]
        self._norms = [name for name, module in modules.items() if isinstance(module, NORMS)]
        self._layers = {name for name, m in modules.items() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
        self._linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
        self._of = {node.index: self._owner(node.module) for node in graph.nodes}
        self._after = self._after_recurrent()

    def structure(self) -> Structure:
        """What was found."""
        first: dict[str, int] = {}
        for node in self._graph.nodes:
            first.setdefault(self._of[node.index], node.index)
        inside = {norm: owner for norm in self._norms if (owner := self._inside(norm))}
        behind: dict[str, str] = {}
        for layer in self._recurrent:
            if layer in first and layer not in inside.values() and (norm := self._first_behind(layer)):
                behind.setdefault(norm, layer)
        ran = sorted((norm for norm in self._norms if norm in self._graph.modules), key=self._position)
        return Structure(
            norms=tuple(self._place(norm, inside.get(norm) or behind.get(norm, "")) for norm in ran),
            recurrent=tuple(sorted((name for name in self._recurrent if name in first), key=first.__getitem__)),
            idle=tuple(norm for norm in self._norms if norm not in self._graph.modules),
        )

    def _inside(self, name: str) -> str:
        """The recurrent module that a module is part of; empty where there is none."""
        return next((layer for layer in self._recurrent if layer and name.startswith(f"{layer}.")), "")

    def _owner(self, module: str) -> str:
        """The recurrent module that an operation ran in, else its innermost module."""
        return module if module in self._recurrent else self._inside(module) or module

    def _after_recurrent(self) -> set[int]:
        """Values that depend on what a recurrent layer made."""
        found: set[int] = set()
        for node in self._graph.nodes:
            if self._of[node.index] in self._recurrent or any(value in found for value in node.inputs):
                found.update(value for value in node.outputs if value is not None)
        return found

    def _nodes_of(self, norm: str) -> list[Node]:
        return [node for node in self._graph.nodes if node.module == norm]

    def _position(self, norm: str) -> int:
        return next((node.index for node in self._nodes_of(norm)), len(self._graph.nodes))

    def _place(self, norm: str, recurrent: str) -> NormPlace:
        nodes = self._nodes_of(norm)
        parameters = {index for name, index in self._graph.parameters.items() if name.startswith(f"{norm}.")}
        read = {value for node in nodes for value in node.given} - parameters
        layers = self._sources(read)
        return NormPlace(
            name=norm,
            layers=tuple(sorted(layers, key=lambda name: min(n.index for n in self._graph.nodes if n.module == name))),
            recurrent=recurrent,
            after_recurrent=bool(read & self._after),
            alone=self._alone(nodes, read),
        )

    def _sources(self, values: Iterable[int]) -> set[str]:
        """Convolutions and linear layers outside recurrent modules whose outputs reach some values first."""
        found: set[str] = set()
        seen: set[int] = set()
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            node = self._graph.producer(value)
            if value in seen or node is None:
                continue
            seen.add(value)
            owner = self._of[node.index]
            if owner in self._layers:
                found.add(owner)
            elif owner not in self._recurrent and owner not in self._norms:
                waiting.extend(node.inputs)
        return found

    def _alone(self, nodes: list[Node], read: set[int]) -> str:
        """The layer whose output a normalization reads as it is: both run once, and nothing else reads the output."""
        graph = self._graph
        if len(read) != 1 or len({node.given for node in nodes}) != 1:
            return ""
        (value,) = read
        node = graph.producer(value)
        outside = [
            i for i in graph.values[value].readers if graph.nodes[i].module != (nodes[0].module if nodes else "")
        ]
        if node is None or node.module not in self._layers or outside or value in graph.outputs:
            return ""
        products = [n for n in graph.nodes if n.module == node.module and n.op in _PRODUCTS]
        weight = graph.parameters.get(f"{node.module}.weight")
        once = weight is not None and len(graph.values[weight].readers) == 1 and len(products) == 1
        return node.module if once and not graph.values[value].opaque else ""

    def _first_behind(self, layer: str) -> str:
        """The first normalization that the output of a recurrent layer reaches, through linear layers at most."""
        graph = self._graph
        waiting = [v for node in graph.nodes if self._of[node.index] == layer for v in node.outputs if v is not None]
        seen: set[int] = set()
        norms: set[int] = set()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            for reader in graph.values[value].readers:
                node = graph.nodes[reader]
                owner = self._of[reader]
                if owner in self._norms:
                    norms.add(reader)
                elif owner == layer or owner in self._linear or owner not in {*self._recurrent, *self._layers}:
                    waiting.extend(v for v in node.outputs if v is not None)
        return self._of[min(norms)] if norms else ""
