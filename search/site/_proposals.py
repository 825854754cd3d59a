"""Proposals of the noise model at a site, made before the sampler has seen a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.quantization.unseen_rows import UnseenClipping
from alphasmith.objectives.smoothing import Smoothing, coefficient_map
from alphasmith.search.site.parametrization import Parametrization, Parametrizations, Ranges
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.alpha_ranges import DEFAULT_ALPHA, AlphaRange
from alphasmith.search.study.candidates import Candidate

#: Proposals per study: the best one of each parametrization, as far as they promise to be near the best of all.
_MOST = 4
_NEAR = 1.5
#: Steps of a descent, and of the one that makes the first proposal.
_STEPS, _LEAD_STEPS = 40, 10
#: Alpha whose range the noise model takes for all; the exact judge takes each candidate's own.
_TYPICAL_ALPHA = 0.75
#: An alpha this close to the end of its range is held back by it.
_AT_BOUND = 1e-6
#: What leaving the ranges must promise to be worth a candidate, as a share of the predicted loss.
_WORTH = 0.99


class Proposer:
    """Noise models of a site, one for each shift statistic.

    Args:
        data: Search rows of the site.
        settings: Settings of the search; proposals have the first one of its range statistics.
        frames: Ways to look at the site; their shifts decide which models are made.
        energy: Squared norm of the float output on all rows.
        unseen: Clipping expected of rows that were not seen.

    Raises:
        NonFiniteError: The rows or weights hold NaN or infinity.
    """

    def __init__(
        self,
        data: SiteData,
        settings: SiteSettings,
        frames: Parametrizations,
        *,
        energy: float,
        unseen: UnseenClipping | None,
    ) -> None:
        self._data = data
        self._template = Candidate("noise_model", None, range=settings.search.range[0])
        self._strict = settings.groups.ranges == "strict"
        # What saturation loses is counted on few outputs, so that twice the best prediction may still be the best candidate.
        self._near = math.inf if settings.scheme.saturates else _NEAR
        margin = settings.search.range_margin

        def factor(frame: Parametrization) -> float:
            match self._template.range:
                case "tail":
                    scales = frame.coefficients.scales(frames.start(frame, _TYPICAL_ALPHA))
                    return frames.tail_factor(Smoothing(scales=scales, shift=frame.shift))
                case "margin":
                    return margin
            return 1.0

        self._models = {
            centre: NoiseModel(
                data, settings.scheme, shift=frame.shift, energy=energy, range_factor=factor(frame), unseen=unseen
            )
            for centre, frame in {frame.centre: frame for frame in frames.values()}.items()
        }

    def model(self, centre: str) -> NoiseModel:
        """The model of rows under a shift statistic."""
        return self._models[centre]

    def lead(self, frames: Parametrizations, ranges: Ranges) -> Candidate:
        """A first proposal after few steps, where alpha 0.5 promises most: a good incumbent early.

        Raises:
            NonFiniteError: The model has no finite prediction there.
        """
        plain = {f.key: f.coefficients.scales(frames.start(f, DEFAULT_ALPHA)).unsqueeze(0) for f in frames.values()}
        losses = {key: float(self.model(key[2]).losses(scales)[0]) for key, scales in plain.items()}
        key = min(losses, key=lambda k: losses[k] if math.isfinite(losses[k]) else math.inf)
        start = frames.start(frames[key], DEFAULT_ALPHA).unsqueeze(0)
        return self._minimum(frames, frames[key], ranges[key], start, steps=_LEAD_STEPS)[1]

    def single_alpha(self, frames: Parametrizations) -> float:
        """The single alpha in [0, 1] of least predicted loss, in the base parametrization.

        Raises:
            NonFiniteError: No prediction is finite.
        """
        base = frames.base
        one = coefficient_map(
            base.activation,
            self._data.weight_absmax,
            torch.zeros_like(base.coefficients.labels),
            ties=self._data.ties,
            producer=self._data.producer_absmax,
        )
        device = self._data.device
        low, high = (torch.tensor([v], dtype=torch.float64, device=device) for v in (0.0, 1.0))
        starts = torch.tensor([[DEFAULT_ALPHA], [0.8]], dtype=torch.float64, device=device)
        return float(self.model(base.centre).minimise(one, low, high, starts, steps=_LEAD_STEPS).theta)

    def propose(
        self,
        frames: Parametrizations,
        ranges: Ranges,
        single: float,
        *,
        beyond: bool = True,
        lead: Candidate | None = None,
    ) -> list[Candidate]:
        """The optimum of each parametrization inside its ranges, the most promising first; those far behind are left out.

        Args:
            frames: Ways to look at the site.
            ranges: Parametrization -> alpha range of every group.
            single: The best single alpha, where descent starts among others.
            beyond: Whether the best parametrization's optimum without ranges is proposed as well, where they hold it back and are not
                strict: ranges are good defaults, not laws (trap T3).
            lead: A proposal to start from in its parametrization, too; it is not proposed again.

        Raises:
            NonFiniteError: The model has no finite prediction in any parametrization.
        """
        found: list[tuple[float, Candidate]] = []
        for key, frame in frames.items():
            starts = [frames.start(frame, alpha) for alpha in (single, 1.0)]
            if lead is not None and frames.of(lead) is frame:
                starts.append(frames.theta(lead))
            found.append(self._minimum(frames, frame, ranges[key], torch.stack(starts)))
        found.sort(key=lambda pair: pair[0])
        near = [(loss, c) for loss, c in found[:_MOST] if loss <= self._near * found[0][0]]
        if beyond and not self._strict:
            near += self._beyond(frames, ranges, *near[0])
        return [c for _, c in sorted(near, key=lambda pair: pair[0]) if c != lead]

    def near_limit(self, frames: Parametrizations, ranges: Ranges, best: Candidate, limit: torch.Tensor) -> Candidate:
        """The best candidate's numbers that come nearest to the scales (C,) of the per-channel limit.

        Where the model's descent over few numbers ends too early (4-bit weights), the one over all scales often does not.

        Raises:
            NonFiniteError: The model has no finite prediction there.
        """
        frame = frames.of(best)
        starts = frames.project(frame, limit).unsqueeze(0)
        bounds = ranges[frame.key] if self._strict else _anywhere(ranges[frame.key])
        return self._minimum(frames, frame, bounds, starts)[1]

    def _minimum(
        self,
        frames: Parametrizations,
        frame: Parametrization,
        ranges: Sequence[AlphaRange],
        starts: torch.Tensor,
        *,
        steps: int = _STEPS,
    ) -> tuple[float, Candidate]:
        low, high = frames.box(frame, ranges)
        starts = torch.minimum(torch.maximum(starts, low), high)
        best = self.model(frame.centre).minimise(frame.coefficients, low, high, starts, steps=steps)
        return best.loss, frames.candidate(self._template, frame, torch.minimum(torch.maximum(best.theta, low), high))

    def _beyond(
        self, frames: Parametrizations, ranges: Ranges, loss: float, candidate: Candidate
    ) -> list[tuple[float, Candidate]]:
        """The optimum with alphas anywhere in [0, 1], from ``candidate`` on, where its ranges hold it back markedly."""
        frame = frames.of(candidate)
        bounds = ranges[frame.key]
        alphas = (candidate.alphas or ())[: frame.k]
        if not any(min(a - r.low, r.high - a) < _AT_BOUND for a, r in zip(alphas, bounds, strict=True)):
            return []
        start = frames.theta(candidate).unsqueeze(0)
        found = self._minimum(frames, frame, _anywhere(bounds), start)
        return [found] if found[0] <= _WORTH * loss else []

    def predicted(self, frames: Parametrizations, candidates: Sequence[Candidate]) -> list[float]:
        """Predicted losses of candidates; NaN or infinite where the model fails."""
        scales = [frames.smoothing(c).scales.unsqueeze(0) for c in candidates]
        return [float(self.model(frames.of(c).centre).losses(s)[0]) for c, s in zip(candidates, scales, strict=True)]


def _anywhere(ranges: Sequence[AlphaRange]) -> list[AlphaRange]:
    """The same widened to [0, 1]."""
    return [replace(r, low=0.0, high=1.0) for r in ranges]
