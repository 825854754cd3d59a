"""Where a shift of a site's input can go into biases (Outlier Suppression+, arXiv 2304.09145).

The labels of a folded site say which elements of which values belong to which channel. A shift z may be folded when every
such value is either a plain copy of another or made by a normalization or an operator that adds a bias to it, and when
nobody reads one but further copies and the site's own operators. Then ``b' = b - z`` in every such bias makes the operators
read X - z, and ``b' = b + W z`` in theirs takes it back. Anything else (a nonlinearity, a product, zeros that are padded
around X) leaves the shift in the quantizer of the input, where it needs no proof.
"""

from __future__ import annotations

from collections.abc import Sequence

from alphasmith.objectives.sites._propagation import ANY, ZEROS, Solution
from alphasmith.objectives.sites._rules import IDENTITY, MOVEMENT, NORMS
from alphasmith.objectives.sites._weights import Operators, Use
from alphasmith.objectives.sites.graph import Graph, Node
from alphasmith.objectives.sites.types import Operator, ParameterEdit, ShiftEdit

#: Copies of elements; operations that also make zeros would leave these unshifted.
_COPIES = (MOVEMENT | IDENTITY) - {"constant_pad_nd", "im2col", "tril", "triu", "as_strided"}
#: Readers that look at the shape only.
_SHAPE_ONLY = ZEROS | {
    "empty_like", "ones_like", "full_like", "new_empty", "new_ones", "new_full", "sym_size", "sym_numel", "sym_stride",
}  # fmt: skip


def shift_edits(
    graph: Graph, operators: Operators, members: Sequence[int], solution: Solution, edits: Sequence[ParameterEdit]
) -> tuple[ShiftEdit, ...]:
    """Edits that fold a shift of a folded site.

    Args:
        graph: The traced call.
        operators: Its operators.
        members: The operators of the site.
        solution: The labels with which its scales were proven to cancel.
        edits: The edits of its scales.

    Returns:
        One edit per bias of producers and consumers; empty where the shift cannot be folded.
    """
    biases = _producer_biases(graph, operators, frozenset(members), solution)
    consumers = [_consumer(graph, operators, member, edits) for member in members]
    if not biases or any(edit is None or edit.parameter in biases for edit in consumers):
        return ()
    return (*biases.values(), *(edit for edit in consumers if edit is not None))


def _producer_biases(
    graph: Graph, operators: Operators, members: frozenset[int], solution: Solution
) -> dict[str, ShiftEdit]:
    """Edits of the biases that every shifted value gets its shift from, by name; empty when one gets it otherwise."""
    makers: dict[int, set[int]] = {}
    for value, labels in solution.values.items():
        if bool((labels == ANY).any()) or not _only_copied(graph, operators, members, value):
            return {}
        node = graph.producer(value)
        if node is None:
            return {}
        if node.op in _COPIES:
            # A copy has the labels of its source; a stored tensor or zeros as the source would need their own edit.
            if node.args[0].index not in solution.values:
                return {}
            continue
        bias = _added_bias(operators, members, node)
        if bias is None or value != node.out or bias not in solution.parameters or solution.offsets[bias]:
            return {}
        makers.setdefault(bias, set()).add(node.index)
    found: dict[str, ShiftEdit] = {}
    for bias, nodes in makers.items():
        record = graph.values[bias]
        if record.kind != "parameter" or len(record.shape) != 1 or not nodes.issuperset(record.readers):
            return {}
        channel = solution.parameters[bias].clamp(min=-1).reshape(record.shape)
        found[record.name] = ShiftEdit(parameter=record.name, channel=channel)
    return found


def _only_copied(graph: Graph, operators: Operators, members: frozenset[int], value: int) -> bool:
    """Whether all that reads a value copies it, looks at its shape, or is an operator of the site that multiplies it."""
    for reader in graph.values[value].readers:
        node, use = graph.nodes[reader], operators.by_node.get(reader)
        if use is not None:
            if use.operator not in members or use.x != value or use.bias == value:
                return False
        elif node.op not in _SHAPE_ONLY and (node.op not in _COPIES or node.args[0].index != value):
            return False
    return True


def _added_bias(operators: Operators, members: frozenset[int], node: Node) -> int | None:
    """The value that a normalization, or an operator outside the site, adds to its output as it is."""
    if node.op in NORMS:
        return node.value("bias")
    use = operators.by_node.get(node.index)
    if use is None or use.operator in members or not _adds_whole_bias(node):
        return None
    return use.bias


def _adds_whole_bias(node: Node) -> bool:
    return bool(node.arguments.get("alpha", 1) == 1 and node.arguments.get("beta", 1) == 1)


def _consumer(graph: Graph, operators: Operators, member: int, edits: Sequence[ParameterEdit]) -> ShiftEdit | None:
    """The edit that gives an operator's bias what its weight makes of the shift; None where that is not possible."""
    record, uses = operators.records[member], operators.uses[member]
    bias = graph.parameters.get(record.bias) if record.bias is not None else None
    if bias is None or record.raw or not record.plain or graph.values[bias].name in graph.pinned:
        return None
    if not {use.node for use in uses}.issuperset(graph.values[bias].readers) or bias in graph.outputs:
        return None
    if not all(use.bias == bias and _corrects(graph, record, use) for use in uses):
        return None
    channels = [edit.channel for edit in edits if edit.parameter == record.weight and edit.power > 0]
    if len(channels) != 1:
        return None
    return ShiftEdit(
        parameter=graph.values[bias].name, channel=channels[0], weight=record.weight, transposed=record.transposed
    )


def _corrects(graph: Graph, record: Operator, use: Use) -> bool:
    """Whether the bias is added whole, and no zeros are padded around the input, which would not be shifted."""
    node = graph.nodes[use.node]
    padded = record.kind == "conv" and any(node.arguments["padding"])
    return _adds_whole_bias(node) and not padded and graph.values[use.bias or 0].shape == (record.out_channels,)
