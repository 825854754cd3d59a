"""Statistics of a stream of rows in memory that does not grow with the stream.

Shapes: T rows, C channels, D columns, S samples. Sources: claim A-1 (abs-max per channel over all samples), trap T7
(dead channels, non-finite values). Percentile and RMS withstand single outlier tokens, which set an abs-max alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from alphasmith.objectives.errors import InputError, NonFiniteError

#: Bins of the percentile histogram per factor of two; their geometric middle is reported.
BINS_PER_OCTAVE = 16
#: Magnitudes below 2**LOWEST_EXPONENT are reported as 0, those from 2**HIGHEST_EXPONENT on as the channel's abs-max.
LOWEST_EXPONENT = -28
HIGHEST_EXPONENT = 20
#: Largest relative error of a percentile whose true value lies between those two magnitudes.
PERCENTILE_ERROR = 2.0 ** (0.5 / BINS_PER_OCTAVE) - 1.0
#: Bins of one channel: underflow, the octaves, overflow.
PERCENTILE_BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_OCTAVE + 2

#: Elements converted at a time; bounds the temporary memory of one update to ``CHUNK_ELEMENTS * CHUNK_BYTES``.
CHUNK_ELEMENTS = 1 << 18
#: Temporary bytes per element: a float32 copy, a float64 copy with its squares, a float32 magnitude and int64 indices.
CHUNK_BYTES = 32


class ChannelStatistics:
    """Running statistics per channel of rows (T, C), independent of the order and the batching of the rows.

    Abs-max, minimum, maximum, count and percentile are independent of order and of merging to the bit; RMS up to float64
    rounding. Everything is 0 before the first row. Source: claim A-1 (a_j).

    Args:
        channels: C, at least 1.
        percentiles: Keep the histogram that ``percentile`` reads: C * PERCENTILE_BINS * 4 bytes.
        device: Where the statistics are kept; rows are moved there.

    Raises:
        InputError: ``channels`` is below 1.
    """

    def __init__(self, channels: int, *, percentiles: bool = True, device: torch.device | str = "cpu") -> None:
        if channels < 1:
            raise InputError("channels", f"{channels} is below 1", "give the number of columns of the rows")
        self._channels = channels
        self._count = 0
        self._low = torch.full((channels,), math.inf, dtype=torch.float32, device=device)
        self._high = torch.full((channels,), -math.inf, dtype=torch.float32, device=device)
        self._squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self._histogram = (
            torch.zeros(channels, PERCENTILE_BINS, dtype=torch.int32, device=device) if percentiles else None
        )

    @property
    def channels(self) -> int:
        """C."""
        return self._channels

    @property
    def count(self) -> int:
        """Number of rows seen."""
        return self._count

    @property
    def minimum(self) -> torch.Tensor:
        """(C,) float32 smallest value."""
        return self._low.clone() if self._count else torch.zeros_like(self._low)

    @property
    def maximum(self) -> torch.Tensor:
        """(C,) float32 largest value."""
        return self._high.clone() if self._count else torch.zeros_like(self._high)

    @property
    def absmax(self) -> torch.Tensor:
        """(C,) float32 largest magnitude, exact (claim A-1: a_j)."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def rms(self) -> torch.Tensor:
        """(C,) float32 root mean square; sums are float64."""
        return (self._squares / max(self._count, 1)).sqrt().float()

    def percentile(self, q: float) -> torch.Tensor:
        """Percentile of the magnitudes of each channel.

        The order statistic of rank ceil(q / 100 * (count - 1)), as ``torch.quantile(interpolation="higher")`` defines it, read
        from a histogram with logarithmic bins: relative error at most ``PERCENTILE_ERROR`` (2.2 %) for magnitudes between
        2**-28 and 2**20; below it is 0, above it and for the highest rank it is the exact abs-max.

        Args:
            q: Percent, in (0, 100].

        Returns:
            (C,) float32.

        Raises:
            InputError: ``q`` is out of range, or the statistics were made with ``percentiles=False``.
        """
        if not 0.0 < q <= 100.0:
            raise InputError("percentile", f"{q} is not in (0, 100]", "use for example 99.9")
        if self._histogram is None:
            raise InputError("percentile", "no histogram was kept", "make the statistics with percentiles=True")
        absmax = self.absmax
        rank = math.ceil(q / 100.0 * (self._count - 1))
        if rank >= self._count - 1:
            return absmax
        step = max(1, CHUNK_ELEMENTS // PERCENTILE_BINS)
        bins = torch.cat([_bin_of_rank(part, rank) for part in torch.split(self._histogram, step)])
        middle = torch.exp2((bins.double() - 0.5) / BINS_PER_OCTAVE + LOWEST_EXPONENT).float()
        value = torch.where(bins == 0, torch.zeros_like(middle), middle)
        return torch.where(bins == PERCENTILE_BINS - 1, absmax, torch.minimum(value, absmax))

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows. On an error nothing is changed.

        Args:
            rows: (T, C) floating; strided views are read without a copy of the whole. T may be 0.

        Raises:
            InputError: Wrong shape or dtype, or more than 2**31 - 1 rows in total.
            NonFiniteError: A value is NaN or infinite (in float32); the caller knows the tensor's name.
        """
        if rows.dim() != 2 or rows.shape[1] != self._channels or not rows.is_floating_point():
            raise InputError(
                "rows",
                f"{tuple(rows.shape)} {rows.dtype} is not a floating (T, {self._channels})",
                "flatten the leading dimensions",
            )
        if rows.shape[0] == 0:
            return
        _check_count(self._count + rows.shape[0])
        chunks = torch.split(rows.detach(), max(1, CHUNK_ELEMENTS // self._channels))
        low = torch.stack([self._convert(chunk).amin(dim=0) for chunk in chunks]).amin(dim=0)
        high = torch.stack([self._convert(chunk).amax(dim=0) for chunk in chunks]).amax(dim=0)
        # amin and amax propagate NaN, so C values answer for all T * C of them. (aminmax is up to ten times slower here.)
        bad = ~(torch.isfinite(low) & torch.isfinite(high))
        if bool(bad.any()):
            channel = int(bad.nonzero()[0, 0])
            raise NonFiniteError(f"NaN or infinite values in {int(bad.sum())} channel(s), first in channel {channel}")
        self._low = torch.minimum(self._low, low)
        self._high = torch.maximum(self._high, high)
        self._count += rows.shape[0]
        for chunk in chunks:
            values = self._convert(chunk)
            self._squares += values.double().square_().sum(dim=0)
            if self._histogram is not None:
                _count_magnitudes(self._histogram, values)

    def merge(self, other: ChannelStatistics) -> None:
        """Take in everything ``other`` has seen; ``other`` is not changed.

        Raises:
            InputError: The channels differ, or only one of the two keeps a histogram.
        """
        if other.channels != self._channels or (other._histogram is None) != (self._histogram is None):
            raise InputError(
                "other",
                f"its {other.channels} channels or its histogram do not match {self._channels} channels",
                "merge statistics of the same tensor made with the same settings",
            )
        _check_count(self._count + other._count)
        device = self._low.device
        self._low = torch.minimum(self._low, other._low.to(device))
        self._high = torch.maximum(self._high, other._high.to(device))
        self._squares = self._squares + other._squares.to(device)
        self._count += other._count
        if self._histogram is not None and other._histogram is not None:
            self._histogram += other._histogram.to(device)

    def _convert(self, chunk: torch.Tensor) -> torch.Tensor:
        return chunk.to(device=self._low.device, dtype=torch.float32)


def _check_count(count: int) -> None:
    if count > torch.iinfo(torch.int32).max:
        raise InputError("rows", f"{count} rows overflow the histogram's 32-bit counts", "calibrate on less data")


def _count_magnitudes(histogram: torch.Tensor, values: torch.Tensor) -> None:
    """Add the magnitudes of values (T, C) float32 to histogram (C, PERCENTILE_BINS) int32."""
    position = values.abs().log2_().sub_(LOWEST_EXPONENT).mul_(BINS_PER_OCTAVE).floor_().add_(1)
    bins = position.clamp_(0, PERCENTILE_BINS - 1).to(torch.int64)
    bins += torch.arange(histogram.shape[0], device=bins.device) * PERCENTILE_BINS
    flat = bins.flatten()
    histogram.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def _bin_of_rank(histogram: torch.Tensor, rank: int) -> torch.Tensor:
    """(C,) int64: the bin that holds the magnitude of 0-based ``rank`` in ascending order."""
    target = torch.full((histogram.shape[0], 1), rank, dtype=torch.int64, device=histogram.device)
    return torch.searchsorted(histogram.cumsum(dim=1, dtype=torch.int64), target, right=True).flatten()


def priorities(seed: int, samples: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Random numbers of rows, each decided by its own identity: no order and no batch has a part in them.

    Args:
        seed: 64 bits at most.
        samples: (T,) int64 number of the sample a row came from.
        places: (T,) int64 place of the row within its sample.

    Returns:
        (T,) float64 in [0, 1), by the finalizer of SplitMix64 applied to seed, sample and place in turn.
    """
    state = np.uint64(seed & (2**64 - 1))
    mixed = _mix(_mix(samples.numpy().astype(np.uint64) ^ _mix(np.array([state]))) ^ places.numpy().astype(np.uint64))
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Neighbouring numbers made unlike. Source: SplitMix64 (Steele, Lea, Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


#: Largest values of samples that are kept of every channel and side.
SAMPLE_TOPS = 17


class SampleExtremes:
    """The largest and smallest values that samples reach, per channel: rows of one sample are alike, samples are not.

    Args:
        channels: C, at least 1.
        device: Where they are kept.
    """

    def __init__(self, channels: int, *, device: torch.device | str = "cpu") -> None:
        self._tops = torch.full((2, 0, channels), -math.inf, dtype=torch.float32, device=device)
        self._seen = 0

    @property
    def seen(self) -> int:
        """Samples offered so far."""
        return self._seen

    @property
    def tops(self) -> torch.Tensor:
        """(2, k, C) float32, descending: the largest of the samples' largest values, and of minus their smallest ones; k = min(seen, 17)."""
        return self._tops.clone()

    def update(self, high: torch.Tensor, low: torch.Tensor) -> None:
        """Offer samples.

        Args:
            high: (B, C) largest value of every channel in each sample, -inf in a sample without rows.
            low: (B, C) smallest value likewise, inf in a sample without rows.
        """
        filled = torch.isfinite(high).all(dim=1)
        new = torch.stack([high[filled], -low[filled]]).to(self._tops)
        self._seen += int(filled.sum())
        both = torch.cat([self._tops, new], dim=1)
        self._tops = both.topk(min(SAMPLE_TOPS, both.shape[1]), dim=1).values


class RowReservoir:
    """Uniform random sample, without replacement, of the rows of a stream, in bounded memory.

    Every row has a random priority; the ``capacity`` highest stay. The result does not depend on the order of the rows, nor on
    how the stream was cut into updates, and the sample for a smaller capacity is a prefix of the sample for a larger one.

    Args:
        capacity: Rows kept at most, at least 1.

    Raises:
        InputError: ``capacity`` is below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InputError("rows", f"{capacity} is below 1", "keep at least one row")
        self._capacity = capacity
        self._seen = 0
        self._priorities = torch.empty(0, dtype=torch.float64)
        self._tags = torch.empty(0, dtype=torch.int64)
        self._rows: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Rows kept at most."""
        return self._capacity

    @property
    def seen(self) -> int:
        """Rows offered so far."""
        return self._seen

    @property
    def rows(self) -> torch.Tensor:
        """(T, D) float32 copy on the CPU, T = min(seen, capacity), in random order: every prefix is a random subset.

        (0, 0) before the first row.
        """
        if self._rows is None:
            return torch.empty(0, 0)
        return self._rows[self._order()]

    @property
    def tags(self) -> torch.Tensor:
        """(T,) int64 tags of ``rows``; -1 where none was given."""
        return self._tags[self._order()]

    def update(self, rows: torch.Tensor, priorities: torch.Tensor, tags: torch.Tensor | None = None) -> None:
        """Offer rows.

        Args:
            rows: (T, D) floating, T may be 0.
            priorities: (T,) float64, uniform and independent of each other.
            tags: (T,) integer, e.g. the sample each row came from, or None.

        Raises:
            InputError: A shape contradicts another, or D changed.
        """
        if rows.dim() != 2:
            raise InputError("rows", f"{tuple(rows.shape)} is not (T, D)", "flatten the leading dimensions")
        if priorities.shape != rows.shape[:1]:
            raise InputError("priorities", f"{tuple(priorities.shape)} is not ({len(rows)},)", "give one per row")
        self.offer(priorities, lambda index: rows[index.to(rows.device)], tags)

    def offer(
        self,
        priorities: torch.Tensor,
        gather: Callable[[torch.Tensor], torch.Tensor],
        tags: torch.Tensor | None = None,
    ) -> int:
        """Offer rows that are made only if they are kept.

        Args:
            priorities: (T,) float64, one for each row offered, uniform and independent of each other.
            gather: Maps the ascending indices (P,) int64, on the CPU, of the rows that stay (P <= capacity) to the rows (P, D).
            tags: (T,) integer or None.

        Returns:
            P, the number of rows that entered; 0 when the sample did not change.

        Raises:
            InputError: ``tags`` or the gathered rows have the wrong shape.
        """
        priorities, count = priorities.to(torch.float64), priorities.shape[0]
        if tags is not None and tags.shape != (count,):
            raise InputError("tags", f"{tuple(tags.shape)} is not ({count},)", "give one tag per row")
        kept = self._priorities.shape[0]
        index = torch.arange(count)
        if kept == self._capacity:
            index = index[priorities > self._priorities.min()]
        ranked = torch.cat([self._priorities, priorities[index]])
        if ranked.shape[0] > self._capacity:
            stay = torch.zeros(ranked.shape[0], dtype=torch.bool)
            stay[ranked.topk(self._capacity).indices] = True
        else:
            stay = torch.ones(ranked.shape[0], dtype=torch.bool)
        entering = index[stay[kept:]]
        if entering.shape[0]:
            rows = gather(entering)
            self._check(rows, entering.shape[0])
            self._place(rows, stay[:kept], priorities[entering], None if tags is None else tags.cpu()[entering])
        self._seen += count
        return int(entering.shape[0])

    def _check(self, rows: torch.Tensor, count: int) -> None:
        columns = rows.shape[-1] if self._rows is None else self._rows.shape[1]
        if rows.shape != (count, columns):
            raise InputError(
                "rows", f"{tuple(rows.shape)} is not ({count}, {columns})", "offer rows of the same tensor every time"
            )

    def _place(
        self, rows: torch.Tensor, survivors: torch.Tensor, priorities: torch.Tensor, tags: torch.Tensor | None
    ) -> None:
        """Write entering rows over the slots of those that left, then behind the last one."""
        if self._rows is None:
            self._rows = torch.empty(self._capacity, rows.shape[1], dtype=torch.float32)
        kept = survivors.shape[0]
        free = (~survivors).nonzero().flatten()
        total = int(survivors.sum()) + rows.shape[0]
        slots = torch.cat([free, torch.arange(kept, total)])
        self._priorities = torch.cat([self._priorities, priorities.new_empty(total - kept)])
        self._tags = torch.cat([self._tags, self._tags.new_empty(total - kept)])
        self._priorities[slots] = priorities
        self._tags[slots] = -1 if tags is None else tags.to(torch.int64)
        self._rows[slots] = rows.detach().to(device="cpu", dtype=torch.float32)

    def _order(self) -> torch.Tensor:
        return self._priorities.argsort(descending=True)
