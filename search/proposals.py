"""What the noise model proposes at a site, before the sampler has seen a loss. Source: architecture notes section 5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from alphasmith.objectives.noise import NoiseModel
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.site_data import SiteData
from alphasmith.objectives.smoothing import Smoothing, coefficient_map
from alphasmith.search.candidates import Candidate
from alphasmith.search.config import RangeStatistic
from alphasmith.search.frames import Frame, FrameKey, Frames
from alphasmith.search.ranges import DEFAULT_ALPHA, AlphaRange

#: Proposals per study: the best one of each frame, as far as they promise to be near the best of all.
_MOST = 4
_NEAR = 1.5
#: Steps of a descent, and of the one that makes the first proposal.
_STEPS, _LEAD_STEPS = 40, 10
#: An alpha this close to the end of its range is held back by it.
_AT_BOUND = 1e-6
#: What leaving the ranges must promise to be worth a candidate, as a share of the predicted loss.
_WORTH = 0.99


@dataclass(frozen=True, kw_only=True)
class NoiseFacts:
    """How the noise model did at one site.

    Attributes:
        median_log_ratio: Median of ln(predicted / exact loss) over the candidates scored with both.
        kendall_tau: Rank correlation of predicted and exact losses over them; None for fewer than 4 candidates.
        proposals: Candidates it proposed.
        seconds: Time spent in it [s].
        evaluations_saved: Exact evaluations of the grid of single alphas and of all trials, less those that were made.
        seconds_saved: Those evaluations at the median time of a trial, less the time spent in the noise model [s]; negative
            where it cost more than it spared.
    """

    median_log_ratio: float
    kendall_tau: float | None
    proposals: int
    seconds: float = 0.0
    evaluations_saved: int = 0
    seconds_saved: float = 0.0

    @property
    def trusted(self) -> bool:
        """Whether its limit may end a study: its order of the candidates agrees with the exact one, as far as known."""
        return self.kendall_tau is None or self.kendall_tau >= 0.6


class Proposer:
    """Noise models of a site, one for each shift statistic.

    Args:
        data: Search rows of the site.
        scheme: Quantization scheme.
        energy: Squared norm of the float output on all rows.
        frames: Ways to look at the site; their shifts decide which models are made.
        range_factor: Static range of its proposals, relative to abs-max.

    Raises:
        NonFiniteError: The rows or weights hold NaN or infinity.
    """

    def __init__(
        self, data: SiteData, scheme: Scheme, energy: float, frames: Frames, *, range_factor: float = 1.0
    ) -> None:
        self._data = data
        self._models = {
            centre: NoiseModel(data, scheme, shift=frame.shift, energy=energy, range_factor=range_factor)
            for centre, frame in {frame.centre: frame for frame in frames.values()}.items()
        }

    def model(self, centre: str) -> NoiseModel:
        """The model of rows under a shift statistic."""
        return self._models[centre]

    def lead(
        self, frames: Frames, ranges: Mapping[FrameKey, Sequence[AlphaRange]], range_: RangeStatistic
    ) -> Candidate:
        """A first proposal after few steps, in the frame that promises most at alpha 0.5: a good incumbent early.

        Raises:
            NonFiniteError: The model has no finite prediction there.
        """
        plain = {f.key: f.coefficients.scales(frames.start(f, DEFAULT_ALPHA)).unsqueeze(0) for f in frames.values()}
        losses = {key: float(self.model(key[2]).losses(scales)[0]) for key, scales in plain.items()}
        key = min(losses, key=lambda k: losses[k] if math.isfinite(losses[k]) else math.inf)
        start = frames.start(frames[key], DEFAULT_ALPHA).unsqueeze(0)
        template = Candidate("noise_model", None, range=range_)
        return self._minimum(frames, frames[key], ranges[key], start, template, steps=_LEAD_STEPS)[1]

    def single_alpha(self, frames: Frames) -> float:
        """The single alpha in [0, 1] of least predicted loss, in the base frame.

        Raises:
            NonFiniteError: No prediction is finite.
        """
        base = frames.base
        one = coefficient_map(
            base.activation,
            self._data.weight_absmax,
            torch.zeros_like(base.coefficients.labels),
            ties=self._data.ties,
        )
        device = self._data.device
        low, high = (torch.tensor([v], dtype=torch.float64, device=device) for v in (0.0, 1.0))
        starts = torch.tensor([[DEFAULT_ALPHA], [0.8]], dtype=torch.float64, device=device)
        return float(self.model(base.centre).minimise(one, low, high, starts, steps=_LEAD_STEPS).theta)

    def propose(
        self,
        frames: Frames,
        ranges: Mapping[FrameKey, Sequence[AlphaRange]],
        single: float,
        range_: RangeStatistic,
        *,
        beyond: bool,
        lead: Candidate | None = None,
    ) -> list[Candidate]:
        """The optimum of each frame inside its ranges, the most promising first; frames far behind are left out.

        Args:
            frames: Ways to look at the site.
            ranges: Frame -> alpha range of every group.
            single: The best single alpha, where descent starts among others.
            range_: Range statistic of the proposals.
            beyond: Whether the best frame's optimum without ranges is proposed as well, where they hold it back: ranges are
                good defaults, not laws (trap T3).
            lead: A proposal to start from in its frame, too.

        Raises:
            NonFiniteError: The model has no finite prediction in any frame.
        """
        template = Candidate("noise_model", None, range=range_)
        found: list[tuple[float, Candidate]] = []
        for key, frame in frames.items():
            starts = [frames.start(frame, alpha) for alpha in (single, 1.0)]
            if lead is not None and frames.of(lead) is frame:
                starts.append(frames.theta(lead))
            found.append(self._minimum(frames, frame, ranges[key], torch.stack(starts), template))
        found.sort(key=lambda pair: pair[0])
        near = [(loss, c) for loss, c in found[:_MOST] if loss <= _NEAR * found[0][0]]
        if beyond:
            near += self._beyond(frames, ranges, *near[0])
        return [c for _, c in sorted(near, key=lambda pair: pair[0])]

    def near_limit(
        self,
        frames: Frames,
        ranges: Sequence[AlphaRange],
        best: Candidate,
        limit: torch.Tensor,
        range_: RangeStatistic,
    ) -> Candidate:
        """The numbers, in the frame of the best candidate, that come nearest to the scales (C,) of the per-channel limit.

        Where the model's descent over few numbers ends too early (4-bit weights), the one over all scales often does not.

        Raises:
            NonFiniteError: The model has no finite prediction there.
        """
        frame = frames.of(best)
        starts = frames.project(frame, limit).unsqueeze(0)
        return self._minimum(frames, frame, ranges, starts, Candidate("noise_model", None, range=range_))[1]

    def _minimum(
        self,
        frames: Frames,
        frame: Frame,
        ranges: Sequence[AlphaRange],
        starts: torch.Tensor,
        template: Candidate,
        *,
        steps: int = _STEPS,
    ) -> tuple[float, Candidate]:
        low, high = frames.box(frame, ranges)
        starts = torch.minimum(torch.maximum(starts, low), high)
        best = self.model(frame.centre).minimise(frame.coefficients, low, high, starts, steps=steps)
        return best.loss, frames.candidate(template, frame, torch.minimum(torch.maximum(best.theta, low), high))

    def _beyond(
        self, frames: Frames, ranges: Mapping[FrameKey, Sequence[AlphaRange]], loss: float, candidate: Candidate
    ) -> list[tuple[float, Candidate]]:
        """The optimum with alphas anywhere in [0, 1], from ``candidate`` on, where its ranges hold it back markedly."""
        frame = frames.of(candidate)
        bounds = ranges[frame.key]
        alphas = (candidate.alphas or ())[: frame.k]
        if not any(min(a - r.low, r.high - a) < _AT_BOUND for a, r in zip(alphas, bounds, strict=True)):
            return []
        wide = [replace(r, low=0.0, high=1.0) for r in bounds]
        start = frames.theta(candidate).unsqueeze(0)
        found = self._minimum(frames, frame, wide, start, replace(candidate, alphas=None))
        return [found] if found[0] <= _WORTH * loss else []

    def predicted(
        self, frames: Frames, candidates: Sequence[Candidate], smoothings: Sequence[Smoothing]
    ) -> list[float]:
        """Predicted losses of candidates and what they do to the site; NaN or infinite where the model fails."""
        models = [self.model(frames.of(c).centre) for c in candidates]
        return [float(m.losses(s.scales.unsqueeze(0))[0]) for m, s in zip(models, smoothings, strict=True)]
