"""The work queue of a run: waiting sites, leases, and accepted results. One contract, any backend.

Claims are leases. A lease that was not renewed may be claimed by another process; whether a lease is still ours is told by
worker and attempt, never by the time, so a process that was frozen and found its lease merely run out goes on, and one
whose lease was taken over is refused, whatever its clock says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar, cast

from sqlalchemy import ColumnElement, Connection, CursorResult, delete, insert, select, update
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.connection import Database, StorageError
from alphasmith.storage.database.retries import PATIENCE
from alphasmith.storage.database.tables import AttemptRow, ResultRow, RunRow, StoredArtifactRow, TicketRow, WorkerRow
from alphasmith.storage.queue._driver_lease import DriverLease
from alphasmith.storage.queue._plan import check_order, dependants_of, difference, new_ticket
from alphasmith.storage.queue._reads import (
    read_done,
    read_progress,
    read_results,
    read_tickets,
    read_workers,
    reusable_winners,
)
from alphasmith.storage.queue._transitions import TicketTransitions, exhausted
from alphasmith.storage.queue.leases import LEASE, Heartbeat, Identity, LeaseClock, utc_now
from alphasmith.storage.queue.records import (
    Claim,
    RunProgress,
    SiteWinner,
    StoredArtifact,
    Ticket,
    TicketSpec,
    WorkerRecord,
    WorkerRole,
)
from alphasmith.storage.runs.entries import SiteRecord, prose
from alphasmith.storage.runs.run_store import drop_site, store_site

__all__ = ["Board", "Heartbeat", "Identity", "LeaseLostError", "reusable_winners"]

T = TypeVar("T")

_UNSYNCED = {"synchronize_session": False}
_PLAN_REMEDY = "resume it with the model and the settings it began with, or launch a new run"


class LeaseLostError(StorageError):
    """The claim is not this worker's any more: another process took it over, or it has ended. Nothing was written."""


class Board:
    """Tickets of one run, seen and moved by one worker.

    Usable from several threads; every process makes its own. Every method is one transaction that is repeated when the
    database loses it, also when only the answer to its commit was lost.

    Args:
        database: Initialised.
        run_id: Full id of a run.
        role: What this process is to the run.
        engine: Display name of the engine.
        lease: Seconds after which a process without a heartbeat counts as dead.
        attempts: How often a site is tried before it counts as failed, where its worker died.
        identity: Of this process; None: found out.
        clock: Time of this machine; SQLite only, servers use their own.
    """

    def __init__(
        self,
        database: Database,
        run_id: str,
        *,
        role: WorkerRole,
        engine: str = "",
        lease: float = LEASE,
        attempts: int = 3,
        identity: Identity | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._run = run_id
        self._role = role
        self._engine = engine
        self._lease = lease
        self._allowed = attempts
        self._identity = identity or Identity.here()
        self._clock = LeaseClock(database.backend, clock)
        self._moves = TicketTransitions(
            run_id, identity=self._identity, lease=lease, allowed=attempts, clock=self._clock
        )
        self._right = DriverLease(database, run_id, identity=self._identity, lease=lease, clock=self._clock)
        self._mutex = threading.Lock()
        self._claiming = threading.Lock()
        self._held: dict[str, int] = {}
        # Whether a claim may have been committed without our knowing.
        self._uncertain = False
        self._dependants: Mapping[str, tuple[str, ...]] | None = None
        self._planned: frozenset[str] = frozenset()

    @property
    def worker(self) -> str:
        """Unique id of this worker: host, process and random digits."""
        return self._identity.worker

    @property
    def token(self) -> str:
        """Random digits of this worker's id: they fence what it writes outside the database."""
        return self._identity.token

    @property
    def lease(self) -> float:
        """Seconds after which a process without a heartbeat counts as dead."""
        return self._lease

    @property
    def driving(self) -> bool:
        """Whether this process has the right to record the run, as of the last renewal."""
        return self._right.held

    def join(self) -> None:
        """Make this process known as one that works on the run.

        Raises:
            InputError: No such run; or an autonomous worker on SQLite, which hands work to one process only.
        """
        if self._role == "worker" and self._database.backend == "sqlite":
            raise InputError(
                "storage",
                "SQLite hands work to one process only: two would be given the same trial",
                "use postgresql://... for runs with several workers",
            )

        def operation(session: Session) -> None:
            self._require(session)
            row = session.get(WorkerRow, self.worker)
            if row is None:
                row = WorkerRow(id=self.worker, run_id=self._run, host=self._identity.host, pid=self._identity.pid)
                session.add(row)
            row.role = self._role
            row.engine = self._engine
            row.state = "alive"
            row.joined = row.heartbeat = cast(datetime, self._clock.now())

        self._write(operation)

    def leave(self) -> None:
        """Take leave: claims still held are given back and do not count, and the worker is known as gone."""

        def operation(session: Session) -> None:
            self._moves.release(session, TicketRow.worker == self.worker, "returned", "its worker left")
            self._workers_left(session, WorkerRow.id == self.worker)

        self._write(operation)
        with self._mutex:
            self._held.clear()
            self._uncertain = False

    def drive(self) -> None:
        """Take the exclusive right to record the run.

        Claims of a driver that is dead, on SQLite all claims, are open again at once and count against no site.

        Raises:
            InputError: Field ``RUN``: another live process has the right, or there is no such run.
        """
        had = self._right.held
        locked = self._right.lock()

        def operation(session: Session) -> None:
            before = self._right.take(session, locked=locked)
            everyone = self._database.backend == "sqlite"
            if everyone or before is not None:
                holders = TicketRow.worker != self.worker if everyone else TicketRow.worker == before
                left = WorkerRow.id != self.worker if everyone else WorkerRow.id == before
                self._moves.release(session, holders, "lost", "its driver died")
                self._workers_left(session, left)

        try:
            self._write(operation)
        except BaseException:
            if locked and not had:
                self._right.unlock()
            raise
        self._right.taken()

    def stop_driving(self) -> None:
        """Give the right to record the run back; does nothing where this process does not have it."""
        self._write(self._right.give_back)
        self._right.given_back()

    def forget_driver(self) -> None:
        """Remove what is left of the right to record a run that is finished."""
        self._right.forget()

    def plan(self, specs: Sequence[TicketSpec], *, part: bool = False) -> None:
        """Make the tickets, or find them made: done ones stay done, failed ones wait again, recorded winners to begin with stay.

        Args:
            specs: The sites, and what they wait for.
            part: Whether these are some of the run's sites only, none of which depends on others than these.

        Raises:
            InputError: Field ``RUN``: the plan differs from the one the run began with; or a site depends on one that is not
                planned before it.
        """
        check_order(specs)

        def operation(session: Session) -> None:
            self._require(session)
            rows = {row.site: row for row in session.scalars(select(TicketRow).where(TicketRow.run_id == self._run))}
            if part:
                wanted = {spec.site for spec in specs}
                rows = {site: row for site, row in rows.items() if site in wanted}
            if not rows:
                if specs:
                    session.execute(insert(TicketRow), [new_ticket(self._run, spec) for spec in specs])
                return
            if changed := difference(rows, specs):
                raise InputError("RUN", f"the sites of {self._run} changed: {changed}", _PLAN_REMEDY)
            for spec in specs:
                row = rows[spec.site]
                row.position = spec.position
                if row.state == "failed":
                    row.state, row.tries, row.reason, row.ended = "waiting", 0, "", None

        self._write(operation)
        self._dependants = None

    def claim(self, skip: Collection[str] = ()) -> Claim | None:
        """Take the first ticket that nobody works on and that waits for no other site.

        A lease that ran out, or whose holder is a process of this machine that is dead, counts as nobody's; the attempt is
        then lost. A site that lost as many attempts as are allowed is failed for good instead.

        Args:
            skip: Sites not to take.

        Returns:
            The claim; None where there is nothing to take at present.
        """
        with self._claiming:  # one at a time: what is not known must not be another thread's
            return self._claim(skip)

    def _claim(self, skip: Collection[str]) -> Claim | None:
        with self._mutex:
            known = dict(self._held)
        again = self._uncertain
        self._uncertain = True

        def operation(session: Session) -> Claim | None:
            nonlocal again
            found = self._moves.unknown(session, known) if again else None
            again = True  # from now on this is a repetition
            found = found or self._moves.take(session, skip)
            while found is None and self._moves.recover(session, skip):
                found = self._moves.take(session, skip)
            return found

        claim = self._write(operation)
        with self._mutex:
            self._uncertain = False
            if claim is not None:
                self._held[claim.site] = claim.attempt
        return claim

    def renew(self, *, patience: float = PATIENCE) -> None:
        """Report that this process lives: extend its claims and its right to record the run.

        What ran out but was not taken over is extended too.

        Args:
            patience: See ``Database.transact``.
        """

        def operation(session: Session) -> None:
            # In the order in which other transactions lock: tickets, workers, the run.
            mine = update(TicketRow).where(
                TicketRow.run_id == self._run, TicketRow.state == "running", TicketRow.worker == self.worker
            )
            session.execute(mine.values(lease_until=self._clock.after(self._lease)), execution_options=_UNSYNCED)
            known = update(WorkerRow).where(WorkerRow.id == self.worker, WorkerRow.state == "alive")
            session.execute(known.values(heartbeat=self._clock.now()), execution_options=_UNSYNCED)
            self._right.renew(session)

        self._write(operation, patience=patience)

    def give_back(self, claim: Claim, *, reason: str, counted: bool) -> None:
        """End a claim without a result; does nothing where the lease was taken over.

        Args:
            claim: A claim of this worker.
            reason: Why, one line.
            counted: Whether it counts against the site, as when its worker died; a site that used all its attempts up is
                then failed for good. False: it was interrupted.
        """

        def end(session: Session, row: TicketRow) -> None:
            if counted and row.tries >= self._allowed:
                self._moves.fail(session, row, exhausted(row.tries, reason), reason)
                return
            row.tries -= 0 if counted else 1
            row.state, row.lease_until, row.reason = "waiting", None, prose(reason)
            self._moves.end_attempt(session, row, "returned", reason)

        self._end(claim, end)

    def fail(self, claim: Claim, reason: str) -> None:
        """Fail a site for good, because its search itself failed; does nothing where the lease was taken over."""
        self._end(claim, lambda session, row: self._moves.fail(session, row, reason, reason))

    def complete(
        self,
        claim: Claim,
        site: SiteRecord,
        winner: SiteWinner,
        artifact: StoredArtifact,
    ) -> bool:
        """Accept a result: its record, its winner and where its tensors are, whole or not at all.

        Args:
            claim: The claim under which it was found.
            site: Record of the site.
            winner: What later runs may begin with; worker, attempt and run are filled in.
            artifact: Its tensors in the artifact store.

        Returns:
            Whether it was accepted. False: the lease is not this worker's any more, and nothing was written.
        """

        def operation(session: Session) -> bool:
            row = self._moves.locked(session, claim)
            if row is None or (row.worker, row.attempts) != (self.worker, claim.attempt):
                return False
            if row.state != "running":
                return row.state == "done"  # a repetition: the answer to the commit was lost
            now = cast(datetime, self._clock.now())
            store_site(session, self._run, site)
            session.add(_result_row(self._run, replace(winner, worker=self.worker, attempt=claim.attempt), now))
            _keep_artifact(session, self._run, artifact, now)
            row.state, row.lease_until, row.ended, row.reason = "done", None, now, ""
            self._moves.end_attempt(session, row, "done", "")
            session.flush()
            self._block(session, claim.site, -1)
            return True

        return self._write(operation)

    def reopen(self, site: str, reason: str) -> None:
        """Have a site that is done searched again, since the tensors of its result are gone or damaged. For the driver.

        Its trials stay in their study, so the new search finds the same without scoring them again. Sites that wait for it
        wait again; those that are done stay so. Nothing happens where the site is not done.

        Args:
            site: Its name.
            reason: What became of the result.
        """

        def operation(session: Session) -> None:
            query = select(TicketRow).where(TicketRow.run_id == self._run, TicketRow.site == site)
            row = session.scalars(query.with_for_update()).first()
            if row is None or row.state != "done":
                return
            result = delete(ResultRow).where(ResultRow.run_id == self._run, ResultRow.site == site)
            session.execute(result, execution_options=_UNSYNCED)
            kept = (
                StoredArtifactRow.run_id == self._run,
                StoredArtifactRow.kind == "result",
                StoredArtifactRow.name == site,
            )
            session.execute(delete(StoredArtifactRow).where(*kept), execution_options=_UNSYNCED)
            drop_site(session, self._run, site)
            ended = update(AttemptRow).where(AttemptRow.ticket_id == row.id, AttemptRow.number == row.attempts)
            session.execute(ended.values(state="lost", reason=prose(reason)), execution_options=_UNSYNCED)
            row.state, row.ended, row.reason, row.tries = "waiting", None, prose(reason), 0
            session.flush()
            self._block(session, site, +1)

        self._write(operation)

    def fence(self, claim: Claim) -> Callable[[Connection], None]:
        """A check to be made first in another transaction that writes under a claim.

        It locks the ticket until that transaction ends, so that nobody can take the claim over in between, and raises
        LeaseLostError unless the claim is this worker's.
        """
        query = (
            select(TicketRow.id)
            .where(
                TicketRow.run_id == self._run,
                TicketRow.site == claim.site,
                TicketRow.state == "running",
                TicketRow.worker == self.worker,
                TicketRow.attempts == claim.attempt,
            )
            .with_for_update()
        )

        def check(connection: Connection) -> None:
            if connection.execute(query).first() is None:
                raise LeaseLostError(f"attempt {claim.attempt} at {claim.site} of {self._run} was taken over")

        return check

    def driver_fence(self) -> Callable[[Connection], None]:
        """As ``fence``, for what only the driver writes: raises LeaseLostError unless this process still drives the run."""
        query = select(RunRow.id).where(RunRow.id == self._run, RunRow.driver == self.worker).with_for_update()

        def check(connection: Connection) -> None:
            if connection.execute(query).first() is None:
                raise LeaseLostError(f"run {self._run} was taken over by another driver")

        return check

    def while_driving(self, step: Callable[[], None]) -> None:
        """Take a step outside the database that only the driver may take, in one with the check that this process is it.

        The run's row is locked from the check to the end of the step, so that nobody becomes the driver in between; the step
        must be short. It is taken again where the answer of the database was lost, so it must be safe to take twice.

        Args:
            step: E.g. a rename.

        Raises:
            LeaseLostError: Another process drives the run by now. The step was not taken, unless an earlier repetition took it.
        """
        check = self.driver_fence()

        def operation(session: Session) -> None:
            check(session.connection())
            step()

        self._write(operation)

    def tickets(self) -> list[Ticket]:
        """All tickets, in order."""
        return self._database.transact(lambda session: read_tickets(session, self._run))

    def workers(self) -> list[WorkerRecord]:
        """All processes that joined, newest heartbeat first."""
        return self._database.transact(
            lambda session: read_workers(session, self._run, lease=self._lease, clock=self._clock)
        )

    def results(self) -> dict[str, SiteWinner]:
        """Accepted results by site."""
        return self._database.transact(lambda session: read_results(session, self._run))

    def done(self) -> frozenset[str]:
        """Sites that are done; cheap."""
        return self._database.transact(lambda session: read_done(session, self._run))

    def progress(self) -> RunProgress:
        """How far the run is, counted by the database."""
        return self._database.transact(
            lambda session: read_progress(session, self._run, lease=self._lease, clock=self._clock)
        )

    def _write(self, operation: Callable[[Session], T], *, patience: float = PATIENCE) -> T:
        def begun(session: Session) -> T:
            if self._database.backend == "sqlite":
                # SQLite's transactions begin with the first write: too late, what is decided on is read before.
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            elif self._database.backend == "mysql":
                # Its default locks every row that was looked at, and reads rows as they were when it began.
                session.connection(execution_options={"isolation_level": "READ COMMITTED"})
            return operation(session)

        return self._database.transact(begun, patience=patience)

    def _require(self, session: Session) -> None:
        if session.scalar(select(RunRow.id).where(RunRow.id == self._run)) is None:
            raise InputError("RUN", f"no run {self._run!r} in {self._database.masked}", "see alphasmith list")

    def _end(self, claim: Claim, end: Callable[[Session, TicketRow], None]) -> None:
        def operation(session: Session) -> None:
            row = self._moves.locked(session, claim)
            if row is not None and (row.state, row.worker, row.attempts) == ("running", self.worker, claim.attempt):
                end(session, row)

        self._write(operation)

    def _workers_left(self, session: Session, which: ColumnElement[bool]) -> None:
        left = update(WorkerRow).where(WorkerRow.run_id == self._run, which).values(state="left")
        session.execute(left, execution_options=_UNSYNCED)

    def _block(self, session: Session, site: str, by: int) -> None:
        """Count the sites that others wait for: one more or one less for those that wait for this one."""
        if self._dependants is None or site not in self._planned:
            # Read once: with 10,000 sites they are long. A plan grows at most, by sites together with all that wait for them.
            self._planned = frozenset(session.scalars(select(TicketRow.site).where(TicketRow.run_id == self._run)))
            self._dependants = dependants_of(session, self._run)
        waiting = self._dependants.get(site, ())
        if waiting:
            freed = update(TicketRow).where(TicketRow.run_id == self._run, TicketRow.site.in_(waiting))
            done = session.execute(freed.values(blocked=TicketRow.blocked + by), execution_options=_UNSYNCED)
            if cast("CursorResult[Any]", done).rowcount != len(waiting):
                raise StorageError(f"{self._database.masked}: tickets of {self._run} are missing")


def _result_row(run_id: str, winner: SiteWinner, accepted: datetime) -> ResultRow:
    return ResultRow(
        run_id=run_id,
        site=winner.site,
        attempt=winner.attempt,
        worker=winner.worker,
        digest=winner.digest,
        scheme=winner.scheme,
        winner=dict(winner.winner),
        loss=winner.loss,
        artifact_id=winner.artifact_id,
        sha256=winner.sha256,
        accepted=accepted,
    )


def _keep_artifact(session: Session, run_id: str, artifact: StoredArtifact, created: datetime) -> None:
    query = select(StoredArtifactRow).where(
        StoredArtifactRow.run_id == run_id,
        StoredArtifactRow.kind == artifact.kind,
        StoredArtifactRow.name == artifact.name,
    )
    row = session.scalars(query).first()
    if row is None:
        row = StoredArtifactRow(run_id=run_id, kind=artifact.kind, name=artifact.name)
        session.add(row)
    row.key, row.artifact_id, row.sha256, row.bytes = (
        artifact.key,
        artifact.artifact_id,
        artifact.sha256,
        artifact.bytes,
    )
    row.created = created
