"""Rules for what an operation does to scales: one per aten operation, keyed by its name.

A rule makes the labels around its node consistent (see ``propagation``) or raises ``Blocked``. It is called again
whenever a label around the node grows, and must hold for any batch, not only for the traced one. An operation without
a rule blocks every scale that touches it. Source: trap T6 (what folds).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from alphasmith.objectives.sites._propagation import NONE, ZEROS, Alternative, Blocked, Role, Rule, Solver
from alphasmith.objectives.sites._weights import Use, WeightKey
from alphasmith.objectives.sites.graph import Node, Ref

#: Pure data movement of one tensor: elements are copied, dropped, repeated, reordered or padded with zeros.
MOVEMENT = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "slice", "select", "split",
    "split_with_sizes", "unbind", "chunk", "squeeze", "unsqueeze", "roll", "flip", "index", "index_select", "gather", "repeat",
    "unfold", "im2col", "pixel_unshuffle", "pixel_shuffle", "channel_shuffle", "tril", "triu", "as_strided", "constant_pad_nd", "diagonal",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
})  # fmt: skip
#: Movement that keeps every element in its place.
IDENTITY = frozenset({"clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh", "positive"})
#: f(k x) = k f(x) for every k > 0, element by element.
_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "neg", "abs"})
#: Readers that look at the shape, or at what no positive scale changes; a first output made of zeros can shrink.
_SHAPE_ONLY = frozenset({
    "empty_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_ones", "new_full", "sign", "isnan",
    "isinf", "sym_size", "sym_numel", "sym_stride",
})  # fmt: skip
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})
#: Per-plane linear or max operations: all positions of one (sample, channel) share a label. Value: spatial dimensions.
_PLANES = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3,
    "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3,
    "mkldnn_adaptive_avg_pool2d": 2, "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_nearest3d": 3,
    "upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3,
}  # fmt: skip
_BATCH_NORMS = frozenset({
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update",
})  # fmt: skip
NORMS = _BATCH_NORMS | {"native_layer_norm", "native_group_norm", "_fused_rms_norm"}
_ATTENTION = frozenset({
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math",
})  # fmt: skip


# -- movement and elementwise ------------------------------------------------------------------------------------------


def _movement(solver: Solver, node: Node) -> None:
    source = node.args[0].index
    if not _touched(solver, node):
        return
    if node.op == "constant_pad_nd" and node.arguments["value"] != 0:
        raise Blocked(f"padded with a constant in {node.module or 'the model'}")
    if node.op == "view" and "dtype" in node.arguments:
        raise Blocked("reinterpreted as another dtype")
    if node.op == "as_strided" and not solver.graph.values[source].packed:
        raise Blocked(f"read by {solver.context(node)}")
    for out, index in zip(node.outputs, solver.run_on_index(node, [source]), strict=True):
        if out is not None:
            solver.link(out, source, index, carry_offset=True)
    _unpick(solver, node, source)


def _unpick(solver: Solver, node: Node, source: int) -> None:
    """Label what another batch may pick where this one picked something else.

    Entries that the data chose must be interchangeable, so all along the axis share a label. A stored tensor is often longer
    than what one batch takes of it (positions): its other rows follow those that were taken, if those agree.
    """
    if not solver.labelled(source):
        return
    value = solver.graph.values[source]
    axes, chosen = _picked_axes(solver, node, len(value.shape))
    by_data = any(solver.graph.values[v].from_input for v in chosen)
    if not axes or not (by_data or (value.from_parameter and not value.from_input)):
        return
    labels = solver.labels(source)
    if not by_data and not bool(((labels < 0) | (labels == labels.amax(axes, keepdim=True))).all()):
        return
    kept = [1 if axis in axes else size for axis, size in enumerate(value.shape)]
    index = torch.arange(math.prod(kept)).reshape(kept).expand(value.shape)
    vector = solver.vector(source, index, torch.full((math.prod(kept),), NONE, dtype=torch.int32))
    solver.spread(source, index, vector, solver.offset(source))


def _picked_axes(solver: Solver, node: Node, rank: int) -> tuple[tuple[int, ...], list[int]]:
    """Axes of its first argument along which a movement takes some entries, and the tensors that say which."""
    if node.op in ("slice", "select"):
        return (node.arguments["dim"] % rank,), []
    if node.op in ("index_select", "gather"):
        return (node.arguments["dim"] % rank,), [node.arguments["index"].index]
    if node.op != "index":
        return (), []
    axes: list[int] = []
    chosen: list[int] = []
    axis = 0
    for entry in node.arguments["indices"]:
        if not isinstance(entry, Ref):
            axis += 1
            continue
        data = solver.graph.values[entry.index].data
        # a mask covers as many axes as it has
        width = (
            len(solver.graph.values[entry.index].shape)
            if data is not None and data.dtype in (torch.bool, torch.uint8)
            else 1
        )
        axes.extend(range(axis, axis + width))
        chosen.append(entry.index)
        axis += width
    return tuple(axes), chosen


def _identity(solver: Solver, node: Node) -> None:
    solver.link(node.out, node.args[0].index, carry_offset=True)


def _homogeneous(solver: Solver, node: Node) -> None:
    solver.link(node.out, node.args[0].index)


def _leaky(solver: Solver, node: Node) -> None:
    """``prelu`` and ``rrelu`` as they run in evaluation: negative values times a slope, which no scale of the input changes."""
    if node.arguments.get("training"):
        raise Blocked(f"made by {solver.context(node)}")
    slope = node.value("weight")
    if solver.labelled(slope):
        raise Blocked(f"read as the slopes of {solver.context(node)}")
    solver.link(node.out, node.args[0].index)


def _threshold(solver: Solver, node: Node) -> None:
    if node.arguments["threshold"] != 0 or node.arguments["value"] != 0:
        raise Blocked(f"compared with a constant in {node.module or 'the model'}")
    solver.link(node.out, node.args[0].index)


def _joined(solver: Solver, node: Node) -> None:
    """``cat`` and ``stack``: every part is linked to its place in the output."""
    sources = list(dict.fromkeys(ref.index for ref in node.args[0]))
    (index,) = solver.run_on_index(node, sources)
    start = 0
    for source in sources:
        size = solver.graph.values[source].numel
        if size and not solver.is_zero(source):
            _link_part(solver, node.out, source, index, start, size)
        start += size


def _link_part(solver: Solver, out: int, source: int, index: Tensor, start: int, size: int) -> None:
    """Link the elements of ``out`` that come from ``source``; the others keep their labels."""
    mine = (index >= start) & (index < start + size)
    labels = solver.labels(out)
    if not (solver.labelled(out) or solver.labelled(source)):
        return
    if solver.offset(out) or solver.offset(source):
        raise Blocked("a constant is added to it")
    old = solver.labels(source)
    found = solver.collapse(labels[mine], index[mine] - start, size).reshape(old.shape)
    merged = solver.merge(old, found)
    solver.put(source, merged)
    grown = torch.full(index.shape, NONE, dtype=torch.int32)
    grown[mine] = merged.reshape(-1)[index[mine] - start]
    solver.put(out, grown)


def _clamp(solver: Solver, node: Node) -> None:
    low, high = node.arguments.get("min"), node.arguments.get("max")
    if low not in (None, 0) or high not in (None, 0):
        raise Blocked(f"{solver.context(node)} is not positively homogeneous")
    _homogeneous(solver, node)


def _masked_fill(solver: Solver, node: Node) -> None:
    value = node.arguments["value"]
    if isinstance(value, Ref) or not (value == 0 or math.isinf(value)):
        raise Blocked(f"filled with a constant in {node.module or 'the model'}")
    solver.link_broadcast(node.out, node.args[0].index)


def _where(solver: Solver, node: Node) -> None:
    for name in ("self", "other"):
        operand = node.value(name)
        if operand is None:
            raise Blocked(f"mixed with a constant in {node.module or 'the model'}")
        solver.link_broadcast(node.out, operand)


def _sum_of_two(solver: Solver, node: Node) -> None:
    """``add`` and ``sub``: both terms shrink alike. A constant added to a parameter is a (1 + w) norm."""
    self_value, other = node.value("self"), node.value("other")
    if self_value is None or other is None:
        _add_constant(solver, node, self_value)
        return
    solver.link_broadcast(node.out, self_value)
    solver.link_broadcast(node.out, other)


def _add_constant(solver: Solver, node: Node, term: int | None) -> None:
    constant = node.arguments["other"]
    if term is None or isinstance(constant, Ref):
        raise Blocked(f"a constant is added in {node.module or 'the model'}")
    step = float(constant) * float(node.arguments.get("alpha", 1)) * (1 if node.op == "add" else -1)
    if not step:
        solver.link(node.out, term)
        return
    value = solver.graph.values[term]
    if value.from_input or not value.from_parameter:
        raise Blocked(f"a constant is added in {node.module or 'the model'}")
    merged = solver.merge(solver.labels(node.out), solver.labels(term))
    if solver.labelled(node.out):
        solver.put(term, merged, solver.offset(node.out) + step)
    if solver.labelled(term):
        solver.put(node.out, merged, solver.offset(term) - step)


def _product(solver: Solver, node: Node) -> list[Alternative] | None:
    """Exactly one factor shrinks with the output. Which one is a choice when only the output is known to."""
    a, b = node.value("self"), node.value("other")
    if a is None or b is None:
        factor = a if a is not None else b
        if factor is not None:
            solver.link_broadcast(node.out, factor)
        return None
    scaled = [value for value in (a, b) if solver.labelled(value)]
    if len(scaled) > 1 or (scaled and a == b):
        raise Blocked(f"both factors of a product in {node.module or 'the model'} would be scaled")
    if scaled:
        solver.link_broadcast(node.out, scaled[0])
        return None
    if not solver.labelled(node.out):
        return None
    if a == b:
        raise Blocked(f"made by {solver.context(node)}")
    return _factors(solver, node.out, (a, b))


def _factors(solver: Solver, out: int, factors: tuple[int, ...]) -> list[Alternative]:
    """Candidates in the order to try: parameters that vary over the channels, then data, then what would tie channels."""
    distinct = int(torch.unique(solver.labels(out).clamp(min=NONE)).numel())

    def rank(value: int) -> int:
        record = solver.graph.values[value]
        if record.numel < distinct - 1:
            return 2
        return 0 if record.from_parameter and not record.from_input else 1

    usable = [v for v in factors if solver.graph.values[v].floating and solver.graph.values[v].kind != "constant"]
    return [Alternative(v, solver.broadcast_index(out, v)) for v in sorted(usable, key=rank)]


def _quotient(solver: Solver, node: Node) -> None:
    divisor = node.value("other")
    if solver.labelled(divisor):
        raise Blocked(f"it is a divisor in {node.module or 'the model'}")
    if node.value("self") is None or node.arguments.get("rounding_mode") is not None:
        raise Blocked(f"made by {solver.context(node)}")
    solver.link_broadcast(node.out, node.args[0].index)


def _copy(solver: Solver, node: Node) -> None:
    source = node.value("src")
    if source is not None:
        solver.link_broadcast(node.out, source)


def _reduction(solver: Solver, node: Node) -> None:
    source = node.args[0].index
    if not _touched(solver, node):
        return
    shape = solver.graph.values[source].shape
    dims = node.arguments.get("dim")
    chosen = range(len(shape)) if dims is None or dims == [] else [d % len(shape) for d in dims]
    kept = [1 if d in chosen else n for d, n in enumerate(shape)]
    index = torch.arange(math.prod(kept)).reshape(kept).expand(shape)
    solver.link(source, node.out, index)


def _planes(solver: Solver, node: Node) -> None:
    source = node.args[0].index
    if not _touched(solver, node):
        return
    spatial = _PLANES[node.op]
    shape, target = solver.graph.values[source].shape, solver.graph.values[node.out].shape
    planes = shape[:-spatial]

    def numbered(full: tuple[int, ...]) -> Tensor:
        return torch.arange(math.prod(planes)).reshape(planes + (1,) * spatial).expand(full)

    known = torch.full((math.prod(planes),), NONE, dtype=torch.int32)
    vector = solver.vector(node.out, numbered(target), solver.vector(source, numbered(shape), known))
    solver.spread(source, numbered(shape), vector)
    solver.spread(node.out, numbered(target), vector)


def _zeros(solver: Solver, node: Node) -> None:
    """A tensor of zeros shrinks without being touched; what it was shaped after is only looked at."""


def _shape_only(solver: Solver, node: Node) -> None:
    if solver.labelled(node.out):
        raise Blocked(f"made by {solver.context(node)}")


def _full(solver: Solver, node: Node) -> None:
    filled_with = node.value("value")
    if solver.labelled(filled_with):
        raise Blocked(f"read by {solver.context(node)}")
    if not solver.is_zero(node.out):
        _shape_only(solver, node)


# -- normalizations and tables -------------------------------------------------------------------------------------------


def _norm(solver: Solver, node: Node) -> None:
    """A normalization cancels what comes in and shrinks what goes out through its weight and bias."""
    weight, bias = node.value("weight"), node.value("bias")
    if any(solver.labelled(v) for v in node.inputs if v not in (weight, bias)):
        raise Blocked(f"read by {solver.context(node)}")
    if not any(solver.labelled(v) for v in (node.out, weight, bias)):
        return
    if weight is None:
        raise Blocked(f"{solver.context(node)} has no weight to absorb the scale")
    shape = solver.graph.values[node.out].shape
    channels = math.prod(solver.graph.values[weight].shape)
    index = torch.arange(channels)
    if node.op in _BATCH_NORMS or node.op == "native_group_norm":
        index = index.reshape((channels,) + (1,) * (len(shape) - 2))
    else:
        index = index.reshape(solver.graph.values[weight].shape)
    index = index.expand(shape)
    solver.link(node.out, weight, index)
    if bias is not None:
        solver.link(node.out, bias, index)


def _embedding(solver: Solver, node: Node) -> None:
    table = node.value("weight")
    if table is None or not (solver.labelled(table) or solver.labelled(node.out)):
        return
    rows, width = solver.graph.values[table].shape
    channel = torch.arange(width)
    known = torch.full((width,), NONE, dtype=torch.int32)
    inside = channel.expand(rows, width)
    outside = channel.expand(solver.graph.values[node.out].shape)
    vector = solver.vector(node.out, outside, solver.vector(table, inside, known))
    solver.spread(table, inside, vector)
    solver.spread(node.out, outside, vector)


# -- products of matrices --------------------------------------------------------------------------------------------------


def _matrix_product(solver: Solver, node: Node) -> list[Alternative] | None:
    use = solver.operators.by_node.get(node.index)
    if use is not None:
        _operator(solver, use)
        return None
    names = {
        "addmm": ("mat1", "mat2", "self"),
        "baddbmm": ("batch1", "batch2", "self"),
        "mv": ("self", "vec", ""),
        "convolution": ("input", "weight", "bias"),
    }.get(node.op, ("self", "mat2", ""))
    a, b, added = (node.value(name) for name in names)
    if a is None or b is None:
        raise Blocked(f"read by {solver.context(node)}")
    if node.op in ("convolution", "mv"):
        if _touched(solver, node):
            raise Blocked(f"{solver.context(node)} has a weight that is computed from other tensors")
        return None
    choice = _activation_product(solver, node, a, b)
    if added is not None and choice is None:
        solver.link_broadcast(node.out, added)
    return choice


def _operator(solver: Solver, use: Use) -> None:
    """Scaled inputs are undone by the weight's input channels; scaled outputs come from its output channels."""
    if solver.labelled(use.x) or bool((solver.weight(use.key, "in") >= 0).any()):
        solver.require_member(use)
        _share(solver, use.key, "in", use.x, use.x_axis, use.x_batch)
    if solver.labelled(use.out) or bool((solver.weight(use.key, "out") >= 0).any()):
        _share(solver, use.key, "out", use.out, use.out_axis, use.out_batch)
    node = solver.graph.nodes[use.node]
    if any(solver.labelled(v) for v in node.inputs if v not in (use.x, use.bias)):
        raise Blocked(f"read as the weight of {solver.context(node)}")
    if use.bias is None:
        return
    if use.key.conv:
        solver.link(use.out, use.bias, channel_index(solver.graph.values[use.out].shape, use.out_axis, None))
    else:
        solver.link_broadcast(use.out, use.bias)


def _share(solver: Solver, key: WeightKey, role: Role, value: int, axis: int, batch: int | None) -> None:
    """One label per channel, for all rows of the value and for the weight."""
    if solver.offset(value):
        raise Blocked("a constant is added to it")
    index = channel_index(solver.graph.values[value].shape, axis, batch)
    vector = solver.vector(value, index, solver.weight(key, role))
    solver.put_weight(key, role, vector)
    solver.spread(value, index, vector)


def channel_index(shape: tuple[int, ...], axis: int, batch: int | None) -> Tensor:
    """Channel number of every element: position along ``axis``, plus that along ``batch`` times the axis' size."""
    index = torch.arange(shape[axis]).reshape([-1 if d == axis else 1 for d in range(len(shape))])
    if batch is not None:
        step = torch.arange(shape[batch]).reshape([-1 if d == batch else 1 for d in range(len(shape))])
        index = index + step * shape[axis]
    return index.expand(shape)


def _activation_product(solver: Solver, node: Node, a: int, b: int) -> list[Alternative] | None:
    """Rows of A scale rows of the output, columns of B its columns; never both (attention: P stays, V shrinks)."""
    scaled = [value for value in (a, b) if solver.labelled(value)]
    if len(scaled) > 1 or (scaled and a == b):
        raise Blocked(f"both factors of {solver.context(node)} would be scaled")
    shape = solver.graph.values[node.out].shape
    rows, columns = shape[-2], shape[-1]
    lead = torch.arange(math.prod(shape[:-2])).reshape(*shape[:-2], 1, 1)
    by_row = lead * rows + torch.arange(rows).reshape(-1, 1)
    by_column = lead * columns + torch.arange(columns)
    numbered = {a: (by_row, rows), b: (by_column, columns)}
    if scaled:
        _share_lines(solver, node.out, scaled[0], *numbered[scaled[0]])
        return None
    if not solver.labelled(node.out):
        return None
    labels = solver.labels(node.out)
    first = b if bool((labels == labels[..., :1, :]).all()) else a
    # An alternative maps the output to one line of the factor; sharing that line does the rest on the next visit.
    alternatives = []
    for value in (first, a if first == b else b):
        factor = solver.graph.values[value].shape
        if value == b:
            index = lead * factor[-2] * factor[-1] + torch.arange(columns)
        else:
            index = lead * factor[-2] * factor[-1] + torch.arange(rows).reshape(-1, 1) * factor[-1]
        if solver.graph.values[value].floating and factor[-1] and factor[-2]:
            alternatives.append(Alternative(value, index.expand(shape)))
    return alternatives


def _share_lines(solver: Solver, out: int, factor: int, index: Tensor, lines: int) -> None:
    shape, target = solver.graph.values[factor].shape, solver.graph.values[out].shape
    known = torch.full((math.prod(shape[:-2]) * lines,), NONE, dtype=torch.int32)
    inside, outside = index.expand(shape), index.expand(target)
    vector = solver.vector(out, outside, solver.vector(factor, inside, known))
    solver.spread(factor, inside, vector)
    solver.spread(out, outside, vector)


def _attention(solver: Solver, node: Node) -> None:
    """Fused attention: output channel d of head h is a mean of value channel d of the head that h shares."""
    value = node.value("value")
    if value is None or not _touched(solver, node):
        return
    others = [ref.index for name, ref in node.arguments.items() if isinstance(ref, Ref) and name != "value"]
    if value in others or any(solver.labelled(v) for v in others):
        raise Blocked(f"read by the attention scores of {node.module or 'the model'}")
    shape, target = solver.graph.values[value].shape, solver.graph.values[node.out].shape
    heads = shape[-3]
    if target[-3] % heads or target[-1] != shape[-1]:
        raise Blocked(f"made by {solver.context(node)}")
    vectors = torch.arange(math.prod(shape[:-2]) * shape[-1]).reshape(*shape[:-2], 1, shape[-1])
    inside = vectors.expand(shape)
    outside = vectors.repeat_interleave(target[-3] // heads, dim=-3).expand(target)
    known = torch.full((vectors.numel(),), NONE, dtype=torch.int32)
    vector = solver.vector(node.out, outside, solver.vector(value, inside, known))
    solver.spread(value, inside, vector)
    solver.spread(node.out, outside, vector)


def _touched(solver: Solver, node: Node) -> bool:
    return any(solver.labelled(v) for v in (*node.inputs, *node.outputs))


_Plain = Callable[[Solver, Node], None]


def _table() -> dict[str, Rule]:
    def checked(rule: _Plain) -> Rule:
        def run(solver: Solver, node: Node) -> None:
            rule(solver, node)

        return run

    table: dict[str, Rule] = {}
    groups: list[tuple[frozenset[str] | dict[str, int], _Plain]] = [
        (MOVEMENT, _movement),
        (IDENTITY, _identity),
        (_HOMOGENEOUS, _homogeneous),
        (_SHAPE_ONLY, _shape_only),
        (ZEROS, _zeros),
        (_REDUCTIONS, _reduction),
        (_PLANES, _planes),
        (NORMS, _norm),
        (_ATTENTION, _attention),
    ]
    for names, rule in groups:
        table.update(dict.fromkeys(names, checked(rule)))
    single: dict[str, _Plain] = {
        "cat": _joined, "stack": _joined, "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp,
        "masked_fill": _masked_fill, "where": _where, "add": _sum_of_two, "sub": _sum_of_two, "div": _quotient,
        "copy": _copy, "full": _full, "full_like": _full, "new_full": _full, "scalar_tensor": _full, "fill": _full,
        "embedding": _embedding, "_prelu_kernel": _leaky, "rrelu_with_noise": _leaky, "threshold": _threshold,
    }  # fmt: skip
    table.update({name: checked(rule) for name, rule in single.items()})
    table["mul"] = _product
    for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "convolution"):
        table[name] = _matrix_product
    return table


#: Rule of every operation that scales can pass; all others block.
RULES: dict[str, Rule] = _table()
