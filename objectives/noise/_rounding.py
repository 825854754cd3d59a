"""Rounding of one tensor of a site: sampled entries, their steps, and the output error their rounding makes.

The parts of :mod:`alphasmith.objectives.noise.model`. Source: formula fA4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.objectives.calibration.site_layout import by_block, columns_by_block, outputs_by_block
from alphasmith.objectives.quantization.quantizers import round_codes_
from alphasmith.objectives.quantization.scheme import QMAX, ActivationFormat, Scheme, WeightFormat
from alphasmith.objectives.smoothing import ChannelRange

# Directions in which the columns of x are correlated that are followed, and the steps that find them.
_DIRECTIONS = 8
_SUBSPACE_STEPS = 2
# Rows of x per pass of the column energies: a temporary that stays in the cache.
_ENERGY_ROWS = 1024


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedPeaks:
    """Magnitudes that set the steps of a tensor whose rows do not set their own.

    Attributes:
        values: (Q, M) magnitudes; the largest of row q, after scaling, is the largest code of step q. Under a zero point: largest
            values, at least 0.
        below: (Q, M) minus the smallest values, at least 0, under a zero point: the codes span the sum of both; else None.
        channel: (M,) int64 site channel of every magnitude.
        step: (R,) int64: which of the Q steps each sampled row is rounded with.
        mass: (Q,) float64 rows of the tensor that share each step.
        factor: Range relative to that largest magnitude; below 1 clips.
    """

    values: Tensor
    channel: Tensor
    step: Tensor
    mass: Tensor
    factor: float
    below: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SampledCodes:
    """What sampled rows of a tensor round to under candidates.

    Attributes:
        codes: (n, B, R, N) float32 codes, counted from the zero point.
        step: (n, B or 1, R) steps.
        zero: (n, B or 1, R, 1) code that stands for 0, under a zero point.
    """

    codes: Tensor
    step: Tensor
    zero: Tensor | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Rounding:
    """Rounding of one tensor, in B blocks whose noise meets its own partners, with N columns each.

    Attributes:
        grows: True for weights, which are multiplied by s; False for activations, which are divided.
        number_format: What the tensor is rounded to.
        entries: (B, R, N) float32 sampled rows.
        mass: Rows of the tensor that each sampled row stands for.
        emphasis: (B, R) float32 weight of every sampled row; None: 1. Energies, partners and directions count weights already.
        channel: (B, N) int64 site channel of every column.
        energy: (B, N) float64 sum of squares of the tensor's columns, over all of its rows.
        partner: (B, N) float64 sum of squares of what multiplies each column.
        peaks: What sets the steps; None: every sampled row sets its own.
        directions: (B, r, N) float32: rows whose Gram matrix is the part of the partner's that correlated columns share; ``partner``
            is the diagonal of the whole. None: columns are taken to be uncorrelated.
        pieces: Consecutive blocks that are pieces of the same rows; their errors add up along a direction.
    """

    grows: bool
    number_format: WeightFormat | ActivationFormat
    entries: Tensor
    mass: float
    channel: Tensor
    energy: Tensor
    partner: Tensor
    peaks: FixedPeaks | None
    directions: Tensor | None = None
    pieces: int = 1
    emphasis: Tensor | None = None

    def errors(self, scales: Tensor) -> Tensor:
        """Summed squares of the output errors, (n,) float64, under candidates ``scales`` (n, C) float32.

        Every sampled entry is rounded as the quantizer would, so zeros, entries that set their own step, dead zones, few bits,
        fp8 and clipping are what they are. Errors of different columns are taken to be independent, except along ``directions``:
        there the errors of a fixed weight add up over all rows that share them.
        """
        columns, scaled, step, zero = self._in_steps(scales)
        scaled.sub_(round_codes_(scaled.clone(), self.number_format, zero))
        # Steps are squared relative to the largest, so that tensors of any size stay within float32.
        unit = step.amax(dim=(1, 2), keepdim=True)
        weight = (step / unit).square().expand(-1, *self.entries.shape[:2])
        weight = (weight if self.emphasis is None else weight * self.emphasis).unsqueeze(2)
        partner, shared = self.partner, torch.zeros_like(unit.flatten(), dtype=torch.float64)
        if self.directions is not None:
            partner = (partner - self.directions.square().sum(dim=1)).clamp_min(0)
            along = torch.matmul(scaled, (self.directions / columns.unsqueeze(2)).mT) * (step / unit).unsqueeze(-1)
            together = along.unflatten(1, (-1, self.pieces)).sum(dim=2).square()
            if self.emphasis is not None:  # of a row, hence the same in all of its pieces
                together = together * self.emphasis[:: self.pieces].unsqueeze(2)
            shared = together.sum(dim=(1, 2, 3)).to(torch.float64)
        noise = torch.matmul(weight, scaled.square_()).squeeze(2).to(torch.float64)
        alone = (noise * partner / columns.to(torch.float64).square()).sum(dim=(1, 2))
        return (alone + shared) * unit.flatten().to(torch.float64).square() * self.mass

    def codes(self, scales: Tensor) -> SampledCodes:
        """What the sampled rows round to under candidates ``scales`` (n, C) float32."""
        _, scaled, step, zero = self._in_steps(scales)
        return SampledCodes(round_codes_(scaled, self.number_format, zero), step, zero)

    def thinned(self, rows: int) -> Rounding:
        """The same with at most ``rows`` of its sampled rows, for :meth:`codes`."""
        picked = evenly(self.entries.shape[1], rows, self.entries.device)
        return replace(
            self,
            entries=self.entries[:, picked],
            mass=self.mass * self.entries.shape[1] / len(picked),
            peaks=None if self.peaks is None else replace(self.peaks, step=self.peaks.step[picked]),
            emphasis=None if self.emphasis is None else self.emphasis[:, picked],
        )

    def _in_steps(self, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Factors (n, B, N) of the columns, and sampled rows (n, B, R, N) divided by their steps, with steps and zero points."""
        factors = scales if self.grows else scales.reciprocal()
        columns = factors[:, self.channel]
        scaled = self.entries * columns.unsqueeze(2)
        peak, below = self._spans(scaled, factors)
        span = peak if below is None else peak + below
        step = torch.where(span == 0, 1.0, span / QMAX[self.number_format])
        zero = None if below is None else (below / step).round_().unsqueeze(-1)
        return columns, scaled.mul_(step.reciprocal().unsqueeze(-1)), step, zero

    def _spans(self, scaled: Tensor, factors: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the steps of every sampled row (n, B, R) reach up to: the largest magnitude; or both sides of 0 under a zero point."""
        if self.peaks is None:
            if self.number_format == "uint8":
                return scaled.amax(dim=-1).clamp_min(0), -scaled.amin(dim=-1).clamp_max(0)
            return scaled.abs().amax(dim=-1), None
        given = self.peaks

        def spread(values: Tensor) -> Tensor:
            largest = (values * factors[:, given.channel].unsqueeze(1)).amax(dim=-1) * given.factor
            return largest[:, given.step].unsqueeze(1)

        return spread(given.values), None if given.below is None else spread(given.below)


@dataclass(frozen=True, eq=False)
class PartRounding:
    """Roundings of one part of a site.

    Attributes:
        weights: One for each tensor of weights.
        activations: Of the rows; None where they stay in float.
    """

    weights: tuple[Rounding, ...]
    activations: Rounding | None


def measure(
    data: SiteData, part: SitePart, scheme: Scheme, shift: Tensor | None, range_factor: float, rows: int, outputs: int
) -> PartRounding:
    """Roundings of one part of a site: a few passes over x and the weights, no product. Unchecked: see ``check_site_data``.

    Args:
        data: The site.
        part: One of its parts.
        scheme: Number formats and granularities.
        shift: (C,) subtracted from the rows, or None.
        range_factor: Static range relative to the calibrated peak.
        rows: Rows of x that are sampled, at most.
        outputs: Rows of the weights, over all convolution groups, that are sampled, at most.
    """
    offset = None if shift is None else shift[part.channel]
    x_energy = _column_energy(part.x, offset, part.row_weight)
    blocks = by_block(part.weight, part)
    w_energy = _weighed(blocks.square(), outputs_by_block(part)).sum(dim=1).to(torch.float64)
    picked = evenly(part.x.shape[0], rows, part.x.device)
    entries = part.x[picked] if offset is None else part.x[picked] - offset
    emphasis = None if part.row_weight is None else part.row_weight[picked]
    correlated = entries if emphasis is None else entries * emphasis.sqrt().unsqueeze(1)
    directions = _directions(columns_by_block(correlated, part.groups)) * math.sqrt(part.x.shape[0] / len(picked))
    weights = _weight_roundings(part, scheme, blocks, w_energy, x_energy.view(part.groups, -1), directions, outputs)
    if scheme.activations == "none":
        return PartRounding(weights, None)
    activations = Rounding(
        grows=False,
        number_format=scheme.activations,
        entries=entries.unsqueeze(0),
        mass=part.x.shape[0] / len(picked),
        channel=part.channel.unsqueeze(0),
        energy=x_energy.unsqueeze(0),
        partner=w_energy.view(1, -1),
        peaks=_activation_peaks(data, part, scheme, shift, range_factor, picked),
        emphasis=None if emphasis is None else emphasis.unsqueeze(0),
    )
    return PartRounding(weights, activations)


def _activation_peaks(
    data: SiteData, part: SitePart, scheme: Scheme, shift: Tensor | None, range_factor: float, picked: Tensor
) -> FixedPeaks | None:
    channels = torch.arange(data.channels, device=part.x.device)
    rows = part.x.shape[0]
    if scheme.activation_granularity == "static":
        values, below = _sides(data.input_range, shift, asymmetric=scheme.asymmetric)
        return FixedPeaks(
            values=values.unsqueeze(0),
            below=None if below is None else below.unsqueeze(0),
            channel=channels,
            step=torch.zeros_like(picked),
            mass=torch.full((1,), part.mass, dtype=torch.float64, device=part.x.device),
            factor=range_factor,
        )
    if part.sample is None or part.sample_low is None or part.sample_high is None:
        return None
    used, step = torch.unique(part.sample[picked], return_inverse=True)
    found = ChannelRange(part.sample_low[used], part.sample_high[used])
    values, below = _sides(found, shift, asymmetric=scheme.asymmetric)
    return FixedPeaks(
        values=values,
        below=below,
        channel=channels,
        step=step,
        mass=torch.bincount(step, None if part.row_weight is None else part.row_weight[picked]).to(torch.float64)
        * (rows / len(picked)),
        factor=1.0,
    )


def _sides(found: ChannelRange, shift: Tensor | None, *, asymmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Magnitudes of a range after the shift: the larger of both sides, or under a zero point either side."""
    if not asymmetric:
        return found.peaks(shift), None
    high, low = (found.high, found.low) if shift is None else (found.high - shift, found.low - shift)
    return high.clamp_min(0), -low.clamp_max(0)


def _weight_roundings(
    part: SitePart,
    scheme: Scheme,
    blocks: Tensor,
    w_energy: Tensor,
    x_energy: Tensor,
    directions: Tensor,
    wanted: int,
) -> tuple[Rounding, ...]:
    if scheme.is_float:
        return ()
    channel, weight = part.channel.view(part.groups, -1), outputs_by_block(part)
    if scheme.weight_granularity != "tensor":
        columns = blocks.shape[2]
        picked = evenly(blocks.shape[1], -(-wanted // part.groups), blocks.device)
        size = min(scheme.group_size or columns, columns)
        rounding = Rounding(
            grows=True,
            number_format=scheme.weights,
            entries=_by_step(blocks[:, picked], size),
            mass=blocks.shape[1] / len(picked),
            channel=_by_step(channel, size),
            energy=_by_step(w_energy, size),
            partner=_by_step(x_energy, size),
            peaks=None,
            directions=_by_step(directions, size),
            pieces=-(-columns // size),
            emphasis=None if weight is None else weight[:, picked].repeat_interleave(-(-columns // size), dim=0),
        )
        return (rounding,)
    # One step per operator over all of its convolution groups, each of which sees its own columns.
    sizes = [features // part.groups for features in part.out_features]
    found = []
    weights = [None] * len(sizes) if weight is None else torch.split(weight, sizes, dim=1)
    for operator, emphasis in zip(torch.split(blocks, sizes, dim=1), weights, strict=True):
        outputs = operator.shape[1]
        picked = evenly(outputs, -(-wanted // (part.groups * len(sizes))), blocks.device)
        found.append(
            Rounding(
                grows=True,
                number_format=scheme.weights,
                entries=operator[:, picked],
                mass=outputs / len(picked),
                channel=channel,
                energy=_weighed(operator.square(), emphasis).sum(dim=1).to(torch.float64),
                partner=x_energy,
                peaks=FixedPeaks(
                    values=operator.abs().amax(dim=1).view(1, -1),
                    channel=part.channel,
                    step=torch.zeros_like(picked),
                    mass=torch.full((1,), _total(outputs, emphasis), dtype=torch.float64, device=blocks.device),
                    factor=1.0,
                ),
                directions=directions,
                emphasis=None if emphasis is None else emphasis[:, picked],
            )
        )
    return tuple(found)


def _directions(rows: Tensor) -> Tensor:
    """Leading right singular vectors times singular values, (B, r, N), of ``rows`` (B, R, N), by subspace iteration."""
    count = min(_DIRECTIONS, *rows.shape[1:])
    # Rows of the matrix start the iteration: no random numbers, and they lie in the space that is looked for.
    basis = torch.linalg.qr(rows[:, evenly(rows.shape[1], count, rows.device)].mT)[0]
    for _ in range(_SUBSPACE_STEPS):
        basis = torch.linalg.qr(torch.bmm(rows.mT, torch.bmm(rows, basis)))[0]
    # The Gram matrix of a projection is that of its leading singular vectors, in whatever basis it is written.
    factor = torch.linalg.qr(torch.bmm(rows, basis), mode="r")[1]
    return torch.bmm(factor, basis.mT)


def _by_step(values: Tensor, size: int) -> Tensor:
    """(groups, ..., N) as (groups * steps per row, ..., size), the ragged last step padded with zeros."""
    padded = functional.pad(values, (0, -values.shape[-1] % size))
    return padded.view(*values.shape[:-1], -1, size).movedim(-2, 1).flatten(0, 1)


def evenly(count: int, most: int, device: torch.device) -> Tensor:
    """Indices of at most ``most`` of ``count`` rows, evenly spaced."""
    taken = min(count, most)
    return torch.arange(taken, device=device) * count // taken


def _column_energy(x: Tensor, offset: Tensor | None, weight: Tensor | None) -> Tensor:
    """(D,) float64 sums over rows of the squares of ``x - offset``, times the weights (T,) of the rows."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    weights = [None] * -(-x.shape[0] // _ENERGY_ROWS) if weight is None else torch.split(weight, _ENERGY_ROWS)
    for rows, of_rows in zip(torch.split(x, _ENERGY_ROWS), weights, strict=True):
        centred = rows if offset is None else rows - offset
        total += _weighed(centred * centred, of_rows).sum(dim=0)
    return total


def _weighed(squares: Tensor, weight: Tensor | None) -> Tensor:
    """Squares (..., R, N) times the weights (..., R) of their rows; None: 1."""
    return squares if weight is None else squares * weight.unsqueeze(-1)


def _total(rows: int, weight: Tensor | None) -> float:
    """Sum of the weights of the rows of a tensor, a convolution group on average: it has one step for all of them."""
    return float(rows if weight is None else weight.sum(dim=1, dtype=torch.float64).mean())
