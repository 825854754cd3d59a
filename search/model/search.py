"""Claim A-2 to the letter: one study, K alphas over all channels of the model, N candidate models, loss at the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.groups import Grouping, group_channels
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.literals import CandidateKind
from alphasmith.objectives.smoothing import Smoothing, group_scales
from alphasmith.search.config import GroupsConfig, RunConfig
from alphasmith.search.interruption import leave
from alphasmith.search.model._output_scorer import OutputScorer
from alphasmith.search.site.parametrization import ranges_of
from alphasmith.search.study.alpha_ranges import AlphaRange
from alphasmith.search.study.candidates import Candidate, TrialResult, baselines, lowest_of
from alphasmith.search.study.fault_isolation import Racer, race_all
from alphasmith.search.study.guard import Overruled, guard
from alphasmith.search.study.space import SearchSpace
from alphasmith.search.study.study import RecordedStudy, play
from alphasmith.search.study.types import StudyContext
from alphasmith.storage.runs.entries import Losses

#: Fact of a study under which the single alphas that were looked at are kept.
_GRID = "single_alpha_grid"


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """What smoothing needs of one site: statistics and ties, no rows.

    Attributes:
        activation: (C,) a_j.
        weight: (C,) w_j.
        ties: (C,) channels with equal values share a scale.
        producer: (C,) p_j of quantized weights that the scale divides; None where there are none.
    """

    activation: torch.Tensor
    weight: torch.Tensor
    ties: torch.Tensor
    producer: torch.Tensor | None = None


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
    search: Losses
    held_out: Losses
    overruled: Overruled | None
    results: tuple[TrialResult, ...]
    exact_evaluations: int
    seconds: float
    study_name: str

    @property
    def best_single_alpha(self) -> float:
        """The best single alpha."""
        return self.search.best_single_alpha


class ModelScales:
    """Alphas of groups over the whole model -> smoothings per site."""

    def __init__(self, sites: Mapping[str, SiteStatistics], labels: Mapping[str, torch.Tensor] | None = None) -> None:
        self._sites = sites
        self._labels = labels or {n: torch.zeros(len(s.activation), dtype=torch.int64) for n, s in sites.items()}
        self.k = 1 + max(int(v.max()) for v in self._labels.values())

    def __call__(self, alphas: Sequence[float] | None) -> dict[str, Smoothing]:
        """Smoothing of every site; None: identity."""
        return {name: self._smoothing(name, alphas) for name in self._sites}

    def single(self, alpha: float) -> dict[str, Smoothing]:
        """Smoothings of one alpha for the whole model."""
        return self((alpha,) * self.k)

    def of_site(self, name: str, alpha: float) -> Smoothing:
        """Smoothing of one site under one alpha."""
        return self._smoothing(name, (alpha,) * self.k)

    def _smoothing(self, name: str, alphas: Sequence[float] | None) -> Smoothing:
        s = self._sites[name]
        scales = group_scales(s.activation, s.weight, alphas, self._labels[name], ties=s.ties, producer=s.producer)
        return Smoothing(scales=scales)


def search_model(
    sites: Mapping[str, SiteStatistics],
    judge: ModelObjective,
    reserve: ModelObjective,
    config: RunConfig,
    *,
    rho: float,
    racer: Racer | None = None,
    batch: int = 1,
    context: StudyContext | None = None,
) -> ModelResult:
    """Search K alphas shared by all channels of the model.

    Args:
        sites: Statistics of every smoothable site.
        judge: Loss at the model's output on the search batches.
        reserve: The same on held-out batches.
        config: Its sections ``groups`` (over the pooled channels of all sites) and ``search``.
        rho: Scarcity of the target hardware (fA7).
        racer: Scores several candidates against each other, in other processes say; None: ``judge``.
        batch: Proposals of the sampler that are scored together.
        context: Where the study is recorded, who hears of its trials, and when it is left; None: nothing is kept.

    Raises:
        InputError: No site can be smoothed, or the number of groups is left open.
        Interrupted: ``context.stop`` said so.
    """
    context = context or StudyContext()
    groups, search = config.groups, config.search
    start = context.clock()
    if not sites:
        raise InputError("model", "no site can be smoothed", "see the reasons printed for each site")
    grouping, labels = _group(sites, groups)
    to_scales = ModelScales(sites, labels)
    grid = context.noted(_GRID)
    if grid is None:
        leave(context.stop)
        alphas = [k / (search.single_alphas - 1) for k in range(search.single_alphas)]
        scores = race_all(racer or judge, [to_scales.single(alpha) for alpha in alphas])
        grid = [[round(alpha, 9), s.loss] for alpha, s in zip(alphas, scores, strict=True) if s.loss is not None]
    single = lowest_of(grid)
    ranges = ranges_of(grouping, groups, rho, single)
    study = RecordedStudy(search, SearchSpace.of(ranges), context)
    study.note(_GRID, grid)
    play(
        study,
        OutputScorer[Candidate](judge, lambda c: to_scales(c.alphas), clock=context.clock, racer=racer),
        first=baselines(len(ranges), single),
        protected=3,
        trials=search.trials,
        batch=1 if study.pruning else batch,  # an Optuna pruner compares one candidate with those before it
        stop=context.stop,
    )
    verdict = guard(
        study.results,
        lambda candidates: [_loss(reserve, to_scales(c.alphas)) for c in candidates],
        best_single_alpha=single,
    )
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
        search=verdict.search,
        held_out=verdict.held_out,
        overruled=verdict.overruled,
        results=tuple(study.results),
        exact_evaluations=judge.evaluations + reserve.evaluations,
        seconds=context.clock() - start,
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


def _loss(objective: ModelObjective, smoothings: Mapping[str, Smoothing]) -> float | None:
    """The loss of one candidate, None where it breaks down."""
    return race_all(objective, [smoothings], protected=1)[0].loss
