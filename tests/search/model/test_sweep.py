"""One alpha for the whole model: the sweep finds it, records it, and never scores twice what is on record."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import optuna
import pytest
import torch
from torch import Tensor

from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.config import SearchConfig
from alphasmith.search.interruption import Interrupted
from alphasmith.search.model.search import ModelScales, SiteStatistics
from alphasmith.search.model.sweep import GRID, SWEEP_TRIALS, Sweep, sweep_alpha
from alphasmith.search.study.study_record import StoredLog
from alphasmith.search.study.types import StudyContext

optuna.logging.set_verbosity(optuna.logging.WARNING)


def scales() -> ModelScales:
    """Two sites whose scales are e to the power of alpha."""
    one = torch.tensor([torch.e, torch.e])
    site = SiteStatistics(activation=one, weight=torch.ones(2), ties=torch.arange(2), producer=None)
    return ModelScales({"a": site, "b": site})


class Valley:
    """A loss with its lowest point at an alpha; everything below ``broken`` breaks the model."""

    def __init__(self, lowest: float, broken: float = -1.0) -> None:
        self.lowest, self.broken = lowest, broken
        self.seen: list[float] = []

    def race(
        self, candidates: Sequence[Mapping[str, Smoothing]], *, incumbent: Tensor | None = None, protected: int = 0
    ) -> list[ModelScore]:
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Mapping[str, Smoothing]) -> ModelScore:
        alphas = {round(float(value.log()), 5) for smoothing in candidate.values() for value in smoothing.scales}
        (alpha,) = alphas  # one for the whole model
        self.seen.append(alpha)
        if alpha < self.broken:
            return ModelScore.failed("the output is NaN")
        errors = torch.full((8,), 0.01 + (alpha - self.lowest) ** 2, dtype=torch.float64)
        return ModelScore(loss=float(errors.mean()), samples=8, errors=errors, stopped=False, failure="")


def swept(valley: Valley, context: StudyContext | None = None) -> Sweep | None:
    return sweep_alpha(scales(), cast(ModelObjective, valley), SearchConfig(), context or StudyContext())


@pytest.mark.parametrize("lowest", [0.0, 0.3, 0.42, 0.58, 0.7, 0.86, 0.93, 0.97, 1.0])
def test_the_lowest_alpha_is_found_within_half_a_step_of_the_grid(lowest: float) -> None:
    found = swept(valley := Valley(lowest))
    assert found is not None
    step = max(later - earlier for earlier, later in itertools.pairwise(GRID))
    assert abs(found.alpha - max(lowest, GRID[0] - 0.1)) <= step / 2
    assert found.loss == pytest.approx(0.01 + (found.alpha - lowest) ** 2)
    assert len(valley.seen) == len(found.results) == SWEEP_TRIALS
    assert len(set(valley.seen)) == SWEEP_TRIALS, "no alpha twice"


def test_alphas_that_break_the_model_are_failed_trials() -> None:
    found = swept(Valley(0.5, broken=0.7))
    assert found is not None
    assert found.alpha == pytest.approx(0.7)
    assert {t.state for t in found.results} == {"COMPLETE", "FAIL"}
    assert swept(Valley(0.5, broken=2.0)) is None


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_sweep_cut_anywhere_goes_on(cut: int) -> None:
    undisturbed = swept(Valley(0.8))
    storage = optuna.storages.InMemoryStorage()
    asked = iter(range(100))
    with contextlib.suppress(Interrupted):
        swept(Valley(0.8), StudyContext(log=StoredLog(storage, "x"), name="x", stop=lambda: next(asked) >= cut))
    log = StoredLog(storage, "x")
    known = len(log.past.trials)
    again = swept(valley := Valley(0.8), StudyContext(log=log, name="x"))
    assert undisturbed is not None
    assert again is not None
    assert (again.alpha, again.loss) == (undisturbed.alpha, undisturbed.loss)
    assert len(valley.seen) <= SWEEP_TRIALS - known + 1, "only the one to beat is scored again"
