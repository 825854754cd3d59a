"""Integer products of linear operators as nodes of a graph.

``ort-u8``: codes of both operands are unsigned, with 128 for 0, because kernels of ONNX Runtime for unsigned codes are exact on
every x86 processor. ``ort-s8``: those of weights are signed, which processors with VNNI multiply more than twice as fast. ``qdq``:
QuantizeLinear and DequantizeLinear of standard ONNX around a float product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from alphasmith.objectives.literals import OnnxLayout
from alphasmith.objectives.quantization.quantizers import BYTE_MIDDLE
from alphasmith.objectives.quantization.scheme import QMAX
from alphasmith.search.exports.onnx._codes import OperatorConstants
from alphasmith.search.exports.onnx._graph import MICROSOFT, GraphWriter
from alphasmith.search.exports.source import DeployedOperator

_UINT8, _INT32 = ir.DataType.UINT8, ir.DataType.INT32


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A rounded tensor.

    Attributes:
        codes: Integers.
        scale: Their step: (), or of every row (..., 1), or of every sample (B, 1, ...).
        zero: () code that stands for 0.
        static: Whether the step is known beforehand.
    """

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value
    static: bool


class Products:
    """Writes products.

    Args:
        writer: Of the graph.
        layout: Of the export.
    """

    def __init__(self, writer: GraphWriter, layout: OnnxLayout) -> None:
        self._writer = writer
        self._layout = layout
        self._rounded: dict[tuple[object, ...], Codes] = {}

    def rounded(
        self,
        before: ir.Node,
        x: ir.Value,
        operator: DeployedOperator,
        constants: OperatorConstants,
        axes: tuple[int, ...],
    ) -> Codes:
        """The codes of a tensor; but in ``qdq``, operators that round it alike share them.

        Args:
            before: Node that they are put in front of, unless they are there.
            x: What is rounded.
            operator: That reads it.
            constants: Its initializers.
            axes: Of the tensor that share a scale where it is found at run time.
        """
        static = operator.scheme.static
        # ONNX Runtime finds no integer product behind a QuantizeLinear that several of them read.
        own = operator.name if self._layout == "qdq" else ""
        key = (x, own, *(constants.input_key() if static else axes))
        if key not in self._rounded:
            name = f"{operator.name}.input"
            if static:
                scale, zero = constants.input_scale(), constants.input_zero()
                codes = self._writer.node(
                    before, "QuantizeLinear", [x, scale, zero], f"{name}_codes", dtype=zero.dtype
                )  # fmt: skip
                self._rounded[key] = Codes(codes=codes, scale=scale, zero=zero, static=True)
            else:
                self._rounded[key] = self._rows(before, x, name, axes)
        return self._rounded[key]

    def product(
        self, before: ir.Node, x: Codes, bias: ir.Value | None, operator: DeployedOperator, constants: OperatorConstants
    ) -> ir.Value:
        """The product of a rounded input and the weight, as float32.

        Args:
            before: Node that it replaces.
            x: (..., C).
            bias: (O,) float32 that is added, or None.
            operator: Whose product it is.
            constants: Its initializers.
        """
        if self._layout == "qdq":
            return self._around_float(before, x, bias, operator, constants)
        name = operator.name
        weight, scale = self._matrix(before, constants, name), constants.weight_scale()
        zero = constants.weight_zero(per_channel=False)
        if operator.scheme.static:
            # The scale of the operator itself, although the codes may have been made for another that reads the same tensor.
            inputs = [x.codes, weight, constants.input_scale(), scale, constants.input_zero(), zero, bias]
            return self._writer.node(
                before, "MatMulIntegerToFloat", inputs, f"{name}.product", domain=MICROSOFT
            )  # fmt: skip
        node = self._writer.node
        total = node(before, "MatMulInteger", [x.codes, weight, x.zero, zero], f"{name}.integers", dtype=_INT32)
        value = node(before, "Cast", [total], f"{name}.counts", to=int(ir.DataType.FLOAT))
        value = node(before, "Mul", [value, x.scale], f"{name}.steps")
        value = node(before, "Mul", [value, scale], f"{name}.product")
        return value if bias is None else node(before, "Add", [value, bias], f"{name}.sum")

    def _matrix(self, before: ir.Node, constants: OperatorConstants, name: str) -> ir.Value:
        """The weight (C, O); the matrices of windows below each other, which runtimes do once, when they load the model."""
        weight = constants.weight()
        shape = list(weight.shape or ())
        if len(shape) == 2:
            return weight
        columns = self._writer.constant(f"{name}.matrix_shape", np.array([-1, shape[-1]], np.int64))
        return self._writer.node(before, "Reshape", [weight, columns], f"{name}.matrix", dtype=weight.dtype)

    def dequantized(self, before: ir.Node, x: Codes, operator: DeployedOperator) -> ir.Value:
        """Float values of codes.

        Args:
            before: Node that uses them.
            x: The codes.
            operator: That reads them.
        """
        if not x.static:
            counts = self._writer.node(
                before, "Cast", [x.codes], f"{operator.name}.input_raised", to=int(ir.DataType.FLOAT)
            )
            counts = self._writer.node(
                before, "Sub", [counts, self._number("middle", BYTE_MIDDLE)], f"{operator.name}.input_counts"
            )
            return self._writer.node(before, "Mul", [counts, x.scale], f"{operator.name}.input")
        return self._writer.node(before, "DequantizeLinear", [x.codes, x.scale, x.zero], f"{operator.name}.input")

    def _around_float(
        self, before: ir.Node, x: Codes, bias: ir.Value | None, operator: DeployedOperator, constants: OperatorConstants
    ) -> ir.Value:
        node, name = self._writer.node, operator.name
        own = replace(x, scale=constants.input_scale(), zero=constants.input_zero())
        values = self.dequantized(before, own, operator)
        quantized = [constants.weight(), constants.weight_scale(), constants.weight_zero(per_channel=True)]
        weight = node(before, "DequantizeLinear", quantized, f"{name}.weight", axis=1)
        product = node(before, "MatMul", [values, weight], f"{name}.product")
        if bias is None:
            return product
        stored = bias.const_value
        rank = len(before.outputs[0].shape or ())
        if stored is None or rank < 1:
            return node(before, "Add", [product, bias], f"{name}.sum")
        # ONNX Runtime makes a float Gemm of a product and a bias, and then finds no integers: of two axes by any Add, of more
        # by one of a vector.
        if rank > 2:
            row = self._writer.constant(f"{name}.bias_row", stored.numpy().reshape(1, -1))
            return node(before, "Add", [product, row], f"{name}.sum")
        negative = self._writer.constant(f"{name}.bias_negated", -stored.numpy())
        return node(before, "Sub", [product, negative], f"{name}.sum")

    def _rows(self, before: ir.Node, x: ir.Value, name: str, axes: tuple[int, ...]) -> Codes:
        """Codes of activations whose scale is found at run time: formula fA4."""
        node, number = self._writer.node, self._number
        last = self._writer.constant(f"axes_{'_'.join(map(str, axes))}", np.array(axes, np.int64))
        largest = node(
            before, "ReduceMax", [node(before, "Abs", [x], f"{name}_size"), last], f"{name}_largest", keepdims=1
        )
        width = node(before, "Div", [largest, number("codes", QMAX["int8"])], f"{name}_width")
        flat = node(before, "Equal", [largest, number("nothing", 0)], f"{name}_flat", dtype=ir.DataType.BOOL)
        kept = node(before, "Max", [width, number("smallest_step", float(np.finfo(np.float32).tiny))], f"{name}_kept")
        scale = node(before, "Where", [flat, number("one", 1), kept], f"{name}_step")
        rounded = node(before, "Round", [node(before, "Div", [x, scale], f"{name}_quotient")], f"{name}_rounded")
        raised = node(before, "Add", [rounded, number("middle", BYTE_MIDDLE)], f"{name}_raised")
        clipped = node(before, "Clip", [raised, number("nothing", 0), number("last_code", 255)], f"{name}_clipped")
        codes = node(before, "Cast", [clipped], f"{name}_codes", dtype=_UINT8, to=int(_UINT8))
        zero = self._writer.constant("middle_code", np.array(BYTE_MIDDLE, np.uint8))
        return Codes(codes=codes, scale=scale, zero=zero, static=False)

    def _number(self, name: str, value: float) -> ir.Value:
        return self._writer.constant(name, np.array(value, np.float32))
