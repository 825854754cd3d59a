"""Moves of tickets under leases, each inside a transaction that its caller began."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import cast

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from alphasmith.storage.board_reads import ticket_of
from alphasmith.storage.leases import Identity, LeaseClock, named
from alphasmith.storage.record_types import prose
from alphasmith.storage.tables import AttemptRow, TicketRow
from alphasmith.storage.work_records import AttemptState, Claim, TicketState

_UNSYNCED = {"synchronize_session": False}


class TicketMoves:
    """How the tickets of one run move from state to state.

    Args:
        run_id: The run.
        identity: Of the worker on whose behalf they are moved.
        lease: Seconds.
        allowed: Attempts that may speak against a site.
        clock: By which leases end.
    """

    def __init__(self, run_id: str, *, identity: Identity, lease: float, allowed: int, clock: LeaseClock) -> None:
        self._run = run_id
        self._identity = identity
        self._lease = lease
        self._allowed = allowed
        self._clock = clock

    def take_waiting(self, session: Session, skip: Collection[str]) -> Claim | None:
        """Pick and take the first waiting ticket in one statement; None: there is none, or the database cannot.

        MySQL has neither RETURNING nor a subquery on the table that is updated; there ``first`` and ``take`` do it.
        """
        if session.get_bind().dialect.name == "mysql":
            return None
        free = (TicketRow.run_id == self._run, TicketRow.state == "waiting", TicketRow.blocked == 0)
        query = select(TicketRow.id).where(*free, TicketRow.tries < self._allowed)
        if skip:
            query = query.where(TicketRow.site.not_in(list(skip)))
        chosen = query.order_by(TicketRow.position).limit(1).with_for_update(skip_locked=True).scalar_subquery()
        now = self._clock.now()
        statement = (
            update(TicketRow)
            .where(TicketRow.id == chosen, TicketRow.state == "waiting")
            .values(
                state="running",
                worker=self._identity.worker,
                attempts=TicketRow.attempts + 1,
                tries=TicketRow.tries + 1,
                started=now,
                ended=None,
                lease_until=self._clock.after(self._lease),
                reason="",
            )
            .returning(TicketRow)
        )
        row = session.scalars(statement, execution_options={**_UNSYNCED, "populate_existing": True}).first()
        return None if row is None else self._begun(session, row)

    def first(self, session: Session, skip: Collection[str]) -> TicketRow | None:
        """The first ticket that may be taken, locked; tickets that others are taking are passed over."""
        free: ColumnElement[bool] = TicketRow.state == "waiting"
        run_out = TicketRow.lease_until < self._clock.now()
        dead = self._dead_or_late(session, run_out)
        if dead is not None:
            free = or_(
                free,
                and_(
                    TicketRow.state == "running",
                    TicketRow.worker != self._identity.worker,
                    or_(run_out, TicketRow.worker.in_(dead)),
                ),
            )
        query = select(TicketRow).where(TicketRow.run_id == self._run, free, TicketRow.blocked == 0)
        if skip:
            query = query.where(TicketRow.site.not_in(list(skip)))
        query = query.order_by(TicketRow.position).limit(1).with_for_update(skip_locked=True)
        return session.scalars(query.execution_options(populate_existing=True)).first()

    def _dead_or_late(self, session: Session, run_out: ColumnElement[bool]) -> list[str] | None:
        """Holders on this machine that are dead; None where there is no claim to take over, the usual case."""
        near = TicketRow.worker.startswith(f"{self._identity.host}/", autoescape=True)
        query = select(TicketRow.worker, run_out).where(
            TicketRow.run_id == self._run,
            TicketRow.state == "running",
            TicketRow.worker != self._identity.worker,
            or_(run_out, near),
        )
        rows = session.execute(query).all()
        dead = {worker for worker, _ in rows if worker is not None and self._is_dead(worker)}
        return sorted(dead) if dead or any(late for _, late in rows) else None

    def _is_dead(self, worker: str) -> bool:
        identity = Identity.of(worker)
        return identity is not None and identity.is_dead(self._identity)

    def take(self, session: Session, row: TicketRow) -> Claim | None:
        """Take a locked ticket; None: it is failed for good instead."""
        if row.state == "running":
            row.reason = f"{named(row.worker)} was not heard of any more"
            self.end_attempt(session, row, "lost", row.reason)
        if row.tries >= self._allowed:
            self.fail(session, row, exhausted(row.tries, row.reason), None)
            session.flush()
            return None
        now = cast(datetime, self._clock.now())
        row.state, row.worker, row.reason, row.ended = "running", self._identity.worker, "", None
        row.attempts += 1
        row.tries += 1
        row.started = now
        row.lease_until = cast(datetime, self._clock.after(self._lease))
        session.flush()
        session.refresh(row)
        return self._begun(session, row)

    def _begun(self, session: Session, row: TicketRow) -> Claim:
        """Note the attempt at a ticket that was taken."""
        attempt = {"run_id": self._run, "ticket_id": row.id, "number": row.attempts, "worker": self._identity.worker}
        session.add(AttemptRow(**attempt, state="running", started=row.started, reason=""))
        session.flush()
        return Claim(ticket=ticket_of(row), attempt=row.attempts)

    def unknown(self, session: Session, known: Mapping[str, int]) -> Claim | None:
        """A claim that was committed though its answer was lost."""
        query = select(TicketRow).where(
            TicketRow.run_id == self._run, TicketRow.state == "running", TicketRow.worker == self._identity.worker
        )
        for row in session.scalars(query.order_by(TicketRow.position).with_for_update()):
            if known.get(row.site) != row.attempts:
                return Claim(ticket=ticket_of(row), attempt=row.attempts)
        return None

    def locked(self, session: Session, claim: Claim) -> TicketRow | None:
        """The ticket of a claim, locked, whoever holds it now."""
        query = select(TicketRow).where(TicketRow.run_id == self._run, TicketRow.site == claim.site)
        return session.scalars(query.with_for_update()).first()

    def fail(self, session: Session, row: TicketRow, reason: str, attempt: str | None) -> None:
        """Fail a locked ticket for good; ``attempt`` is why its attempt failed, None where that has ended already."""
        row.state, row.lease_until, row.reason = "failed", None, prose(reason)
        row.ended = cast(datetime, self._clock.now())
        if attempt is not None:
            self.end_attempt(session, row, "failed", attempt)

    def end_attempt(self, session: Session, row: TicketRow, state: AttemptState, reason: str) -> None:
        """Note how the running attempt at a locked ticket ended."""
        statement = update(AttemptRow).where(
            AttemptRow.ticket_id == row.id, AttemptRow.number == row.attempts, AttemptRow.state == "running"
        )
        session.execute(
            statement.values(state=state, ended=self._clock.now(), reason=prose(reason)), execution_options=_UNSYNCED
        )

    def release(self, session: Session, holders: ColumnElement[bool], state: AttemptState, reason: str) -> None:
        """Open the claims of some workers again; they count against no site."""
        query = select(TicketRow).where(TicketRow.run_id == self._run, TicketRow.state == "running", holders)
        waiting: TicketState = "waiting"
        for row in session.scalars(query.order_by(TicketRow.id).with_for_update()).all():
            self.end_attempt(session, row, state, reason)
            row.state, row.lease_until, row.reason = waiting, None, reason
            row.tries = max(0, row.tries - 1)


def exhausted(tries: int, reason: str) -> str:
    """Why a site is given up, in words."""
    last = f"; the last one: {reason}" if reason else ""
    return f"{tries} {'attempt' if tries == 1 else 'attempts'} ended without a result{last}"
