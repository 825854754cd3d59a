"""The search at one site: group its channels, bound their alphas, try candidates, guard the winner. Claims A-1 to A-3."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import optuna
import pandas as pd
import torch

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.groups import Grouping, group_channels
from alphasmith.objectives.limit import per_channel_limit
from alphasmith.objectives.noise import NoiseModel
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.site_data import SiteData
from alphasmith.objectives.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.smoothing import group_scales
from alphasmith.search.config import GroupsConfig, RunConfig, SearchConfig
from alphasmith.search.ranges import AlphaRange, group_ranges
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.studies import (
    Candidate,
    CandidateKind,
    Losses,
    TrialResult,
    Verdict,
    baselines,
    best_single_alpha,
    guard,
    open_study,
    run_study,
)
from alphasmith.search.threads import threads_for
from alphasmith.storage.database import open_optuna

#: Share of the rows on which a candidate is scored first, so that a pruner can act.
_RUNGS = (0.25, 1.0)


@dataclass(frozen=True, kw_only=True)
class SiteResult:
    """What a search at one site found.

    Attributes:
        name: Site name.
        labels: (C,) int64 group of every channel.
        ranges: (K,) alpha range of every group.
        magnitudes: (K,) representative magnitude of every group.
        outliers: (K,) whether the grouping calls the group an outlier group.
        requested_k: Groups asked for; larger than K when the channels do not support that many.
        winner: Where the winner comes from; a baseline when nothing beat it on held-out rows.
        alphas: (K,) alphas of the winner, None when identity won.
        scales: (C,) smoothing scales of the winner.
        best_single_alpha: The best single alpha of the grid.
        best_single_scales: (C,) its scales.
        search: Losses on the search rows.
        held_out: Losses on the held-out rows.
        guarded: True when the best search trial lost to a baseline on held-out rows.
        results: All trials.
        exact_evaluations: Candidates scored on search or held-out rows, grid included.
        seconds: Wall time [s].
        study_name: Name of the Optuna study.
    """

    name: str
    labels: torch.Tensor
    ranges: tuple[AlphaRange, ...]
    magnitudes: tuple[float, ...]
    outliers: tuple[bool, ...]
    requested_k: int
    winner: CandidateKind
    alphas: tuple[float, ...] | None
    scales: torch.Tensor
    best_single_alpha: float
    best_single_scales: torch.Tensor
    search: Losses
    held_out: Losses
    guarded: bool
    results: tuple[TrialResult, ...]
    exact_evaluations: int
    seconds: float
    study_name: str

    @property
    def loss(self) -> float:
        """Winner's loss on the search rows."""
        return self.search.ours

    @property
    def held_out_loss(self) -> float:
        """Winner's loss on the held-out rows."""
        return self.held_out.ours

    @property
    def limit(self) -> float | None:
        """Held-out loss of scales chosen freely per channel on the search rows; None when it was not computed."""
        return self.held_out.limit

    @property
    def baselines(self) -> dict[str, float | None]:
        """Held-out losses of identity, alpha_0.5 and best_single."""
        return {
            "identity": self.held_out.identity,
            "alpha_0.5": self.held_out.alpha_half,
            "best_single": self.held_out.best_single,
        }

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial: number, candidate, state, loss, seconds, reason and alpha_0 .. alpha_{K-1}."""
        rows = []
        for r in self.results:
            alphas = dict(enumerate(r.candidate.alphas or ()))
            rows.append(
                {
                    "number": r.number,
                    "candidate": r.candidate.kind,
                    "state": r.state,
                    "loss": r.loss,
                    "seconds": r.seconds,
                    "reason": r.reason,
                    **{f"alpha_{k}": alphas.get(k) for k in range(len(self.ranges))},
                }
            )
        return pd.DataFrame(rows)


def search_site(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    scheme: Scheme | str,
    groups: int = 4,
    trials: int = 32,
    seed: int = 0,
    storage: str | None = None,
) -> SiteResult:
    """Search the smoothing coefficients of ONE layer.

    Three quarters of the rows, drawn with ``seed``, are searched on; the rest judge the winner.

    Args:
        x: (T, C) activations, at least 2 rows.
        w: (O, C) weight.
        scheme: Scheme or its name, e.g. ``"w8a8-channel-static"``.
        groups: K.
        trials: Trials of the study, baselines included; at least 4 are made.
        seed: Seed of the split, the sampler and nothing else.
        storage: SQLAlchemy URL that keeps the study; None keeps it in memory.

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
    settings = RunConfig.build({"groups": {"k": groups}, "search": {"trials": max(trials, 4), "seed": seed}})
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed)).to(x.device)
    cut = max(1, min(x.shape[0] - 1, x.shape[0] * 3 // 4))
    data, held_out = (linear_site_data(x[rows], w) for rows in (order[:cut], order[cut:]))
    # A deployed model knows the ranges of its calibration data only.
    held_out = replace(
        held_out, activation_statistic=data.activation_statistic, activation_absmax=data.activation_absmax
    )
    return search_data(
        data,
        held_out,
        scheme=scheme,
        groups=settings.groups,
        search=settings.search,
        rho=0.0,
        storage=None if storage is None else open_optuna(storage),
        study_name=None if storage is None else f"search_site-{time.time_ns()}",
    )


def search_data(
    data: SiteData,
    held_out: SiteData,
    *,
    scheme: Scheme,
    groups: GroupsConfig,
    search: SearchConfig,
    rho: float,
    storage: optuna.storages.BaseStorage | None,
    study_name: str | None,
    clock: Callable[[], float] = time.perf_counter,
    on_trial: Callable[[TrialResult], None] | None = None,
) -> SiteResult:
    """Search one site given its calibration and held-out rows; ``search_site`` and the run both end here.

    Args:
        data: Rows to search on, weights and statistics.
        held_out: Rows that judge the winner; its static ranges must come from ``data``.
        scheme: Quantization scheme.
        groups: Grouping and range settings.
        search: Trials, sampler, pruner, seed.
        rho: Scarcity of the target hardware (fA7).
        storage: Optuna storage, None for memory.
        study_name: Name of the study, None for a random one.
        clock: Seconds, monotonic.
        on_trial: Called after each trial.
    """
    work = sum(part.x.shape[0] * part.weight.numel() for part in data.parts)
    with threads_for(work):
        return _search(data, held_out, scheme, groups, search, rho, storage, study_name, clock, on_trial)


def _search(
    data: SiteData,
    held_out: SiteData,
    scheme: Scheme,
    groups: GroupsConfig,
    search: SearchConfig,
    rho: float,
    storage: optuna.storages.BaseStorage | None,
    study_name: str | None,
    clock: Callable[[], float],
    on_trial: Callable[[TrialResult], None] | None,
) -> SiteResult:
    start = clock()
    judge, reserve = SiteObjective(data, scheme), SiteObjective(held_out, scheme)
    grouping = group_channels(
        data.activation_statistic.cpu(), method=groups.method, k=groups.k, bins=groups.bins, ties=data.ties.cpu()
    )
    to_scales = _Scales(data, grouping.labels)
    single, grid = best_single_alpha(lambda alpha: judge.loss(to_scales.single(alpha)), search.single_alphas)
    ranges = ranges_of(grouping, groups, rho, single)
    space = SearchSpace.of(ranges)
    noise = NoiseModel(data, scheme) if search.noise_model else None
    candidates = baselines(len(ranges), single)
    if noise is not None:
        candidates += _proposals(noise, grouping, space, single)
    study = open_study(search, space, grid, storage=storage, name=study_name)
    results = run_study(
        study,
        space,
        _SiteCandidates(judge, to_scales),
        candidates=candidates,
        trials=search.trials,
        device=str(data.activation_absmax.device),
        clock=clock,
        on_trial=on_trial,
    )
    verdict = guard(results, lambda candidate: reserve.loss(to_scales(candidate.alphas)))
    chosen = verdict.winner.candidate
    limit, held_out_limit = _limit(noise, judge, reserve, to_scales.single(single), verdict)
    return SiteResult(
        name=data.name,
        labels=grouping.labels,
        ranges=ranges,
        magnitudes=tuple(grouping.values.tolist()),
        outliers=tuple(grouping.outliers),
        requested_k=groups.k,
        winner=chosen.kind,
        alphas=chosen.alphas,
        scales=to_scales(chosen.alphas),
        best_single_alpha=single,
        best_single_scales=to_scales.single(single),
        search=replace(verdict.search, limit=limit),
        held_out=replace(verdict.held_out, limit=held_out_limit),
        guarded=verdict.guarded,
        results=tuple(results),
        exact_evaluations=judge.exact_evaluations + reserve.exact_evaluations,
        seconds=clock() - start,
        study_name=study.study_name,
    )


def ranges_of(grouping: Grouping, groups: GroupsConfig, rho: float, best_single: float) -> tuple[AlphaRange, ...]:
    """Alpha range of every group; k-means groups magnitudes by logarithm, so its positions are logarithmic, too.

    Unless ``groups.ranges`` is ``strict``, ranges are widened to hold the best single alpha: they are good defaults, not
    laws (trap T3), and a grouped search that cannot come near the best single alpha seldom beats it.
    """
    ranges = group_ranges(
        grouping.values.tolist(),
        rho=rho,
        scale="log" if groups.method == "kmeans" else "linear",
        kind="wide" if groups.ranges == "wide" else "magnitude",
    )
    if groups.ranges == "strict":
        return ranges
    # Scarce hardware raised the low ends on purpose: then only the high ends give way.
    return tuple(r.holding(best_single if rho == 0 else max(best_single, r.low)) for r in ranges)


class _Scales:
    """Alphas of groups -> scales of channels."""

    def __init__(self, data: SiteData, labels: torch.Tensor) -> None:
        self._data = data
        self._labels = labels.to(data.activation_statistic.device)
        self.k = int(labels.max()) + 1

    def single(self, alpha: float) -> torch.Tensor:
        """Scales (C,) of one alpha for every channel."""
        return self((alpha,) * self.k)

    def __call__(self, alphas: Sequence[float] | None) -> torch.Tensor:
        data = self._data
        return group_scales(data.activation_statistic, data.weight_absmax, alphas, self._labels, ties=data.ties)


class _SiteCandidates:
    """The exact loss of a candidate on growing row subsets."""

    def __init__(self, judge: SiteObjective, to_scales: _Scales) -> None:
        self._judge = judge
        self._to_scales = to_scales
        rows = judge.rows
        self._steps = sorted({max(1, int(rows * share)) for share in _RUNGS})

    def losses(self, candidate: Candidate) -> Iterator[tuple[int, float]]:
        yield from zip(self._steps, self._judge.losses(self._to_scales(candidate.alphas), self._steps), strict=True)


def _proposals(noise: NoiseModel, grouping: Grouping, space: SearchSpace, single: float) -> list[Candidate]:
    """The noise model's optimum inside the ranges, and around the best single alpha without them.

    Ranges are good defaults, not laws (trap T3): where the best single alpha lies outside them, no set inside may reach it.
    """
    low, high = torch.tensor(space.low), torch.tensor(space.high)
    start = torch.full_like(low, single)
    proposals: list[Candidate] = []
    for bounds in ((low, high), (torch.zeros_like(low), torch.ones_like(high))):
        try:
            found = noise.optimise_alphas(grouping.labels, *bounds, start)
        except NonFiniteError:
            continue
        alphas = tuple(found.clamp(*(b.to(found) for b in bounds)).tolist())
        if all(alphas != p.alphas for p in proposals):
            proposals.append(Candidate("noise_model", alphas))
    return proposals


def _limit(
    noise: NoiseModel | None, judge: SiteObjective, reserve: SiteObjective, start: torch.Tensor, verdict: Verdict
) -> tuple[float | None, float | None]:
    """Exact losses of freely optimised per-channel scales on search and held-out rows; None where the noise model fails.

    The winner's scales are one free choice, too, so the limit is never above it.
    """
    if noise is None:
        return None, None
    try:
        limit = per_channel_limit(judge, noise, start)
        held_out = reserve.loss(limit.scales)
    except NonFiniteError:
        return None, None
    return min(limit.loss, verdict.search.ours), min(held_out, verdict.held_out.ours)
