"""What products that saturate add to the loss of a site, counted on a few of its rows and outputs.

    error(s) ~ sum over sampled rows t and outputs o of (S_t S_o lost_to)^2, times the rows and outputs each stands for

lost_to: what pairs of the codes of row t and output o lose to 16 bits (formula fA20), S: their steps. All pairs of a product are
counted, so what they lose together is; that it is independent of the rounding errors is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SitePart
from alphasmith.objectives.calibration.site_layout import columns_by_block, kernel_columns
from alphasmith.objectives.noise._rounding import PartRounding, Rounding
from alphasmith.objectives.quantization.quantizers import BYTE_MIDDLE
from alphasmith.objectives.quantization.saturating_pairs import SaturatingPairs

# Rows of x and, over all convolution groups and operators, outputs that are looked at. Outputs differ in what they lose by orders.
_ROWS, _OUTPUTS = 32, 128


class SampledSaturation:
    """Squared error that saturation makes at the output of one part of a site, summed over its rows.

    Args:
        part: The part.
        rounding: Its roundings, of bytes on both sides.
    """

    def __init__(self, part: SitePart, rounding: PartRounding) -> None:
        self._groups, self._kernel = part.groups, kernel_columns(part.channel)
        each = max(1, _OUTPUTS // (part.groups * max(1, len(rounding.weights))))
        self._weights: Sequence[Rounding] = [found.thinned(each) for found in rounding.weights]
        self._rows = None if rounding.activations is None else rounding.activations.thinned(_ROWS)

    def errors(self, scales: Tensor) -> Tensor:
        """Summed squares of what is lost, (n,) float64, under candidates ``scales`` (n, C) float32; NaN where codes are not finite."""
        total = torch.zeros(scales.shape[0], dtype=torch.float64, device=scales.device)
        if self._rows is None:
            return total
        x = self._rows.codes(scales)
        unsigned = (x.codes + (BYTE_MIDDLE if x.zero is None else x.zero)).squeeze(1)
        row_weight = x.step.squeeze(1).to(torch.float64).square()
        if self._rows.emphasis is not None:
            row_weight = row_weight * self._rows.emphasis
        for rounding in self._weights:
            w = rounding.codes(scales)
            output_weight = w.step.expand(w.codes.shape[:-1]).to(torch.float64).square()
            if rounding.emphasis is not None:
                output_weight = output_weight * rounding.emphasis
            mass = self._rows.mass * rounding.mass
            for n in range(len(scales)):
                total[n] += mass * self._lost(w.codes[n], output_weight[n], unsigned[n], row_weight[n])
        return total

    def _lost(self, weights: Tensor, output_weight: Tensor, unsigned: Tensor, row_weight: Tensor) -> Tensor:
        """Of codes (g, O, D/g) of weights and (R, D) of rows, with the weights (g, O) and (R,) of squares."""
        if not bool(torch.isfinite(weights).all() & torch.isfinite(unsigned).all()):
            return row_weight.new_full((), torch.nan)
        total = row_weight.new_zeros(())
        for codes, rows, weight in zip(weights, columns_by_block(unsigned, self._groups), output_weight, strict=True):
            lost = SaturatingPairs(codes, self._kernel).lost(rows).to(torch.float64)
            total = total + torch.einsum("t,to,o->", row_weight.expand(len(rows)), lost.square_(), weight)
        return total
