"""Progress: lines at intervals where there is no terminal, one bar that fits every terminal."""

from __future__ import annotations

import io
import itertools
import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.search.progress import PlainLines, TerminalBars, for_terminal

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
    screen, ticks = Screen(), itertools.count(step=2.0)
    with TerminalBars(screen, clock=lambda: next(ticks)) as bars:
        bars.stage("starting")
        bars.stage("calibrating", 4)
        for _ in range(4):
            bars.advance()
    frames = screen.frames()
    assert frames.index("starting, 2 s") < frames.index("calibrating 4/4, 2 s")


def test_a_stage_that_failed_is_not_said_to_have_ended() -> None:
    screen = Screen()
    with suppress(InterruptedError), TerminalBars(screen) as bars:
        bars.stage("calibrating", 4)
        raise InterruptedError
    assert not [line for line in screen.frames() if line.startswith("calibrating")]
