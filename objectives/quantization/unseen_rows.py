"""Clipping of rows that nobody has seen: what the rows that set a static range cannot show of its error.

The range of an activation is set by the largest of N rows, so none of them is clipped, or only those that a tighter range is meant
to clip. A further row exceeds the largest of a channel with probability 1 / (N + 1), whatever the distribution; by how much is told by
the next largest ones, to which a generalized Pareto tail is fitted. The wider the range, the less is clipped and the coarser are the
steps; where both cost least is the range of a finite sample. Source: formula fA11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.objectives.calibration.site_layout import read_energies
from alphasmith.objectives.quantization.scheme import QMAX, Scheme
from alphasmith.objectives.smoothing import ChannelRange, Smoothing

#: Largest values of a channel that its tail is fitted to, at most these shares of its rows and of what its samples reach.
_EXCESSES, _SHARE, _SAMPLE_SHARE = 16, 0.125, 0.25
#: Place, among what samples reach, above which rows are counted that come together.
_HIGH = 3
#: Fewest excesses that tell the shape of a tail; with fewer it is taken to be exponential.
_SHAPED = 8
#: Shapes that are believed: the mean square of an excess is finite below 1/2.
_SHAPES = (-0.3, 0.3)
#: Largest spacings of a channel that are left out: some tokens have values of their own, and a gap between them and the others is no
#: tail. Largest multiple of the mean that a spacing counts as, where the shape is told.
_TRIMMED, _CLUSTER = 2, 6.0
#: Weight of what is expected to be clipped against rounding. Few rows are clipped, and those by much: above the weight 1 the
#: expected loss hardly grows and the loss of unlucky rows falls (docs/performance.md). Where rows that come together are counted, which
#: expects rather too much than too little, none is needed.
_CAUTION, _CAUTION_TOGETHER = 4.0, 1.0
#: Widest range that is looked at, over the abs-max, and points of each of two grids up to there.
_WIDEST, _POINTS = 4.0, 9
#: e4m3 rounds in proportion to the value, which no range changes, down to its subnormal numbers, which are this far apart.
_FP8_SUBNORMAL_STEP = 2.0**-9
#: Floor of magnitudes, so that their logarithms are finite, and of what is divided by.
_NOTHING = 1e-140
#: Scales of a tail after which nothing is left of it, and the shape below which it is exponential.
_FAR, _STRAIGHT = 1e9, 1e-6


class UnseenClipping:
    """Squared error that clipping is expected to make at the output of a site on as many new rows as it has.

    Attributes:
        idle: Whether there is nothing to clip: no static range.
        shape: Shape of the tails, dimensionless: 0 exponential, above 0 heavier, below 0 bounded.

    Args:
        data: The site, with the range of all rows that were seen. Unchecked: see ``check_site_data``.
        scheme: Number formats and granularities.
    """

    def __init__(self, data: SiteData, scheme: Scheme) -> None:
        self.idle = not scheme.static
        # A range with a zero point has two ends, each set by its own side; a symmetric one has one size.
        self._two_ends = scheme.asymmetric
        self.shape = 0.0
        self._data = data
        if self.idle:
            return
        self._steps = QMAX[scheme.activations] / (_FP8_SUBNORMAL_STEP if scheme.activations == "fp8" else 1.0)
        self._read = read_energies(data)
        self._mean, self._square = _moments(data)
        self._tails = _Tails.of(data, self._read)
        self.shape = self._tails.shape

    @torch.no_grad()
    def error(self, logs: Tensor, factor: Tensor | float, shift: Tensor | None = None) -> Tensor:
        """Expected squared error under candidates, (n,) float64.

        Args:
            logs: (n, C) float64 log s.
            factor: (n,) or one static range factor, see ``Smoothing``.
            shift: (n, C) or (C,) subtracted from every row; None: nothing.
        """
        if self.idle:
            return logs.new_zeros(logs.shape[0])
        tails, moved = self._tails.to(logs.device), self._moved(logs, shift)
        peak = self._sizes(tails.largest - moved, logs).amax(dim=-1, keepdim=True)
        reach = torch.as_tensor(factor, dtype=logs.dtype, device=logs.device).reshape(-1, 1) * (peak + logs).exp()
        beyond = reach + moved - tails.largest
        inside = beyond.clamp_max(0)
        mean = tails.scale / (1 - tails.shape)
        clipped = tails.square * tails.left(beyond) + inside.square() - 2 * inside * mean
        total: Tensor = (clipped * tails.read).sum(dim=(0, 2))
        return total

    @torch.no_grad()
    def noise(self, logs: Tensor, factor: float, shift: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
        """The same and its gradient by ``logs``, (n,) and (n, C), for descent: with a smooth maximum over channels.

        Args:
            logs: (n, C) float64 log s.
            factor: Static range factor, at least 1.
            shift: (C,) subtracted from every row; None: nothing.
            power: Sharpness of the maximum.
        """
        tails, moved = self._tails.to(logs.device), self._moved(logs, shift)
        peaks = power * self._sizes(tails.largest - moved, logs)
        peak = peaks.logsumexp(dim=-1, keepdim=True)
        reach = factor * (peak / power + logs).exp()
        beyond = reach + moved - tails.largest
        left = tails.left(beyond)
        error = left * tails.square * tails.read
        # Of a wider range: minus twice the mean that is left of an excess.
        slope = -error * (1 - 2 * tails.shape) / (tails.scale + tails.shape * beyond.clamp_min(0)).clamp_min(_NOTHING)
        outward = slope * reach if self._two_ends else slope.sum(dim=0, keepdim=True) * reach
        by_scale = outward - outward.sum(dim=-1, keepdim=True) * (peaks - peak).exp()
        return error.sum(dim=(0, 2)), by_scale.sum(dim=0)

    @torch.no_grad()
    def best_factor(self, smoothing: Smoothing) -> float:
        """Static range factor, at least 1, that costs least in rounding and expected clipping; 1 where nothing is static.

        Args:
            smoothing: Scales and shift; its own factor plays no part.
        """
        if self.idle:
            return 1.0
        device = self._read.device
        logs = smoothing.scales.to(device, torch.float64).log().unsqueeze(0)
        shift = None if smoothing.shift is None else smoothing.shift.to(device, torch.float64)
        low, high = 0.0, math.log(_WIDEST)
        best = low
        for _ in range(2):
            grid = torch.linspace(low, high, _POINTS, dtype=torch.float64, device=device)
            cost = self._rounding(logs, grid.exp(), shift) + self._tails.caution * self.error(
                logs.expand(_POINTS, -1), grid.exp(), shift
            )
            best = float(grid[int(cost.argmin())])
            step = (high - low) / (_POINTS - 1)
            low, high = max(0.0, best - step), min(math.log(_WIDEST), best + step)
        return math.exp(best)

    def _rounding(self, logs: Tensor, factors: Tensor, shift: Tensor | None) -> Tensor:
        """(n,) squared error of rounding under factors (n,); what is far below a step loses itself, no more."""
        found = self._data.input_range
        low, high = ChannelRange(found.low.to(logs), found.high.to(logs)).edges(logs[0].exp(), shift)
        peak = high - low if self._two_ends else torch.maximum(high, -low)
        noise = (2 * ((factors * peak / self._steps).log().unsqueeze(1) + logs)).exp() / 12
        own = self._square.to(logs)
        if shift is not None:
            own = (own - 2 * shift * self._mean.to(logs) + shift.square()).clamp_min(0)
        norm = (noise.square() + own.square()).clamp_min(_NOTHING).sqrt()
        total: Tensor = (noise / norm * own * self._read.to(logs)).sum(dim=1)
        return total

    def _sizes(self, largest: Tensor, logs: Tensor) -> Tensor:
        """Log magnitudes that set the range, after scaling, of every side (2, n, C), or of the larger one (1, n, C)."""
        sizes = _log(largest)
        return (sizes if self._two_ends else sizes.amax(dim=0, keepdim=True)) - logs

    def _moved(self, logs: Tensor, shift: Tensor | None) -> Tensor:
        """(2, n or 1, C) what the shift takes from either side."""
        if shift is None:
            return logs.new_zeros(2, 1, 1)
        moved = shift.to(logs).reshape(-1, logs.shape[1])
        return torch.stack([moved, -moved])


@dataclass(frozen=True, eq=False)
class _Tails:
    """Tails of C channels on two sides, that of large and that of small values, float64.

    Attributes:
        largest: (2, 1, C) the largest value seen, and minus the smallest.
        scale: (2, 1, C) scale of the tail beyond it, in the unit of the activation.
        square: (2, 1, C) mean square of what exceeds it, over the rows that do.
        read: (C,) error at the output, over all rows, for every unit of it: rows that exceed it are as rare as they are.
        shape: Shape of all of them.
        caution: Weight of what is expected to be clipped against rounding.
    """

    largest: Tensor
    scale: Tensor
    square: Tensor
    read: Tensor
    shape: float
    caution: float

    @classmethod
    def of(cls, data: SiteData, read: Tensor) -> _Tails:
        """Fitted to the spacings of the largest values, of which those that part a cluster from the rest are left out."""
        largest = torch.stack([data.input_range.high.double(), -data.input_range.low.double()])
        rows = min(part.x.shape[0] for part in data.parts)
        seen = data.rows_seen or max(part.x.shape[0] for part in data.parts)
        scale, shape, told_by = _fitted(_largest_values(data, _count(rows, _SHARE)), (seen + 1) / rows)
        samples, together = data.samples_seen, 1.0
        # A tail that few values tell of deserves no weight beyond its own.
        caution = max(1.0, _CAUTION * told_by / _EXCESSES)
        if data.tops is not None and samples < seen and _count(samples, _SAMPLE_SHARE) >= _SHAPED:
            # Rows of one sample are alike, so the largest of all may come from few; what counts is how far samples differ.
            tops = data.tops[:, : _count(samples, _SAMPLE_SHARE) + 1].double()
            apart, shape, _ = _fitted(tops, (samples + 1) / samples)
            scale = torch.maximum(scale, apart)
            together, caution = _rows_together(data, tops, seen), _CAUTION_TOGETHER
        scale = scale.clamp_min(_NOTHING)
        return cls(
            largest=largest.unsqueeze(1),
            scale=scale.unsqueeze(1),
            square=(2 * scale.square() / ((1 - shape) * (1 - 2 * shape))).unsqueeze(1),
            # Exchangeable rows: each of N + 1 is the largest with the same probability; where rows come together, samples are.
            read=read * together / (seen + 1),
            shape=shape,
            caution=caution,
        )

    def left(self, beyond: Tensor) -> Tensor:
        """Share of that mean square that is left ``beyond`` the largest value, elementwise; 1 up to there."""
        steps = (beyond.clamp_min(0) / self.scale).clamp_max(_FAR)
        if abs(self.shape) < _STRAIGHT:
            return torch.exp(-steps)
        return (1 + self.shape * steps).clamp_min(_NOTHING) ** (2 - 1 / self.shape)

    def to(self, device: torch.device) -> _Tails:
        """The same on ``device``."""
        if self.read.device == device:
            return self
        return replace(
            self,
            largest=self.largest.to(device),
            scale=self.scale.to(device),
            square=self.square.to(device),
            read=self.read.to(device),
        )


def _log(values: Tensor) -> Tensor:
    return values.clamp_min(_NOTHING).log()


def _fitted(tops: Tensor, outward: float) -> tuple[Tensor, float, int]:
    """Scale (2, C) and shape of tails, and the number of spacings that tell of them, from the largest values (2, k + 1, C).

    ``outward``: 1 / probability of exceeding the largest value, over the number of values that the largest ones were taken from.
    """
    spacings = [_spacings(side) for side in tops]
    count = len(spacings[0])
    if count == 0:
        return torch.zeros_like(tops[:, 0]), 0.0, 0
    scale = torch.stack([_trimmed_mean(values) for values in spacings])
    # The longer side of a channel tells the shape; the other one may be an edge, as that of a ReLU is. Which is longer must not be said
    # by the largest value itself, whose distance to the next would then seem larger than it is.
    upper = tops[0, -1] >= tops[1, -1]
    shape = _shape(torch.where(upper, spacings[0], spacings[1]), torch.where(upper, scale[0], scale[1]))
    # From where the mean of the spacings is at home to the largest of all that were seen.
    return scale * max(1.0, outward * count / math.e) ** shape, shape, count


def _count(values: int, share: float) -> int:
    """Spacings that tails are fitted to, of so many values."""
    return max(1, min(_EXCESSES, int(values * share)))


def _rows_together(data: SiteData, tops: Tensor, seen: int) -> float:
    """Rows, at least 1, that exceed a high value together in a sample that does, mean over channels and sides; ``seen``: all rows."""
    place = min(_HIGH, tops.shape[1] - 1)
    shares = []
    for part in data.parts:
        for edges, sign in zip(tops[:, place], (1.0, -1.0), strict=True):
            shares.append((sign * part.x > edges[part.channel].to(part.x)).to(torch.float64).mean())
    return max(1.0, seen * float(torch.stack(shares).mean()) / place)


def _spacings(top: Tensor) -> Tensor:
    """(k, C) of k + 1 largest values: i times the i-th one's distance to the next; exponential tails make all of them alike."""
    order = torch.arange(1, top.shape[0], dtype=torch.float64, device=top.device)
    return order.unsqueeze(1) * (top[:-1] - top[1:])


def _trimmed_mean(spacings: Tensor) -> Tensor:
    """(C,) mean of exponential variables (k, C), from all but the largest few."""
    count = spacings.shape[0]
    kept = count - min(_TRIMMED, count // 2)
    # The i-th smallest of k exponential variables of mean 1 is expected to be 1/k + 1/(k - 1) + ... + 1/(k - i + 1).
    expected = [sum(1 / (count - j) for j in range(i + 1)) for i in range(kept)]
    return spacings.sort(dim=0).values[:kept].sum(dim=0) / sum(expected)


def _shape(spacings: Tensor, scale: Tensor) -> float:
    """Shape of generalized Pareto tails, the same for all channels: the i-th spacing is in proportion to i^-shape."""
    live = scale > 0
    if spacings.shape[0] < _SHAPED or not bool(live.any()):
        return 0.0
    typical = (spacings[:, live] / scale[live]).clamp_max(_CLUSTER).mean(dim=1)
    place = torch.arange(1, len(typical) + 1, dtype=torch.float64, device=typical.device).log()
    place = place - place.mean()
    slope = float((place * typical.clamp_min(_NOTHING).log()).sum() / place.square().sum())
    return min(max(-slope, _SHAPES[0]), _SHAPES[1])


def _largest_values(data: SiteData, count: int) -> Tensor:
    """(2, k + 1, C) float64, descending: the largest values of every channel in the rows kept, and of minus its values."""
    most = min(count + 1, min(part.x.shape[0] for part in data.parts))
    sides = []
    for sign in (1.0, -1.0):
        found = [
            _by_channel(part, (sign * part.x).topk(most, dim=0).values, data.channels, most) for part in data.parts
        ]
        sides.append(torch.cat(found).topk(most, dim=0).values.double())
    return torch.stack(sides)


def _by_channel(part: SitePart, top: Tensor, channels: int, count: int) -> Tensor:
    """The largest values (count, C) of every channel, of those (count, D) of every column."""
    order = part.channel.argsort(stable=True)
    most = int(torch.bincount(part.channel, minlength=channels).max())
    place = torch.arange(len(order), device=order.device)
    first = torch.searchsorted(part.channel[order], torch.arange(channels, device=order.device))
    channel = part.channel[order]
    spread = top.new_full((count, channels, most), -math.inf)
    spread[:, channel, place - first[channel]] = top[:, order]
    return spread.permute(0, 2, 1).reshape(-1, channels).topk(count, dim=0).values


def _moments(data: SiteData) -> tuple[Tensor, Tensor]:
    """(C,) float64 mean of every channel over the rows kept, and its mean square."""
    total = torch.zeros(data.channels, dtype=torch.float64, device=data.device)
    squares, count = torch.zeros_like(total), torch.zeros_like(total)
    for part in data.parts:
        total.index_add_(0, part.channel, part.x.sum(dim=0, dtype=torch.float64))
        squares.index_add_(0, part.channel, part.x.square().sum(dim=0, dtype=torch.float64))
        rows = torch.full_like(part.channel, part.x.shape[0], dtype=torch.float64)
        count.index_add_(0, part.channel, rows)
    count = count.clamp_min(1)
    return total / count, squares / count
