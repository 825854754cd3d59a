"""Reads of a work queue: tickets, workers, results and how far a run is. One transaction each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import cast

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from alphasmith.storage.database.connection import Database
from alphasmith.storage.database.optuna_private import STUDIED, of_run
from alphasmith.storage.database.tables import ResultRow, TicketRow, WorkerRow
from alphasmith.storage.queue.leases import LeaseClock
from alphasmith.storage.queue.records import (
    RunProgress,
    SiteWinner,
    Ticket,
    TicketState,
    WorkerRecord,
    WorkerRole,
)

#: The rate of a run is that of the sites that were done within so many seconds.
RATE_WINDOW = 900.0

#: Values in one IN list; SQLite's oldest limit is 999 for a statement.
_CHUNK = 500


def ticket_of(row: TicketRow) -> Ticket:
    """A row as the record it stands for."""
    return Ticket(
        site=row.site,
        position=row.position,
        depends_on=tuple(row.depends_on),
        digest=row.digest,
        reused=row.reused,
        state=cast(TicketState, row.state),
        attempts=row.attempts,
        worker=row.worker,
        lease_until=row.lease_until if row.state == "running" else None,
        started=row.started,
        ended=row.ended,
        reason=row.reason,
    )


def read_tickets(session: Session, run_id: str) -> list[Ticket]:
    """All tickets of a run, in order."""
    rows = session.scalars(select(TicketRow).where(TicketRow.run_id == run_id).order_by(TicketRow.position))
    return [ticket_of(row) for row in rows]


def read_workers(session: Session, run_id: str, *, lease: float, clock: LeaseClock) -> list[WorkerRecord]:
    """All processes that joined a run, newest heartbeat first."""
    query = select(WorkerRow, clock.now().label("present")).where(WorkerRow.run_id == run_id)
    found = []
    for row, present in session.execute(query.order_by(WorkerRow.heartbeat.desc(), WorkerRow.id)):
        age = max(0.0, (present - row.heartbeat).total_seconds())
        found.append(
            WorkerRecord(
                id=row.id,
                role=cast(WorkerRole, row.role),
                host=row.host,
                pid=row.pid,
                engine=row.engine,
                alive=row.state == "alive" and age <= lease,
                left=row.state == "left",
                joined=row.joined,
                heartbeat=row.heartbeat,
                age=age,
            )
        )
    return found


def read_results(session: Session, run_id: str) -> dict[str, SiteWinner]:
    """The accepted results of a run, by site."""
    rows = session.scalars(select(ResultRow).where(ResultRow.run_id == run_id).order_by(ResultRow.id))
    return {row.site: _winner(row) for row in rows}


def read_done(session: Session, run_id: str) -> frozenset[str]:
    """Sites that are done."""
    done = select(TicketRow.site).where(TicketRow.run_id == run_id, TicketRow.state == "done")
    return frozenset(session.scalars(done))


def read_progress(session: Session, run_id: str, *, lease: float, clock: LeaseClock) -> RunProgress:
    """How far a run is, counted by the database."""
    ours = TicketRow.run_id == run_id
    counted = select(TicketRow.state, func.count()).where(ours).group_by(TicketRow.state)
    counts = Counter({state: int(number) for state, number in session.execute(counted)})
    live = select(TicketRow).where(ours, TicketRow.state == "running", TicketRow.lease_until >= clock.now())
    running = tuple(ticket_of(row) for row in session.scalars(live.order_by(TicketRow.position)))
    given_up = select(TicketRow.site, TicketRow.reason).where(ours, TicketRow.state == "failed")
    failed = tuple((site, reason) for site, reason in session.execute(given_up.order_by(TicketRow.position)))
    rate = _rate(session, run_id, clock)
    trials = select(func.count()).select_from(STUDIED).where(of_run(run_id))
    waiting = counts["waiting"] + counts["running"] - len(running)
    return RunProgress(
        waiting=waiting,
        running=running,
        done=counts["done"],
        failed=failed,
        trials=session.execute(trials).scalar_one(),
        workers=tuple(read_workers(session, run_id, lease=lease, clock=clock)),
        rate=rate,
        seconds_left=None if rate is None else 60.0 * (waiting + len(running)) / rate,
    )


def reusable_winners(
    database: Database, digests: Collection[str], scheme: str, *, not_run: str
) -> dict[str, SiteWinner]:
    """The best result that other runs, finished or not, recorded for each of these sites.

    Args:
        database: Initialised.
        digests: Digests of sites, see ``TicketSpec.digest``; empty ones have no results.
        scheme: Name of the scheme; results of others say nothing about this one.
        not_run: The run that asks.

    Returns:
        Digest -> the result of lowest held-out loss, the earlier of two equals; digests without one are left out.

    Raises:
        StorageError: The database was lost.
    """
    wanted = sorted(set(digests) - {""})

    def operation(session: Session) -> dict[str, SiteWinner]:
        best: dict[str, SiteWinner] = {}
        for chunk in _chunks(wanted):
            query = select(ResultRow).where(
                ResultRow.digest.in_(chunk), ResultRow.scheme == scheme, ResultRow.run_id != not_run
            )
            for row in session.scalars(query.order_by(ResultRow.loss, ResultRow.id)):
                best.setdefault(row.digest, _winner(row))
        return best

    return database.transact(operation)


def _winner(row: ResultRow) -> SiteWinner:
    return SiteWinner(
        site=row.site,
        attempt=row.attempt,
        worker=row.worker,
        digest=row.digest,
        scheme=row.scheme,
        winner=row.winner,
        loss=row.loss,
        artifact_id=row.artifact_id,
        sha256=row.sha256,
        run=row.run_id,
    )


def _rate(session: Session, run_id: str, clock: LeaseClock) -> float | None:
    """Sites per minute since the first of those that were done lately; pauses count."""
    recent = (
        select(func.count(), func.min(TicketRow.ended), clock.now().label("present"))
        .where(TicketRow.run_id == run_id, TicketRow.state == "done", TicketRow.ended >= clock.after(-RATE_WINDOW))
        .group_by(TicketRow.run_id)
    )
    row = session.execute(recent).first()
    if row is None or row[0] < 2:
        return None
    number, first, present = cast(tuple[int, datetime, datetime], tuple(row))
    return (number - 1) / (max(present - first, timedelta(milliseconds=1)) / timedelta(minutes=1))


def _chunks(values: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(values)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk
