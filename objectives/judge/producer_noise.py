"""What a site's scales do to the weights that produce its input: the other side of a fold, in the loss of a candidate.

    error(s) = sum_r passed_r c(s_r^2 step^2 / 12 sum_d E x_d^2, E y_r^2) sum_{d in channel of r} T ||W_:d||^2
    step = max_r (max_d |P_rd| / s_r) / qmax,    c(n, e) = n e / sqrt(n^2 + e^2)

P is the producer's weight, which becomes ``P / s`` and has one step for all its rows; x is its input, y = P x its output, W the
weight of the site, T the rows of the site; where rows and outputs
carry weights, their sum and the weighted norm. A row's rounding noise is multiplied by s_r on its way into W s; c caps it by the
energy of what it disturbs, because a row far below one step rounds to zero. Where every row has its own step, s cancels and the
error of the producer is the same for every candidate: then none of it is counted. Source: formulas fA4 and fA5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import ProducerRows, SiteData
from alphasmith.objectives.calibration.site_layout import read_energies
from alphasmith.objectives.quantization.scheme import QMAX, Scheme

#: e4m3 rounds in proportion to the value, which no scale changes, down to its subnormal numbers, which are this far apart.
_FP8_SUBNORMAL_STEP = 2.0**-9
#: Floor of squares and magnitudes, so that a row of zeros has an error of 0 instead of 0 / 0.
_NOTHING = 1e-280


class ProducerNoise:
    """Squared error that the rounding of a site's producers makes at its output, summed over its rows.

    Attributes:
        idle: Whether no candidate differs from another by it: no quantized producer, or a step per row.

    Args:
        data: The site. Unchecked: see ``check_site_data``.
        scheme: Number formats and granularities.
    """

    def __init__(self, data: SiteData, scheme: Scheme) -> None:
        self.idle = scheme.weight_granularity != "tensor" or not data.producers
        self._codes = QMAX.get(scheme.weights, 1.0) / (_FP8_SUBNORMAL_STEP if scheme.weights == "fp8" else 1.0)
        read = read_energies(data)
        self._rows = () if self.idle else tuple((rows, _reached(rows, read)) for rows in data.producers)

    def error(self, logs: Tensor, power: int | None = None) -> Tensor:
        """Squared error under candidates, (n,) float64; differentiable.

        Args:
            logs: (n, C) float64 log s.
            power: Sharpness of the maximum of the rows, for descent; None: the maximum itself.
        """
        total = logs.new_zeros(logs.shape[0])
        for rows, reached in self._rows:
            divided = rows.channel >= 0
            factor = torch.where(divided, logs[:, rows.channel.clamp(min=0)], 0.0)
            peaks = rows.absmax.to(torch.float64).clamp_min(_NOTHING).log() - factor
            peak = peaks.amax(dim=1, keepdim=True)
            if power is not None:
                peak = (peaks * power).logsumexp(dim=1, keepdim=True) / power
            noise = (2 * (peak + factor - math.log(self._codes))).exp() * rows.input_energy / 12
            norm = (noise.square() + rows.energy.square()).clamp_min(_NOTHING).sqrt()
            total = total + (noise / norm * rows.energy * reached).sum(dim=1)
        return total


def _reached(rows: ProducerRows, read: Tensor) -> Tensor:
    """(R,) error at the output of the site for every unit of squared error of a row."""
    return rows.passed * torch.where(rows.channel >= 0, read[rows.channel.clamp(min=0)], 0.0)
