"""Status of a run: its state, its sites and who works on it, as of one moment by the database's clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import Text, inspect, select
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import parse_json
from alphasmith.storage.database.connection import Database
from alphasmith.storage.database.retries import PATIENCE
from alphasmith.storage.database.tables import RunRow, WorkerRow
from alphasmith.storage.queue._reads import read_progress
from alphasmith.storage.queue.leases import LEASE, Identity, LeaseClock, is_gone, named, utc_now
from alphasmith.storage.queue.records import RunProgress
from alphasmith.storage.runs.records import RunRecord, RunStatus

#: Longest lease that a record may ask for [s]: what is more cannot be added to a time.
_LONGEST = 366 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
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
) -> RunSnapshot:
    """Look at a run; reads only.

    Args:
        database: Initialised.
        record: The run, as it was read at any time before; what changes is read anew.
        lease: Seconds after which a worker without a heartbeat counts as dead.
        clock: Time of this machine; SQLite only, servers use their own.
        patience: See ``Database.transact``.

    Raises:
        InputError: The run was deleted.
        StorageError: The database refused or was lost.
    """
    times = LeaseClock(database.backend, clock)
    here = Identity.here()

    def operation(session: Session) -> RunSnapshot:
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
        workers = tuple(replace(w, alive=w.alive and not is_gone(w.id, here)) for w in progress.workers)
        live = now.driver is not None and now.driver_until is not None and now.driver_until >= present
        return RunSnapshot(
            record=now,
            progress=replace(progress, workers=workers),
            driver=now.driver if live and not is_gone(now.driver, here) else None,
            present=present,
        )

    return database.transact(operation, patience=patience)


def database_now(database: Database) -> datetime:
    """The time by the clock that ends leases: the server's, or on SQLite this machine's."""
    query = select(LeaseClock(database.backend).now())
    found: datetime = database.transact(lambda session: session.execute(query).scalar_one())
    return found


def live_runs(database: Database, now: datetime) -> dict[str, str]:
    """Runs with a driver or a worker heard of within a lease, and who that is; processes known to be dead do not count.

    Args:
        database: Of any schema; one from before workers were recorded has no live runs.
        now: See ``database_now``.

    Returns:
        Run id -> what people call that process.

    Raises:
        StorageError: The database was lost.
    """
    if not inspect(database.engine).has_table(WorkerRow.__tablename__):
        return {}
    here = Identity.here()

    def look(session: Session) -> dict[str, str]:
        found = _drivers(session, now, here)
        # As text: one configuration that is no JSON must not hide the processes of all other runs.
        workers = select(WorkerRow, RunRow.config.cast(Text)).join(RunRow, RunRow.id == WorkerRow.run_id)
        for worker, config in session.execute(workers.where(WorkerRow.state == "alive")):
            if worker.heartbeat + timedelta(seconds=_lease_in(config)) > now and not is_gone(worker.id, here):
                found.setdefault(worker.run_id, worker.id)
        return found

    return {run: named(worker) for run, worker in database.transact(look).items()}


def live_drivers(database: Database) -> dict[str, str]:
    """Run id -> id of its driver, for every run that a live process drives now.

    Args:
        database: Initialised.

    Raises:
        StorageError: The database refused or was lost.
    """
    now, here = LeaseClock(database.backend).now(), Identity.here()
    return database.transact(lambda session: _drivers(session, now, here))


def past_drivers(database: Database, run_id: str) -> tuple[str, ...]:
    """Tokens of all processes that drive a run or ever did, see ``Identity``.

    Args:
        database: Initialised.
        run_id: The run.

    Raises:
        StorageError: The database refused or was lost.
    """
    query = select(WorkerRow.id).where(WorkerRow.run_id == run_id, WorkerRow.role == "driver").order_by(WorkerRow.id)
    workers = database.transact(lambda session: list(session.scalars(query)))
    return tuple(identity.token for worker in workers if (identity := Identity.of(worker)) is not None)


def lease_of(config: Mapping[str, Any]) -> float:
    """Seconds after which a worker of a run counts as dead, as configured when it began.

    Args:
        config: Of the run, as recorded.
    """
    workers = config.get("workers")
    lease = workers.get("lease") if isinstance(workers, Mapping) else None
    return float(lease) if isinstance(lease, (int, float)) and 0 < lease <= _LONGEST else LEASE


def _lease_in(config: str) -> float:
    try:
        found = parse_json(config, field="RUN", what="its configuration", remedy="restore a backup")
    except InputError:
        return LEASE
    return lease_of(found if isinstance(found, dict) else {})


def _drivers(session: Session, now: Any, here: Identity) -> dict[str, str]:
    query = select(RunRow.id, RunRow.driver).where(RunRow.driver.is_not(None), RunRow.driver_until >= now)
    return {run: str(driver) for run, driver in session.execute(query) if not is_gone(driver, here)}
