"""Studies: order of trials, failures, pruning, samplers, frozen spaces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import optuna
import pytest

from alphasmith.objectives.errors import AlphasmithError, InputError, NonFiniteError
from alphasmith.search.config import SAMPLERS
from alphasmith.search.ranges import group_ranges
from alphasmith.search.samplers import make_pruner, make_sampler
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.studies import Candidate, TrialResult, baselines, best_trial, guard, run_study

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = SearchSpace.of(group_ranges([1.0, 10.0, 100.0], scale="log"))
TARGET = (0.2, 0.5, 0.8)


class Bowl:
    """Squared distance of the alphas to TARGET, on three growing subsets; identity costs 10."""

    def __init__(self, broken: frozenset[int] = frozenset()) -> None:
        self.calls = 0
        self.broken = broken

    def losses(self, candidate: Candidate) -> Iterator[tuple[int, float]]:
        call, self.calls = self.calls, self.calls + 1
        for step in (1, 2, 4):
            if call in self.broken:
                yield step, math.nan
            elif candidate.alphas is None:
                yield step, 10.0
            else:
                yield step, sum((a - t) ** 2 for a, t in zip(candidate.alphas, TARGET, strict=True)) + 0.01 / step


def new_study(sampler: str = "tpe", pruner: str = "none", storage: str | None = None) -> optuna.Study:
    return optuna.create_study(
        sampler=make_sampler(sampler, seed=3, space=SPACE.distributions()),  # type: ignore[arg-type]
        pruner=make_pruner(pruner),  # type: ignore[arg-type]
        storage=storage,
    )


def play(study: optuna.Study, objective: Bowl, trials: int = 20, single: float = 0.95) -> list[TrialResult]:
    ticks = itertools.count()
    return run_study(
        study,
        SPACE,
        objective,
        candidates=baselines(3, single),
        trials=trials,
        device="cpu",
        clock=lambda: float(next(ticks)),
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_plays_a_whole_study_inside_the_ranges(sampler: str) -> None:
    study = new_study(sampler)
    results = play(study, Bowl(), trials=16)
    kinds = [r.candidate.kind for r in results]
    assert kinds[:3] == ["identity", "alpha_0.5", "best_single"]
    assert set(kinds[3:]) == {"sampler"}
    trials = study.trials
    assert trials[0].params == {}
    assert trials[1].params == dict.fromkeys(SPACE.names, 0.5)
    assert trials[2].params == dict.fromkeys(SPACE.names, 0.95), "a baseline outside the ranges is recorded as it is"
    for result, trial in zip(results[3:], trials[3:], strict=True):
        assert result.candidate.alphas == tuple(trial.params[n] for n in SPACE.names)
        for value, low, high in zip(result.candidate.alphas, SPACE.low, SPACE.high, strict=True):
            assert low <= value <= high
    assert len({r.candidate.alphas for r in results}) == len(results), "the N sets are pairwise different (claim A-2)"
    assert best_trial(results).loss == study.best_value


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_learning_samplers_sample_jointly(sampler: str) -> None:
    study = new_study(sampler)
    seen = []
    independent = study.sampler.sample_independent

    def spy(*args: object) -> object:
        seen.append(args)
        return independent(*args)  # type: ignore[arg-type]

    study.sampler.sample_independent = spy  # type: ignore[method-assign]
    play(study, Bowl(), trials=20)
    assert len(seen) <= 3 * 8, "after its start-up trials a sampler must use the whole space at once"


def test_same_seed_same_trials() -> None:
    first, second = (play(new_study(), Bowl()) for _ in range(2))
    assert first == second


def test_tpe_beats_the_baselines_here() -> None:
    results = play(new_study(), Bowl(), trials=40)
    assert best_trial(results).candidate.kind == "sampler"


def test_non_finite_losses_are_failed_trials_with_a_reason() -> None:
    study = new_study()
    results = play(study, Bowl(broken=frozenset({0, 4})))
    assert [r.number for r in results if r.state == "FAIL"] == [0, 4]
    assert study.trials[4].state == optuna.trial.TrialState.FAIL
    assert "nan" in study.trials[4].user_attrs["reason"]
    assert best_trial(results).number not in (0, 4)


def test_all_trials_failing_is_an_error() -> None:
    with pytest.raises(AlphasmithError, match="every trial failed"):
        play(new_study(), Bowl(broken=frozenset(range(20))), trials=4)


def test_pruned_trials_have_no_loss_and_baselines_are_never_pruned() -> None:
    results = play(new_study(sampler="random", pruner="median"), Bowl(), trials=40)
    pruned = [r for r in results if r.state == "PRUNED"]
    assert pruned
    assert all(r.loss is None and r.number > 2 for r in pruned)


def test_ties_go_to_the_lowest_number() -> None:
    tie = [
        TrialResult(number=n, candidate=Candidate("sampler", (0.1 * n,)), state="COMPLETE", loss=1.0, seconds=0.0)
        for n in (2, 0, 1)
    ]
    assert best_trial(tie).number == 0


def test_a_study_refuses_another_space() -> None:
    study = new_study()
    play(study, Bowl(), trials=5)
    other = SearchSpace.of(group_ranges([1.0, 10.0, 1000.0]))
    with pytest.raises(InputError, match="search space"):
        other.freeze_in(study)
    SPACE.freeze_in(study)


def test_a_study_continues_to_its_total_budget() -> None:
    study = new_study()
    play(study, Bowl(), trials=6)
    assert len(play(study, Bowl(), trials=10)) == 4
    assert len(study.trials) == 10


def test_the_guard_prefers_a_baseline_that_is_better_on_held_out_data() -> None:
    results = play(new_study(), Bowl(), trials=30)
    best = best_trial(results)

    def overfitted(candidate: Candidate) -> float:
        return {"identity": 3.0, "alpha_0.5": 2.0, "best_single": 1.0}.get(candidate.kind, 1.5)

    verdict = guard(results, overfitted)
    assert verdict.guarded
    assert verdict.winner.candidate.kind == "best_single"
    assert verdict.held_out.ours == 1.0
    kept = guard(results, lambda c: 1.0)
    assert not kept.guarded
    assert kept.winner == best
    assert kept.search.identity == 10.0


def test_a_failed_baseline_cannot_win() -> None:
    results = play(new_study(), Bowl(broken=frozenset({0})), trials=10)
    verdict = guard(results, lambda c: 0.0 if c.kind == "identity" else 1.0)
    assert verdict.winner.candidate.kind != "identity"
    assert verdict.held_out.identity is None


def test_an_objective_may_refuse_a_candidate() -> None:
    class Refuses(Bowl):
        def losses(self, candidate: Candidate) -> Iterator[tuple[int, float]]:
            if candidate.kind == "sampler":
                raise NonFiniteError("scale of channel 3 is inf")
            return super().losses(candidate)

    study = new_study()
    results = play(study, Refuses(), trials=6)
    assert [r.state for r in results] == ["COMPLETE"] * 3 + ["FAIL"] * 3
    assert study.trials[5].user_attrs["reason"] == "scale of channel 3 is inf"
