"""How others choose smoothing scales, on our exact evaluator: single-alpha grids, coordinate search, OS+ thresholds.

Written from the methods' descriptions; the candidates are theirs, the judge is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.groups import group_channels
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.quantization.quantizers import (
    activation_scale,
    dequantize_weight,
    fake_quantize_activation,
    quantize_weight,
)
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing, group_scales
from benchmarks.timing import seconds_of


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What a method chose.

    Attributes:
        smoothing: Its choice.
        loss: Exact loss of the choice on the rows used.
        evaluations: Candidates scored, every one on all rows.
        seconds: Wall time [s], the float reference product included.
    """

    smoothing: Smoothing
    loss: float
    evaluations: int
    seconds: float


def alpha_grid(points: int) -> list[float]:
    """``points`` alphas, even over [0, 1]."""
    return [i / (points - 1) for i in range(points)]


def single_alpha_grid(data: SiteData, scheme: Scheme, points: int) -> Outcome:
    """One alpha for all channels: every point of the grid, scored."""
    start = time.perf_counter()
    judge = SiteObjective(data, scheme)
    labels = torch.zeros(data.channels, dtype=torch.int64)
    return _best(judge, (_of_alphas(data, (alpha,), labels) for alpha in alpha_grid(points)), start)


def coordinate_search(data: SiteData, scheme: Scheme, groups: int, *, points: int = 21, sweeps: int = 3) -> Outcome:
    """K alphas, one at a time over the grid, from the best single alpha; stops when a sweep changes nothing."""
    start = time.perf_counter()
    judge = SiteObjective(data, scheme)
    labels = group_channels(data.activation_statistic, method="kmeans", k=groups, ties=data.ties).labels
    grid = alpha_grid(points)
    scored: dict[tuple[float, ...], float] = {}

    def loss(alphas: tuple[float, ...]) -> float:
        if alphas not in scored:
            scored[alphas] = judge.loss(_of_alphas(data, alphas, labels))
        return scored[alphas]

    found = int(labels.max()) + 1
    best = min(((alpha,) * found for alpha in grid), key=loss)
    for _ in range(sweeps):
        before = best
        for k in range(found):
            best = min((*(_moved(best, k, alpha) for alpha in grid), best), key=loss)
        if best == before:
            break
    return Outcome(
        smoothing=_of_alphas(data, best, labels),
        loss=loss(best),
        evaluations=judge.exact_evaluations,
        seconds=time.perf_counter() - start,
    )


def threshold_search(data: SiteData, scheme: Scheme, *, points: int = 60) -> Outcome:
    """OS+: shift z = (max + min) / 2, then ``s_j = max(1, peak_j / t)`` for the best threshold t, spaced in the logarithm."""
    start = time.perf_counter()
    judge = SiteObjective(data, scheme)
    shift = data.input_range.middle(data.ties)
    peaks = data.input_range.peaks(shift)
    low, high = float(peaks[peaks > 0].median()) / 4, float(peaks.max())
    thresholds = torch.logspace(0, 1, points, base=low / high) * high
    tried = (Smoothing(scales=(peaks / t).clamp_min(1.0), shift=shift) for t in thresholds)
    return _best(judge, tried, start)


def plain_seconds(
    data: SiteData, smoothing: Smoothing, scheme: Scheme, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds by a clock of one candidate as other tools make it: fresh copies, requantization and one fp32 product.

    For linear sites. The float reference is computed beforehand, and a shift plays no part.
    """
    references = [part.x @ part.weight.mT for part in data.parts]

    def candidate() -> float:
        total = 0.0
        for part, reference in zip(data.parts, references, strict=True):
            scales = smoothing.scales[part.channel]
            x, weight = part.x / scales, part.weight * scales
            if scheme.activation_granularity == "static":
                absmax = (data.input_range.peaks() / smoothing.scales).max()
            else:
                absmax = x.abs().amax(dim=1, keepdim=True)
            x = fake_quantize_activation(x, activation_scale(absmax, scheme.activations), scheme.activations)
            weight = dequantize_weight(quantize_weight(weight, scheme), scheme)
            total += float((x @ weight.mT - reference).square().sum(dtype=torch.float64))
        return total

    return seconds_of(candidate, 3, clock=clock)


def _of_alphas(data: SiteData, alphas: Sequence[float], labels: Tensor) -> Smoothing:
    scales = group_scales(data.activation_statistic, data.weight_absmax, alphas, labels, ties=data.ties)
    return Smoothing(scales=scales)


def _moved(alphas: tuple[float, ...], k: int, alpha: float) -> tuple[float, ...]:
    return (*alphas[:k], alpha, *alphas[k + 1 :])


def _best(judge: SiteObjective, candidates: Iterable[Smoothing], start: float) -> Outcome:
    def scored() -> Iterator[tuple[float, Smoothing]]:
        for smoothing in candidates:
            yield judge.loss(smoothing), smoothing

    loss, smoothing = min(scored(), key=lambda pair: pair[0])
    return Outcome(
        smoothing=smoothing,
        loss=loss,
        evaluations=judge.exact_evaluations,
        seconds=time.perf_counter() - start,
    )
