"""Sites of a model, found by tensor identity in one traced forward pass (traps T5, T6).

A site is folded only when the propagation of its scales through the traced graph proves that they cancel; everything else
gets an explicit division at its input, or is left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites._edits import extended_over_stack, operator_edit, solution_edits
from alphasmith.objectives.sites._experts import Experts
from alphasmith.objectives.sites._propagation import NONE, Blocked, Solution, Solver
from alphasmith.objectives.sites._reach import Unread
from alphasmith.objectives.sites._reasons import weights_of
from alphasmith.objectives.sites._rules import IDENTITY, MOVEMENT, NORMS, RULES, channel_index
from alphasmith.objectives.sites._shifts import shift_edits
from alphasmith.objectives.sites._weights import Operators, Use, find_operators
from alphasmith.objectives.sites.graph import Graph, Node, trace
from alphasmith.objectives.sites.types import Discovery, Operator, Site
from alphasmith.objectives.text import matches

#: Why a layer takes no scales that only other batches than the traced one reach.
_UNREACHED = "the example batch does not reach it"


def discover(model: nn.Module, batch: Batch, *, experts: bool = False, exclude: Sequence[str] = ()) -> Discovery:
    """Find every site of ``model`` and how its scales can be applied.

    Args:
        model: In eval mode; not modified. What the forward pass does on ``batch`` must be what it does on any batch: layers
            that ``batch`` does not reach are left alone, and nothing is folded that they could read or make.
        batch: One tiny batch (two samples of a few positions); all its intermediate tensors are held at once.
        experts: Also smooth the inputs of mixture-of-experts layers (router and all experts together).
        exclude: ``fnmatch`` patterns of operator names; a site with a matching operator is left alone.

    Returns:
        Sites in forward order, those of layers that were not reached last, and all weights. Operators of a site stand in forward order,
        except that those which read every row of the tensor come before those which read some of them. A site may have
        raw operators only: then nothing is quantized at it.

    Raises:
        InputError: The model is in training mode, or has no linear or convolution operator.
    """
    if model.training:
        raise InputError("model", "is in training mode", "call model.eval() first")
    graph = trace(model, batch)
    operators = find_operators(model, graph)
    if not operators.records:
        raise InputError("model", "has no linear or convolution operator", "choose a model that has one")
    groups = _group(graph, operators)
    moe = Experts(model, graph, operators, [(g.members, g.routed) for g in groups])
    context = _Context(model)
    unread = Unread(model, graph)
    sites = []
    for number, group in enumerate(groups):
        refusal = _refusal(operators, group, exclude) or moe.refusal(number, experts)
        sites.append(_site(graph, operators, group, context, refusal, unread))
    # Layers that other batches may reach: quantized as they are, if calibration reaches them.
    sites += [_left((o,), o.in_channels, _UNREACHED) for o in unread.operators()]
    return Discovery(sites=tuple(sites), weights=weights_of(model, graph, operators, unread))


@dataclass
class _Group:
    """Operators that read the same tensors.

    Attributes:
        members: Operator indices.
        roots: Value -> its labels, for every tensor read; int32 in the value's shape.
        routed: Operators that read rows picked by data, such as tokens sent to an expert.
    """

    members: list[int]
    roots: dict[int, Tensor]
    routed: set[int]


class _Context:
    """Says in the user's words where an operation is."""

    def __init__(self, model: nn.Module) -> None:
        self._classes = {name: type(module).__name__ for name, module in model.named_modules()}

    def __call__(self, node: Node) -> str:
        if node.op in NORMS or "norm" in self._classes.get(node.module, "").lower():
            return f"the normalization {node.module or 'of the model'}"
        return f"{node.op.strip('_')} in {node.module or 'the model'}"


def _group(graph: Graph, operators: Operators) -> list[_Group]:
    """Operators grouped by the tensors that they read, in forward order."""
    found = [_reads(graph, uses) for uses in operators.uses]
    # Whoever reads the most rows of a tensor defines the site; readers of some of its rows join it.
    order = sorted(range(len(found)), key=lambda i: (-found[i].coverage, operators.uses[i][0].node))
    groups: list[_Group] = []
    by_roots: dict[frozenset[int], list[_Group]] = {}
    for index in order:
        reads = found[index]
        candidates = by_roots.setdefault(frozenset(reads.roots), [])
        home = next((g for g in candidates if _compatible(operators, g, index, reads.roots)), None)
        if home is None:
            home = _Group([], dict(reads.roots), set())
            candidates.append(home)
            groups.append(home)
        home.members.append(index)
        if reads.routed:
            home.routed.add(index)
    for group in groups:
        full = found[group.members[0]].coverage
        group.members.sort(key=lambda i: (found[i].coverage < full, operators.uses[i][0].node))
    return sorted(groups, key=lambda g: min(operators.uses[i][0].node for i in g.members))


@dataclass(frozen=True)
class _Reads:
    """Labels of the tensors that one operator reads, and how many of their elements those cover."""

    roots: dict[int, Tensor]
    coverage: int
    routed: bool


def _reads(graph: Graph, uses: Iterable[Use]) -> _Reads:
    roots: dict[int, Tensor] = {}
    routed = False
    for use in uses:
        value, labels, picked = _root(graph, use)
        routed = routed or picked
        roots[value] = torch.maximum(roots[value], labels) if value in roots else labels
    return _Reads(roots, sum(int((t >= 0).sum()) for t in roots.values()), routed)


def _root(graph: Graph, use: Use) -> tuple[int, Tensor, bool]:
    """Strip data movement from an operator's input: the tensor it comes from, its labels, and whether data chose rows."""
    value, picked = use.x, False
    labels = channel_index(graph.values[value].shape, use.x_axis, use.x_batch).to(torch.int32)
    mover = Solver(
        graph, Operators(records=(), uses=(), by_node={}, by_parameter={}, foreign={}), (), 0, {}, lambda n: n.op
    )
    while (node := graph.producer(value)) is not None and not graph.values[value].opaque:
        if node.op == "as_strided" or (node.op not in MOVEMENT and node.op not in IDENTITY):
            break
        source = node.args[0].index
        if not graph.values[source].floating or graph.values[source].opaque:
            break
        if node.op in IDENTITY:
            moved = labels
        else:
            try:
                index = mover.run_on_index(node, [source])[node.outputs.index(value)].reshape(-1)
            except Blocked:
                break
            inside = index >= 0
            moved = torch.full((graph.values[source].numel,), NONE, dtype=torch.int32)
            moved[index[inside]] = labels.reshape(-1)[inside]
            if not torch.equal(moved[index[inside]], labels.reshape(-1)[inside]):
                break  # one element would need two labels
            moved = moved.reshape(graph.values[source].shape)
        if node.op in ("index", "index_select", "gather"):
            chosen = [v for v in node.inputs if v != source]
            picked = picked or any(graph.values[v].from_input for v in chosen)
        value, labels = source, moved
    return value, labels, picked


def _compatible(operators: Operators, group: _Group, index: int, roots: dict[int, Tensor]) -> bool:
    """Whether an operator numbers the channels of the group's tensors as the group does."""
    if operators.records[index].in_channels != operators.records[group.members[0]].in_channels:
        return False
    if operators.uses[index][0].key.batch != operators.uses[group.members[0]][0].key.batch:
        return False
    for value, labels in roots.items():
        both = (labels >= 0) & (group.roots[value] >= 0)
        if not bool(both.any()) or not torch.equal(labels[both], group.roots[value][both]):
            return False
    return True


def _refusal(operators: Operators, group: _Group, exclude: Sequence[str]) -> str:
    for member in group.members:
        name = operators.records[member].name
        if matches(name, exclude):
            return f"{name} is excluded"
    return ""


def _site(graph: Graph, operators: Operators, group: _Group, context: _Context, refusal: str, unread: Unread) -> Site:
    records = tuple(operators.records[i] for i in group.members)
    batch = operators.uses[group.members[0]][0].key.batch
    channels = records[0].in_channels * batch
    free = torch.arange(channels)
    if refusal:
        return _left(records, channels, refusal)
    solver = Solver(graph, operators, group.members, channels, RULES, context)
    try:
        solution = solver.solve(list(group.roots.items()))
        _require_proof(operators, group, solution)
        solution = extended_over_stack(graph, operators, solution, group.routed)
        unread.refuse(solution)
    except Blocked as blocked:
        reason = str(blocked)
    else:
        edits, producers = solution_edits(graph, solution)
        return Site(
            name=records[0].name, operators=records, channels=channels, mode="fold", reason="", ties=solution.ties,
            edits=edits, producers=producers,
            shift_edits=() if group.routed else shift_edits(graph, operators, group.members, solution, edits),
        )  # fmt: skip
    if any(record.raw for record in records):
        return _left(records, channels, reason)
    try:
        for member in group.members:
            for use in operators.uses[member]:
                solver.guard_weight(use.key)
            _require_own_weight(operators, member)
    except Blocked as blocked:
        return _left(records, channels, str(blocked))
    consumers = tuple(operator_edit(graph, operators.uses[i][0].key, "in", free) for i in group.members)
    return Site(
        name=records[0].name, operators=records, channels=channels, mode="explicit", reason=reason, ties=free,
        edits=consumers, producers=(),
    )  # fmt: skip


def _left(records: tuple[Operator, ...], channels: int, reason: str) -> Site:
    return Site(
        name=records[0].name, operators=records, channels=channels, mode="left", reason=reason,
        ties=torch.arange(channels), edits=(), producers=(),
    )  # fmt: skip


def _require_own_weight(operators: Operators, member: int) -> None:
    parameter = operators.uses[member][0].key.parameter
    for use in operators.by_parameter[parameter]:
        if use.operator != member:
            raise Blocked(f"{operators.records[member].weight} is shared with {operators.records[use.operator].name}")


def _require_proof(operators: Operators, group: _Group, solution: Solution) -> None:
    """Every operator of the site must read channels 0..C-1 in order, and something must absorb the scales."""
    expected = solution.ties
    for member in group.members:
        for use in operators.uses[member]:
            labels = solution.weights.get((use.key, "in"))
            if labels is None:
                raise Blocked(f"{operators.records[member].name} reads nothing that can be scaled")
            if not torch.equal(labels.reshape(-1), expected):
                raise Blocked(f"{operators.records[member].name} does not read all channels in order")
    if not solution.parameters and all(role == "in" for _, role in solution.weights):
        raise Blocked("nothing produces it that could absorb the scales")
