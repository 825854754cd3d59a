"""Which runs somebody works on right now, as their database knows it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.orm import Session

from alphasmith.storage.database import Database
from alphasmith.storage.leases import Identity, LeaseClock
from alphasmith.storage.tables import RunRow, WorkerRow

#: Lease of runs whose configuration does not tell [s].
_LEASE = 60.0


def database_now(database: Database) -> datetime:
    """The time by the clock that ends leases: the server's, or on SQLite this machine's."""
    query = select(LeaseClock(database.backend).now())
    found: datetime = database.transact(lambda session: session.execute(query).scalar_one())
    return found


def live_runs(database: Database, now: datetime) -> dict[str, str]:
    """Runs with a driver or a worker that was heard of within a lease, and who that is; processes known to be dead do not count.

    Args:
        database: Of any schema; one from before workers were recorded has no live runs.
        now: See ``database_now``.

    Returns:
        Run id -> ``host/pid``.

    Raises:
        StorageError: The database was lost.
    """
    if not inspect(database.engine).has_table(WorkerRow.__tablename__):
        return {}
    here = Identity.here()

    def look(session: Session) -> dict[str, str]:
        found: dict[str, str] = {}
        drivers = select(RunRow.id, RunRow.driver).where(RunRow.driver.is_not(None), RunRow.driver_until > now)
        for run, driver in session.execute(drivers):
            _add(found, run, str(driver), here)
        workers = select(WorkerRow, RunRow.config).join(RunRow, RunRow.id == WorkerRow.run_id)
        for worker, config in session.execute(workers.where(WorkerRow.state == "alive")):
            if worker.heartbeat + timedelta(seconds=_lease(config)) > now:
                _add(found, worker.run_id, worker.id, here)
        return found

    return database.transact(look)


def _add(found: dict[str, str], run: str, worker: str, here: Identity) -> None:
    identity = Identity.of(worker)
    if identity is None:
        found.setdefault(run, worker)
    elif not identity.is_dead(here):
        found.setdefault(run, f"{identity.host}, process {identity.pid}")


def _lease(config: dict[str, Any]) -> float:
    workers = config.get("workers")
    lease = workers.get("lease") if isinstance(workers, dict) else None
    return float(lease) if isinstance(lease, (int, float)) else _LEASE
