"""A linear layer whose product is taken between integers, with all that does not depend on its input made once.

A model calls it for every token, and a call of torch takes as long as multiplying thousands of numbers: what is computed per call here
is as few passes as the formulas allow. Source: formulas fA4, fA17 and fA20.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.finite import all_finite
from alphasmith.objectives.quantization.integer_product import WeightProducts
from alphasmith.objectives.quantization.quantizers import (
    BYTE_MIDDLE,
    CodeGrid,
    code_limits,
    row_codes_,
    row_steps,
)
from alphasmith.objectives.quantization.scheme import ActivationFormat


class IntegerLinear:
    """``y = (codes - zero) W^T * step of the input * step of the weight + bias``, the product exact, the rest in floats.

    Args:
        products: Of the weight.
        weight_scale: float32 step of the weight: (), or (O, 1).
        outputs: O.
        activations: int8, uint8 or int16.
        grid: Step and zero point of the input, () each; None: every row gets its own.
        dtype: What the input is smoothed and the product scaled in: float32 or float64.
        smoothed: Shifts and divides an input; None: it is taken as it is.
        lost: What the target's kernel loses of a product of unsigned codes (T, C), (T, O); None: nothing.

    Raises:
        NonFiniteError: A step is NaN or infinite.
    """

    def __init__(
        self,
        products: WeightProducts,
        *,
        weight_scale: Tensor,
        outputs: int,
        activations: ActivationFormat,
        grid: CodeGrid | None,
        dtype: torch.dtype,
        smoothed: Callable[[Tensor], Tensor] | None,
        lost: Callable[[Tensor], Tensor] | None,
    ) -> None:
        if grid is not None and not all_finite(grid.scale):
            raise NonFiniteError("the scale of the activation is NaN or infinite")
        self._products, self._format, self._grid = products, activations, grid
        self._wide = activations == "int16"
        self._dtype, self._smoothed, self._lost = dtype, smoothed, lost
        factor = weight_scale.reshape(-1)
        self._factor = (factor if grid is None else factor * grid.scale).expand(outputs).contiguous()
        self._limits = code_limits(activations, None if grid is None or grid.zero is None else float(grid.zero))

    def __call__(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(T, C) -> (T, O).

        Args:
            rows: The input, of any floating type.
            bias: (O,) what is added, or None.

        Raises:
            NonFiniteError: The input, as it is multiplied, holds NaN or infinity.
        """
        if rows.dtype != self._dtype:
            rows = rows.to(self._dtype)
        if self._smoothed is not None:
            rows = self._smoothed(rows)
        if self._dtype != torch.float32:
            rows = rows.to(torch.float32)
        if self._grid is None:
            scale, zero = row_steps(rows, self._format)
            codes = row_codes_(rows / scale, zero)
        else:
            scale, zero = self._grid
            if not all_finite(rows):
                raise NonFiniteError("the activation holds NaN or infinity")
            codes = (rows / scale).round_().clamp_(*self._limits)
        product = self._products.of_words(codes) if self._wide else self._products.of_bytes(codes, zero)
        if self._lost is not None:
            product = product + self._lost(codes + (BYTE_MIDDLE if zero is None else zero))
        if self._dtype != torch.float32:
            product = product.to(self._dtype)
        if self._grid is None:
            product = product.mul_(scale) if product.is_floating_point() else product * scale
        return product * self._factor if bias is None else torch.addcmul(bias, product, self._factor)
