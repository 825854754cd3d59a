"""The noise of one rounding in closed form: smooth in the logarithms of the scales, with its gradient, for descent.

With f = s for weights and f = 1/s for activations, uniform noise of variance step^2 / 12 on the entries it can disturb gives

    noise = sum_j c(share_j sum_r step_r^2 / 12, energy_j f_j^2) partner_j / f_j^2,    step_r = max_j(value_rj f_j) / codes

``c(n, e) = n e / sqrt(n^2 + e^2)`` caps the noise of a column by its energy, because a column well below one step rounds to
zero. Under a zero point step_r is the sum of the maxima of either side of 0. The maximum is a p-norm whose power grows during a descent: its sum over columns is a small matrix product, its gradient
another. Without the cap every term is a posynomial, so the noise is convex in log s. Source: formula fA4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alphasmith.objectives.noise._rounding import Rounding, evenly
from alphasmith.objectives.quantization.scheme import QMAX

# e4m3: 3 mantissa bits, smallest normal 2^-6, so values below it are spaced 2^-9 apart.
_FP8_SUBNORMAL_STEP = 2.0**-9
# Rounding in a binade [2^e, 2^(e+1)) has variance (2^(e-3))^2 / 12; relative to values spread evenly in the logarithm that is
# 2^-6/12 times the mean of 1/m^2 over m in [1, 2) with density 1/(m ln 2), which is 3 / (8 ln 2).
_FP8_RELATIVE_VARIANCE = 2.0**-6 / 12 * 3 / (8 * math.log(2))
# Floor of a squared variance, so that a column without noise has a gradient of 0 instead of 0 / 0.
_NO_NOISE = 1e-280

# Floor of a sum of powers, far enough above the smallest float64 for quotients by it.
_NO_SUM = 1e-280
# What scales take from the sizes of columns, as a power of them; chosen so that the form agrees with rounding at alphas of 0.4 to 0.6.
_TYPICAL_ALPHA = 0.6
# Powers of small ratios underflow: at this one, a row counts down to 1e-4 of the largest. Many rows are smooth in their mean.
_OWN_POWER = 64

#: Powers of the p-norm from the first to the last stage of a descent.
POWERS = (16, 64, 256)


class ClosedForm:
    """Closed-form noise of one rounding, on the CPU: a descent is many small steps, which launches on a GPU would only slow.

    Args:
        rounding: Sampled entries, partners and steps.
        channels: C.
        max_rows: Rows of a block whose steps are followed where every row sets its own.
    """

    def __init__(self, rounding: Rounding, channels: int, max_rows: int) -> None:
        self._channels = channels
        self._own = rounding.peaks is None
        columns = rounding.channel.shape if self._own else (1, -1)
        codes, fp8 = QMAX[rounding.number_format], rounding.number_format == "fp8"
        self._sign = 1.0 if rounding.grows else -1.0
        self._channel = rounding.channel.cpu().reshape(columns)
        share = (rounding.entries != 0).to(torch.float64).mean(dim=1)
        self._share, self._energy, self._partner = (
            values.cpu().reshape(columns).unsqueeze(1) for values in (share, rounding.energy, rounding.partner)
        )
        if rounding.peaks is None:
            rows = rounding.entries.shape[1]
            picked = evenly(rows, max_rows, rounding.entries.device)
            values = rounding.entries[:, picked].abs()
            mass = torch.full_like(values[:, :, 0], rounding.mass * rows / len(picked), dtype=torch.float64)
            mass = mass if rounding.emphasis is None else mass * rounding.emphasis[:, picked]
            if rounding.number_format == "uint8":
                mass = mass * _span_ratios(rounding.entries[:, picked]).square()
            self._peak_channel = self._channel
        else:
            values, mass = rounding.peaks.values.unsqueeze(0), rounding.peaks.mass.unsqueeze(0)
            self._peak_channel = rounding.peaks.channel.cpu().unsqueeze(0)
            codes /= rounding.peaks.factor
        self._mass = mass.cpu().unsqueeze(1)
        # fp8 rounds in proportion to the value, which no scale changes; its uniform noise is that of subnormal numbers.
        self._variance = 1.0 / (12 * (codes / _FP8_SUBNORMAL_STEP if fp8 else codes) ** 2)
        self._constant = _FP8_RELATIVE_VARIANCE * float((self._energy * self._partner).sum()) if fp8 else 0.0
        below = None if rounding.peaks is None else rounding.peaks.below
        sides = (values,) if below is None else (values, below.unsqueeze(0))
        self._sides = tuple(_Side(side.cpu().to(torch.float64)) for side in sides)

    def noise(self, logs: Tensor, power: int) -> tuple[Tensor, Tensor]:
        """Output noise and its gradient.

        Args:
            logs: (n, C) float64 log s, on the CPU.
            power: Sharpness of the maximum, a power of 2.

        Returns:
            (n,) float64 summed output variance; (n, C) float64 its derivative by ``logs``.
        """
        power = min(power, _OWN_POWER) if self._own else power
        factors = self._by_column(logs, self._channel)
        peaks = factors if self._own else self._by_column(logs, self._peak_channel)
        found = [side.sums(peaks, power) for side in self._sides]
        weight, sums, largest = found[0]
        powers = self._sides[0].power(power)
        if len(found) == 1:
            # In units of the largest possible step of a candidate, so that their ratio to tiny sums stays finite.
            steps = self._mass * sums.pow(2 / power)
            ratio = steps / sums
            # What each peak contributes to the sum of the squared steps: half the derivative of that sum by its log factor.
            setting = weight * torch.bmm(ratio, powers)
        else:
            largest = torch.maximum(largest, found[1][2])
            roots = [s.pow(1 / power) * (own - largest).exp() for _, s, own in found]
            span = roots[0] + roots[1]
            steps, ratio = self._mass * span.square(), span
            each = zip(self._sides, found, roots, strict=True)
            setting = sum(
                (w * torch.bmm(self._mass * span * root / s, side.power(power)) for side, (w, s, _), root in each),
                torch.zeros(()),
            )
        unit = (2 * largest).exp_() * self._variance
        setting = setting * unit
        uniform = self._share * (steps.sum(dim=-1, keepdim=True) * unit)
        if self._own:
            uniform = (uniform - setting).clamp_min_(0)
        column = (2 * factors).exp_()
        energy, through = self._energy * column, self._partner / column
        norm = (uniform.square() + energy.square()).clamp_min_(_NO_NOISE).sqrt_()
        low, high = uniform / norm, energy / norm
        noise = uniform * high * through
        # c_n = (e / norm)^3 and c_e = (n / norm)^3.
        by_uniform = high.pow(3) * through * (uniform > 0)
        by_column = 2 * (low.pow(3) * energy * through - noise)
        by_peak = 2 * setting * (by_uniform * self._share).sum(dim=-1, keepdim=True)
        if not self._own:
            slope = self._by_site(by_column, self._channel) + self._by_site(by_peak, self._peak_channel)
            return noise.sum(dim=(0, 2)) + self._constant, self._sign * slope
        mean = torch.bmm(weight * by_uniform, powers.mT)
        by_peak = by_peak - power * by_uniform * setting
        by_peak = by_peak + (power - 2) * unit * weight * torch.bmm(mean / sums * ratio, powers)
        slope = self._by_site(by_column + by_peak, self._channel)
        return noise.sum(dim=(0, 2)) + self._constant, self._sign * slope

    def _by_column(self, logs: Tensor, channel: Tensor) -> Tensor:
        """Log factors (B, n, N) of site values (n, C)."""
        return self._sign * logs[:, channel].transpose(0, 1)

    def _by_site(self, values: Tensor, channel: Tensor) -> Tensor:
        """Sums (n, C) over the columns of every site channel of values (B, n, N)."""
        flat = values.transpose(0, 1).flatten(1)
        return flat.new_zeros(flat.shape[0], self._channels).scatter_add_(
            1, channel.reshape(1, -1).expand_as(flat), flat
        )


class _Side:
    """Magnitudes (B, R, M) whose maxima set steps, as p-norms.

    Args:
        values: float64, on the CPU.
    """

    def __init__(self, values: Tensor) -> None:
        top = values.amax(dim=1, keepdim=True)
        self._log_top = top.clamp_min(torch.finfo(torch.float64).tiny).log()
        self._ratio = values / torch.where(top == 0, 1.0, top)
        self._powers: dict[int, Tensor] = {}

    def sums(self, factors: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor]:
        """Powers of peaks (B, n, M) under log factors, their sums (B, n, R), and the log unit (B, n, 1) of the peaks."""
        peak = factors + self._log_top
        largest = peak.amax(dim=-1, keepdim=True)
        weight = ((peak - largest) * power).exp_()
        return weight, torch.bmm(weight, self.power(power).mT).clamp_min_(_NO_SUM), largest

    def power(self, power: int) -> Tensor:
        """(B, R, M) the magnitudes over the largest of their column, to a power of 2."""
        if power not in self._powers:
            values = self._ratio
            for _ in range(power.bit_length() - 1):
                values = values.square()
            self._powers[power] = values
        return self._powers[power]


def _span_ratios(rows: Tensor) -> Tensor:
    """(largest - smallest) / largest magnitude of rows (B, R, N), 0 being one of their values: (B, R), 1 to 2, 1 for rows of zeros.

    Taken once, with columns about as scales leave them, since these change the width of the ranges by far more than what share of it
    lies on either side.
    """
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny).pow(_TYPICAL_ALPHA)
    high, low = rows.amax(dim=-1).clamp_min(0), rows.amin(dim=-1).clamp_max(0)
    top = torch.maximum(high, -low)
    return torch.where(top == 0, 1.0, (high - low) / torch.where(top == 0, 1.0, top))
