"""Linear and convolution operators of a graph, found by the identity of their weight.

A weight reaches its operation as a parameter, possibly transposed, sliced, selected from a stack or cast. ``WeightView``
says which part of the parameter that is, axis by axis, without materialising anything the size of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from alphasmith.objectives.sites.graph import Graph, Node, Ref
from alphasmith.objectives.sites.types import Operator

#: Operations that hand a weight on unchanged apart from shape, layout and dtype.
_IDENTITIES = frozenset({"detach", "alias", "clone", "_to_copy", "contiguous", "lift_fresh"})
_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"})
_PADS = frozenset({"constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN_FORWARDS = frozenset({nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward})
CHAIN = _IDENTITIES | _RESHAPES | {
    "t", "transpose", "permute", "select", "slice", "split", "split_with_sizes", "unbind", "expand",
}  # fmt: skip


@dataclass(frozen=True)
class Dim:
    """One dimension of a view: ``length`` entries of parameter axis ``axis`` from ``start``; axis None = not stored."""

    axis: int | None
    start: int
    length: int


@dataclass(frozen=True)
class WeightView:
    """The part of a parameter that an operation reads.

    Attributes:
        parameter: Value index of the parameter.
        dims: One entry per dimension of the view.
        fixed: Parameter axes that are not dimensions of the view (selected, or of size one).
    """

    parameter: int
    dims: tuple[Dim, ...]
    fixed: tuple[Dim, ...] = ()

    def region(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) along every axis of the parameter, which has ``rank`` axes."""
        spans = {d.axis: (d.start, d.start + d.length) for d in (*self.dims, *self.fixed) if d.axis is not None}
        return tuple(spans[axis] for axis in range(rank))


@dataclass(frozen=True)
class WeightKey:
    """What is scaled when an operator is: uses with equal keys share their weight scales.

    Attributes:
        parameter: Value index of the parameter.
        region: (start, stop) along every axis of the parameter.
        batch_axis, in_axis, out_axis: Parameter axes of the batch of matrices, the inputs and the outputs; None if absent.
        groups: Convolution groups; 1 for linear.
        transposed: True for transposed convolution, whose weight is (in, out / groups, kernel).
        conv: True for convolutions, whose in or out axis counts channels per group.
    """

    parameter: int
    region: tuple[tuple[int, int], ...]
    batch_axis: int | None
    in_axis: int
    out_axis: int
    groups: int = 1
    transposed: bool = False
    conv: bool = False

    def _span(self, axis: int | None) -> int:
        return 1 if axis is None else self.region[axis][1] - self.region[axis][0]

    @property
    def batch(self) -> int:
        """Number of matrices read at once."""
        return self._span(self.batch_axis)

    @property
    def in_channels(self) -> int:
        """Input channels C."""
        return self._span(self.in_axis) * (1 if self.transposed or not self.conv else self.groups)

    @property
    def out_channels(self) -> int:
        """Output channels O."""
        return self._span(self.out_axis) * (self.groups if self.transposed else 1)

    def overlaps(self, other: WeightKey) -> bool:
        """Whether both read some element of the same parameter."""
        return self.parameter == other.parameter and all(
            a < d and c < b for (a, b), (c, d) in zip(self.region, other.region, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Use:
    """One execution of an operator.

    Attributes:
        node: The node.
        key: The weight it reads.
        x: Input value; ``x_axis`` its channel dimension; ``x_batch`` its batch-of-matrices dimension or None.
        out: Output value; ``out_axis`` and ``out_batch`` likewise.
        bias: Value added to the output along ``out_axis``, or None.
        operator: Index into ``Operators.records``; set once operators are named.
    """

    node: int
    key: WeightKey
    x: int
    x_axis: int
    x_batch: int | None
    out: int
    out_axis: int
    out_batch: int | None
    bias: int | None
    operator: int = -1


@dataclass(frozen=True, kw_only=True)
class Operators:
    """All operators of a graph.

    Attributes:
        records: The operators in forward order.
        uses: Executions of each operator, in forward order.
        by_node: The use that a node is.
        by_parameter: All uses of one parameter as a weight, by its value index.
        foreign: Nodes that read a weight (by parameter value) other than as an operator's weight.
    """

    records: tuple[Operator, ...]
    uses: tuple[tuple[Use, ...], ...]
    by_node: dict[int, Use]
    by_parameter: dict[int, tuple[Use, ...]]
    foreign: dict[int, tuple[int, ...]]


class WeightResolver:
    """Follows values back to the parameter they are a view of."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._memo: dict[int, WeightView | None] = {}

    def __call__(self, value: int) -> WeightView | None:
        """The view that ``value`` is of a parameter, or None when it is anything else."""
        if value not in self._memo:
            self._memo[value] = self._resolve(value)
        return self._memo[value]

    def _resolve(self, index: int) -> WeightView | None:
        value = self._graph.values[index]
        if value.opaque or not value.floating:
            return None
        if value.kind == "parameter":
            return WeightView(index, tuple(Dim(axis, 0, size) for axis, size in enumerate(value.shape)))
        node = self._graph.producer(index)
        if node is None or node.op not in CHAIN:
            return None
        first = node.args[0] if node.args else None
        view = self(first.index) if isinstance(first, Ref) else None
        return None if view is None else _follow(node, view, index, value.shape)


def _follow(node: Node, view: WeightView, out: int, shape: tuple[int, ...]) -> WeightView | None:
    """The view after one operation of ``CHAIN``."""
    dims, a = list(view.dims), node.arguments
    rank = len(dims)
    if node.op in _IDENTITIES:
        return view
    if node.op in _RESHAPES:
        return _reshape(view, shape)
    if node.op == "t":
        return replace(view, dims=tuple(reversed(dims)))
    if node.op == "transpose":
        i, j = a["dim0"], a["dim1"]
        dims[i], dims[j] = dims[j], dims[i]
        return replace(view, dims=tuple(dims))
    if node.op == "permute":
        return replace(view, dims=tuple(dims[i] for i in a["dims"]))
    if node.op == "expand":
        stored = [Dim(None, 0, 1)] * (len(shape) - rank) + dims
        grown = [d if d.length == n else Dim(None, 0, n) for d, n in zip(stored, shape, strict=True)]
        dropped = [d for d, n in zip(stored, shape, strict=True) if d.length != n and d.axis is not None]
        return WeightView(view.parameter, tuple(grown), (*view.fixed, *dropped))
    dim = a.get("dim", 0) % rank
    old = dims[dim]
    if node.op in ("select", "unbind"):
        position = a["index"] % old.length if node.op == "select" else node.outputs.index(out)
        taken = Dim(old.axis, old.start + position, 1)
        return WeightView(view.parameter, (*dims[:dim], *dims[dim + 1 :]), (*view.fixed, taken))
    if node.op == "slice":
        if a["step"] != 1:
            return None
        start = a["start"] or 0
        start = min(start + old.length if start < 0 else start, old.length)
    elif node.op == "split":
        start = a["split_size"] * node.outputs.index(out)
    else:
        start = sum(a["split_sizes"][: node.outputs.index(out)])
    dims[dim] = Dim(old.axis, old.start + start, shape[dim])
    return replace(view, dims=tuple(dims))


def _reshape(view: WeightView, shape: Sequence[int]) -> WeightView | None:
    """Adding or dropping dimensions of size one; None when axes are merged or split."""
    kept = [d for d in view.dims if d.length != 1]
    if [d.length for d in kept] != [n for n in shape if n != 1]:
        return None
    if tuple(d.length for d in view.dims) == tuple(shape):
        return view
    queue = iter(kept)
    dims = tuple(next(queue) if n != 1 else Dim(None, 0, 1) for n in shape)
    dropped = tuple(d for d in view.dims if d.length == 1 and d.axis is not None)
    return WeightView(view.parameter, dims, (*view.fixed, *dropped))


def find_operators(model: nn.Module, graph: Graph) -> Operators:
    """Every matrix product or convolution of ``graph`` that has a parameter as its weight."""
    resolve = WeightResolver(graph)
    found = [use for node in graph.nodes if (use := _use(graph, node, resolve)) is not None]
    by_node = {use.node: use for use in found}
    foreign = _foreign_readers(graph, by_node, resolve, {use.key.parameter for use in found})
    modules = dict(model.named_modules())
    embeddings = _embedding_weights(model)
    owners: dict[int, set[str | None]] = {}
    for use in found:
        owners.setdefault(use.key.parameter, set()).add(_owner(modules, graph, use))
    names: dict[tuple[int, str | None], list[Use]] = {}
    for use in found:
        # One functional use makes the whole weight raw: its module's forward is not the only reader.
        owner = None if None in owners[use.key.parameter] else _owner(modules, graph, use)
        names.setdefault((use.key.parameter, owner), []).append(use)
    records: list[Operator] = []
    uses: list[tuple[Use, ...]] = []
    canonical = {id(t): n for n, t in model.named_parameters()}
    holders = _holders(model)
    for (parameter, owner), group in names.items():
        group = [replace(use, operator=len(records)) for use in group]
        by_node.update({use.node: use for use in group})
        name = graph.values[parameter].name
        shared = parameter in foreign or name in embeddings
        record = _record(name, owner, shared, modules, canonical, graph, group[0])
        stacked = owner is None and not shared and _is_stack(graph, holders.get(name, []), group)
        records.append(replace(record, stacked=graph.values[parameter].shape[0] if stacked else 0))
        uses.append(tuple(group))
    by_parameter: dict[int, tuple[Use, ...]] = {}
    for use in by_node.values():
        by_parameter[use.key.parameter] = (*by_parameter.get(use.key.parameter, ()), use)
    return Operators(
        records=tuple(records), uses=tuple(uses), by_node=by_node, by_parameter=by_parameter, foreign=foreign
    )


def _embedding_weights(model: nn.Module) -> set[str]:
    """Canonical names of the weights of embeddings, used in the traced call or not."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return {name for name, tensor in model.named_parameters() if id(tensor) in tables}


def _record(
    name: str,
    owner: str | None,
    shared: bool,
    modules: dict[str, nn.Module],
    canonical: dict[int, str],
    graph: Graph,
    use: Use,
) -> Operator:
    key = use.key
    path, _, leaf = name.rpartition(".")
    bias: str | None = None
    if owner is not None:
        tensor = getattr(modules[owner], "bias", None)
        bias = None if tensor is None else canonical.get(id(tensor))
    elif use.bias is not None and graph.values[use.bias].kind == "parameter":
        bias = graph.values[use.bias].name
    weight = graph.values[key.parameter]
    return Operator(
        name=owner if owner is not None else path if leaf == "weight" and path else name,
        weight=name,
        bias=bias,
        kind="conv" if key.conv else "linear",
        transposed=key.in_axis < key.out_axis,
        raw=owner is None or shared,
        in_channels=key.in_channels,
        out_channels=key.out_channels,
        kernel=weight.shape[2:] if key.conv else (),
        groups=key.groups,
        plain=owner is not None and is_plain(modules[owner]),
    )


def _holders(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Modules that hold each parameter, by its canonical name."""
    canonical = {id(t): n for n, t in model.named_parameters()}
    found: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            found.setdefault(canonical[id(tensor)], []).append(module)
    return found


def _is_stack(graph: Graph, holders: list[nn.Module], uses: list[Use]) -> bool:
    """Whether a parameter is matrices in a row that nothing but products reads, held by one module alone."""
    value = graph.values[uses[0].key.parameter]
    layouts = {(use.key.in_axis, use.key.out_axis) for use in uses}
    return (
        len(value.shape) == 3
        and value.name not in graph.pinned
        and len(layouts) == 1
        and not uses[0].key.conv
        and set(next(iter(layouts))) == {1, 2}
        and len(holders) == 1
        and not isinstance(holders[0], (nn.ParameterList, nn.ParameterDict))
    )


def is_plain(module: nn.Module) -> bool:
    """Whether the module runs the library's own forward with its own bias (or none)."""
    inner = getattr(type(module), "_conv_forward", None)
    return (
        type(module).forward in {*_PLAIN_FORWARDS, Conv1D.forward}
        and not {"forward", "_conv_forward"}.intersection(vars(module))
        and inner in (None, nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)
        and "bias" in module._parameters
    )


def _owner(modules: dict[str, nn.Module], graph: Graph, use: Use) -> str | None:
    """The module whose own forward ran the operation with its own whole weight, or None."""
    name = graph.nodes[use.node].module
    module = modules.get(name)
    parameter, key = graph.values[use.key.parameter], use.key
    if module is None or key.region != tuple((0, size) for size in parameter.shape):
        return None
    own = getattr(module, "weight", None)
    if own is None or own is not _lookup(modules, parameter.name) or not _reads_its_input(graph, module, use):
        return None
    stored_in_out = key.in_axis < key.out_axis
    if key.conv:
        return name if isinstance(module, _TRANSPOSED if key.transposed else _CONVOLUTIONS) else None
    if isinstance(module, nn.Linear):
        return name if not stored_in_out else None
    # GPT-2's Conv1D is a linear layer with a weight of shape (in, out); known by its shape attribute, not its class.
    return name if hasattr(module, "nf") and stored_in_out and len(parameter.shape) == 2 else None


def _reads_its_input(graph: Graph, module: nn.Module, use: Use) -> bool:
    """Whether dividing what the module is called with divides what its weight reads.

    True of the plain classes. A subclass may put its input through anything first; reshaping, casting and padding pass.
    """
    if type(module).forward in _PLAIN_FORWARDS:
        return True
    node: Node | None = graph.nodes[use.node]
    value, given = use.x, graph.nodes[use.node].given
    while value not in given:
        node = graph.producer(value)
        if node is None or graph.values[value].opaque or node.op not in _IDENTITIES | _RESHAPES | _PADS:
            return False
        if node.op == "constant_pad_nd" and node.arguments["value"] != 0:
            return False
        value = node.args[0].index
    from_end = len(graph.values[use.x].shape) - use.x_axis
    shape = graph.values[value].shape
    return len(shape) >= from_end and shape[-from_end] == use.key.in_channels


def _lookup(modules: dict[str, nn.Module], name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(modules.get(path), leaf, None)


def _foreign_readers(
    graph: Graph, by_node: dict[int, Use], resolve: WeightResolver, weights: set[int]
) -> dict[int, tuple[int, ...]]:
    """Readers of each weight that are neither on the way to an operator nor an operator using it as its weight."""
    foreign: dict[int, list[int]] = {}
    for value in graph.values:
        view = resolve(value.index)
        if view is None or view.parameter not in weights:
            continue
        for index in value.readers:
            node = graph.nodes[index]
            handed_on = node.op in CHAIN and any(o is not None and resolve(o) is not None for o in node.outputs)
            use = by_node.get(index)
            as_weight = use is not None and use.key.parameter == view.parameter and value.index not in (use.x, use.bias)
            if not handed_on and not as_weight:
                foreign.setdefault(view.parameter, []).append(index)
    return {parameter: tuple(nodes) for parameter, nodes in foreign.items()}


def _use(graph: Graph, node: Node, resolve: WeightResolver) -> Use | None:
    if node.op == "convolution":
        return _conv_use(graph, node, resolve)
    names = {
        "mm": ("self", "mat2", None),
        "bmm": ("self", "mat2", None),
        "addmm": ("mat1", "mat2", "self"),
        "baddbmm": ("batch1", "batch2", "self"),
        "mv": ("self", "vec", None),
    }.get(node.op)
    if names is None:
        return None
    a, b = node.value(names[0]), node.value(names[1])
    bias = None if names[2] is None else node.value(names[2])
    if a is None or b is None:
        return None
    rank = len(graph.values[node.out].shape)
    if node.op == "mv":
        view = resolve(a)
        if view is None:
            return None
        key = _linear_key(graph, view, None, 1, 0)
        return None if key is None else Use(
            node=node.index, key=key, x=b, x_axis=0, x_batch=None, out=node.out, out_axis=0, out_batch=None, bias=None
        )  # fmt: skip
    batch = 0 if rank == 3 else None
    for x, weight, in_dim, out_dim in ((a, b, rank - 2, rank - 1), (b, a, rank - 1, rank - 2)):
        view = resolve(weight)
        if view is None:
            continue
        key = _linear_key(graph, view, batch, in_dim, out_dim)
        if key is not None:
            stored = batch if key.batch_axis is not None else None
            return Use(
                node=node.index, key=key, x=x, x_axis=out_dim, x_batch=stored, out=node.out, out_axis=out_dim,
                out_batch=stored, bias=bias,
            )  # fmt: skip
    return None


def _linear_key(graph: Graph, view: WeightView, batch: int | None, in_dim: int, out_dim: int) -> WeightKey | None:
    in_axis, out_axis = view.dims[in_dim].axis, view.dims[out_dim].axis
    if in_axis is None or out_axis is None:
        return None
    rank = len(graph.values[view.parameter].shape)
    batch_axis = None if batch is None else view.dims[batch].axis
    return WeightKey(view.parameter, view.region(rank), batch_axis, in_axis, out_axis)


def _conv_use(graph: Graph, node: Node, resolve: WeightResolver) -> Use | None:
    x, weight = node.value("input"), node.value("weight")
    view = None if weight is None else resolve(weight)
    if x is None or view is None:
        return None
    shape = graph.values[view.parameter].shape
    # An axis of one may have been dropped and put back: the weight of a depthwise convolution often is.
    if len(view.dims) != len(shape) or any(
        dim != Dim(axis, 0, size) and (size, dim.length) != (1, 1)
        for axis, (dim, size) in enumerate(zip(view.dims, shape, strict=True))
    ):
        return None
    transposed = bool(node.arguments["transposed"])
    key = WeightKey(
        view.parameter, view.region(len(shape)), None, int(not transposed), int(transposed),
        groups=node.arguments["groups"], transposed=transposed, conv=True,
    )  # fmt: skip
    # x and out are (N, C, ...): aten::convolution is always called with a batch dimension.
    return Use(
        node=node.index, key=key, x=x, x_axis=1, x_batch=None, out=node.out, out_axis=1, out_batch=None,
        bias=node.value("bias"),
    )  # fmt: skip
