"""Claim A-2 to the letter: one study, K alphas over all channels of the model, N candidate models, loss at the output."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.groups import Grouping, group_channels
from alphasmith.objectives.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.smoothing import Smoothing, group_scales
from alphasmith.search.candidates import Candidate, CandidateKind
from alphasmith.search.config import GroupsConfig, SearchConfig
from alphasmith.search.frames import ranges_of
from alphasmith.search.interruption import leave, never
from alphasmith.search.ranges import AlphaRange
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.studies import (
    Losses,
    Outcome,
    Pruning,
    RecordedStudy,
    State,
    TrialResult,
    baselines,
    best_single_alpha,
    best_trial,
    guard,
    lowest_of,
    play,
)
from alphasmith.search.study_log import StudyLog
from alphasmith.search.survival import Racer, race_all, survive

#: Fact of a study under which the single alphas that were looked at are kept.
_GRID = "single_alpha_grid"


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """What smoothing needs of one site: statistics and ties, no rows.

    Attributes:
        activation: (C,) a_j.
        weight: (C,) w_j.
        ties: (C,) channels with equal values share a scale.
    """

    activation: torch.Tensor
    weight: torch.Tensor
    ties: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """What a search over the whole model found; fields as in ``SiteResult``.

    Attributes:
        labels: (C,) int64 per site, groups shared by all sites.
        smoothings: What the winner does to every site.
    """

    labels: Mapping[str, torch.Tensor]
    ranges: tuple[AlphaRange, ...]
    magnitudes: tuple[float, ...]
    outliers: tuple[bool, ...]
    requested_k: int
    winner: CandidateKind
    alphas: tuple[float, ...] | None
    smoothings: Mapping[str, Smoothing]
    best_single_alpha: float
    search: Losses
    held_out: Losses
    guarded: bool
    results: tuple[TrialResult, ...]
    exact_evaluations: int
    seconds: float
    study_name: str


class ModelScales:
    """Alphas of groups over the whole model -> smoothings per site."""

    def __init__(self, sites: Mapping[str, SiteStatistics], labels: Mapping[str, torch.Tensor] | None = None) -> None:
        self._sites = sites
        self._labels = labels or {n: torch.zeros(len(s.activation), dtype=torch.int64) for n, s in sites.items()}
        self.k = 1 + max(int(v.max()) for v in self._labels.values())

    def __call__(self, alphas: Sequence[float] | None) -> dict[str, Smoothing]:
        """Smoothing of every site; None: identity."""
        return {
            n: Smoothing(scales=group_scales(s.activation, s.weight, alphas, self._labels[n], ties=s.ties))
            for n, s in self._sites.items()
        }

    def single(self, alpha: float) -> dict[str, Smoothing]:
        """Smoothings of one alpha for the whole model."""
        return self((alpha,) * self.k)


def search_model(
    sites: Mapping[str, SiteStatistics],
    judge: ModelObjective,
    reserve: ModelObjective,
    *,
    groups: GroupsConfig,
    search: SearchConfig,
    rho: float,
    log: StudyLog | None = None,
    study_name: str | None = None,
    device: str = "cpu",
    racer: Racer | None = None,
    batch: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    on_trial: Callable[[TrialResult], None] | None = None,
    stop: Callable[[], bool] = never,
) -> ModelResult:
    """Search K alphas shared by all channels of the model.

    Args:
        sites: Statistics of every smoothable site.
        judge: Loss at the model's output on the search batches.
        reserve: The same on held-out batches.
        groups: Grouping over the pooled channels of all sites.
        search: Trials, sampler, pruner, seed.
        rho: Scarcity of the target hardware (fA7).
        log: Keeps the study, and knows what is on record; None: nothing is kept.
        study_name: Name of the study, None for a random one.
        device: Where candidates are scored, recorded with the study.
        racer: Scores several candidates against each other, in other processes say; None: ``judge``.
        batch: Proposals of the sampler that are scored together.
        clock: Seconds, monotonic.
        on_trial: Called after each trial.
        stop: Asked before every batch whether to leave.

    Raises:
        InputError: No site can be smoothed, or the number of groups is left open.
        Interrupted: ``stop`` said so.
    """
    start = clock()
    if not sites:
        raise InputError("model", "no site can be smoothed", "see the reasons printed for each site")
    grouping, labels = _group(sites, groups)
    to_scales = ModelScales(sites, labels)
    grid = None if log is None else log.past.notes.get(_GRID)
    if grid is None:
        leave(stop)
        losses = _single_losses(racer or judge, to_scales, search.single_alphas)
        _, grid = best_single_alpha(losses, search.single_alphas)
    single = lowest_of(grid)
    ranges = ranges_of(grouping, groups, rho, single)
    space = SearchSpace.of(ranges)
    study = RecordedStudy(search, space, device=device, log=log, name=study_name, on_trial=on_trial)
    study.note(_GRID, grid)
    play(
        study,
        ModelScorer(judge, to_scales, clock=clock, racer=racer),
        first=baselines(len(ranges), single),
        protected=3,
        trials=search.trials,
        batch=1 if study.pruning else batch,  # an Optuna pruner compares one candidate with those before it
        stop=stop,
    )
    verdict = guard(study.results, lambda candidates: [_loss(reserve, to_scales(c.alphas)) for c in candidates])
    chosen = verdict.winner.candidate
    return ModelResult(
        labels=labels,
        ranges=ranges,
        magnitudes=tuple(grouping.values.tolist()),
        outliers=grouping.outliers,
        requested_k=_requested(groups),
        winner=chosen.kind,
        alphas=chosen.alphas,
        smoothings=to_scales(chosen.alphas),
        best_single_alpha=single,
        search=verdict.search,
        held_out=verdict.held_out,
        guarded=verdict.guarded,
        results=tuple(study.results),
        exact_evaluations=judge.evaluations + reserve.evaluations,
        seconds=clock() - start,
        study_name=study.name,
    )


def _group(sites: Mapping[str, SiteStatistics], groups: GroupsConfig) -> tuple[Grouping, dict[str, torch.Tensor]]:
    """Group the pooled channels of all sites; labels per site."""
    values = torch.cat([s.activation.cpu() for s in sites.values()])
    ties, offset = [], 0
    for s in sites.values():
        ties.append(s.ties.cpu() + offset)
        offset += len(s.ties)
    grouping = group_channels(
        values, method=groups.method[0], k=_requested(groups), bins=groups.bins, ties=torch.cat(ties)
    )
    parts = torch.split(grouping.labels, [len(s.activation) for s in sites.values()])
    return grouping, dict(zip(sites, parts, strict=True))


def _requested(groups: GroupsConfig) -> int:
    if groups.k == "auto":
        raise InputError("groups.k", "is 'auto', which the noise model of a site decides", "give a number of groups")
    return groups.k


def _single_losses(racer: Racer, to_scales: ModelScales, points: int) -> Callable[[float], float]:
    """Loss of each alpha of an even grid; NonFiniteError for those that broke down or were clearly behind."""
    alphas = [k / (points - 1) for k in range(points)]
    scores = dict(zip(alphas, race_all(racer, [to_scales.single(alpha) for alpha in alphas]), strict=True))

    def loss(alpha: float) -> float:
        score = scores[alpha]
        if score.loss is None:
            raise NonFiniteError(score.failure or "given up early")
        return score.loss

    return loss


def _loss(objective: ModelObjective, smoothings: Mapping[str, Smoothing]) -> float | None:
    """The loss of one candidate, None where it breaks down."""
    return race_all(objective, [smoothings], protected=1)[0].loss


class ModelScorer:
    """Output losses of candidate models, batch by batch, against the best one so far.

    Args:
        judge: Loss at the model's output on the search batches.
        smoothings: Alphas -> what they do to every site.
        clock: Seconds, monotonic.
        racer: Scores several candidates against each other; None: the judge, in this process.
    """

    def __init__(
        self, judge: ModelObjective, smoothings: ModelScales, *, clock: Callable[[], float], racer: Racer | None = None
    ) -> None:
        self._judge = judge
        self._racer: Racer = racer or judge
        self._smoothings = smoothings
        self._clock = clock
        self._best: ModelScore | None = None

    def score(self, candidates: Sequence[Candidate], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        """See :class:`alphasmith.search.studies.Scorer`; steps are batches, from 1."""
        return survive(self._score, candidates, protected=protected, pruning=pruning)

    def _score(self, candidates: Sequence[Candidate], protected: int, pruning: Pruning | None) -> list[Outcome]:
        if pruning is not None:
            return [self._pruned(i, c, None if i < protected else pruning) for i, c in enumerate(candidates)]
        began = self._clock()
        scores = race_all(
            self._racer,
            [self._smoothings(c.alphas) for c in candidates],
            incumbent=None if self._best is None or not self._best.samples else self._best.errors,
            protected=protected,
        )
        seconds, total = self._clock() - began, sum(len(s.losses) for s in scores) or 1
        for score in scores:
            if score.loss is not None and (self._best is None or score.loss < float(self._best.loss or 0.0)):
                self._best = score
        return [_outcome(score, seconds * len(score.losses) / total) for score in scores]

    def recall(self, results: Sequence[TrialResult]) -> None:
        """See :class:`alphasmith.search.studies.Scorer`."""
        complete = [r for r in results if r.loss is not None]
        if complete:
            best = best_trial(complete)
            self.score([best.candidate], protected=1, pruning=None)

    def _pruned(self, index: int, candidate: Candidate, pruning: Pruning | None) -> Outcome:
        """One candidate, stopped where an Optuna pruner says so."""
        began = self._clock()
        steps: list[tuple[int, float]] = []
        state: State = "COMPLETE"
        reason = ""
        try:
            for step, loss in enumerate(self._judge.losses(self._smoothings(candidate.alphas)), start=1):
                steps.append((step, loss))
                if pruning is not None and pruning(index, step, loss):
                    state = "PRUNED"
                    break
        except NonFiniteError as error:
            state, reason = "FAIL", str(error)
        loss_found = steps[-1][1] if state == "COMPLETE" else None
        return Outcome(state=state, loss=loss_found, seconds=self._clock() - began, reason=reason, steps=tuple(steps))


def _outcome(score: ModelScore, seconds: float) -> Outcome:
    state: State = "FAIL" if score.failure else "PRUNED" if score.stopped else "COMPLETE"
    steps = tuple(enumerate(score.losses, start=1))
    return Outcome(state=state, loss=score.loss, seconds=seconds, reason=score.failure, steps=steps)
