"""Exact loss of a site: its rows and weights quantized under given scales, compared with the float output.

    loss = sum ||Q((X - z) / s) Q(W s)^T + W z - X W^T||^2 / sum ||X W^T||^2          over all parts of the site

Rounding of the producers whose rows are divided by s is added, see ``producer_noise``, and on demand what clipping of unseen rows is
expected to add, see ``quantization.unseen_rows``. One candidate costs at most one fp32 product of the site plus element-wise work in preallocated buffers, and a fraction of that
where codes are multiplied as integers; see ``site_kernel``. Source: claims A-2, A-4, A-11, A-12, formulas fA2 to fA5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.objectives.calibration.site_layout import (
    by_block,
    check_site_data,
    columns_by_block,
    row_block,
    subset_rows,
)
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge._site_kernel import SiteKernel
from alphasmith.objectives.judge.candidate_batch import CandidateBatch, paired_difference
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.unseen_rows import UnseenClipping
from alphasmith.objectives.smoothing import ChannelRange, Smoothing

__all__ = [
    "CandidateBatch",
    "SiteObjective",
    "by_block",
    "check_site_data",
    "columns_by_block",
    "linear_site_data",
    "paired_difference",
    "row_block",
    "subset_rows",
]


class SiteObjective:
    """Scores candidates at one site on growing subsets of its rows.

    The data is never changed. Tensors stay on the device they came on. Scratch buffers are shared between candidates, so use
    an objective from one thread at a time.

    Attributes:
        data: What is scored.
        scheme: What it is quantized to.
        rows: T, the rows of the largest part.
        channels: C.
        reference_energy: Squared norm of the float output on all rows.
        unseen: Clipping expected of rows that were not seen; None where it does not count.

    Args:
        data: Rows, weights and statistics of the site.
        scheme: Number formats and granularities.
        budget: Bytes for scratch buffers and the quantized weights of candidates, beside the data and its float output. None:
            512 MiB, or what a single candidate of a large site needs.
        unseen: Add the clipping that rows which were not seen are expected to bring (formula fA11): for rows that set the static range
            themselves, and so never show it. Losses are then estimates of those of other rows.

    Raises:
        InputError: Shapes or ranges within ``data`` contradict each other, or ``budget`` does not hold one candidate.
        NonFiniteError: A tensor of ``data`` holds NaN or infinity; the message names it.
    """

    def __init__(self, data: SiteData, scheme: Scheme, *, budget: int | None = None, unseen: bool = False) -> None:
        check_site_data(data)
        self.data = data
        self.scheme = scheme
        self.unseen = UnseenClipping(data, scheme) if unseen and scheme.static else None
        self._scorer = SiteKernel(data, scheme, budget, self.unseen)
        self.rows = self._scorer.rows
        self.channels = data.channels
        self.reference_energy = self._scorer.energy(self.rows)

    @property
    def exact_evaluations(self) -> int:
        """Candidates scored so far, on however many rows."""
        return self._scorer.candidates_scored

    def energy(self, rows: int) -> float:
        """Squared norm of the float output on a subset of ``rows`` rows of the largest part, 1..``self.rows``."""
        return self._scorer.energy(rows)

    def batch(self, smoothings: Sequence[Smoothing]) -> CandidateBatch:
        """Several candidates, to be scored together; nothing is computed yet.

        Raises:
            InputError: A candidate has scales or a shift that are not (C,), scales that are not positive, or a range factor
                that is not positive and finite. Tensors with NaN or infinity make a failed candidate instead.
        """
        for smoothing in smoothings:
            _check_smoothing(smoothing, self.channels)
        return CandidateBatch(self._scorer, smoothings, self.data.device)

    def loss(self, smoothing: Smoothing, *, rows: int | None = None) -> float:
        """Relative squared error of the quantized output, dimensionless. Source: formula fA5.

        Args:
            smoothing: The candidate.
            rows: Rows of the largest part to score, 1..``self.rows``; other parts give the same fraction. None: all.

        Raises:
            InputError: As :meth:`batch`, or ``rows`` is out of range.
            NonFiniteError: A scale, a shift or the loss is NaN or infinite.
        """
        return next(self.losses(smoothing, (self.rows if rows is None else rows,)))

    def losses(self, smoothing: Smoothing, rows: Sequence[int]) -> Iterator[float]:
        """Losses on growing subsets; weights are quantized once and every row is computed once.

        Only the subsets asked for are computed: a caller who stops early saves the rest.

        Args:
            smoothing: The candidate.
            rows: Strictly ascending subset sizes, in rows of the largest part, each 1..``self.rows``.

        Returns:
            Iterator over the loss on the first ``rows[0]``, ``rows[1]``, ... rows; each equals :meth:`loss` on as many rows
            up to float32 rounding.

        Raises:
            InputError: As :meth:`batch`, or ``rows`` is empty, not ascending or out of range.
            NonFiniteError: A scale or a shift is NaN or infinite; from the iterator: a loss is.
        """
        batch = self.batch([smoothing])
        sizes = tuple(rows)
        if not sizes or sizes[0] < 1 or sizes[-1] > self.rows or any(a >= b for a, b in pairwise(sizes)):
            raise InputError("rows", f"{sizes} is not an ascending list of 1..{self.rows}", "give growing subset sizes")
        if batch.failure(0):
            raise NonFiniteError(batch.failure(0))
        return _growing(batch, sizes)

    def range_factor(self, smoothing: Smoothing, percentile: float) -> float:
        """Static range that holds ``percentile`` percent of the rows entirely, relative to the calibrated abs-max range.

        Only a proposal for ``Smoothing.range_factor``: whether clipping the other rows pays is for the loss to say.

        Args:
            smoothing: Scales and shift; its own range factor plays no part.
            percentile: Of the rows' largest magnitudes max_j |x_tj - z_j| / s_j, in (0, 100].

        Returns:
            A positive factor, above 1 where these rows exceed what calibration saw (held-out rows); 1 for schemes without a
            static range, and where that many rows are zero.

        Raises:
            InputError: As :meth:`batch`, or ``percentile`` is out of range.
            NonFiniteError: A scale, a shift or a scaled row is NaN or infinite.
        """
        if not 0.0 < percentile <= 100.0:
            raise InputError("percentile", f"{percentile} is not in (0, 100]", "use 99.9, or 100 for the abs-max")
        batch = self.batch([smoothing])
        if batch.failure(0):
            raise NonFiniteError(batch.failure(0))
        if not self.scheme.static:
            return 1.0
        inside, whole = self._scorer.range_percentile(batch.smoothing(0), percentile)
        if not math.isfinite(inside) or not math.isfinite(whole):
            raise NonFiniteError("the scaled rows hold NaN or infinity")
        return inside / whole if inside > 0.0 and whole > 0.0 else 1.0


def _growing(batch: CandidateBatch, sizes: tuple[int, ...]) -> Iterator[float]:
    for size in sizes:
        batch.advance(size)
        loss = batch.loss(0)
        if loss is None:
            raise NonFiniteError(batch.failure(0))
        yield loss


def linear_site_data(x: Tensor, w: Tensor, *, name: str = "layer") -> SiteData:
    """Data of a site that is one linear layer, with abs-max statistics taken from ``x`` (T, C) and ``w`` (O, C).

    Raises:
        InputError: ``x`` and ``w`` are not non-empty matrices with the same number of columns.
    """
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or 0 in (*x.shape, *w.shape):
        raise InputError("x", f"{tuple(x.shape)} and w {tuple(w.shape)} do not multiply", "give x (T, C) and w (O, C)")
    x, w = x.detach().to(torch.float32).contiguous(), w.detach().to(torch.float32).contiguous()
    channel = torch.arange(x.shape[1], device=x.device)
    part = SitePart(operators=(name,), x=x, weight=w, out_features=(w.shape[0],), channel=channel)
    input_range = ChannelRange(x.amin(dim=0), x.amax(dim=0))
    return SiteData(
        name=name,
        parts=(part,),
        activation_statistics={"absmax": input_range.peaks()},
        input_range=input_range,
        weight_absmax=w.abs().amax(dim=0),
        ties=channel,
    )


def _check_smoothing(smoothing: Smoothing, channels: int) -> None:
    if tuple(smoothing.scales.shape) != (channels,):
        raise InputError(
            "scales",
            f"has shape {tuple(smoothing.scales.shape)}",
            f"give one scale for each of {channels} channels",
        )
    if smoothing.shift is not None and tuple(smoothing.shift.shape) != (channels,):
        raise InputError(
            "shift",
            f"has shape {tuple(smoothing.shift.shape)}",
            f"give one value for each of {channels} channels, or None",
        )
    if not (smoothing.range_factor > 0 and math.isfinite(smoothing.range_factor)):
        raise InputError(
            "range_factor", f"is {smoothing.range_factor}", "use 1 for the abs-max range, more for a margin"
        )
