"""Rounding of one tensor as noise: steps, the noise they make, and what it is multiplied by. The parts of the noise model.

See :mod:`alphasmith.objectives.noise` for the model. Source: formula fA4, architecture notes section 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from alphasmith.objectives.losses import squared_sum
from alphasmith.objectives.scheme import QMAX, ActivationFormat, Scheme, WeightFormat
from alphasmith.objectives.site_data import SitePart
from alphasmith.objectives.site_objective import by_block, columns_by_block

# e4m3: 3 mantissa bits, smallest normal 2^-6, so values below it are spaced 2^-9 apart.
_FP8_SUBNORMAL_STEP = 2.0**-9
# Rounding in a binade [2^e, 2^(e+1)) has variance (2^(e-3))^2 / 12; relative to values spread evenly in the logarithm that is
# 2^-6/12 times the mean of 1/m^2 over m in [1, 2) with density 1/(m ln 2), which is 3 / (8 ln 2).
_FP8_RELATIVE_VARIANCE = 2.0**-6 / 12 * 3 / (8 * math.log(2))
# Floor of a squared variance, so that a column without noise has a gradient of 0 instead of 0 / 0.
_NO_NOISE = 1e-280


@dataclass(frozen=True, eq=False)
class Rounding:
    """Rounding of one tensor, in B blocks whose noise meets partners of its own, with N columns each.

    Attributes:
        grows: True for weights, which are multiplied by s; False for activations, which are divided.
        values: (B, R, M) magnitudes of R rows; the M of a row share one step.
        value_channel: (B, M) int64 site channel of every value.
        mass: (B, R) rows of the tensor that each row stands for.
        sampled: The M values of a row are its N columns, so the one at the maximum is rounded without error.
        channel: (B, N) int64 site channel of every column.
        share: (B, N) fraction of non-zero entries; a zero rounds without error.
        energy: (B, N) sum of squares of the tensor's columns.
        partner: (B, N) sum of squares of what multiplies each column.
        codes: Steps of uniform rounding between 0 and the largest magnitude.
        relative: Variance of rounding in proportion to the square of the value (fp8), else 0.
    """

    grows: bool
    values: Tensor
    value_channel: Tensor
    mass: Tensor
    sampled: bool
    channel: Tensor
    share: Tensor
    energy: Tensor
    partner: Tensor
    codes: float
    relative: float

    def variance(self, factor: Tensor) -> Tensor:
        """Summed variance of the output, () float64, when channel j is multiplied by ``factor[j]``, its partner divided."""
        with torch.no_grad():
            index = (self.values * factor[self.value_channel].to(self.values.dtype).unsqueeze(1)).argmax(dim=-1)
        # Only the maximum has a gradient; gathering it spares autograd the product of all values.
        peak = self.values.gather(-1, index.unsqueeze(-1)).squeeze(-1) * factor[self.value_channel.gather(-1, index)]
        step = self.mass * (peak / self.codes).square() / 12.0
        columns = factor[self.channel].square()
        noise = self.share * step.sum(dim=1, keepdim=True)
        if self.sampled:
            noise = (noise - torch.zeros_like(noise).scatter_add(1, index, step)).clamp_min(0.0)
        # A column well below one step rounds to zero: its error is its energy, not the noise.
        energy = self.energy * columns
        noise = noise * energy / (noise.square() + energy.square()).clamp_min(_NO_NOISE).sqrt()
        absolute = (noise * self.partner / columns).sum()
        if self.relative == 0.0:
            return absolute
        uneven = self.energy
        if self.sampled:
            exact = self.mass * self.values.gather(-1, index.unsqueeze(-1)).squeeze(-1).square()
            uneven = (uneven - torch.zeros_like(uneven).scatter_add(1, index, exact)).clamp_min(0.0)
        return absolute + self.relative * (uneven * self.partner).sum()


def measure(part: SitePart, scheme: Scheme, static: Tensor, rows: int, max_rows: int) -> tuple[list[Rounding], float]:
    """Roundings of one part of a site, and the energy of its float output. Unchecked: see ``check_site_data``.

    Args:
        part: The part.
        scheme: Number formats and granularities.
        static: (C,) calibrated abs-max of the site's channels.
        rows: First rows of x to measure.
        max_rows: Output rows, over all blocks, whose steps are followed.
    """
    x, groups = part.x[:rows], part.groups
    blocks = by_block(part.weight, part)
    x_energy = x.square().sum(dim=0, dtype=torch.float64)
    w_energy = blocks.square().sum(dim=1, dtype=torch.float64).flatten()
    output_energy = squared_sum(torch.bmm(columns_by_block(x, groups), blocks.mT))
    roundings = [_weight_rounding(part, scheme, blocks, x_energy, w_energy, max_rows)]
    if scheme.activations != "none":
        roundings.append(_activation_rounding(part, scheme, static, x, x_energy, w_energy))
    return roundings, output_energy


def _activation_rounding(
    part: SitePart, scheme: Scheme, static: Tensor, x: Tensor, x_energy: Tensor, w_energy: Tensor
) -> Rounding:
    own_rows = scheme.activation_granularity == "token" and part.sample_absmax is None
    if own_rows:
        values, mass = x.abs(), x.new_ones(x.shape[0])
    elif scheme.activation_granularity == "token" and part.sample_absmax is not None and part.sample is not None:
        values = part.sample_absmax
        mass = torch.bincount(part.sample[: x.shape[0]], minlength=values.shape[0])
    else:
        values, mass = static.unsqueeze(0), x.new_full((1,), x.shape[0])
    channels = torch.arange(static.shape[0], device=x.device)
    return Rounding(
        grows=False,
        values=values.unsqueeze(0),
        value_channel=(part.channel if own_rows else channels).unsqueeze(0),
        mass=mass.to(torch.float64).unsqueeze(0),
        sampled=own_rows,
        channel=part.channel.unsqueeze(0),
        share=(x != 0).to(torch.float64).mean(dim=0, keepdim=True),
        energy=x_energy.unsqueeze(0),
        partner=w_energy.unsqueeze(0),
        **_steps(scheme.activations),
    )


def _weight_rounding(
    part: SitePart, scheme: Scheme, blocks: Tensor, x_energy: Tensor, w_energy: Tensor, max_rows: int
) -> Rounding:
    channel = part.channel.view(part.groups, -1)
    share = (blocks != 0).to(torch.float64).mean(dim=1)
    if scheme.weight_granularity == "tensor":
        # One block per operator, over all columns of x: every convolution group of it sees columns of its own.
        sizes = [features // part.groups for features in part.out_features]
        operators = torch.split(blocks, sizes, dim=1)
        one_each = (len(operators), -1)
        return Rounding(
            grows=True,
            values=torch.stack([o.abs().amax(dim=1).flatten() for o in operators]).unsqueeze(1),
            value_channel=part.channel.expand(one_each),
            mass=torch.tensor(sizes, dtype=torch.float64, device=blocks.device).unsqueeze(1),
            sampled=False,
            channel=part.channel.expand(one_each),
            share=torch.stack([(o != 0).to(torch.float64).mean(dim=1).flatten() for o in operators]),
            energy=torch.stack([o.square().sum(dim=1, dtype=torch.float64).flatten() for o in operators]),
            partner=x_energy.expand(one_each),
            **_steps(scheme.weights),
        )
    outputs, columns = blocks.shape[1:]
    sampled = min(outputs, -(-max_rows // part.groups))
    rows = torch.arange(sampled, device=blocks.device) * outputs // sampled
    size = scheme.group_size or columns

    def by_step(values: Tensor) -> Tensor:
        """(groups, ..., D // groups) as (groups * steps per row, ..., columns per step), the ragged last one padded with 0."""
        padded = functional.pad(values, (0, -columns % size))
        return padded.view(*values.shape[:-1], -1, size).movedim(-2, 1).flatten(0, 1)

    values = by_step(blocks[:, rows].abs())
    return Rounding(
        grows=True,
        values=values,
        value_channel=by_step(channel),
        mass=values.new_full(values.shape[:2], outputs / sampled, dtype=torch.float64),
        sampled=True,
        channel=by_step(channel),
        share=by_step(share),
        energy=by_step(w_energy.view(part.groups, -1)),
        partner=by_step(x_energy.view(part.groups, -1)),
        **_steps(scheme.weights),
    )


class _Steps(TypedDict):
    codes: float
    relative: float


def _steps(fmt: WeightFormat | ActivationFormat) -> _Steps:
    """Uniform and proportional rounding of a format; the uniform steps of fp8 are those of its subnormal numbers."""
    if fmt == "fp8":
        return {"codes": QMAX[fmt] / _FP8_SUBNORMAL_STEP, "relative": _FP8_RELATIVE_VARIANCE}
    return {"codes": QMAX[fmt], "relative": 0.0}
