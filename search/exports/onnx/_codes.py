"""Integer weights and scales as initializers of a graph, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from alphasmith.objectives.calibration.weight_matrix import as_matrix, from_matrix
from alphasmith.objectives.quantization.quantizers import BYTE_MIDDLE
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.exports.onnx._graph import GraphWriter
from alphasmith.search.exports.source import DeployedOperator

#: Form of a weight in a graph: the matrix (C, O) of a product, the matrices (prod(kernel), C, O) of one whose rows are windows, position
#: by position, or a kernel as convolutions take it.
Form = Literal["product", "windows", "convolution", "transposed convolution"]
#: Last parts of the names of an operator's initializers.
WEIGHT, WEIGHT_SCALE = "weight_codes", "weight_scale"
INPUT_SCALE, INPUT_ZERO = "input_scale", "input_zero_point"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Where a weight stands in a graph.

    Attributes:
        operator: Whose it is.
        shape: Of the float weight.
        form: What it becomes.
        groups: Of a convolution.
    """

    operator: DeployedOperator
    shape: tuple[int, ...]
    form: Form
    groups: int = 1


class OperatorConstants:
    """The initializers of one operator.

    Args:
        writer: Of the graph.
        weight: The operator and the form of its weight.
        unsigned_weights: Raise the codes of weights by 128.
        unsigned_inputs: Raise those of signed activations by 128.
        copy: Of the same operator; 0: the one that is read again.
    """

    def __init__(
        self, writer: GraphWriter, weight: Weight, *, unsigned_weights: bool, unsigned_inputs: bool, copy: int = 0
    ) -> None:
        self._writer = writer
        self._weight = weight
        self._operator = weight.operator
        self._unsigned_weights = unsigned_weights
        self._unsigned_inputs = unsigned_inputs
        self._suffix = f"_{copy}" if copy else ""

    def weight(self) -> ir.Value:
        """The codes: int8, or uint8 of which 128 stands for 0."""
        found, rows = self._weight, self._operator.codes
        shape = tuple(found.shape)
        if found.form == "product":
            shape = (rows.shape[1], rows.shape[0])
        elif found.form == "windows":
            shape = (rows.shape[1] // shape[1], shape[1], shape[0])
        dtype = ir.DataType.UINT8 if self._unsigned_weights else ir.DataType.INT8
        # Not made now: of all weights of a model, and of all graphs of it, one at a time is in memory.
        return self._writer.late_constant(f"{self._operator.name}.{WEIGHT}{self._suffix}", dtype, shape, self._stored)

    def _stored(self) -> NDArray[Any]:
        found = self._weight
        if found.form == "product":
            codes = self._operator.codes.t()
        else:
            transposed = found.form == "transposed convolution"
            codes = from_matrix(self._operator.codes, found.shape, "conv", transposed, found.groups)
            codes = codes.flatten(2).permute(2, 1, 0) if found.form == "windows" else codes
        stored = codes.contiguous()
        values: NDArray[Any] = (stored.view(torch.uint8) ^ BYTE_MIDDLE if self._unsigned_weights else stored).numpy()
        return values

    def weight_scale(self, axes: int = 0) -> ir.Value:
        """() float32 per tensor, (O, 1, ...) per channel.

        Args:
            axes: After the channels.
        """
        scale = self._operator.scale
        return self._constant(WEIGHT_SCALE, scale.reshape((-1, *[1] * axes) if scale.dim() else ()).numpy())

    def scale_of_groups(self) -> ir.Value:
        """The scales of a transposed convolution in groups, as they meet its kernel (groups, C / groups, O / groups, *kernel)."""
        found = self._weight
        if not self._operator.scale.dim():
            return self.weight_scale()
        scale = self._operator.scale.reshape(found.groups, 1, found.shape[1], *[1] * (len(found.shape) - 2))
        return self._constant(WEIGHT_SCALE, scale.numpy())

    def weight_zero(self, *, per_channel: bool) -> ir.Value:
        """The code of 0, of the type of the codes.

        Args:
            per_channel: Of the shape of the scale, which DequantizeLinear wants; else ().
        """
        kind, code = (np.uint8, BYTE_MIDDLE) if self._unsigned_weights else (np.int8, 0)
        scale = self._operator.scale
        if per_channel and scale.dim():
            return self._constant("weight_zero_points", np.full((scale.numel(),), code, kind))
        return self._constant("weight_zero_point", np.array(code, kind))

    def input_scale(self) -> ir.Value:
        """() float32 of static activations."""
        return self._constant(INPUT_SCALE, self._static_scale().reshape(()).numpy())

    def input_zero(self) -> ir.Value:
        """() the code of 0: uint8 of activations with a zero point or raised ones, else int8."""
        zero = self._operator.input_zero
        if zero is not None:
            return self._constant(INPUT_ZERO, zero.reshape(()).numpy())
        return self._constant(
            INPUT_ZERO, np.array(BYTE_MIDDLE, np.uint8) if self._unsigned_inputs else np.array(0, np.int8)
        )

    def input_key(self) -> tuple[float, int | None]:
        """Equal for operators that round one tensor alike."""
        zero = self._operator.input_zero
        return float(self._static_scale()), None if zero is None else int(zero)

    def _static_scale(self) -> torch.Tensor:
        scale = self._operator.input_scale
        if scale is None:  # the schemes were checked
            raise ValueError("an operator with static activations has no input scale")
        return scale

    def _constant(self, leaf: str, value: NDArray[Any]) -> ir.Value:
        return self._writer.constant(f"{self._operator.name}.{leaf}{self._suffix}", value)


def read_codes(
    name: str, constants: Mapping[str, NDArray[Any]], scheme: Scheme, form: Form, groups: int
) -> DeployedOperator:
    """An operator as the initializers of a graph hold it.

    Args:
        name: Of its module.
        constants: Of the graph, by name.
        scheme: Its number formats.
        form: Of its weight.
        groups: Of a convolution.

    Raises:
        KeyError: An initializer is missing.
    """
    stored = torch.from_numpy(np.array(constants[f"{name}.{WEIGHT}"]))
    codes = (stored ^ BYTE_MIDDLE).view(torch.int8) if stored.dtype == torch.uint8 else stored
    if form == "product":
        matrix = codes.t()
    else:
        kernel = codes.permute(2, 1, 0) if form == "windows" else codes
        matrix = as_matrix(kernel, "conv", form == "transposed convolution", groups)
    scale = torch.from_numpy(np.array(constants[f"{name}.{WEIGHT_SCALE}"]))
    static = scheme.static
    zero = constants[f"{name}.{INPUT_ZERO}"] if static and scheme.asymmetric else None
    return DeployedOperator(
        name=name,
        kind="linear" if form == "product" else "conv",
        transposed=False,
        scheme=scheme,
        codes=matrix.contiguous(),
        scale=scale.reshape(-1, 1) if scale.dim() else scale,
        input_scale=torch.from_numpy(np.array(constants[f"{name}.{INPUT_SCALE}"])) if static else None,
        input_zero=None if zero is None else torch.from_numpy(np.array(zero)),
        explicit=False,
    )
