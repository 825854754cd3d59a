"""The performance-drop condition: what is lost is told for every metric, and nothing passes unmeasured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.drop import UNMEASURED, DropCondition, Tolerance
from alphasmith.objectives.joint.ports import JointMetric, Measured
from alphasmith.objectives.literals import DropRule

SI_SDR = JointMetric(name="si_sdr", goal="max", unit="dB")
STOI = JointMetric(name="stoi", goal="max")
BITS = JointMetric(name="bits", goal="min")
METRICS = (SI_SDR, STOI, BITS)
VALUES = st.floats(-1e3, 1e3)
LIMITS = st.floats(0, 1e3)


def measured(si_sdr: float | None, stoi: float | None, bits: float | None) -> Measured:
    return Measured(values={"si_sdr": si_sdr, "stoi": stoi, "bits": bits})


@given(st.tuples(VALUES, VALUES, VALUES), st.tuples(VALUES, VALUES, VALUES), st.tuples(LIMITS, LIMITS, LIMITS))
def test_any_is_the_worst_of_the_metrics_and_all_the_best(
    before: tuple[float, ...], now: tuple[float, ...], limits: tuple[float, ...]
) -> None:
    tolerances = tuple(Tolerance(metric=m.name, drop=limit) for m, limit in zip(METRICS, limits, strict=True))
    verdicts = {}
    rule: DropRule
    for rule in ("any", "all"):
        condition = DropCondition(tolerances=tolerances, rule=rule)
        verdicts[rule] = condition.verdict(measured(*before), measured(*now), METRICS)
    excesses = [drop.excess for drop in verdicts["any"].drops if drop.excess is not None]
    assert verdicts["any"].violated == (max(excesses) > 0)
    assert verdicts["all"].violated == (min(excesses) > 0)
    for verdict in verdicts.values():
        assert verdict.violated == any(g > 0 for g in verdict.constraints.values()), "feasible is what meets"
    for drop, a, b, limit in zip(verdicts["any"].drops, before, now, limits, strict=True):
        lost = a - b if drop.metric.goal == "max" else b - a
        assert drop.drop == pytest.approx(lost, abs=1e-8)
        assert drop.excess == pytest.approx(lost - limit, abs=1e-8)


@given(VALUES, VALUES, LIMITS, st.floats(0, 10))
def test_a_wider_tolerance_is_violated_by_nothing_that_met_a_narrower_one(
    before: float, now: float, limit: float, more: float
) -> None:
    narrow, wide = (
        DropCondition(tolerances=(Tolerance(metric="si_sdr", drop=value),)).verdict(
            measured(before, 0, 0), measured(now, 0, 0), METRICS
        )
        for value in (limit, limit + more)
    )
    assert narrow.violated or not wide.violated


@given(VALUES, VALUES, st.floats(0, 1))
def test_a_relative_tolerance_is_a_share_of_the_baseline(before: float, now: float, share: float) -> None:
    relative, absolute = (
        DropCondition(tolerances=(tolerance,)).verdict(measured(0, 0, before), measured(0, 0, now), METRICS)
        for tolerance in (Tolerance(metric="bits", relative=share), Tolerance(metric="bits", drop=share * abs(before)))
    )
    assert relative.drops == absolute.drops


@given(VALUES, VALUES, VALUES)
def test_a_floor_looks_at_the_model_alone(before: float, now: float, floor: float) -> None:
    verdict = DropCondition(
        tolerances=(Tolerance(metric="si_sdr", floor=floor), Tolerance(metric="bits", floor=floor))
    ).verdict(measured(before, 0, before), measured(now, 0, now), METRICS)
    high, _, low = verdict.drops
    assume(now == floor or abs(now - floor) > 1e-8)
    assert high.violated == (now < floor)
    assert low.violated == (now > floor), "where smaller is better the floor is the largest value"


@given(st.integers(-100, 100), st.integers(0, 100))
def test_a_drop_of_exactly_the_tolerance_is_tolerated(thousandths: int, limit: int) -> None:
    """In binary, 0.9 - 0.895 is more than 0.005."""
    condition = DropCondition(tolerances=(Tolerance(metric="stoi", drop=limit / 1000),))
    after = (thousandths - limit) / 1000
    verdict = condition.verdict(measured(0, thousandths / 1000, 0), measured(0, after, 0), METRICS)
    assert not verdict.violated
    worse = condition.verdict(measured(0, thousandths / 1000, 0), measured(0, after - 1e-6, 0), METRICS)
    assert worse.violated


@pytest.mark.parametrize("rule", ["any", "all"])
def test_what_was_not_measured_is_violated_and_named(rule: DropRule) -> None:
    condition = DropCondition(tolerances=(Tolerance(metric="stoi", drop=0.01),), rule=rule)
    verdict = condition.verdict(measured(5, 0.9, 1), measured(5, None, 1), METRICS)
    assert verdict.violated
    assert "stoi was not measured, which violates" in str(verdict)
    assert list(verdict.constraints.values()) == [UNMEASURED]
    missing = condition.verdict(measured(5, 0.9, 1), Measured(values={"si_sdr": 5}), METRICS)
    assert missing.violated
    with pytest.raises(InputError, match="was not measured"):
        condition.verdict(measured(5, None, 1), measured(5, 0.9, 1), METRICS)


def test_metrics_without_a_tolerance_are_told_and_judge_nothing() -> None:
    verdict = DropCondition(tolerances=()).verdict(measured(9, 0.9, 1), measured(1, None, 2), METRICS)
    assert not verdict.violated
    assert verdict.constraints == {}
    assert str(verdict) == "si_sdr fell by 8 dB to 1 dB; stoi was not measured; bits rose by 1 to 2"


def test_words_name_the_excess() -> None:
    condition = DropCondition(tolerances=(Tolerance(metric="si_sdr", drop=0.5), Tolerance(metric="bits", relative=0.1)))
    verdict = condition.verdict(measured(9, 0.9, 1), measured(8, 0.9, 1), METRICS)
    assert str(verdict) == (
        "si_sdr fell by 1 dB to 8 dB, 0.5 dB more than tolerated; stoi stayed at 0.9; bits stayed at 1, tolerated"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_errors(value: float) -> None:
    condition = DropCondition(tolerances=(Tolerance(metric="si_sdr", drop=1.0),))
    with pytest.raises(NonFiniteError, match="si_sdr of the model"):
        condition.verdict(measured(1, 1, 1), measured(value, 1, 1), METRICS)
    with pytest.raises(NonFiniteError, match="stoi of the baseline"):
        condition.verdict(measured(1, value, 1), measured(1, 1, 1), METRICS)
    with pytest.raises(InputError, match="tolerances"):
        Tolerance(metric="si_sdr", drop=value)


def test_the_start_is_checked() -> None:
    condition = DropCondition(tolerances=(Tolerance(metric="stoi", floor=0.8),))
    condition.check(measured(1, 0.8, 1), METRICS)
    with pytest.raises(InputError, match="before anything is taken"):
        condition.check(measured(1, 0.7, 1), METRICS)
    with pytest.raises(InputError, match=r"was not measured \(PESQ is not installed\)"):
        condition.check(replace(measured(1, None, 1), notes=("PESQ is not installed",)), METRICS)
    with pytest.raises(InputError, match="no metric of the task"):
        DropCondition(tolerances=(Tolerance(metric="pesq", drop=0.1),)).check(measured(1, 1, 1), METRICS)


@pytest.mark.parametrize("given", [{}, {"drop": 1.0, "floor": 2.0}, {"drop": -1.0}, {"relative": -0.1}])
def test_tolerances_without_one_limit_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"tolerances\.stoi"):
        Tolerance(metric="stoi", **given)


def test_conditions_that_contradict_themselves_are_refused() -> None:
    one = Tolerance(metric="stoi", drop=0.1)
    with pytest.raises(InputError, match="has two"):
        DropCondition(tolerances=(one, one))
    with pytest.raises(InputError, match="unknown"):
        DropCondition(tolerances=(one,), rule="some")  # type: ignore[arg-type]


def test_a_tolerance_is_told_in_words() -> None:
    given = ({"drop": 0.6}, {"relative": 0.02}, {"floor": 0.9})
    assert [str(Tolerance(metric="a", **one)) for one in given] == ["0.6", "2 % of its value", "until 0.9"]
