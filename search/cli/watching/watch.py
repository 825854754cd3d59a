"""Progress of a run from anywhere: all that is shown is read from its database."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from typing import Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from alphasmith.objectives.text import duration, one_line, visible
from alphasmith.search.cli.watching.status import (
    advice,
    is_over,
    planned_sites,
    progress_facts,
    watch_line,
    watch_lines,
)
from alphasmith.search.config import DEFAULT_STORAGE
from alphasmith.storage.database.connection import Database, StorageError, opened
from alphasmith.storage.database.retries import is_lost
from alphasmith.storage.queue.leases import utc_now
from alphasmith.storage.queue.status import RunSnapshot, lease_of, look_at
from alphasmith.storage.runs.run_store import RunStore

_BAR_WIDTH = 40


def watch_run(
    run: str,
    storage: str | None,
    *,
    interval: float = 2.0,
    as_json: bool = False,
    out: TextIO | None = None,
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show how far a run is until it ends or the user leaves with Ctrl-C; reads its database only.

    On a terminal a block that is kept up to date; elsewhere a line per look at which something had changed; as JSON an
    object per look and line. While the database is away a line says so, and it is read again. A run that failed or was
    interrupted is watched on while autonomous workers are alive, since the last of them finishes it.

    Args:
        run: Its id, or the beginning of it.
        storage: The database it is in; None: the default one.
        interval: Seconds between two looks.
        as_json: Print JSON lines.
        out: Where to print; None: standard output.
        clock: Zone-aware now of this machine.
        sleep: Waits a number of seconds.

    Raises:
        InputError: No such run or database, or the run was deleted meanwhile.
        StorageError: The database refused to answer for a reason that does not pass.
    """
    stream = sys.stdout if out is None else out
    with ExitStack() as stack:
        database = stack.enter_context(opened(storage or DEFAULT_STORAGE))
        try:
            shown = _shown(stream, database.masked, as_json, stack)
            _watch(database, run, shown, interval, clock, sleep)
        except KeyboardInterrupt:
            return
        except BrokenPipeError:
            # Whoever read it has left, as ``head`` does; what is still buffered must not fail at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class View(Protocol):
    """Where looks are shown."""

    def look(self, look: RunSnapshot, at: datetime) -> None:
        """Show one look, made at the time ``at`` of this machine."""
        ...

    def away(self, run_id: str, trouble: str, at: datetime, seconds: float) -> None:
        """Say that the database has not answered for so many seconds."""
        ...

    def end(self, look: RunSnapshot) -> None:
        """Say why there is nothing more to see."""
        ...


def _watch(
    database: Database,
    run: str,
    shown: View,
    interval: float,
    clock: Callable[[], datetime],
    sleep: Callable[[float], None],
) -> None:
    record = RunStore(database).get(run)
    lost: datetime | None = None
    while True:
        try:
            look = look_at(database, record, lease=lease_of(record.config), clock=clock, patience=0.0)
        except StorageError as error:
            if not is_lost(error):
                raise
            now = clock()
            lost = lost or now
            shown.away(record.id, str(error), now, (now - lost).total_seconds())
        else:
            lost = None
            shown.look(look, clock())
            if is_over(look):
                shown.end(look)
                return
        sleep(interval)


def _shown(stream: TextIO, storage: str, as_json: bool, stack: ExitStack) -> View:
    if as_json:
        return _JsonLines(stream)
    if stream.isatty():
        return stack.enter_context(_Terminal(stream, storage))
    return _PlainLines(stream, storage)


class _JsonLines:
    """An object per look, all with the same keys."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def look(self, look: RunSnapshot, at: datetime) -> None:
        record = look.record
        told = {"status": record.status, "reason": record.reason, "folder": record.folder}
        self._print({"run": record.id, **told, "progress": progress_facts(look)}, at, "")

    def away(self, run_id: str, trouble: str, at: datetime, seconds: float) -> None:
        self._print({"run": run_id, "status": None, "reason": None, "folder": None, "progress": None}, at, trouble)

    def end(self, look: RunSnapshot) -> None:
        """The last object said so."""

    def _print(self, told: dict[str, object], at: datetime, trouble: str) -> None:
        line = {"time": at.isoformat(timespec="milliseconds"), **told, "storage_trouble": trouble}
        print(json.dumps(line, allow_nan=False), file=self._stream, flush=True)


class _PlainLines:
    """A line per look at which something had changed."""

    def __init__(self, stream: TextIO, storage: str) -> None:
        self._stream = stream
        self._storage = storage
        self._last: object = None

    def look(self, look: RunSnapshot, at: datetime) -> None:
        progress = look.progress
        found = (
            look.record.status,
            look.driver,
            [(ticket.site, ticket.attempts) for ticket in progress.running],
            (progress.waiting, progress.done, progress.failed, progress.trials),
            [(worker.id, worker.alive) for worker in progress.workers],
        )
        if found != self._last and not is_over(look):
            self._print(watch_line(look))
        self._last = found

    def away(self, run_id: str, trouble: str, at: datetime, seconds: float) -> None:
        if self._last != trouble:
            self._print(_away(trouble))
        self._last = trouble

    def end(self, look: RunSnapshot) -> None:
        self._print(watch_line(look))
        for line in advice(look, self._storage):
            self._print(line)

    def _print(self, line: str) -> None:
        print(visible(line), file=self._stream, flush=True)


class _Terminal:
    """A block that is drawn again at every look."""

    def __init__(self, stream: TextIO, storage: str) -> None:
        self._storage = storage
        self._live = Live(console=Console(file=stream), auto_refresh=False)
        self._block: RenderableType = Text("")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def look(self, look: RunSnapshot, at: datetime) -> None:
        head, counts, *rest = watch_lines(look, self._storage)
        total = planned_sites(look)
        bar = [ProgressBar(total=total, completed=look.progress.done, width=_BAR_WIDTH)] if total else []
        beside = Table.grid(padding=(0, 1))
        beside.add_row(*bar, Text(visible(counts)))
        self._block = Group(Text(visible(head), style="bold"), beside, *(Text(visible(line)) for line in rest))
        self._live.update(self._block, refresh=True)

    def away(self, run_id: str, trouble: str, at: datetime, seconds: float) -> None:
        note = Text(f"{_away(trouble)} (for {duration(seconds)})", style="yellow")
        self._live.update(Group(self._block, note), refresh=True)

    def end(self, look: RunSnapshot) -> None:
        """The block stays, with the reason and the command in it."""


def _away(trouble: str) -> str:
    return f"the database does not answer, trying again: {one_line(trouble)}"
