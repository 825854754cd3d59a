"""Rounded sums of convolutions in the layout ``qdq``, where what reads a sum rounds it anyway.

ONNX Runtime makes an integer convolution (QLinearConv) of Q/DQ around one where its sum, too, is rounded. Rounding commutes with what keeps
the order of numbers and makes no new ones, so that a sum may be rounded before a ReLU or a pooling of largest ones instead of after it,
and nothing changes; a second rounding by the same scale does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from alphasmith.search.exports.onnx._graph import GraphWriter
from alphasmith.search.exports.source import DeployedOperator

#: Operations that commute with rounding by one scale: they keep the order of numbers, and return some of those that they are given, or 0.
_COMMUTING = frozenset(("Relu", "MaxPool", "GlobalMaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"))
#: Largest magnitude that a bias may have as an integer [steps of the sum].
_MOST_STEPS = 2**30


def round_sum(writer: GraphWriter, convolution: ir.Node, operator: DeployedOperator) -> bool:
    """Round the sum of a convolution where all that reads it rounds it by one scale; its bias then is whole steps of the sum.

    Args:
        writer: Of the graph.
        convolution: On dequantized values, its bias float.
        operator: Whose it is.

    Returns:
        Whether it is rounded.
    """
    output = convolution.outputs[0]
    uses, grids = list(output.uses()), set(_grids(output))
    grid = grids.pop() if len(grids) == 1 else None
    # ONNX Runtime finds no integers where codes are of two types, or where two nodes read the sum.
    if grid is None or len(uses) > 1 or grid.kind != _zero(convolution.inputs[0]):
        return False
    bias = convolution.inputs[2] if len(convolution.inputs) > 2 else None
    if bias is not None:
        whole = _whole_bias(writer, convolution, bias, operator)
        if whole is None:
            return False
        convolution.replace_input_with(2, whole)
    after, name = uses[0].node, operator.name
    if after.op_type == "QuantizeLinear":
        return True
    step = writer.constant(f"{name}.output_scale", np.array(grid.step, np.float32))
    zero = writer.constant(f"{name}.output_zero_point", np.array(grid.zero, grid.kind))
    codes = writer.node(after, "QuantizeLinear", [output, step, zero], f"{name}.output_codes", dtype=zero.dtype)
    rounded = writer.node(after, "DequantizeLinear", [codes, step, zero], f"{name}.output")
    rounded.shape = output.shape
    after.replace_input_with(uses[0].idx, rounded)
    return True


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """What a QuantizeLinear rounds to."""

    step: float
    zero: int
    kind: np.dtype[Any]


def _grids(value: ir.Value) -> Iterator[_Grid | None]:
    """Of all that reads a value, behind what commutes with rounding; None: something takes it as it is."""
    if value.is_graph_output():
        yield None
    for use in value.uses():
        node = use.node
        if node.op_type == "QuantizeLinear":
            step, zero = _stored(node.inputs[1]), _stored(node.inputs[2])
            if step is None or zero is None or step.size > 1:
                yield None
            else:
                yield _Grid(step=float(step), zero=int(zero), kind=zero.dtype)
        elif node.op_type in _COMMUTING and use.idx == 0 and not any(more.uses() for more in node.outputs[1:]):
            yield from _grids(node.outputs[0])
        else:
            yield None


def _zero(value: ir.Value | None) -> np.dtype[Any] | None:
    """Type of the codes that a value was dequantized from."""
    node = None if value is None else value.producer()
    zero = None if node is None or node.op_type != "DequantizeLinear" else _stored(node.inputs[2])
    return None if zero is None else zero.dtype


def _stored(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _whole_bias(writer: GraphWriter, before: ir.Node, bias: ir.Value, operator: DeployedOperator) -> ir.Value | None:
    """A bias in whole steps of the sum, as ONNX Runtime wants it; None: it does not fit 32 bits."""
    stored, inputs = _stored(bias), operator.input_scale
    if stored is None or inputs is None:
        return None
    scale = operator.scale.double() * inputs.double()
    steps = scale.reshape(-1 if scale.dim() else ()).float().numpy()
    whole = np.rint(stored.astype(np.float64) / steps)
    if not np.all(np.abs(whole) < _MOST_STEPS):
        return None
    name = operator.name
    codes = writer.constant(f"{name}.bias_codes", whole.astype(np.int32))
    step = writer.constant(f"{name}.bias_scale", np.broadcast_to(steps, whole.shape))
    zero = writer.constant(f"{name}.bias_zero_point", np.zeros(whole.shape, np.int32))
    return writer.node(before, "DequantizeLinear", [codes, step, zero], f"{name}.bias", axis=0)
