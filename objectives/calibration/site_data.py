"""The data of one site: all that scoring its scales needs, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from alphasmith.objectives.smoothing import ChannelRange, tie_index


@dataclass(frozen=True, kw_only=True)
class SitePart:
    """Operators of a site that read the same rows, with their weights concatenated over outputs.

    Linear operators of a site share one part. Convolutions with different kernels or strides each have their own,
    because their patches differ.

    Attributes:
        operators: Names of the operators, in the order in which their rows stand in ``weight``.
        x: (T, D) float32 rows; D = C for linear, channels*kernel (flattened patch, all groups) for conv.
        weight: (O, D // groups) float32.
        out_features: Rows of ``weight`` that belong to each operator; sums to O. A per-tensor weight scale is one per operator.
        channel: (D,) int64: the site channel of every column of x.
        groups: Convolution groups: outputs o in block g see columns of block g only. 1 = dense.
        sample: (T,) int64 or None: for conv, the row of ``sample_low`` each patch was cut from.
        sample_low: (S, C) float32 or None: for conv, smallest value per channel of every sampled input, at most 0 where the
            convolution pads with zeros.
        sample_high: (S, C) float32 or None: likewise the largest value; together the input's dynamic range.
        row_weight: (T,) float32 or None: what a squared error in a row counts, not negative; None: 1 (formula fA10).
        output_weight: (O,) float32 or None: likewise at an output.
    """

    operators: tuple[str, ...]
    x: torch.Tensor
    weight: torch.Tensor
    out_features: tuple[int, ...]
    channel: torch.Tensor
    groups: int = 1
    sample: torch.Tensor | None = None
    sample_low: torch.Tensor | None = None
    sample_high: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None
    output_weight: torch.Tensor | None = None

    @property
    def mass(self) -> float:
        """Sum of the weights of the rows; T where they have none."""
        return float(self.x.shape[0] if self.row_weight is None else self.row_weight.sum(dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class ProducerRows:
    """A quantized weight W whose rows the scales of a site divide, by its R rows.

    Attributes:
        channel: (R,) int64 site channel of every row, -1 where it is not divided.
        absmax: (R,) float32 largest magnitude of every row.
        input_energy: (R,) float64 mean over positions of the summed squares of what multiplies the row.
        energy: (R,) float64 mean square of the row's product.
        passed: (R,) float64 share of the row's output that the site reads, in energy: 0 to 1; 0 for rows that are not divided.
    """

    channel: torch.Tensor
    absmax: torch.Tensor
    input_energy: torch.Tensor
    energy: torch.Tensor
    passed: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """One site's rows, weights and statistics.

    Attributes:
        name: Site name.
        parts: One or more parts that share the C channels.
        activation_statistics: Statistic name (``absmax``, ``percentile``, ``rms``) -> (C,) a_j, float32; the first one is the
            default. All are over ALL calibration data.
        input_range: Range of every channel over ALL calibration data: the static quantization range.
        weight_absmax: (C,) w_j = max over every output of every operator of |W_:j|.
        ties: (C,) int64, see ``Site.ties``.
        producers: The quantized weights that the scales divide; empty where a norm takes them, or a division at run time.
        rows_seen: Rows that statistics and ranges were taken over; 0: those of the largest part.
        tops: (2, k, C) float32, descending: the largest of what samples reach in every channel, and of minus what they reach down to. None: every
            row is a sample of its own.
        samples_seen: Samples that these were taken over.
    """

    name: str
    parts: tuple[SitePart, ...]
    activation_statistics: Mapping[str, torch.Tensor]
    input_range: ChannelRange
    weight_absmax: torch.Tensor
    ties: torch.Tensor
    producers: tuple[ProducerRows, ...] = ()
    rows_seen: int = 0
    tops: torch.Tensor | None = None
    samples_seen: int = 0

    @property
    def channels(self) -> int:
        """C."""
        return int(self.weight_absmax.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.weight_absmax.device

    @property
    def activation_statistic(self) -> torch.Tensor:
        """(C,) a_j of the default statistic."""
        return next(iter(self.activation_statistics.values()))

    @property
    def producer_absmax(self) -> torch.Tensor | None:
        """(C,) float32 p_j = abs-max of all rows that the scale of a channel divides; None where there are none."""
        if not self.producers:
            return None
        peaks = torch.zeros_like(self.weight_absmax)
        for rows in self.producers:
            raise_peaks(peaks, rows.absmax, rows.channel)
        return peaks

    def mean(self) -> torch.Tensor:
        """(C,) mean of every channel over the rows, one value within a tie: a shift that rows outside the calibrated range
        do not turn against, unlike the middle of that range.
        """
        index = tie_index(self.ties, self.channels)
        total = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=self.device)
        count = torch.zeros_like(total)
        for part in self.parts:
            tie = index[part.channel]
            total.index_add_(0, tie, part.x.sum(dim=0, dtype=torch.float64))
            count.index_add_(0, tie, torch.full_like(tie, part.x.shape[0], dtype=torch.float64))
        return (total / count)[index].to(torch.float32)

    def magnitudes(self, statistic: str, shift: torch.Tensor | None = None) -> torch.Tensor:
        """(C,) a_j of ``statistic`` after ``shift`` (C,) is subtracted from the rows.

        Under abs-max that is exactly the largest shifted magnitude. Percentile and RMS of shifted rows are not known after
        calibration; they are taken to shrink as the abs-max does.
        """
        values = self.activation_statistics[statistic]
        if shift is None:
            return values
        before, after = self.input_range.peaks(), self.input_range.peaks(shift)
        return torch.where(before > 0, values * (after / before.clamp_min(torch.finfo(before.dtype).tiny)), values)


def to_device(data: SiteData, device: torch.device | str) -> SiteData:
    """The same data with every tensor on ``device``."""

    def move(record: SiteData | SitePart | ProducerRows) -> dict[str, Any]:
        values = {f.name: getattr(record, f.name) for f in fields(record)}
        return {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}

    parts = tuple(replace(part, **move(part)) for part in data.parts)
    producers = tuple(replace(rows, **move(rows)) for rows in data.producers)
    statistics = {name: value.to(device) for name, value in data.activation_statistics.items()}
    return replace(
        data,
        parts=parts,
        producers=producers,
        activation_statistics=statistics,
        input_range=data.input_range.to(device),
        **move(data),
    )


def raise_peaks(peaks: torch.Tensor, absmax: torch.Tensor, channel: torch.Tensor) -> None:
    """Raise, in place, the largest magnitude (C,) of every channel to those (R,) of rows that belong to it; -1: to none."""
    divided = channel >= 0
    peaks.scatter_reduce_(0, channel[divided], absmax[divided].to(peaks), "amax")
