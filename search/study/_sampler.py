"""Optuna samplers and pruners by name, made to sample a frozen space."""

from __future__ import annotations

import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from alphasmith.search.config import PrunerName, SamplerName
from alphasmith.storage.database.optuna_private import StudyView

#: Trials before a sampler trusts what it has seen: baselines and a proposal are there from the start, so it begins around them.
_START_UP = 4


def make_sampler(name: SamplerName, *, seed: int, space: dict[str, BaseDistribution]) -> BaseSampler:
    """A seeded sampler that draws every trial from ``space``.

    ``tpe`` is Optuna 5's default (multivariate, constant liar); ``qmc`` and ``random`` are baselines; ``cmaes`` suits long
    studies; ``gp`` suits fewer than about 250 trials.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        inner: BaseSampler
        match name:
            case "tpe":
                inner = TPESampler(seed=seed, n_startup_trials=_START_UP)
            case "qmc":
                inner = QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
            case "random":
                inner = RandomSampler(seed=seed)
            case "cmaes":
                inner = CmaEsSampler(seed=seed, warn_independent_sampling=False)
            case "gp":
                inner = GPSampler(seed=seed, n_startup_trials=_START_UP, deterministic_objective=True)
    return inner if name == "random" else _FrozenSpaceSampler(inner, space)


def make_pruner(name: PrunerName) -> BasePruner:
    """A pruner that compares losses on equal row subsets; none where the paired rule decides or nothing does."""
    match name:
        case "none" | "paired":
            return NopPruner()
        case "median":
            return MedianPruner(n_startup_trials=6)
        case "successive_halving":
            return SuccessiveHalvingPruner()
        case "hyperband":
            return HyperbandPruner()


class _FrozenSpaceSampler(BaseSampler):
    """Tells the inner sampler the whole space up front.

    Optuna's samplers infer the space from the parameters that all finished trials share. The identity trial has none (no
    alpha gives s = 1), so left alone they would sample every alpha independently.
    """

    def __init__(self, inner: BaseSampler, space: dict[str, BaseDistribution]) -> None:
        self._inner = inner
        self._space = {n: d for n, d in space.items() if not d.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The frozen space, whatever the trials so far hold."""
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of all alphas, from the trials that have them."""
        view: Any = StudyView(study, frozenset(search_space))
        return self._inner.sample_relative(view, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Start-up trials."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Passed on."""
        self._inner.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Passed on."""
        self._inner.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """Passed on."""
        self._inner.after_trial(study, trial, state, values)
