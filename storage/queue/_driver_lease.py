"""The driver's lease: one process at a time may record a run, and the lease is free again when that process is dead."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import duration
from alphasmith.storage.database.connection import Database
from alphasmith.storage.database.tables import RunRow, WorkerRow
from alphasmith.storage.queue.leases import Identity, LeaseClock, is_gone, named

_REMEDY = "wait until it has ended, or end it"


class DriverLease:
    """Exclusive right of one process to record one run.

    On SQLite it is a file lock beside the database, ``<database>.<run>.driver.lock``, which ends with its process and knows
    no clock; the file stays. On servers it is a lease in the row of the run. The columns of the row tell who has it.

    Args:
        database: Initialised.
        run_id: The run.
        identity: Of this process.
        lease: Seconds [s].
        clock: By which leases end.
    """

    def __init__(self, database: Database, run_id: str, *, identity: Identity, lease: float, clock: LeaseClock) -> None:
        self._run = run_id
        self._identity = identity
        self._lease = lease
        self._clock = clock
        self._held = False
        self._lock = (
            # Taken and given back by any thread of this process.
            FileLock(f"{database.engine.url.database}.{run_id}.driver.lock", timeout=0, thread_local=False)
            if database.backend == "sqlite"
            else None
        )

    @property
    def _remedy(self) -> str:
        """What whoever wanted to drive, too, can do: on servers several processes may search."""
        return _REMEDY if self._lock is not None else f"join it with: alphasmith worker {self._run}, or {_REMEDY}"

    @property
    def held(self) -> bool:
        """Whether this process has it, as far as it knows."""
        return self._held

    def lock(self) -> bool:
        """Take the file lock, where there is one. False: another process has it.

        Raises:
            InputError: Field ``storage``: the lock file cannot be written.
        """
        if self._lock is None or self._lock.is_locked:
            return True
        try:
            self._lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            problem = f"{self._lock.lock_file} is not writable ({error.strerror})"
            raise InputError("storage", problem, "choose another folder for the database") from error
        return True

    def unlock(self) -> None:
        """Give the file lock back, where there is one."""
        if self._lock is not None:
            self._lock.release(force=True)

    def forget(self) -> None:
        """Remove the lock file, where there is one. Only for a run that is finished: nobody will ask for its right again."""
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def take(self, session: Session, *, locked: bool) -> str | None:
        """Take the right, unless another live process has it.

        Args:
            session: A transaction.
            locked: What ``lock`` returned.

        Returns:
            The driver before, whose claims end with its right; None: there was none, or it is this process.

        Raises:
            InputError: Another live driver has it, or there is no such run.
        """
        ours = self._identity.worker
        query = select(RunRow.driver, RunRow.driver_until < self._clock.now()).where(RunRow.id == self._run)
        found = session.execute(query.with_for_update()).first()
        if found is None:
            raise InputError("RUN", f"no run {self._run!r}", "see alphasmith list")
        driver, over = found
        free = locked if self._lock is not None else driver in (None, ours) or over or is_gone(driver, self._identity)
        if not free:
            raise InputError("RUN", self._whose(session, driver), self._remedy)
        self._set(session, driver=ours, driver_until=self._clock.after(self._lease))
        return None if driver == ours else driver

    def taken(self) -> None:
        """Note that the transaction of ``take`` was committed."""
        self._held = True

    def renew(self, session: Session) -> None:
        """Report that the driver lives. A right that ran out is kept; one that was taken over is not taken back."""
        if not self._held:
            return
        self._held = self._set(session, driver_until=self._clock.after(self._lease), only_ours=True)

    def give_back(self, session: Session) -> None:
        """Leave the run without a driver, if it is this one."""
        self._set(session, driver=None, driver_until=None, only_ours=True)

    def given_back(self) -> None:
        """Note that the transaction of ``give_back`` was committed."""
        self._held = False
        self.unlock()

    def _set(self, session: Session, *, only_ours: bool = False, **values: object) -> bool:
        statement = update(RunRow).where(RunRow.id == self._run).values(**values)
        if only_ours:
            statement = statement.where(RunRow.driver == self._identity.worker)
        done = session.execute(statement, execution_options={"synchronize_session": False})
        return bool(cast("CursorResult[Any]", done).rowcount)

    def _whose(self, session: Session, driver: str | None) -> str:
        if Identity.of(driver or "") is None:
            return f"{self._run} is driven by another process"
        heard = select(WorkerRow.heartbeat, self._clock.now()).where(WorkerRow.id == driver)
        row = session.execute(heard).first()
        ago = "" if row is None else f", last heartbeat {duration((row[1] - row[0]).total_seconds())} ago"
        return f"{self._run} is driven by {named(driver)}{ago}"
