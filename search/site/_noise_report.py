"""How far the noise model of a site is trusted, when its per-channel limit ends a study, and what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np
from scipy.stats import kendalltau

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.noise.channel_limit import Limit, per_channel_limit
from alphasmith.search.site._proposals import Proposer
from alphasmith.search.site.parametrization import Parametrizations, Ranges
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.candidates import BASELINES, Candidate, TrialResult
from alphasmith.search.study.guard import Verdict
from alphasmith.search.study.trial import best_trial
from alphasmith.storage.runs.entries import NoiseFacts

T = TypeVar("T")

#: Steps of the descent to the per-channel limit.
_LIMIT_STEPS = 30
#: Why a site has no per-channel limit where products saturate.
_NO_LIMIT = "no per-channel limit: descent to it takes products as exact"


class Surrogate:
    """The noise model of a site, asked as long as its numbers are finite; the time it takes is counted.

    Attributes:
        reason: Why it was given up; empty: it was not.
        seconds: Time spent on its answers [s].

    Args:
        data: Search rows of the site.
        settings: Settings of the search, which may do without a noise model.
        frames: Ways to look at the site.
        judge: Exact judge on the search rows.
    """

    def __init__(self, data: SiteData, settings: SiteSettings, frames: Parametrizations, judge: SiteObjective) -> None:
        self.reason, self.seconds = "", 0.0
        self._proposer: Proposer | None = None
        if settings.search.noise_model:
            try:
                self._proposer = Proposer(data, settings, frames, energy=judge.reference_energy, unseen=judge.unseen)
            except NonFiniteError as error:
                self.reason = str(error)

    @property
    def usable(self) -> bool:
        """Whether it answers."""
        return self._proposer is not None

    def ask(self, question: Callable[[Proposer], T]) -> T | None:
        """The answer; None where there is no noise model, or where it fails now and is given up."""
        if self._proposer is None:
            return None
        start = time.perf_counter()
        try:
            return question(self._proposer)
        except NonFiniteError as error:
            self.reason, self._proposer = str(error), None
            return None
        finally:
            self.seconds += time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class NoiseReport:
    """What is known of the noise model once its first proposals have exact losses.

    Attributes:
        facts: How its predictions agree with exact losses.
        limit: The per-channel limit; None where it could not be found.
    """

    facts: NoiseFacts
    limit: Limit | None


class LimitRule:
    """Ends a study near the per-channel limit, which is found once, around the best candidate by then.

    Where products saturate there is none, and no study ends by it: descent does not see what saturation costs, so that what it finds is
    no floor, and candidates that were not tried may be far below.

    Args:
        surrogate: The noise model.
        frames: Ways to look at the site.
        judge: Exact judge on the search rows.
        tolerance: How far above the limit is near, relative.
    """

    def __init__(self, surrogate: Surrogate, frames: Parametrizations, judge: SiteObjective, tolerance: float) -> None:
        self._surrogate, self._frames, self._judge = surrogate, frames, judge
        self._tolerance = tolerance
        self._report: NoiseReport | None = None

    @property
    def without(self) -> str:
        """Why there is no limit although there is a noise model; empty otherwise."""
        return _NO_LIMIT if self._surrogate.usable and self._judge.scheme.saturates else ""

    def enough(self, loss: float, results: Sequence[TrialResult]) -> str:
        """Why a study with these trials and this best loss may end; empty to go on."""
        if not self._surrogate.usable:
            return ""
        if self._report is None:
            self._report = NoiseReport(self._compare(results), self._find_limit(best_trial(results)))
        facts, limit = self._report.facts, self._report.limit
        if limit is None or not facts.trusted or loss > (1 + self._tolerance) * limit.loss:
            return ""
        return f"within {self._tolerance:.1%} of the per-channel limit"

    def proposals(self, ranges: Ranges, results: Sequence[TrialResult]) -> list[Candidate]:
        """The candidate that comes nearest to the scales of the limit, where it was not tried yet."""
        best, limit = best_trial(results).candidate, self._limit
        if limit is None or best.kind in BASELINES:
            return []
        found = self._surrogate.ask(lambda p: p.near_limit(self._frames, ranges, best, limit.smoothing.scales))
        return [] if found is None or any(r.candidate == found for r in results) else [found]

    def losses(self, verdict: Verdict, held_out: SiteObjective) -> tuple[float | None, float | None]:
        """The limit on search and held-out rows; the winner is one free choice, too, so the limit is never above it."""
        if self._limit is None:
            return None, None
        try:
            loss = held_out.loss(self._limit.smoothing)
        except NonFiniteError:
            return None, None
        return min(self._limit.loss, verdict.search.ours), min(loss, verdict.held_out.ours)

    def facts(self, results: Sequence[TrialResult], spared: int) -> NoiseFacts | None:
        """How the noise model did, and its cost against that of ``spared`` exact evaluations; None: it was not looked at."""
        if self._report is None:
            return None
        each, seconds = median(r.seconds for r in results if r.loss is not None), self._surrogate.seconds
        saved = spared * each - seconds
        bought = {"seconds": seconds, "evaluations_saved": spared, "seconds_saved": saved}
        return self._report.facts.model_copy(update=bought)

    @property
    def _limit(self) -> Limit | None:
        return None if self._report is None else self._report.limit

    def _compare(self, results: Sequence[TrialResult]) -> NoiseFacts:
        # Identity has no parametrization, so where shifting is forced no model looks at its rows.
        scored = [r for r in results if r.loss and (r.candidate.alphas is not None or self._frames.base.shift is None)]
        candidates = [r.candidate for r in scored]
        predicted = self._surrogate.ask(lambda p: p.predicted(self._frames, candidates)) or [math.nan] * len(scored)
        pairs = [(p, float(r.loss or 0.0)) for p, r in zip(predicted, scored, strict=True) if np.isfinite(p) and p > 0]
        tau = kendalltau(*zip(*pairs, strict=True)).statistic if len(pairs) >= 4 else None
        return NoiseFacts(
            median_log_ratio=median(float(np.log(p / e)) for p, e in pairs) if pairs else 0.0,
            kendall_tau=None if tau is None or not np.isfinite(tau) else float(tau),
            proposals=sum(r.candidate.kind == "noise_model" for r in results),
        )

    def _find_limit(self, best: TrialResult) -> Limit | None:
        if self.without:
            return None
        start, centre = self._frames.smoothing(best.candidate), self._frames.of(best.candidate).centre
        return self._surrogate.ask(
            lambda p: per_channel_limit(self._judge, p.model(centre), start, start_loss=best.loss, steps=_LIMIT_STEPS)
        )
