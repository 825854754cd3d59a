"""Integer convolutions as nodes of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from alphasmith.objectives.literals import OnnxLayout
from alphasmith.search.exports.onnx._codes import OperatorConstants
from alphasmith.search.exports.onnx._graph import GraphWriter
from alphasmith.search.exports.onnx._products import Codes
from alphasmith.search.exports.source import DeployedOperator

#: Largest magnitude that a bias may have as an integer [steps of the sum].
_MOST_STEPS = 2**30


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
        """The convolution of a rounded input and the weight, as float32.

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
            inputs = [values, dense, *([] if bias is None else [self._whole_bias(before, bias, operator)])]
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

    def _whole_bias(self, before: ir.Node, bias: ir.Value, operator: DeployedOperator) -> ir.Value:
        """A bias in whole steps of the sum, as ONNX Runtime wants it; as it is where it does not fit 32 bits."""
        stored, name = bias.const_value, operator.name
        steps = _steps(operator)
        if stored is None:
            return bias
        whole = np.rint(stored.numpy().astype(np.float64) / steps)
        if not np.all(np.abs(whole) < _MOST_STEPS):
            return bias
        scale = self._writer.constant(f"{name}.bias_scale", np.broadcast_to(steps, whole.shape))
        codes = self._writer.constant(f"{name}.bias_codes", whole.astype(np.int32))
        zero = self._writer.constant(f"{name}.bias_zero_point", np.zeros(whole.shape, np.int32))
        return self._writer.node(before, "DequantizeLinear", [codes, scale, zero], f"{name}.bias", axis=0)

    def _bias(self, name: str, bias: ir.Value, spaces: int) -> ir.Value:
        stored = bias.const_value
        if stored is None:
            raise ValueError(f"the bias of {name} is computed")
        return self._aligned(f"{name}.bias_row", stored.numpy(), spaces)

    def _aligned(self, name: str, values: Any, spaces: int) -> ir.Value:
        """Numbers of output channels, (O,) or (), as they meet (B, O, *space)."""
        shape: Sequence[int] = (-1, *[1] * spaces) if np.ndim(values) else ()
        return self._writer.constant(name, np.asarray(values, np.float32).reshape(shape))


def _steps(operator: DeployedOperator) -> Any:
    """(O,) or () float32: what a step of the sum of integers is worth; of activations without a static scale, in theirs."""
    scale, inputs = operator.scale.double(), operator.input_scale
    steps = scale.reshape(-1 if scale.dim() else ())
    return (steps if inputs is None else steps * inputs.double()).float().numpy()
