"""Integer convolutions as nodes of a graph.

Where windows lie side by side a convolution is a linear product of a rearranged input: the patch layer of a vision transformer, and
kernels of size 1. ONNX Runtime multiplies the integers of a product faster than those of a convolution, and finds no integers in Q/DQ around
a convolution whose sum stays float. With many channels the product is so much faster that windows which overlap are copied out for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from alphasmith.objectives.literals import OnnxLayout
from alphasmith.search.exports.onnx._codes import OperatorConstants
from alphasmith.search.exports.onnx._graph import GraphWriter
from alphasmith.search.exports.onnx._products import Codes
from alphasmith.search.exports.source import DeployedOperator

#: Fewest channels of an input whose windows are copied out. With fewer, copying takes longer than the product saves (`benchmarks.convolutions`).
#: Unsigned products gain less; qdq would copy float values.
COPIED: Mapping[OnnxLayout, int] = {"ort-s8": 32, "ort-u8": 256}
#: Of a slice: up to the end of the axis.
_END = np.iinfo(np.int64).max


class Convolutions:
    """Writes convolutions.

    Args:
        writer: Of the graph.
        layout: Of the export.
    """

    def __init__(self, writer: GraphWriter, layout: OnnxLayout) -> None:
        self._writer = writer
        self._layout = layout

    def convolution(
        self, before: ir.Node, x: Codes, bias: ir.Value | None, operator: DeployedOperator, constants: OperatorConstants
    ) -> ir.Value:
        """The convolution of a rounded input and the weight, as float32; in ``qdq`` on a bias as it is.

        Args:
            before: Float convolution that it replaces; its attributes are taken over.
            x: (B, C, *space).
            bias: (O,) float32 that is added, or None.
            operator: Whose it is.
            constants: Its initializers.
        """
        taken: Mapping[str, Any] = {name: attribute.value for name, attribute in before.attributes.items()}
        node, name = self._writer.node, operator.name
        weight = constants.weight()
        if self._layout == "qdq":
            values = node(
                before, "DequantizeLinear", [x.codes, constants.input_scale(), constants.input_zero()], f"{name}.input"
            )
            quantized = [weight, constants.weight_scale(), constants.weight_zero(per_channel=True)]
            dense = node(before, "DequantizeLinear", quantized, f"{name}.weight", axis=0)
            inputs = [values, dense, *([] if bias is None else [bias])]
            return node(before, "Conv", inputs, f"{name}.convolution", **taken)
        zero = constants.weight_zero(per_channel=False)
        codes = [x.codes, weight, x.zero, zero]
        total = node(before, "ConvInteger", codes, f"{name}.integers", dtype=ir.DataType.INT32, **taken)
        value = node(before, "Cast", [total], f"{name}.counts", to=int(ir.DataType.FLOAT))
        spaces = len(before.inputs[1].shape or ()) - 2
        # Static: a product of two constants, which runtimes compute when they load the model.
        step = node(before, "Mul", [constants.weight_scale(axes=spaces), x.scale], f"{name}.step")
        value = node(before, "Mul", [value, step], f"{name}.product")
        if bias is None:
            return value
        return node(before, "Add", [value, self._bias(name, bias, spaces)], f"{name}.sum")

    def _bias(self, name: str, bias: ir.Value, spaces: int) -> ir.Value:
        stored = bias.const_value
        if stored is None:
            raise ValueError(f"the bias of {name} is computed")
        return self._aligned(f"{name}.bias_row", stored.numpy(), spaces)

    def _aligned(self, name: str, values: Any, spaces: int) -> ir.Value:
        """Numbers of output channels, (O,) or (), as they meet (B, O, *space)."""
        shape: Sequence[int] = (-1, *[1] * spaces) if np.ndim(values) else ()
        return self._writer.constant(name, np.asarray(values, np.float32).reshape(shape))


def padding_of(node: ir.Node) -> ir.Node | None:
    """What puts numbers around the input of a convolution and commutes with its rounding: zeros, or some of its own numbers.

    Args:
        node: The convolution.
    """
    source = node.inputs[0]
    padding = None if source is None else source.producer()
    if padding is None or padding.op_type != "Pad":
        return None
    mode = padding.attributes.get("mode")
    value = padding.inputs[2] if len(padding.inputs) > 2 else None
    if (mode is None or mode.as_string() == "constant") and value is not None:
        stored = value.const_value
        return None if stored is None or stored.numpy().any() else padding
    return padding


def padded(writer: GraphWriter, before: ir.Node, x: Codes, padding: ir.Node, name: str) -> Codes:
    """The codes of an input with numbers around it.

    Args:
        writer: Of the graph.
        before: The convolution.
        x: Codes of the input.
        padding: See :func:`padding_of`.
        name: Of the node.
    """
    sizes, axes = padding.inputs[1], padding.inputs[3] if len(padding.inputs) > 3 else None
    mode = padding.attributes.get("mode")
    inputs = [x.codes, sizes, x.zero, *([] if axes is None else [axes])]
    told = {"mode": "constant" if mode is None else mode.as_string()}
    return replace(x, codes=writer.node(before, "Pad", inputs, f"{name}.padded_codes", dtype=x.codes.dtype, **told))


def side_by_side(node: ir.Node, kernel: Sequence[int]) -> bool:
    """Whether no number of an input of a convolution is read by two windows, and none is left out but at the end.

    Args:
        node: The convolution.
        kernel: Shape of its weight (O, C, *kernel).
    """
    window = list(kernel[2:])
    return (
        _one_group(node)
        and not any(_integers(node, "pads", [0]))
        and _integers(node, "strides", [1] * len(window)) == window
        and set(_integers(node, "dilations", [1])) == {1}
    )


def worth_copying(node: ir.Node, kernel: Sequence[int], layout: OnnxLayout) -> bool:
    """Whether windows that overlap are copied out for a product of integers.

    Args:
        node: The convolution.
        kernel: Shape of its weight (O, C, *kernel).
        layout: Of the export.
    """
    return layout in COPIED and kernel[1] >= COPIED[layout] and _one_group(node)


def _one_group(node: ir.Node) -> bool:
    """Whether every output channel reads every input channel, between borders that are given as numbers."""
    attributes = node.attributes
    computed = "auto_pad" in attributes and attributes["auto_pad"].as_string() not in ("NOTSET", "VALID")
    return not computed and ("group" not in attributes or attributes["group"].as_int() == 1)


def windows(writer: GraphWriter, before: ir.Node, x: ir.Value, kernel: Sequence[int], name: str) -> ir.Value:
    """The numbers of every window as a row, in the order of the weight's.

    Args:
        writer: Of the graph.
        before: The convolution, see :func:`side_by_side`.
        x: (B, C, *space), codes or values of its input.
        kernel: Shape of its weight.
        name: Of the nodes.

    Returns:
        (B, *windows, C * prod(kernel)).
    """
    channels, window = kernel[1], kernel[2:]
    spaces, dtype = len(window), x.dtype
    if all(size == 1 for size in window):
        return writer.node(before, "Transpose", [x], f"{name}_rows", dtype=dtype, perm=[0, *range(2, spaces + 2), 1])
    x, sizes = _whole_windows(writer, before, x, kernel, name)
    split = writer.node(before, "Reshape", [x, sizes], f"{name}_split", dtype=dtype)
    order = [0, *range(2, 2 * spaces + 2, 2), 1, *range(3, 2 * spaces + 2, 2)]
    turned = writer.node(before, "Transpose", [split], f"{name}_turned", dtype=dtype, perm=order)
    rows = _whole_numbers(writer, f"{name}_row_sizes", [0] * (spaces + 1) + [channels * math.prod(window)])
    return writer.node(before, "Reshape", [turned, rows], f"{name}_rows", dtype=dtype)


def copied_windows(writer: GraphWriter, before: ir.Node, x: Codes, kernel: Sequence[int], name: str) -> Codes:
    """The codes of every window as a row, position by position, of each all channels.

    Args:
        writer: Of the graph.
        before: The convolution, see :func:`worth_copying`.
        x: (B, C, *space), codes of its input.
        kernel: Shape of its weight.
        name: Of the nodes.

    Returns:
        (B, *windows, prod(kernel) * C).
    """
    window, dtype = kernel[2:], x.codes.dtype
    spaces = len(window)
    strides, dilations = _integers(before, "strides", [1] * spaces), _integers(before, "dilations", [1] * spaces)
    # Channels last: what is copied of a position lies together.
    last = [0, *range(2, spaces + 2), 1]
    codes = writer.node(before, "Transpose", [x.codes], f"{name}_channels_last", dtype=dtype, perm=last)
    around = _integers(before, "pads", [0] * 2 * spaces)
    if any(around):
        sizes = _whole_numbers(writer, f"{name}_around", [0, *around[:spaces], 0, 0, *around[spaces:], 0])
        codes = writer.node(before, "Pad", [codes, sizes, x.zero], f"{name}_padded", dtype=dtype, mode="constant")
    axes = _whole_numbers(writer, f"{name}_axes", range(1, spaces + 1))
    steps = _whole_numbers(writer, f"{name}_strides", strides)
    copies = []
    for position in itertools.product(*(range(size) for size in window)):
        starts = [at * step for at, step in zip(position, dilations, strict=True)]
        # From the end, whatever the size: where the last window has this position.
        left = [(size - 1) * step - start for size, step, start in zip(window, dilations, starts, strict=True)]
        label = "_".join(map(str, position))
        first = _whole_numbers(writer, f"{name}_first_{label}", starts)
        end = _whole_numbers(writer, f"{name}_end_{label}", [-more if more else _END for more in left])
        copies.append(writer.node(before, "Slice", [codes, first, end, axes, steps], f"{name}_{label}", dtype=dtype))
    return replace(x, codes=writer.node(before, "Concat", copies, f"{name}_rows", dtype=dtype, axis=-1))


def _whole_windows(
    writer: GraphWriter, before: ir.Node, x: ir.Value, kernel: Sequence[int], name: str
) -> tuple[ir.Value, ir.Value]:
    """An input without what is too little for a window at its ends, and the sizes that set its windows apart: (B, C, n, k, n, k)."""
    channels, window = kernel[1], list(kernel[2:])
    source = before.inputs[0]
    space = list((source.shape if source is not None else None) or ())[2:]
    axes = _whole_numbers(writer, f"{name}_axes", range(2, len(window) + 2))
    starts = _whole_numbers(writer, f"{name}_starts", [0] * len(window))
    known = [size for size in space if isinstance(size, int)]
    if len(known) == len(window):
        counts = [size // step for size, step in zip(known, window, strict=True)]
        used = [count * step for count, step in zip(counts, window, strict=True)]
        apart = [0, channels, *(n for pair in zip(counts, window, strict=True) for n in pair)]
        sizes = _whole_numbers(writer, f"{name}_sizes", apart)
        if used == known:
            return x, sizes
        ends = _whole_numbers(writer, f"{name}_ends", used)
    else:
        node, whole = writer.node, ir.DataType.INT64
        steps = _whole_numbers(writer, f"{name}_window", window)
        shape = node(before, "Shape", [x], f"{name}_shape", dtype=whole, start=2)
        count = node(before, "Div", [shape, steps], f"{name}_windows", dtype=whole)
        ends = node(before, "Mul", [count, steps], f"{name}_ends", dtype=whole)
        last = _whole_numbers(writer, f"{name}_last", [-1])
        column = node(before, "Unsqueeze", [count, last], f"{name}_counts", dtype=whole)
        beside = _whole_numbers(writer, f"{name}_window_column", [[step] for step in window])
        pairs = node(before, "Concat", [column, beside], f"{name}_pairs", dtype=whole, axis=1)
        flat = node(before, "Reshape", [pairs, last], f"{name}_flat", dtype=whole)
        first = _whole_numbers(writer, f"{name}_first", [0, channels])
        sizes = node(before, "Concat", [first, flat], f"{name}_sizes", dtype=whole, axis=0)
    return writer.node(before, "Slice", [x, starts, ends, axes], f"{name}_whole", dtype=x.dtype), sizes


def channels_first(writer: GraphWriter, before: ir.Node, product: ir.Value, spaces: int, name: str) -> ir.Value:
    """A product of windows (B, *windows, O) as the convolution returns it: (B, O, *windows).

    Args:
        writer: Of the graph.
        before: The convolution.
        product: Of its windows and its weight.
        spaces: Axes of a window.
        name: Of the node.
    """
    return writer.node(
        before, "Transpose", [product], f"{name}.convolution", perm=[0, spaces + 1, *range(1, spaces + 1)]
    )


def _whole_numbers(writer: GraphWriter, name: str, numbers: Iterable[int] | Sequence[Sequence[int]]) -> ir.Value:
    return writer.constant(name, np.array(list(numbers), np.int64))


def _integers(node: ir.Node, attribute: str, absent: Sequence[int]) -> list[int]:
    found = node.attributes.get(attribute)
    return list(absent) if found is None else list(found.as_ints())
