"""Progress of a run: bars on a terminal, plain lines elsewhere, nothing for scripts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from alphasmith.objectives.text import duration, visible


class Progress(Protocol):
    """Stages of a run and how far each is."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; the one before is finished."""
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

    def advance(self, detail: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


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
        self._begun = self._last = clock()

    def stage(self, name: str, total: int | None = None) -> None:
        """Print the stage's name."""
        self._name, self._total, self._done = name, total or 0, 0
        self._begun = self._last = self._clock()
        self.note(f"{name} ..." if not total else f"{name} (0/{total}) ...")

    def advance(self, detail: str = "") -> None:
        """Print where the stage stands, unless it did so just now."""
        self._done += 1
        now = self._clock()
        if now - self._last < self._interval or not self._total:
            return
        self._last = now
        left = (now - self._begun) / self._done * (self._total - self._done)
        self.note(
            f"{self._name} ({self._done}/{self._total}), {detail + ', ' if detail else ''}about {duration(left)} left"
        )

    def note(self, text: str) -> None:
        """Print the line."""
        print(visible(text), file=self._stream, flush=True)


class TerminalBars:
    """rich bars: stage, units done, detail (best loss), time left."""

    def __init__(self, stream: TextIO) -> None:
        console = Console(file=stream)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task: TaskID | None = None

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
        """Add a bar."""
        self._finish()
        self._task = self._bars.add_task(name, total=total, detail="")

    def advance(self, detail: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.update(self._task, advance=1)
            if detail:
                self._bars.update(self._task, detail=detail)

    def note(self, text: str) -> None:
        """Print the line above the bars."""
        self._bars.console.print(visible(text), markup=False, highlight=False)

    def _finish(self) -> None:
        if self._task is None:
            return
        task = self._bars.tasks[self._task]
        total = task.total if task.total is not None else max(task.completed, 1)
        self._bars.update(self._task, total=total, completed=total)


def for_terminal(stream: TextIO = sys.stderr) -> TerminalBars | PlainLines:
    """Bars where ``stream`` is a terminal, plain lines otherwise."""
    return TerminalBars(stream) if stream.isatty() else PlainLines(stream)
