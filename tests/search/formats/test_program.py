"""The integer program of the formats, against every plan there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.search.formats._program import TOLERANCE, Program

numbers = st.floats(min_value=0, max_value=1e3, allow_subnormal=False).map(lambda value: round(value, 3))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    sites, choices = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    losses, costs = (
        np.array(draw(st.lists(st.lists(numbers, min_size=choices, max_size=choices), min_size=sites, max_size=sites)))
        for _ in range(2)
    )
    impossible = draw(st.lists(st.tuples(st.integers(0, sites - 1), st.integers(1, 3)), max_size=3))
    for site, choice in impossible:
        if choice < choices:  # the first one stays
            losses[site, choice] = np.nan
    return Program(losses, costs)


def every_plan(program: Program) -> list[tuple[int, ...]]:
    sites, choices = program.losses.shape
    plans = itertools.product(range(choices), repeat=sites)
    return [plan for plan in plans if all(program.possible[site, place] for site, place in enumerate(plan))]


@given(programs(), st.floats(0, 1.2))
@settings(max_examples=60, deadline=None)
def test_no_plan_within_the_limit_is_better(program: Program, part: float) -> None:
    limit = program.least + part * (program.most - program.least)
    found = program.best(limit)
    assert found is not None
    slack = 2 * TOLERANCE * (program.most or 1.0)
    assert program.cost(found) <= limit + slack
    best = min(program.loss(plan) for plan in every_plan(program) if program.cost(plan) <= limit)
    assert program.loss(found) <= best + 1e-5 * (np.nanmax(program.losses) or 1.0)


@given(programs())
@settings(max_examples=30, deadline=None)
def test_the_next_best_plans_are_others_and_no_better(program: Program) -> None:
    every: list[tuple[int, ...]] = every_plan(program)
    seen: list[tuple[int, ...]] = []
    while (plan := program.best(program.most, without=seen)) is not None and len(seen) < 4:
        assert plan not in seen
        assert all(
            program.loss(plan) >= program.loss(other) - 1e-5 * (np.nanmax(program.losses) or 1.0) for other in seen
        )
        seen.append(plan)
    assert len(seen) == min(4, len(every))


@given(programs())
@settings(max_examples=30, deadline=None)
def test_the_front_is_monotone(program: Program) -> None:
    front = program.front(program.limits())
    assert front
    pairs = list(itertools.pairwise(front))
    assert all(
        program.cost(left) <= program.cost(right) and program.loss(left) > program.loss(right) for left, right in pairs
    )


def test_a_limit_that_nothing_meets_has_no_plan() -> None:
    program = Program(np.array([[1.0, 0.5], [1.0, 0.2]]), np.array([[1.0, 2.0], [1.0, 3.0]]))
    assert program.best(1.9) is None
    assert program.best(2.0) == (0, 0)
    assert program.front([0.0, 1.0]) == []


@pytest.mark.parametrize(
    ("losses", "costs"),
    [([[1.0]], [[1.0, 2.0]]), ([[np.nan]], [[1.0]]), ([[-1.0]], [[1.0]]), ([[1.0]], [[-1.0]]), ([], [])],
)
def test_what_is_no_program_is_refused(losses: list[list[float]], costs: list[list[float]]) -> None:
    with pytest.raises(InputError):
        Program(np.array(losses), np.array(costs))
