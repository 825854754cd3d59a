"""The study of a compression: what is tried, in which order, what counts, and what a killed process changes: nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from alphasmith.objectives.errors import AlphasmithError, NonFiniteError
from alphasmith.objectives.joint.ports import Measured
from alphasmith.search.compression._space import Choice, Space, costly
from alphasmith.search.compression._study import (
    BYTES,
    CONSTRAINT,
    DROP,
    DROPPED,
    REASON,
    DroppedError,
    Point,
    counted,
    directions,
    feasible,
    front,
    run_study,
)
from alphasmith.search.compression.config import CompressConfig
from alphasmith.search.interruption import Interrupted, never
from alphasmith.search.progress import Silent
from alphasmith.storage.database.optuna_private import begin_trial, begun_trial

CLASSES = ("conv", "linear")


def space_of(**study: Any) -> Space:
    config = CompressConfig.build({"study": {"trials": 16, **study}, "train": {"encoder": [0.0, 1e-4]}})
    return Space(config=config, terms=("encoder",), decomposed=CLASSES, clustered=CLASSES)


class Formula:
    """Stages that compute bytes and drop from the choice, fail now and then, and remember what they were asked."""

    def __init__(
        self, *, end_at: int | None = None, error: Callable[[Choice], AlphasmithError | None] = lambda _: None
    ) -> None:
        self.asked: list[Choice] = []
        self._end_at, self._error = end_at, error

    def point(self, choice: Choice) -> Point:
        if len(self.asked) == self._end_at:
            raise Killed
        self.asked.append(choice)
        if (error := self._error(choice)) is not None:
            raise error
        bits = sum(math.log2(k) for k in choice.clusters.values())
        kept = 1 - sum(choice.drops.values()) / 2 if choice.drops else 1.0
        drop = 40 * 2.0 ** (-bits) + (1 - kept)
        return Point(
            stored=round(1000 * bits * kept),
            ratio=64 / (bits * kept),
            latency=None,
            measured=Measured(values={"si_sdr": 10 - drop, "pesq": None}, notes=("pesq not measured",)),
            drops={"si_sdr": drop},
            constraints={"si_sdr": drop - 0.3},
        )


class Killed(BaseException):
    """The process ends in the middle of a trial."""


class Worker:
    """A worker's claims on a study in memory; those of workers that are not alive are abandoned."""

    def __init__(self, study: optuna.Study, name: str = "one", alive: tuple[str, ...] = ()) -> None:
        self._study, self._name, self._alive = study, name, alive

    def begin(self, trial: FrozenTrial, *, first: int) -> optuna.Trial | None:
        if len(self._study.trials) != first:
            return None
        trial.user_attrs = {**trial.user_attrs, "worker": self._name}
        trial_id, _ = begin_trial(self._study, trial, first=first)
        return begun_trial(self._study, trial_id)

    def end(self) -> None:
        pass

    def abandoned(self) -> Mapping[int, Mapping[str, Any]]:
        running = self._study.get_trials(states=(TrialState.RUNNING,))
        return {one.number: one.user_attrs for one in running if one.user_attrs.get("worker") not in self._alive}


def study_of(latency: bool = False) -> optuna.Study:
    return optuna.create_study(directions=directions(latency))


def run(study: optuna.Study, stages: Formula, space: Space, claims: Worker | None = None) -> list[FrozenTrial]:
    return run_study(study, space, stages, claims=claims or Worker(study), progress=Silent(), stop=never)


def told(trials: list[FrozenTrial]) -> list[Any]:
    return [(trial.state, trial.params, trial.values, trial.user_attrs.get(DROPPED)) for trial in trials]


def test_it_begins_with_plain_trials_and_then_shares_costly_choices() -> None:
    study, space = study_of(), space_of(trials=16, inner=3)
    trials = run(study, Formula(), space)
    plain = len(space.plain())
    assert [trial.params["role"] for trial in trials[:plain]] == ["off", "off", "truncate", "branch"]
    assert [trial.params["k.conv"] for trial in trials[:plain]] == [256, 8, 16, 16]
    assert trials[2].params["flat"] == "branch"
    for start in range(plain, 16, 3):
        group = [costly(trial.params) for trial in trials[start : start + 3]]
        assert all(one == group[0] for one in group), start
    assert len({str(costly(trial.params)) for trial in trials[plain:]}) == 4


def test_everything_people_read_is_an_attribute_and_drops_are_constraints() -> None:
    trial = run(study_of(), Formula(), space_of(trials=1))[0]
    assert trial.values == [trial.user_attrs[BYTES]]
    drop = trial.user_attrs[DROP + "si_sdr"]
    assert trial.user_attrs["study.si_sdr"] == 10 - drop
    assert trial.user_attrs["study.pesq"] is None
    assert trial.user_attrs["notes"] == "pesq not measured"
    assert trial.user_attrs[CONSTRAINT + "si_sdr"] == trial.constraints["si_sdr"] == drop - 0.3
    assert feasible(trial) == (drop <= 0.3)


def test_what_drops_is_pruned_and_what_is_not_finite_fails_each_with_its_reason() -> None:
    def error(choice: Choice) -> AlphasmithError | None:
        if choice.role == "truncate":
            return DroppedError("round 1 lost 3 dB")
        return NonFiniteError("the loss is NaN at step 7") if choice.role == "branch" else None

    trials = run(study_of(), Formula(error=error), space_of(trials=4))
    assert [trial.state for trial in trials] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
    ]
    assert trials[2].user_attrs[DROPPED] == "round 1 lost 3 dB"
    assert trials[3].user_attrs[REASON] == "the loss is NaN at step 7"
    assert not any(feasible(trial) for trial in trials[2:])


@pytest.mark.parametrize("killed_at", [0, 3, 6, 11])
def test_a_killed_study_ends_as_an_undisturbed_one(killed_at: int) -> None:
    space = space_of(trials=14, inner=2)

    def error(choice: Choice) -> AlphasmithError | None:
        return DroppedError("too much") if choice.role == "truncate" and choice.drops["conv"] > 0.02 else None

    undisturbed = run(study_of(), Formula(error=error), space)
    study = study_of()
    with pytest.raises(Killed):
        run(study, Formula(end_at=killed_at, error=error), space)
    assert study.trials[-1].state == TrialState.RUNNING
    assert told(run(study, Formula(error=error), space)) == told(undisturbed)
    assert told(front(counted(study))) == told(front(undisturbed))


def test_a_trial_that_was_dropped_in_the_last_moment_stays_dropped() -> None:
    space, study = space_of(trials=3), study_of()
    run(study, Formula(), space_of(trials=2))
    trial = study.ask()
    trial.set_user_attr(DROPPED, "too much")
    assert [one.state for one in run(study, Formula(), space)][2] == TrialState.PRUNED


def test_stopping_keeps_what_was_found_and_more_trials_go_on() -> None:
    study, stages = study_of(), Formula()
    calls = itertools.count()
    with pytest.raises(Interrupted):
        run_study(study, space_of(), stages, claims=Worker(study), progress=Silent(), stop=lambda: next(calls) == 5)
    assert len(counted(study)) == 5
    assert len(run(study, stages, space_of(trials=7))) == 7
    assert len(stages.asked) == 7, "nothing is done twice"


class Waiting(BaseException):
    """A worker has nothing left to do but to wait for another one."""


def wait(seconds: float) -> None:
    raise Waiting


class During(Formula):
    """Stages of a worker in the middle of whose trial something happens."""

    def __init__(self, at: int, happens: Callable[[], None]) -> None:
        super().__init__()
        self._at, self._happens = at, happens

    def point(self, choice: Choice) -> Point:
        if len(self.asked) == self._at:
            self._happens()
        return super().point(choice)


def beside(study: optuna.Study, space: Space, stages: Formula, *alive: str) -> None:
    """Another worker does all that it can."""
    claims = Worker(study, "two", ("two", *alive))
    with pytest.raises(Waiting):
        run_study(study, space, stages, claims=claims, progress=Silent(), stop=never, sleep=wait)


@pytest.mark.parametrize("at", [0, 3, 4, 6, 11])
def test_two_workers_lose_no_trial_and_make_none_twice(at: int) -> None:
    study, space, other = study_of(), space_of(trials=14, inner=2), Formula()
    mine = During(at, lambda: beside(study, space, other, "one"))
    trials = run(study, mine, space, Worker(study, "one", ("one", "two")))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 14 == [trial.state for trial in study.trials]
    assert sorted(trial.user_attrs["place"] for trial in trials) == list(range(14))
    assert len(mine.asked) + len(other.asked) == 14
    assert len(mine.asked) == at + 1, "the other one left nothing"
    of = {trial.user_attrs["place"]: trial for trial in trials}
    for leader in range(len(space.plain()), 14, 2):
        assert costly(of[leader].params) == costly(of[leader + 1].params)


def test_a_worker_rather_takes_what_needs_no_stage_that_another_is_at() -> None:
    study, space, other = study_of(), space_of(trials=12, inner=4), Formula()
    plain = len(space.plain())
    mine = During(plain, lambda: beside(study, space, other, "one"))
    run(study, mine, space, Worker(study, "one", ("one", "two")))
    places = [trial.user_attrs["place"] for trial in study.trials]
    assert places == [*range(plain + 1), *range(plain + 4, 12), *range(plain + 1, plain + 4)]


def test_the_trial_of_a_worker_that_is_gone_is_tried_again_and_what_it_finds_too_late_does_not_count() -> None:
    study, space, other = study_of(), space_of(trials=8), Formula()

    def replaced() -> None:
        claims = Worker(study, "two", ("two",))
        assert len(run(study, other, space, claims)) == 8

    mine = During(5, replaced)
    trials = run(study, mine, space, Worker(study, "one", ("one", "two")))
    assert [trial.number for trial in study.trials if trial.state == TrialState.FAIL] == [5]
    assert sorted(trial.user_attrs["place"] for trial in trials) == list(range(8))
    assert (len(mine.asked), len(other.asked)) == (6, 3)
    late = study.trials[5]
    assert BYTES not in late.user_attrs
    assert late.params == trials[5].params, "as the seed of the place says"


def test_a_trial_that_somebody_else_began_meanwhile_is_looked_at_first() -> None:
    study, space = study_of(), space_of(trials=6)

    class Late(Worker):
        met = 0

        def begin(self, trial: FrozenTrial, *, first: int) -> optuna.Trial | None:
            if not Late.met:
                Late.met += 1
                beside(study, space_of(trials=7), During(4, self._leave), "one")
            return super().begin(trial, first=first)

        def _leave(self) -> None:
            raise Waiting

    trials = run(study, Formula(), space, Late(study, "one", ("one",)))
    assert sorted(trial.user_attrs["place"] for trial in trials) == list(range(6))


def test_an_error_that_nobody_foresaw_leaves_the_trial_to_others() -> None:
    study, space = study_of(), space_of(trials=3)

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(study, During(1, broken), space, Worker(study, "one", ("one",)))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert len(run(study, Formula(), space, Worker(study, "one", ("one",)))) == 3


def trial_of(stored: float, drop: float, excess: float, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    attributes = {BYTES: stored, DROP + "m": drop, CONSTRAINT + "m": excess}
    return create_trial(
        state=state,
        values=[stored] if state == TrialState.COMPLETE else None,
        params={"x": 0.0},
        distributions={"x": FloatDistribution(0, 1)},
        user_attrs=attributes,
    )


POINTS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 5), st.sampled_from([-1.0, 0.0, 1.0])), min_size=1, max_size=12
)


@given(POINTS)
def test_the_front_is_what_nothing_beats_within_the_limits(points: list[tuple[int, int, float]]) -> None:
    trials = [trial_of(*point) for point in points]
    for number, trial in enumerate(trials):
        trial.number = number
    found = front(trials)
    within = [trial for trial in trials if feasible(trial)]
    assert [trial.number for trial in within] == [n for n, point in enumerate(points) if point[2] <= 0]

    def costs(trial: FrozenTrial) -> tuple[float, float]:
        return trial.user_attrs[BYTES], trial.user_attrs[DROP + "m"]

    for trial in within:
        mine = costs(trial)
        assert any(all(a <= b for a, b in zip(costs(other), mine, strict=True)) for other in found)
    for one, other in itertools.permutations(found, 2):
        assert not all(a <= b for a, b in zip(costs(one), costs(other), strict=True)), "neither beats the other"
    assert [trial.user_attrs[BYTES] for trial in found] == sorted(trial.user_attrs[BYTES] for trial in found)


def test_with_nothing_to_decompose_there_are_codebooks_alone() -> None:
    space = Space(config=space_of().config, terms=(), decomposed=(), clustered=("conv",))
    trials = run(study_of(), Formula(), space)
    assert {frozenset(trial.params) for trial in trials} == {frozenset({"role", "k.conv"})}
    assert {trial.params["role"] for trial in trials} == {"off"}
