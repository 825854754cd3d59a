"""Formulas fA6 and fA7, with the examples of the patent."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.search.study.alpha_ranges import DEFAULT_ALPHA, group_ranges

magnitudes = st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=12)


def test_the_two_points_of_the_text() -> None:
    small, large = group_ranges([5.0, 95.0])
    assert (small.low, small.high) == pytest.approx((0.1, 0.5))
    assert (large.low, large.high) == pytest.approx((0.5, 0.9))


def test_one_group_gets_the_overall_range_and_default_alpha_lies_inside() -> None:
    (only,) = group_ranges([3.0])
    assert (only.low, only.high) == (0.1, 0.9)
    assert only.low < DEFAULT_ALPHA < only.high


@given(magnitudes, st.floats(0, 1), st.sampled_from(["linear", "log"]))
def test_ranges_are_ordered_and_scarcity_only_raises_the_low_end(values: list[float], rho: float, scale: str) -> None:
    plain = group_ranges(values, scale=scale)  # type: ignore[arg-type]
    scarce = group_ranges(values, rho=rho, scale=scale)  # type: ignore[arg-type]
    for a, b in zip(plain, scarce, strict=True):
        assert 0.1 - 1e-12 <= a.low <= b.low <= b.high + 1e-12
        assert b.high == a.high <= 0.9 + 1e-12
        assert b.low == pytest.approx(a.low + rho * (a.high - a.low))
    order = sorted(range(len(values)), key=values.__getitem__)
    lows = [plain[i].low for i in order]
    assert lows == sorted(lows)


@pytest.mark.parametrize(
    ("rho", "expected"),
    [
        (0.0, [(0.1, 0.5), (0.15, 0.55), (0.5, 0.9)]),
        (0.5, [(0.3, 0.5), (0.35, 0.55), (0.7, 0.9)]),
        (1.0, [(0.5, 0.5), (0.55, 0.55), (0.9, 0.9)]),
    ],
)
def test_rho_raises_the_low_end_from_fa6_up_to_the_high_end(rho: float, expected: list[tuple[float, float]]) -> None:
    ranges = group_ranges([1, 2, 9], rho=rho)
    assert [r.low for r in ranges] == pytest.approx([low for low, _ in expected], abs=1e-12)
    assert [r.high for r in ranges] == pytest.approx([high for _, high in expected], abs=1e-12)
    assert [r.position for r in ranges] == [0.0, 0.125, 1.0]


def test_rho_zero_is_fa6_to_the_bit() -> None:
    ranges = group_ranges([0.0, 8.0, 16.0], rho=0.0)
    assert [(r.low, r.high) for r in ranges] == [(0.1, 0.5), (0.1 + 0.4 * 0.5, 0.5 + 0.4 * 0.5), (0.5, 0.9)]


def test_dead_groups_are_the_smallest_on_a_log_scale() -> None:
    dead, small, large = group_ranges([0.0, 1.0, 100.0], scale="log")
    assert dead.position == small.position == 0.0
    assert large.position == 1.0


@pytest.mark.parametrize("bad", [[], [math.nan], [-1.0], [math.inf, 1.0]])
def test_bad_magnitudes(bad: list[float]) -> None:
    with pytest.raises(InputError, match="magnitudes"):
        group_ranges(bad)
    with pytest.raises(InputError, match="rho"):
        group_ranges([1.0], rho=1.5)


def test_a_range_is_widened_only_to_hold_an_alpha_outside() -> None:
    (small, large) = group_ranges([5.0, 95.0])
    assert small.holding(0.3) is small
    wider = small.holding(0.95)
    assert (wider.low, wider.high) == (small.low, 0.95)
    assert "widened" in wider.explanation
    assert large.holding(0.2).low == 0.2
