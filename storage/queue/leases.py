"""Leases: who holds one, by whose clock it ends, and the thread that keeps it alive."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from sqlalchemy import ColumnElement, DateTime, Interval, func, literal, literal_column, type_coerce

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.storage.database.tables import UtcDateTime
from alphasmith.storage.runs.records import utc

#: Seconds after which a process without a heartbeat counts as dead, unless a run says otherwise; as in its configuration.
LEASE = 60.0
#: A holder reports so many times within a lease.
BEATS_PER_LEASE = 4


def utc_now() -> datetime:
    """The time of this machine."""
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which process this is, so that another on the same machine can see whether it is still there.

    Attributes:
        host: Host name.
        pid: Process id, in its namespace.
        token: Random; tells two workers of one process apart.
        started: When the process began, in clock ticks since the machine did; 0: unknown.
        boot: The machine's boot, the first digits of its random id; empty: unknown.
        namespace: Namespace of the process id; empty: unknown.
    """

    host: str
    pid: int
    token: str
    started: int = 0
    boot: str = ""
    namespace: str = ""

    @classmethod
    def here(cls) -> Identity:
        """A new worker of this process."""
        pid = os.getpid()
        return cls(
            # The id of a worker takes the text apart at slashes.
            host=socket.gethostname().replace("/", "_") or "localhost",
            pid=pid,
            token=secrets.token_hex(4),
            started=_began(pid) or 0,
            boot=_first_line("/proc/sys/kernel/random/boot_id")[:8],
            namespace=_namespace(),
        )

    @classmethod
    def of(cls, worker: str) -> Identity | None:
        """The identity in a worker's id; None where there is none in it."""
        parts = worker.split("/")
        if len(parts) != 4 or not parts[1].isdecimal():
            return None
        started, _, rest = parts[3].partition("-")
        boot, _, namespace = rest.partition("-")
        if not started.isdecimal():
            return None
        return cls(
            host=parts[0], pid=int(parts[1]), token=parts[2], started=int(started), boot=boot, namespace=namespace
        )

    @property
    def worker(self) -> str:
        """A worker's id, readable up to its last slash."""
        return f"{self.host}/{self.pid}/{self.token}/{self.started}-{self.boot}-{self.namespace}"

    def is_dead(self, here: Identity) -> bool:
        """Whether the process is certainly gone; False for processes of other machines, containers and boots.

        Args:
            here: Identity of the process that asks.
        """
        place = (self.host, self.boot, self.namespace)
        if not (self.boot and self.namespace and self.started) or place != (here.host, here.boot, here.namespace):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it is another user's
        began = _began(self.pid)
        # Another time: the number was given to another process since.
        return began is not None and began != self.started


def is_gone(worker: str | None, here: Identity) -> bool:
    """Whether a worker, by its id, is a process that is certainly gone; nothing is known of those of other machines.

    Args:
        worker: Its id; None: nobody.
        here: Identity of the process that asks.
    """
    identity = Identity.of(worker or "")
    return identity is not None and identity.is_dead(here)


def named(worker: str | None) -> str:
    """Display name of a worker, from its id."""
    identity = Identity.of(worker or "")
    return f"process {identity.pid} on {identity.host}" if identity else f"process {worker}"


def _began(pid: int) -> int | None:
    """Start of a process [ticks since boot]; 0: it ended and only its number is left; None: cannot be read."""
    # psutil tells this as a time of day, which moves when the clock is set; what looks like another process would be the same.
    fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return 0 if fields[0] in {"Z", "X"} else int(fields[19])


def _namespace() -> str:
    try:
        return "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))
    except OSError:
        return ""


def _first_line(path: str) -> str:
    try:
        # The name of a process may hold anything, a line break included.
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


class LeaseClock:
    """The one clock by which leases of a database begin and end, as SQL expressions.

    Servers use their own, so the clocks of the machines that work need not agree and may jump.

    Args:
        backend: ``sqlite``, ``postgresql`` or ``mysql``.
        clock: Time of this machine; used on SQLite only, where one machine works.
    """

    def __init__(self, backend: str, clock: Callable[[], datetime] = utc_now) -> None:
        self._backend = backend
        self._clock = clock

    def now(self) -> ColumnElement[datetime]:
        """The present."""
        return self.after(0.0)

    def after(self, seconds: float) -> ColumnElement[datetime]:
        """``seconds`` from now; before it where negative."""
        ahead = timedelta(seconds=seconds)
        if self._backend == "postgresql":
            # Not now(): that is when the transaction began.
            present = func.timezone("UTC", func.clock_timestamp(), type_=DateTime())
            return type_coerce(present + literal(ahead, Interval()) if seconds else present, UtcDateTime())
        if self._backend == "mysql":
            microseconds = round(ahead / timedelta(microseconds=1))
            return literal_column(f"(UTC_TIMESTAMP(6) + INTERVAL {microseconds} MICROSECOND)", UtcDateTime())
        return literal(utc(self._clock()) + ahead, UtcDateTime())


class Renewable(Protocol):
    """What a heartbeat keeps alive."""

    @property
    def lease(self) -> float:
        """Seconds after which a holder without a heartbeat counts as dead."""
        ...

    def renew(self, *, patience: float = ...) -> None:
        """Report once; see ``Board.renew``."""
        ...


class Heartbeat:
    """Renews the leases of a board in the background, four times per lease, while the block runs.

    An outage of the database is survived: it goes on trying, and a lease that ran out meanwhile is extended unless another
    process took it over.

    Args:
        board: The board of this process.
    """

    def __init__(self, board: Renewable) -> None:
        self._board = board
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="alphasmith heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # A report that is under way may hang on a dead server; the thread then ends with the process.
        self._thread.join(timeout=self._board.lease)

    def _beat(self) -> None:
        # Event.wait counts on the monotonic clock.
        while not self._ended.wait(self._board.lease / BEATS_PER_LEASE):
            with suppress(AlphasmithError):
                self._board.renew(patience=0.0)
