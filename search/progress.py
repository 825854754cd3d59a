"""Progress of a run: bars on a terminal, plain lines elsewhere, nothing for scripts."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import duration, visible

#: Most that a stage's name and its bar take of a line [characters].
_NAME, _BAR = 26, 28
#: Weight of the newest unit of a kind in the mean of what they took.
_NEWEST = 0.3


class Progress(Protocol):
    """Stages of a run and how far each is."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; the one before is finished."""
        ...

    def expect(self, costs: Sequence[float]) -> None:
        """What each unit of the stage costs relative to the others, in order; without it all cost the same."""
        ...

    def advance(self, detail: str = "") -> None:
        """One unit of the stage is done."""
        ...

    def note(self, text: str) -> None:
        """A line worth keeping."""
        ...


class Silent:
    """No output; the default of the Python API."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Nothing."""

    def expect(self, costs: Sequence[float]) -> None:
        """Nothing."""

    def advance(self, detail: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class TimeLeft:
    """Estimate of the time that the rest of a stage takes, from what its units took so far.

    Units of equal cost are of one kind, and a kind is known by those of it that are done, the latest most. Kinds to come are
    taken from a line through those seen, or, while there is one only, from the square root of the cost: part of the time of
    a unit does not depend on its size.

    Args:
        total: Units of the stage.
        now: When it begins [s].
    """

    def __init__(self, total: int, now: float) -> None:
        self._costs = [1.0] * total
        self._done = 0
        self._last = now
        self._kinds: dict[float, float] = {}

    def expect(self, costs: Sequence[float]) -> None:
        """Relative costs of all units, in order.

        Raises:
            InputError: There are not as many as units, or one is not positive.
        """
        if len(costs) != len(self._costs) or any(not cost > 0 for cost in costs):
            raise InputError("costs", f"{len(costs)} for {len(self._costs)} units", "give a positive one for each unit")
        self._costs = list(costs)

    def advance(self, now: float) -> None:
        """One unit is done, at ``now`` [s]."""
        if self._done < len(self._costs):
            cost = self._costs[self._done]
            took, before = now - self._last, self._kinds.get(cost)
            self._kinds[cost] = took if before is None else before + (took - before) * _NEWEST
        self._done += 1
        self._last = now

    def seconds(self, now: float) -> float | None:
        """Time left at ``now`` [s]; None while nothing is known."""
        if not self._kinds:
            return None
        left = sum(self._predicted(cost) for cost in self._costs[self._done :])
        return max(0.0, left - (now - self._last))

    def _predicted(self, cost: float) -> float:
        if cost in self._kinds:
            return self._kinds[cost]
        if len(self._kinds) == 1:
            (seen, took), *_ = self._kinds.items()
            return took * math.sqrt(cost / seen)
        mean = math.fsum(self._kinds) / len(self._kinds)
        level = math.fsum(self._kinds.values()) / len(self._kinds)
        rise = math.fsum((seen - mean) * took for seen, took in self._kinds.items())
        slope = max(0.0, rise / math.fsum((seen - mean) ** 2 for seen in self._kinds))
        # Never below the least of them: far from those seen a line may say anything.
        return max(level + slope * (cost - mean), min(self._kinds.values()) * min(1.0, cost / min(self._kinds)))


class PlainLines:
    """A line per stage and, at most every ``interval`` seconds, one on how far it is.

    Args:
        stream: Where lines go.
        interval: Seconds between two lines of one stage.
        clock: Seconds, monotonic.
    """

    def __init__(self, stream: TextIO, *, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._name, self._total, self._done = "", 0, 0
        self._last = clock()
        self._left = TimeLeft(0, self._last)

    def stage(self, name: str, total: int | None = None) -> None:
        """Print the stage's name."""
        self._name, self._total, self._done = name, total or 0, 0
        self._last = self._clock()
        self._left = TimeLeft(self._total, self._last)
        self.note(f"{name} ..." if not total else f"{name} (0/{total}) ...")

    def expect(self, costs: Sequence[float]) -> None:
        """See :meth:`TimeLeft.expect`."""
        self._left.expect(costs)

    def advance(self, detail: str = "") -> None:
        """Print where the stage stands, unless it did so just now."""
        self._done += 1
        now = self._clock()
        self._left.advance(now)
        if now - self._last < self._interval or not self._total:
            return
        self._last = now
        left = duration(self._left.seconds(now) or 0.0)
        self.note(f"{self._name} ({self._done}/{self._total}), {detail + ', ' if detail else ''}about {left} left")

    def note(self, text: str) -> None:
        """Print the line."""
        print(visible(text), file=self._stream, flush=True)


class TerminalBars:
    """A rich bar for the stage at work: units done, detail (best loss), time left; finished stages become lines above it.

    The line fits every width from 60 characters on: first the detail is cut, never the units done. On a stream that is no
    terminal only the lines of finished stages are written.

    Args:
        stream: Where it is drawn.
        clock: Seconds, monotonic.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        console = Console(file=stream)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=_NAME)),
            BarColumn(bar_width=min(_BAR, max(4, (console.width - 2 * _NAME) // 2))),
            _Units(),
            TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            _Left(lambda: self._left.seconds(self._clock())),
            console=console,
            expand=True,
            transient=True,
        )
        self._task: TaskID | None = None
        self._clock = clock
        self._begun = clock()
        self._left = TimeLeft(0, self._begun)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """Show a bar for it in place of that of the stage before, which becomes a line."""
        self._finish()
        self._begun = self._clock()
        self._left = TimeLeft(total or 0, self._begun)
        self._task = self._bars.add_task(escape(name), total=total, detail="")

    def expect(self, costs: Sequence[float]) -> None:
        """See :meth:`TimeLeft.expect`."""
        self._left.expect(costs)

    def advance(self, detail: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._left.advance(self._clock())
            self._bars.update(self._task, advance=1)
            if detail:
                self._bars.update(self._task, detail=escape(detail))

    def note(self, text: str) -> None:
        """Print the line above the bar."""
        self._bars.console.print(visible(text), markup=False, highlight=False)

    def _finish(self) -> None:
        if self._task is None:
            return
        (task,) = (task for task in self._bars.tasks if task.id == self._task)
        done = f" {task.completed:.0f}/{task.total:.0f}" if task.total else ""
        self._bars.remove_task(self._task)
        self._task = None
        self._bars.console.print(
            f"{task.description}{done}, {duration(self._clock() - self._begun)}", highlight=False, style="dim"
        )


class _Units(ProgressColumn):
    """Units done of all, e.g. ``18/120``; nothing where their number is unknown. Never cut."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, justify="right"))

    def render(self, task: Task) -> Text:
        """As the row of the task shows it."""
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if task.total else "", style="progress.download")


class _Left(ProgressColumn):
    """Time left, e.g. ``40 s left``; nothing while it is unknown. Never cut.

    Args:
        seconds: Tells it [s].
    """

    def __init__(self, seconds: Callable[[], float | None]) -> None:
        super().__init__(table_column=Column(no_wrap=True, justify="right"))
        self._seconds = seconds

    def render(self, task: Task) -> Text:
        """As the row of the task shows it."""
        left = self._seconds()
        return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")


def for_terminal(stream: TextIO = sys.stderr) -> TerminalBars | PlainLines:
    """Bars where ``stream`` is a terminal, plain lines otherwise."""
    return TerminalBars(stream) if stream.isatty() else PlainLines(stream)
