"""Progress of a run: bars on a terminal, plain lines elsewhere, nothing for scripts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from alphasmith.objectives.text import duration, visible

#: Most that a stage's name and its bar take of a line [characters].
_NAME, _BAR = 26, 28


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
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            transient=True,
        )
        self._task: TaskID | None = None
        self._clock = clock
        self._begun = clock()

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
        self._task = self._bars.add_task(escape(name), total=total, detail="")

    def advance(self, detail: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
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


def for_terminal(stream: TextIO = sys.stderr) -> TerminalBars | PlainLines:
    """Bars where ``stream`` is a terminal, plain lines otherwise."""
    return TerminalBars(stream) if stream.isatty() else PlainLines(stream)
