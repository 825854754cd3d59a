"""Claim A-2 to the letter: one study, K alphas over all channels of the model, N candidate models, loss at the output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import optuna
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.groups import Grouping, group_channels
from alphasmith.objectives.model_objective import ModelObjective
from alphasmith.objectives.smoothing import group_scales
from alphasmith.search.config import GroupsConfig, SearchConfig
from alphasmith.search.ranges import AlphaRange
from alphasmith.search.site_search import ranges_of
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.studies import (
    Candidate,
    CandidateKind,
    Losses,
    TrialResult,
    baselines,
    best_single_alpha,
    guard,
    open_study,
    run_study,
)


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
        scales: (C,) per site, of the winner.
    """

    labels: Mapping[str, torch.Tensor]
    ranges: tuple[AlphaRange, ...]
    magnitudes: tuple[float, ...]
    outliers: tuple[bool, ...]
    requested_k: int
    winner: CandidateKind
    alphas: tuple[float, ...] | None
    scales: Mapping[str, torch.Tensor]
    best_single_alpha: float
    search: Losses
    held_out: Losses
    guarded: bool
    results: tuple[TrialResult, ...]
    exact_evaluations: int
    seconds: float
    study_name: str


class ModelScales:
    """Alphas of groups over the whole model -> scales per site."""

    def __init__(self, sites: Mapping[str, SiteStatistics], labels: Mapping[str, torch.Tensor] | None = None) -> None:
        self._sites = sites
        self._labels = labels or {n: torch.zeros(len(s.activation), dtype=torch.int64) for n, s in sites.items()}
        self.k = 1 + max(int(v.max()) for v in self._labels.values())

    def __call__(self, alphas: Sequence[float] | None) -> dict[str, torch.Tensor]:
        """Scales (C,) of every site; None: identity."""
        return {
            n: group_scales(s.activation, s.weight, alphas, self._labels[n], ties=s.ties)
            for n, s in self._sites.items()
        }

    def single(self, alpha: float) -> dict[str, torch.Tensor]:
        """Scales of one alpha for the whole model."""
        return self((alpha,) * self.k)


def search_model(
    sites: Mapping[str, SiteStatistics],
    judge: ModelObjective,
    reserve: ModelObjective,
    *,
    groups: GroupsConfig,
    search: SearchConfig,
    rho: float,
    storage: optuna.storages.BaseStorage | None,
    study_name: str | None,
    clock: Callable[[], float] = time.perf_counter,
    on_trial: Callable[[TrialResult], None] | None = None,
) -> ModelResult:
    """Search K alphas shared by all channels of the model.

    Args:
        sites: Statistics of every smoothable site.
        judge: Loss at the model's output on the search batches.
        reserve: The same on held-out batches.
        groups: Grouping over the pooled channels of all sites.
        search: Trials, sampler, pruner, seed.
        rho: Scarcity of the target hardware (fA7).
        storage: Optuna storage, None for memory.
        study_name: Name of the study.
        clock: Seconds, monotonic.
        on_trial: Called after each trial.

    Raises:
        InputError: No site can be smoothed.
    """
    start = clock()
    if not sites:
        raise InputError("model", "no site can be smoothed", "see the reasons printed for each site")
    grouping, labels = _group(sites, groups)
    to_scales = ModelScales(sites, labels)
    single, grid = best_single_alpha(lambda alpha: judge.loss(to_scales.single(alpha)), search.single_alphas)
    ranges = ranges_of(grouping, groups, rho, single)
    space = SearchSpace.of(ranges)
    study = open_study(search, space, grid, storage=storage, name=study_name)
    results = run_study(
        study,
        space,
        _ModelCandidates(judge, to_scales),
        candidates=baselines(len(ranges), single),
        trials=search.trials,
        device=search.device or "cpu",
        clock=clock,
        on_trial=on_trial,
    )
    verdict = guard(results, lambda candidate: reserve.loss(to_scales(candidate.alphas)))
    chosen = verdict.winner.candidate
    return ModelResult(
        labels=labels,
        ranges=ranges,
        magnitudes=tuple(grouping.values.tolist()),
        outliers=grouping.outliers,
        requested_k=groups.k,
        winner=chosen.kind,
        alphas=chosen.alphas,
        scales=to_scales(chosen.alphas),
        best_single_alpha=single,
        search=verdict.search,
        held_out=verdict.held_out,
        guarded=verdict.guarded,
        results=tuple(results),
        exact_evaluations=judge.evaluations + reserve.evaluations,
        seconds=clock() - start,
        study_name=study.study_name,
    )


def _group(sites: Mapping[str, SiteStatistics], groups: GroupsConfig) -> tuple[Grouping, dict[str, torch.Tensor]]:
    """Group the pooled channels of all sites; labels per site."""
    values = torch.cat([s.activation.cpu() for s in sites.values()])
    ties, offset = [], 0
    for s in sites.values():
        ties.append(s.ties.cpu() + offset)
        offset += len(s.ties)
    grouping = group_channels(values, method=groups.method, k=groups.k, bins=groups.bins, ties=torch.cat(ties))
    parts = torch.split(grouping.labels, [len(s.activation) for s in sites.values()])
    return grouping, dict(zip(sites, parts, strict=True))


class _ModelCandidates:
    """The output loss of a candidate model after each batch."""

    def __init__(self, judge: ModelObjective, to_scales: ModelScales) -> None:
        self._judge = judge
        self._to_scales = to_scales

    def losses(self, candidate: Candidate) -> Iterator[tuple[int, float]]:
        yield from enumerate(self._judge.losses(self._to_scales(candidate.alphas)), start=1)
