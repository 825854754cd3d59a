"""Progress: lines at intervals where there is no terminal, one bar that fits every terminal."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.search.progress import PlainLines, TerminalBars, TimeLeft, for_terminal

#: What a bar writes to move and colour what it draws.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True

    def frames(self) -> list[str]:
        """Every line that was ever drawn."""
        return [_ESCAPES.sub("", line).rstrip() for line in re.split(r"[\r\n]+", self.getvalue())]


@pytest.mark.parametrize("total", [4, None])
def test_plain_lines_come_at_intervals(total: int | None) -> None:
    stream, ticks = io.StringIO(), itertools.count(step=6.0)
    lines = PlainLines(stream, interval=10.0, clock=lambda: next(ticks))
    lines.stage("searching", total)
    for _ in range(4):
        lines.advance("best loss 0.1")
    told = stream.getvalue().splitlines()
    assert told[0].startswith("searching")
    # Six seconds a step, a line every ten: after steps 2 and 4, with the time the rest will take.
    assert told[1:] == (
        []
        if total is None
        else [
            "searching (2/4), best loss 0.1, about 12 s left",
            "searching (4/4), best loss 0.1, about 0 s left",
        ]
    )


def test_lines_where_there_is_no_terminal() -> None:
    assert isinstance(for_terminal(io.StringIO()), PlainLines)
    assert isinstance(for_terminal(Screen()), TerminalBars)


@given(
    width=st.integers(60, 200),
    name=st.sampled_from(["searching sites", "metric of the float model", "refining at the output", "[bold] x" * 9]),
    total=st.integers(1, 99_999),
    detail=st.text("abc [/]e-07.", max_size=90),
)
def test_units_done_are_seen_at_every_width(width: int, name: str, total: int, detail: str) -> None:
    screen = Screen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setenv("LINES", "24")
        patch.setenv("TERM", "xterm")
        with suppress(InterruptedError), TerminalBars(screen) as bars:
            bars.stage(name, total)
            bars.advance(detail)
            raise InterruptedError  # drawn once more, and not turned into the line of a stage that ended
        frames = screen.frames()
    assert [line for line in frames if "━" in line and f" 1/{total} " in f"{line} "]
    assert max(map(len, frames)) <= width


def test_a_stage_that_ended_is_a_line() -> None:
    screen, now = Screen(), [0.0]
    with TerminalBars(screen, clock=lambda: now[0]) as bars:
        bars.stage("starting")
        now[0] = 2.0
        bars.stage("calibrating", 4)
        for _ in range(4):
            now[0] += 5.0
            bars.advance()
    frames = screen.frames()
    assert frames.index("starting, 2 s") < frames.index("calibrating 4/4, 20 s")


def test_a_stage_at_work_says_what_is_left() -> None:
    screen, now = Screen(), [0.0]
    with suppress(InterruptedError), TerminalBars(screen, clock=lambda: now[0]) as bars:
        bars.stage("calibrating", 4)
        now[0] = 5.0
        bars.advance()
        raise InterruptedError  # drawn once more
    assert any(" 1/4 " in line and line.endswith("15 s left") for line in screen.frames())


def test_a_stage_that_failed_is_not_said_to_have_ended() -> None:
    screen = Screen()
    with suppress(InterruptedError), TerminalBars(screen) as bars:
        bars.stage("calibrating", 4)
        raise InterruptedError
    assert not [line for line in screen.frames() if line.startswith("calibrating")]


def told(durations: Sequence[float], costs: Sequence[float] | None = None) -> tuple[list[float], list[float]]:
    """Time left as estimated after each unit but the last, and as it was."""
    left = TimeLeft(len(durations), 0.0)
    if costs is not None:
        left.expect(costs)
    assert left.seconds(0.0) is None
    estimates = []
    for now in itertools.accumulate(durations):
        left.advance(now)
        estimates.append(left.seconds(now) or 0.0)
    assert estimates[-1] == 0
    return estimates[:-1], [math.fsum(durations[done:]) for done in range(1, len(durations))]


def worst(estimates: Sequence[float], truth: Sequence[float]) -> float:
    return max(max(guess / true, true / guess) for guess, true in zip(estimates, truth, strict=True))


#: Weights and seconds of the sites of one block of an encoder (q k v, o, fc1, fc2).
BLOCK = ((1152 * 384, 1.9), (384 * 384, 1.4), (1536 * 384, 1.8), (384 * 1536 + 1, 2.9))


@given(blocks=st.integers(2, 8), noise=st.lists(st.floats(0.75, 1.3), min_size=32, max_size=32))
def test_sites_of_different_cost_are_estimated_within_a_factor_of_two(blocks: int, noise: list[float]) -> None:
    costs, seconds = zip(*(BLOCK * blocks), strict=True)
    estimates, truth = told([s * n for s, n in zip(seconds, noise, strict=False)], costs)
    assert worst(estimates, truth) < 2


def test_costly_sites_at_the_end_are_seen_coming() -> None:
    # A convolutional network: few weights at first, many at last.
    costs = [float(4**stage) for stage in range(5) for _ in range(3)]
    durations = [0.5 + 0.02 * cost for cost in costs]
    estimates, truth = told(durations, costs)
    blind, _ = told(durations)
    assert worst(estimates[4:], truth[4:]) < 2
    assert worst(blind[4:], truth[4:]) > 2


@given(
    fixed=st.floats(0.01, 10),
    slope=st.floats(0, 10),
    costs=st.lists(st.sampled_from([1.0, 2.0, 5.0, 40.0]), min_size=4, max_size=30),
)
def test_a_part_that_grows_with_the_cost_is_learned_from_two_kinds(
    fixed: float, slope: float, costs: list[float]
) -> None:
    costs = [1.0, 40.0, *costs]
    durations = [fixed + slope * cost for cost in costs]
    estimates, truth = told(durations, costs)
    assert estimates[1:] == pytest.approx(truth[1:], rel=1e-6)


def test_what_units_take_lately_counts_most() -> None:
    # A refinement: whole candidates first, then such as are computed in part and stopped early.
    durations = [8.0, 8.0, 5.0, 5.0, 5.0, 10.0, 5.0, 5.0, 5.0, 5.0, 5.0, 3.0, 3.0, 3.0]
    estimates, truth = told(durations)
    assert worst(estimates[1:], truth[1:]) < 2
    mean = [math.fsum(durations[:done]) / done * (len(durations) - done) for done in range(2, len(durations))]
    assert worst(estimates[1:], truth[1:]) < worst(mean, truth[1:])


def test_time_that_passes_is_not_left() -> None:
    left = TimeLeft(3, 0.0)
    left.advance(10.0)
    assert [left.seconds(now) for now in (10.0, 14.0, 100.0)] == [20.0, 16.0, 0.0]


@pytest.mark.parametrize("costs", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan]])
def test_costs_that_fit_no_stage_are_refused(costs: list[float]) -> None:
    with pytest.raises(InputError, match="costs"):
        TimeLeft(2, 0.0).expect(costs)
