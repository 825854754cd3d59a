"""One look at a run for people: its state, its sites and who works on it, as of one moment by the database's clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.storage.board_reads import read_progress
from alphasmith.storage.database import Database
from alphasmith.storage.leases import Identity, LeaseClock, utc_now
from alphasmith.storage.record_types import RunRecord, RunStatus
from alphasmith.storage.retries import PATIENCE
from alphasmith.storage.tables import RunRow
from alphasmith.storage.work_records import RunProgress


@dataclass(frozen=True, kw_only=True)
class RunLook:
    """A run as it was when it was looked at.

    Attributes:
        record: Its record.
        progress: How far it is. A worker of this machine whose process is gone is not alive, whatever its lease says.
        driver: Id of its live driver; None where there is none.
        present: When it was looked at, by the clock of its leases.
    """

    record: RunRecord
    progress: RunProgress
    driver: str | None
    present: datetime


def look_at(
    database: Database,
    record: RunRecord,
    *,
    lease: float,
    clock: Callable[[], datetime] = utc_now,
    patience: float = PATIENCE,
) -> RunLook:
    """Look at a run; reads only.

    Args:
        database: Initialised.
        record: The run, as it was read at any time before; what changes is read anew.
        lease: Seconds after which a worker that was not heard of counts as dead.
        clock: Time of this machine; SQLite only, servers use their own.
        patience: See ``Database.transact``.

    Raises:
        InputError: The run was deleted.
        StorageError: The database refused or was lost.
    """
    times = LeaseClock(database.backend, clock)
    here = Identity.here()

    def operation(session: Session) -> RunLook:
        # The state first: progress that is read after the end of a run is its last.
        row = session.get(RunRow, record.id)
        if row is None:
            raise InputError("RUN", f"{record.id} is not in {database.masked} any more", "see alphasmith list")
        now = replace(
            record,
            status=cast(RunStatus, row.status),
            reason=row.reason,
            started=row.started,
            finished=row.finished,
            folder=row.folder,
            driver=row.driver,
            driver_until=row.driver_until,
        )
        present = session.execute(select(times.now())).scalar_one()
        progress = read_progress(session, record.id, lease=lease, clock=times)
        workers = tuple(replace(w, alive=w.alive and not _is_dead(w.id, here)) for w in progress.workers)
        live = now.driver is not None and now.driver_until is not None and now.driver_until >= present
        return RunLook(
            record=now,
            progress=replace(progress, workers=workers),
            driver=now.driver if live and not _is_dead(now.driver, here) else None,
            present=present,
        )

    return database.transact(operation, patience=patience)


def live_drivers(database: Database, *, clock: Callable[[], datetime] = utc_now) -> dict[str, str]:
    """Run id -> id of its driver, for every run that a live process drives now.

    Args:
        database: Initialised.
        clock: Time of this machine; SQLite only, servers use their own.

    Raises:
        StorageError: The database refused or was lost.
    """
    now = LeaseClock(database.backend, clock).now()
    query = select(RunRow.id, RunRow.driver).where(RunRow.driver.is_not(None), RunRow.driver_until >= now)
    rows = database.transact(lambda session: session.execute(query).all())
    here = Identity.here()
    return {run_id: driver for run_id, driver in rows if driver is not None and not _is_dead(driver, here)}


def _is_dead(worker: str | None, here: Identity) -> bool:
    """Whether a process of this machine is certainly gone; nothing is known of those of others."""
    identity = Identity.of(worker or "")
    return identity is not None and identity.is_dead(here)
