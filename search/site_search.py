"""The search at one site: group its channels, bound their alphas, try candidates, guard the winner. Claims A-1 to A-3."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import optuna
import torch
from scipy.stats import kendalltau

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.limit import Limit, per_channel_limit
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.site_data import SiteData
from alphasmith.objectives.site_objective import SiteObjective, linear_site_data, paired_difference
from alphasmith.objectives.smoothing import Smoothing, coefficient_map
from alphasmith.search.candidates import BASELINES, Candidate
from alphasmith.search.config import GroupsConfig, RunConfig, SearchConfig
from alphasmith.search.frames import Frame, FrameKey, Frames, hull, ranges_of
from alphasmith.search.interruption import leave, never
from alphasmith.search.proposals import NoiseFacts, Proposer
from alphasmith.search.ranges import DEFAULT_ALPHA, AlphaRange
from alphasmith.search.site_result import SearchFacts, SiteResult
from alphasmith.search.site_scorer import SiteScorer
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.studies import (
    RecordedStudy,
    TrialResult,
    Verdict,
    baselines,
    best_single_alpha,
    best_trial,
    guard,
    play,
)
from alphasmith.search.study_log import StoredLog, StudyLog
from alphasmith.search.threads import threads_for
from alphasmith.storage.database import open_optuna

#: K that ``auto`` tries, in this order, while held-out loss falls.
_GROWING_K = (1, 2, 4, 8, 16)
#: First step of the exact search for the best single alpha around the predicted one.
_ALPHA_STEP = 0.05
#: Paired standard errors by which a range statistic must beat the winner's on held-out rows.
_RANGE_CONFIDENCE = 1.0
#: A percentile that leaves this share of the range or more changes nothing worth a look.
_CLIPS = 0.98
#: Proposals of the sampler that are scored together: on a GPU one alone does not fill it.
_BATCH = {"cuda": 8}
#: Steps of the descent to the per-channel limit.
_LIMIT_STEPS = 30
#: Trials whose loss is at most this many times the best one's meet it on held-out rows, where they see the site otherwise.
_RIVAL = 1.5


def search_site(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    scheme: Scheme | str,
    groups: int | str = 4,
    trials: int = 32,
    seed: int = 0,
    storage: str | None = None,
    settings: RunConfig | None = None,
) -> SiteResult:
    """Search the smoothing coefficients of ONE layer.

    Three quarters of the rows, drawn with ``seed``, are searched on; the rest judge the winner.

    Args:
        x: (T, C) activations, at least 2 rows.
        w: (O, C) weight.
        scheme: Scheme or its name, e.g. ``"w8a8-channel-static"``.
        groups: K, or ``"auto"``.
        trials: Trials of the study at most, baselines included; at least 4 are made where the study needs them.
        seed: Seed of the split, the sampler and nothing else.
        storage: SQLAlchemy URL that keeps the study; None keeps it in memory.
        settings: Sections ``groups`` and ``search`` of a configuration, where ``groups``, ``trials`` and ``seed`` are
            replaced by the arguments; None: the defaults.

    Raises:
        InputError: Wrong shapes, non-finite x or w, or a number or name that cannot be used.
    """
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise InputError("x, w", f"shapes {tuple(x.shape)} and {tuple(w.shape)} do not match", "give (T, C) and (O, C)")
    if x.shape[0] < 2:
        raise InputError("x", "has fewer than 2 rows", "give rows to search on and rows to judge on")
    for name, tensor in (("x", x), ("w", w)):
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(name, "holds NaN or infinite values", "remove them")
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs a line per study
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    known = settings or RunConfig()
    settings = RunConfig.build(
        {
            "groups": known.groups.model_dump() | {"k": groups},
            "search": known.search.model_dump() | {"trials": max(trials, 4), "seed": seed},
        }
    )
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed)).to(x.device)
    cut = max(1, min(x.shape[0] - 1, x.shape[0] * 3 // 4))
    data, held_out = (linear_site_data(x[rows], w) for rows in (order[:cut], order[cut:]))
    # A deployed model knows the ranges of its calibration data only.
    held_out = replace(held_out, activation_statistics=data.activation_statistics, input_range=data.input_range)
    return search_data(
        data,
        held_out,
        scheme=scheme,
        groups=settings.groups,
        search=settings.search,
        rho=0.0,
        log=None if storage is None else StoredLog(open_optuna(storage), name := f"search_site-{time.time_ns()}"),
        study_name=None if storage is None else name,
    )


def search_data(
    data: SiteData,
    held_out: SiteData,
    *,
    scheme: Scheme,
    groups: GroupsConfig,
    search: SearchConfig,
    rho: float,
    log: StudyLog | None = None,
    study_name: str | None = None,
    shiftable: bool = True,
    budget: int | None = None,
    reused: Candidate | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_trial: Callable[[TrialResult], None] | None = None,
    stop: Callable[[], bool] = never,
) -> SiteResult:
    """Search one site given its calibration and held-out rows; ``search_site`` and the run both end here.

    Args:
        data: Rows to search on, weights and statistics.
        held_out: Rows that judge the winner; its static ranges must come from ``data``.
        scheme: Quantization scheme.
        groups: Grouping and range settings.
        search: Trials, sampler, pruner, seed.
        rho: Scarcity of the target hardware (fA7).
        log: Keeps the study, and knows what is on record of it; None: nothing is kept.
        study_name: Name of the study, None for a random one.
        shiftable: Whether the site's input may be shifted, see ``Site.shiftable``.
        budget: Memory for the buffers of each judge [bytes]; None: 512 MiB, or what one candidate needs.
        reused: The winner of an earlier search at this site, to start from; left out where it does not fit the settings.
        clock: Seconds, monotonic.
        on_trial: Called after each trial.
        stop: Asked before every batch of candidates whether to leave; what was found by then is on record.

    Raises:
        AlphasmithError: Every trial failed, or the study on record was made for another space.
        Interrupted: ``stop`` said so.
    """
    work = sum(part.x.shape[0] * part.weight.numel() for part in data.parts)
    with threads_for(work):
        one = _SiteSearch(data, held_out, scheme, groups, search, rho, shiftable, budget, reused, clock)
        try:
            return one.run(log=log, study_name=study_name, on_trial=on_trial, stop=stop)
        finally:
            one.release()


class _SiteSearch:
    """The steps of one search, in order; see :meth:`run`."""

    def __init__(
        self,
        data: SiteData,
        held_out: SiteData,
        scheme: Scheme,
        groups: GroupsConfig,
        search: SearchConfig,
        rho: float,
        shiftable: bool,
        budget: int | None,
        reused: Candidate | None,
        clock: Callable[[], float],
    ) -> None:
        self._start = clock()
        self._clock = clock
        self._data, self._scheme = data, scheme
        self._groups, self._search, self._rho, self._shiftable = groups, search, rho, shiftable
        self._budget = budget
        self._judge, self._held_out_data = SiteObjective(data, scheme, budget=budget), held_out
        #: Candidate -> its loss and squared errors per row on the held-out rows; None where it failed there.
        self._held_out_scores: dict[Candidate, tuple[float, torch.Tensor] | None] = {}
        self._noise_reason = ""
        self._noise_seconds = 0.0
        self._k_tried: tuple[int, ...] = ()
        self._frames = self._look(1 if groups.k == "auto" else groups.k)
        self._proposer = self._make_proposer() if search.noise_model else None
        self._scorer = SiteScorer(self._judge, self._to_smoothing, clock=clock, start=self._start)
        self._reused = reused
        self._limit: Limit | None = None
        self._facts: NoiseFacts | None = None

    def run(
        self,
        *,
        log: StudyLog | None,
        study_name: str | None,
        on_trial: Callable[[TrialResult], None] | None,
        stop: Callable[[], bool],
    ) -> SiteResult:
        """Best single alpha, K, proposals, trials, guard, range statistic."""
        leave(stop)
        lead = self._lead()
        single, grid = self._best_single()
        if self._groups.k == "auto":
            self._grow_k(single)
            lead = self._from_earlier()
        ranges = self._ranges(single)
        space = SearchSpace.of(
            hull(list(ranges.values())),
            betas=self._groups.betas,
            offsets=self._groups.offsets,
            choices=self._frames.choices(),
            recorded={"range": self._search.range},
        )
        leave(stop)
        beyond = self._groups.ranges != "strict"
        # An earlier winner is tried alone at first: where it is near the limit, no descent is needed.
        known = lead is not None and lead.kind == "reused"
        proposals = [lead] if known and lead else self._propose(ranges, single, beyond=beyond, lead=lead)
        first = [replace(c, range=self._search.range[0]) for c in baselines(self._frames.k, single)] + proposals
        study = RecordedStudy(
            self._search,
            space,
            device=str(self._data.device),
            log=log,
            name=study_name,
            on_trial=on_trial,
        )
        study.note("single_alpha_grid", grid)
        stopped = play(
            study,
            self._scorer,
            first=first,
            protected=3,
            trials=self._search.trials,
            batch=_BATCH.get(self._data.device.type, 1),
            patience=self._search.patience,
            enough=lambda best: self._enough(best, study.results),
            follow_up=lambda: (
                (self._propose(ranges, single, beyond=beyond, lead=lead)[1:] if known else [])
                + self._near_limit(ranges, study.results)
            ),
            stop=stop,
        )
        rivals = _rivals(study.results)
        ranged, range_losses = self._try_ranges(study, best_trial(study.results))
        verdict = guard(study.results, self._held_out, also=rivals + ranged)
        winner = verdict.winner.candidate
        limit = self._limit_losses(verdict)
        frame = self._frames.of(winner)
        return SiteResult(
            name=self._data.name,
            labels=frame.grouping.labels,
            ranges=ranges[frame.key],
            magnitudes=tuple(frame.grouping.values.tolist()),
            outliers=tuple(frame.grouping.outliers),
            requested_k=self._frames.k if self._groups.k == "auto" else self._groups.k,
            candidate=winner,
            smoothing=self._to_smoothing(winner),
            grouping=frame.method,
            statistic=frame.statistic,
            best_single_alpha=single,
            plain={c.kind: self._to_smoothing(c) for c in first[:3]},
            slopes=self._slopes(frame, winner),
            search=replace(verdict.search, limit=limit[0]),
            held_out=replace(verdict.held_out, limit=limit[1]),
            guarded=verdict.guarded,
            results=tuple(study.results),
            exact_evaluations=self._judge.exact_evaluations + self._reserve.exact_evaluations,
            seconds=self._clock() - self._start,
            study_name=study.name,
            facts=SearchFacts(
                stopped=stopped + (f"; exact losses only: {self._noise_reason}" if self._noise_reason else ""),
                noise_model=self._bought(study.results),
                noise_reason=self._noise_reason,
                k_tried=self._k_tried,
                range_losses=range_losses,
            ),
            trace=tuple(self._scorer.trace),
            space=space,
        )

    def release(self) -> None:
        """Break the circle with the scorer, so that rows and buffers go at once and not when the collector comes by."""
        del self._scorer

    @cached_property
    def _reserve(self) -> SiteObjective:
        """Judge of the held-out rows, made when it is first asked: proposals come before it."""
        return SiteObjective(self._held_out_data, self._scheme, budget=self._budget)

    def _slopes(self, frame: Frame, candidate: Candidate) -> torch.Tensor:
        """d log s / d alpha (C,): that of a^alpha alone where the candidate has betas, else of a^alpha / w^(1 - alpha)."""
        if candidate.betas:
            return frame.coefficients.features[0]
        plain = coefficient_map(frame.activation, self._data.weight_absmax, frame.grouping.labels, ties=self._data.ties)
        return plain.features[0]

    def _look(self, k: int) -> Frames:
        return Frames(self._data, self._groups, self._search, k=k, shiftable=self._shiftable)

    def _to_smoothing(self, candidate: Candidate) -> Smoothing:
        return self._frames.smoothing(candidate, lambda s: self._judge.range_factor(s, self._search.range_percentile))

    def _make_proposer(self) -> Proposer | None:
        """None, with the reason kept, where the noise model cannot be made: then losses are exact only."""
        try:
            factor = self._search.range_margin if self._search.range[0] == "margin" else 1.0
            return Proposer(self._data, self._scheme, self._judge.reference_energy, self._frames, range_factor=factor)
        except NonFiniteError as error:
            self._noise_reason = str(error)
            return None

    def _timed(self, ask: Callable[[Proposer], Any], default: Any) -> Any:
        """Ask the noise model; ``default`` where it is off or fails, once and for all."""
        if self._proposer is None:
            return default
        start = self._clock()
        try:
            return ask(self._proposer)
        except NonFiniteError as error:
            self._noise_reason, self._proposer = str(error), None
            return default
        finally:
            self._noise_seconds += self._clock() - start

    def _best_single(self) -> tuple[float, list[list[float]]]:
        """The best single alpha and the [alpha, loss] that were looked at.

        The noise model finds it; exact losses on the first rung of rows walk on from there while a neighbour is better.
        """
        predicted = self._timed(lambda p: p.single_alpha(self._frames), default=None)
        if predicted is None:
            single = self._frames.single
            return best_single_alpha(lambda alpha: self._judge.loss(single(alpha)), self._search.single_alphas)
        rows = self._scorer.rungs[0]
        known: dict[float, float] = {}

        def look(alphas: Sequence[float]) -> None:
            new = [a for a in alphas if 0.0 <= a <= 1.0 and a not in known]
            batch = self._judge.batch([self._frames.single(a) for a in new])
            batch.advance(rows)
            known.update((a, float("inf") if (loss := batch.loss(i)) is None else loss) for i, a in enumerate(new))

        centre = round(predicted, 9)
        look((centre, round(centre - _ALPHA_STEP, 9), round(centre + _ALPHA_STEP, 9)))
        while (best := min(known, key=lambda a: (known[a], a))) != centre:
            centre = best
            look((round(centre - _ALPHA_STEP, 9), round(centre + _ALPHA_STEP, 9)))
        return centre, [[a, loss] for a, loss in sorted(known.items()) if np.isfinite(loss)]

    def _ranges(self, single: float) -> dict[FrameKey, tuple[AlphaRange, ...]]:
        return {key: ranges_of(f.grouping, self._groups, self._rho, single) for key, f in self._frames.items()}

    def _lead(self) -> Candidate | None:
        """A quick proposal, scored before anything else: what follows has an incumbent to lose against.

        The winner of an earlier search at this site is a better one and costs nothing.
        """
        if self._groups.k == "auto":
            return None
        known = self._from_earlier()
        if known is not None and self._scorer.score([known], protected=1, pruning=None)[0].state == "COMPLETE":
            return known
        ranges = self._ranges(DEFAULT_ALPHA)
        lead: Candidate | None = self._timed(
            lambda p: p.lead(self._frames, ranges, self._search.range[0]), default=None
        )
        if lead is None or self._scorer.score([lead], protected=1, pruning=None)[0].state != "COMPLETE":
            return None
        return lead

    def _from_earlier(self) -> Candidate | None:
        """The winner of an earlier search in the terms of this one; None where it does not fit or a baseline says the same."""
        old = self._reused
        if old is None or old.alphas is None or old.kind in BASELINES or old.range not in self._search.range:
            return None
        kinds = (bool(old.betas), bool(old.offsets)) == (self._groups.betas, self._groups.offsets)
        if not kinds or len(old.alphas) != self._frames.k:
            return None
        frame = self._frames.of(old)
        if (old.grouping or frame.method, old.statistic or frame.statistic, old.shift) != frame.key:
            return None
        plain = Candidate("reused", old.alphas, old.betas, old.offsets, range=old.range)
        return replace(plain, **self._frames.named(frame))

    def _propose(
        self,
        ranges: Mapping[FrameKey, Sequence[AlphaRange]],
        single: float,
        *,
        beyond: bool,
        lead: Candidate | None = None,
    ) -> list[Candidate]:
        found: list[Candidate] = self._timed(
            lambda p: p.propose(self._frames, ranges, single, self._search.range[0], beyond=beyond, lead=lead),
            default=[],
        )
        return [c for c in ([lead] if lead is not None else []) + found if c != lead or c is lead]

    def _grow_k(self, single: float) -> None:
        """Keep the first K whose successor does not lower the held-out loss by more than its paired standard error."""
        looks: list[tuple[int, Frames, Smoothing]] = []
        for k in _GROWING_K:
            if k > self._data.channels or (looks and looks[-1][1].k < looks[-1][0]):
                break  # the channels do not support as many
            self._frames = self._look(k)
            proposals = self._propose(self._ranges(single), single, beyond=False)
            if not proposals:
                break
            looks.append((k, self._frames, self._to_smoothing(proposals[0])))
        if not looks:
            self._frames = self._look(4)  # no noise model to compare K with
            return
        batch = self._reserve.batch([smoothing for _, _, smoothing in looks])
        batch.advance(self._reserve.rows)
        kept = 0
        for i in range(1, len(looks)):
            mean, deviation = batch.paired(kept, i)
            if batch.failure(i) or mean <= deviation:
                break
            kept = i
        self._k_tried = tuple(k for k, _, _ in looks)
        self._frames = looks[kept][1]

    def _enough(self, best: float, results: Sequence[TrialResult]) -> str:
        """Compares with the per-channel limit, which is found once, around the best candidate so far."""
        if self._proposer is None:
            return ""
        if self._facts is None:
            self._facts = self._measure_noise_model(results)
        if self._limit is None:
            best_so_far = best_trial(results).candidate
            start, centre = self._to_smoothing(best_so_far), self._frames.of(best_so_far).centre
            self._limit = self._timed(
                lambda p: per_channel_limit(self._judge, p.model(centre), start, start_loss=best, steps=_LIMIT_STEPS),
                default=None,
            )
        tolerance = self._search.tolerance
        if self._limit is None or not self._facts.trusted or best > (1 + tolerance) * self._limit.loss:
            return ""
        return f"within {tolerance:.1%} of the per-channel limit"

    def _near_limit(
        self, ranges: Mapping[FrameKey, Sequence[AlphaRange]], results: Sequence[TrialResult]
    ) -> list[Candidate]:
        """A proposal made from the scales of the limit, where no other one came near it."""
        best = best_trial(results).candidate
        limit = self._limit
        if limit is None or best.kind in BASELINES:
            return []
        bounds = ranges[self._frames.of(best).key]
        if self._groups.ranges != "strict":
            bounds = [replace(r, low=0.0, high=1.0) for r in bounds]
        found: Candidate | None = self._timed(
            lambda p: p.near_limit(self._frames, bounds, best, limit.smoothing.scales, self._search.range[0]),
            default=None,
        )
        return [] if found is None or any(r.candidate == found for r in results) else [found]

    def _measure_noise_model(self, results: Sequence[TrialResult]) -> NoiseFacts:
        """Predicted against exact losses of the candidates scored on all rows so far."""
        # Identity has no frame of its own, so where shifting is forced no model looks at its rows.
        scored = [r for r in results if r.loss and (r.candidate.alphas is not None or self._frames.base.shift is None)]
        candidates = [r.candidate for r in scored]
        predicted = self._timed(
            lambda p: p.predicted(self._frames, candidates, [self._to_smoothing(c) for c in candidates]), default=[]
        )
        pairs = [(p, float(r.loss or 0.0)) for p, r in zip(predicted, scored, strict=True) if np.isfinite(p) and p > 0]
        tau = kendalltau(*zip(*pairs, strict=True)).statistic if len(pairs) >= 4 else None
        return NoiseFacts(
            median_log_ratio=median(float(np.log(p / e)) for p, e in pairs) if pairs else 0.0,
            kendall_tau=None if tau is None or not np.isfinite(tau) else float(tau),
            proposals=sum(r.candidate.kind == "noise_model" for r in results),
        )

    def _bought(self, results: Sequence[TrialResult]) -> NoiseFacts | None:
        """What the noise model cost and what it spared: the exact grid of single alphas, and trials that were not needed."""
        if self._facts is None:
            return None
        spared = self._search.single_alphas + self._search.trials - self._judge.exact_evaluations
        each = median(r.seconds for r in results if r.loss is not None)
        return replace(
            self._facts,
            seconds=self._noise_seconds,
            evaluations_saved=spared,
            seconds_saved=spared * each - self._noise_seconds,
        )

    def _held_out(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Losses on the held-out rows; a candidate is scored there once."""
        new = [c for c in candidates if c not in self._held_out_scores]
        batch = self._reserve.batch([self._to_smoothing(c) for c in new])
        batch.advance(self._reserve.rows)
        for i, candidate in enumerate(new):
            loss = batch.loss(i)
            self._held_out_scores[candidate] = None if loss is None else (loss, batch.row_errors(i))
        return [None if (score := self._held_out_scores[c]) is None else score[0] for c in candidates]

    def _try_ranges(
        self, study: RecordedStudy, best: TrialResult
    ) -> tuple[list[TrialResult], tuple[tuple[str, float], ...]]:
        """The best trial under another range statistic, recorded as a trial, where that is better on held-out rows.

        On the rows that were searched on, abs-max never clips and a margin only costs, so only other rows can tell.
        """
        variants = self._range_variants(best.candidate)
        if not variants:
            return [], ()
        losses = self._held_out([best.candidate, *variants])
        scored = {c: loss for c, loss in zip((best.candidate, *variants), losses, strict=True) if loss is not None}
        known = {c.range: loss for c, loss in scored.items()}
        study.note("range_statistics", known)
        chosen = min(scored, key=lambda c: scored[c], default=best.candidate)
        before, after = (self._held_out_scores[c] for c in (best.candidate, chosen))
        if chosen == best.candidate or before is None or after is None:
            return [], tuple(known.items())
        mean, deviation = paired_difference(before[1], after[1], 1.0)
        if mean <= _RANGE_CONFIDENCE * deviation:
            return [], tuple(known.items())
        return study.attempt(self._scorer, [chosen], protected=1), tuple(known.items())

    def _range_variants(self, winner: Candidate) -> list[Candidate]:
        """The winner under every other range statistic that can make a difference on the held-out rows."""
        static = self._scheme.activations != "none" and self._scheme.activation_granularity == "static"
        if not static or winner.alphas is None or winner.kind in BASELINES:
            return []
        plain = self._to_smoothing(replace(winner, range="absmax"))
        useful = {
            "absmax": True,
            "percentile": self._judge.range_factor(plain, self._search.range_percentile) < _CLIPS,
            "margin": self._reserve.range_factor(plain, 100.0) > 1.0,
        }
        return [replace(winner, range=name) for name in self._search.range if name != winner.range and useful[name]]

    def _limit_losses(self, verdict: Verdict) -> tuple[float | None, float | None]:
        """The limit on search and held-out rows; the winner is one free choice, too, so the limit is never above it."""
        if self._limit is None:
            return None, None
        try:
            held_out = self._reserve.loss(self._limit.smoothing)
        except NonFiniteError:
            return None, None
        return min(self._limit.loss, verdict.search.ours), min(held_out, verdict.held_out.ours)


def _rivals(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The best trial near the best one of every other frame: what a shift or a grouping gains may not hold on other rows."""
    best = best_trial(results)
    by_frame: dict[tuple[str, str, str], list[TrialResult]] = {}
    for r in results:
        if r.candidate.kind not in BASELINES and r.loss is not None and r.loss <= _RIVAL * float(best.loss or 0.0):
            by_frame.setdefault((r.candidate.grouping, r.candidate.statistic, r.candidate.shift), []).append(r)
    by_frame.pop((best.candidate.grouping, best.candidate.statistic, best.candidate.shift), None)
    return [best_trial(trials) for trials in by_frame.values()]
