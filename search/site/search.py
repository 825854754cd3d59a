"""The search at one site: group its channels, bound their alphas, try candidates, guard the winner. Claims A-1 to A-3."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import numpy.typing as npt
import optuna
import torch

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.media.in_memory import as_tensor
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.config import RunConfig, SchemeConfig, SearchConfig
from alphasmith.search.devices import threads_for
from alphasmith.search.interruption import leave, never
from alphasmith.search.site._noise_report import LimitRule
from alphasmith.search.site._opening import Opening, open_site
from alphasmith.search.site._scorer import HeldOutScorer
from alphasmith.search.site._static_range import choose_range
from alphasmith.search.site.parametrization import ChoiceKey, Ranges
from alphasmith.search.site.result import SiteResult
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.candidates import BASELINES, Candidate, TrialResult
from alphasmith.search.study.guard import guard
from alphasmith.search.study.study import RecordedStudy, play
from alphasmith.search.study.study_record import StoredLog, StudyLog
from alphasmith.search.study.trial import best_trial
from alphasmith.search.study.types import StudyContext
from alphasmith.storage.database.connection import open_optuna
from alphasmith.storage.runs.entries import SearchFacts

#: Proposals of the sampler that are scored together: on a GPU one alone does not fill it.
_BATCH = {"cuda": 8}
#: Trials whose loss is at most this many times the best one's are judged on held-out rows, too, the best of each parametrization.
_RIVAL = 1.5


def search_site(
    x: torch.Tensor | npt.ArrayLike,
    w: torch.Tensor | npt.ArrayLike,
    *,
    scheme: Scheme | SchemeConfig | Mapping[str, Any] | str,
    groups: int | str = 4,
    trials: int = 32,
    seed: int = 0,
    storage: str | None = None,
    settings: RunConfig | Mapping[str, Any] | None = None,
) -> SiteResult:
    """Search the smoothing coefficients of ONE layer.

    Three quarters of the rows, drawn with ``seed``, are searched on; the rest judge the winner. Then its numbers stay, and its scales,
    shift and range are taken again from all rows, which a deployed layer is better off with; the losses stay those before.

    Args:
        x: (T, C) activations, at least 2 rows: a tensor, an array, a data parametrization or lists of numbers.
        w: (O, C) weight, likewise.
        scheme: Scheme, its fields or its name, e.g. ``"w8a8-channel-static"``.
        groups: K, or ``"auto"``.
        trials: Trials of the study at most, baselines included; at least 4 are made where the study needs them.
        seed: Seed of the split, the sampler and nothing else.
        storage: SQLAlchemy URL that keeps the study; None keeps it in memory.
        settings: Sections ``groups`` and ``search`` of a configuration, where ``groups``, ``trials`` and ``seed`` are
            replaced by the arguments; None: the defaults.

    Raises:
        InputError: Wrong types or shapes, non-finite x or w, or a number or name that cannot be used.
    """
    x = as_tensor(x, "x").to(torch.float32)
    w = as_tensor(w, "w").to(x)
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise InputError("x, w", f"shapes {tuple(x.shape)} and {tuple(w.shape)} do not match", "give (T, C) and (O, C)")
    if x.shape[0] < 2:
        raise InputError("x", "has fewer than 2 rows", "give rows to search on and rows to judge on")
    for name, tensor in (("x", x), ("w", w)):
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(name, "holds NaN or infinite values", "remove them")
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs a line per study
    known = RunConfig.build(settings or {})
    trials = max(trials, 4) if isinstance(trials, int) else trials
    config = RunConfig(
        storage=storage,
        scheme=scheme,
        groups=known.groups.model_dump() | {"k": groups},
        search=known.search.model_dump() | {"trials": trials, "seed": seed},
    )
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(config.search.seed)).to(x.device)
    cut = max(1, min(x.shape[0] - 1, x.shape[0] * 3 // 4))
    data, held_out = (linear_site_data(x[rows], w) for rows in (order[:cut], order[cut:]))
    # A deployed model knows the ranges of its calibration data only.
    held_out = replace(held_out, activation_statistics=data.activation_statistics, input_range=data.input_range)
    name = f"search_site-{time.time_ns()}"
    return search_data(
        data,
        held_out,
        SiteSettings(scheme=config.scheme.build(), groups=config.groups, search=config.search),
        everything=linear_site_data(x, w),
        log=None if storage is None else StoredLog(open_optuna(storage), name),
        study_name=None if storage is None else name,
    )


def search_data(
    data: SiteData,
    held_out: SiteData,
    settings: SiteSettings,
    *,
    everything: SiteData | None = None,
    log: StudyLog | None = None,
    study_name: str | None = None,
    stop: Callable[[], bool] = never,
) -> SiteResult:
    """Search one site given its calibration and held-out rows; ``search_site`` and the run both end here.

    Args:
        data: Rows to search on, weights and statistics.
        held_out: Rows that judge the winner; its static ranges must come from ``data``.
        settings: What to try.
        everything: All rows of the site, from which the scales, the shift and the range of the winner and of the baselines are taken
            again at the end, when nothing is judged any more; None: they stay those of ``data``.
        log: Keeps the study, and knows what is on record of it; None: nothing is kept.
        study_name: Name of the study, None for a random one.
        stop: Polled before every batch of candidates; return True to stop. What was found by then is on record.

    Raises:
        AlphasmithError: Every trial failed, or the study on record was made for another space.
        Interrupted: ``stop`` said so.
    """
    start = time.perf_counter()
    with threads_for(sum(part.x.shape[0] * part.weight.numel() for part in data.parts)):
        judge = SiteObjective(data, settings.scheme, budget=settings.budget, unseen=True)
        # Made when it is first asked: proposals come before it.
        reserve = cache(lambda: SiteObjective(held_out, settings.scheme, budget=settings.budget))
        leave(stop)
        opening = open_site(data, settings, judge, reserve, start=start)
        leave(stop)
        frames, surrogate = opening.frames, opening.surrogate
        ranges = frames.ranges(opening.single)
        space = frames.space(ranges)
        context = StudyContext(device=str(data.device), log=log, name=study_name)
        study = RecordedStudy(settings.search, space, context)
        study.note("single_alpha_grid", opening.grid)
        rule = LimitRule(surrogate, frames, judge, settings.search.tolerance)
        stopped = _play(study, opening, ranges, rule, settings.search, stop)
        scorer = HeldOutScorer(reserve(), frames.smoothing)
        choice = choose_range(best_trial(study.results).candidate, frames, judge, scorer, settings.search)
        if choice.losses:
            study.note("range_statistics", dict(choice.losses))
        ranged = [] if choice.better is None else study.attempt(opening.scorer, [choice.better], protected=1)
        verdict = guard(
            study.results, scorer.losses, best_single_alpha=opening.single, also=_rivals(study.results) + ranged
        )
        limits = rule.losses(verdict, reserve())
        winner = verdict.winner.candidate
        frame = frames.of(winner)
        if everything is not None:
            frames = frames.refitted(everything)
        spared = settings.search.single_alphas + settings.search.trials - judge.exact_evaluations
        return SiteResult(
            name=data.name,
            labels=frame.grouping.labels,
            ranges=ranges[frame.key],
            magnitudes=tuple(frame.grouping.values.tolist()),
            outliers=tuple(frame.grouping.outliers),
            requested_k=frames.k if settings.groups.k == "auto" else settings.groups.k,
            candidate=winner,
            smoothing=frames.smoothing(winner),
            refitted=everything is not None,
            grouping=frame.method,
            statistic=frame.statistic,
            plain={c.kind: frames.smoothing(c) for c in opening.baselines},
            slopes=frames.slopes(winner),
            search=verdict.search.model_copy(update={"limit": limits[0]}),
            held_out=verdict.held_out.model_copy(update={"limit": limits[1]}),
            overruled=verdict.overruled,
            results=tuple(study.results),
            exact_evaluations=judge.exact_evaluations + reserve().exact_evaluations,
            seconds=time.perf_counter() - start,
            study_name=study.name,
            facts=SearchFacts(
                stopped="; ".join(filter(None, (stopped, rule.without, _without_model(surrogate.reason)))),
                noise_model=rule.facts(study.results, spared),
                noise_reason=surrogate.reason,
                k_tried=opening.k_tried,
                range_losses=dict(choice.losses),
            ),
            trace=tuple(opening.scorer.trace),
            space=space,
        )


def _play(
    study: RecordedStudy[Candidate],
    opening: Opening,
    ranges: Ranges,
    rule: LimitRule,
    search: SearchConfig,
    stop: Callable[[], bool],
) -> str:
    """Try baselines and proposals, then the sampler's, until the per-channel limit is near; why it ended."""
    frames, lead = opening.frames, opening.lead
    # An earlier winner is tried alone at first: where it is near the limit, no descent is needed.
    reused = lead is not None and lead.kind == "reused"

    def proposals() -> list[Candidate]:
        return opening.surrogate.ask(lambda p: p.propose(frames, ranges, opening.single, lead=lead)) or []

    return play(
        study,
        opening.scorer,
        first=opening.baselines + ([] if lead is None else [lead]) + ([] if reused else proposals()),
        protected=len(opening.baselines),
        trials=search.trials,
        batch=_BATCH.get(frames.base.activation.device.type, 1),
        patience=search.patience,
        enough=lambda best: rule.enough(best, study.results),
        follow_up=lambda: (proposals() if reused else []) + rule.proposals(ranges, study.results),
        stop=stop,
    )


def _without_model(reason: str) -> str:
    return f"exact losses only: {reason}" if reason else ""


def _rivals(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The best trial near the best one of every other frame: what a shift or a grouping gains may be lost on other rows."""
    best, frame = best_trial(results), attrgetter("grouping", "statistic", "shift")
    by_frame: dict[ChoiceKey, list[TrialResult]] = {}
    for r in results:
        if r.candidate.kind not in BASELINES and r.loss is not None and r.loss <= _RIVAL * float(best.loss or 0.0):
            by_frame.setdefault(frame(r.candidate), []).append(r)
    by_frame.pop(frame(best.candidate), None)
    return [best_trial(trials) for trials in by_frame.values()]
