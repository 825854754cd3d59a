"""State transitions of tickets under leases, each inside a transaction that its caller began."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import cast

from sqlalchemy import ColumnElement, Select, and_, or_, select, update
from sqlalchemy.orm import Session

from alphasmith.objectives.text import counted
from alphasmith.storage.database.tables import AttemptRow, TicketRow
from alphasmith.storage.queue._reads import ticket_of
from alphasmith.storage.queue.leases import Identity, LeaseClock, is_gone, named
from alphasmith.storage.queue.records import AttemptState, Claim, TicketState
from alphasmith.storage.runs.entries import prose

_UNSYNCED = {"synchronize_session": False}


class TicketTransitions:
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

    def take(self, session: Session, skip: Collection[str]) -> Claim | None:
        """Take the first waiting ticket that waits for no other site; None: there is none.

        One statement, except on MySQL, which has neither RETURNING nor a subquery on the table that is updated.
        """
        chosen = self._first(TicketRow.state == "waiting", TicketRow.tries < self._allowed, skip=skip)
        taken = update(TicketRow).values(
            state="running",
            worker=self._identity.worker,
            attempts=TicketRow.attempts + 1,
            tries=TicketRow.tries + 1,
            started=self._clock.now(),
            ended=None,
            lease_until=self._clock.after(self._lease),
            reason="",
        )
        options = {**_UNSYNCED, "populate_existing": True}
        if session.get_bind().dialect.name == "mysql":
            found = session.scalar(chosen)
            if found is None:
                return None
            session.execute(taken.where(TicketRow.id == found), execution_options=options)
            row = session.get(TicketRow, found, populate_existing=True)
        else:
            mine = taken.where(TicketRow.id == chosen.scalar_subquery(), TicketRow.state == "waiting")
            row = session.scalars(mine.returning(TicketRow), execution_options=options).first()
        return None if row is None else self._begun(session, row)

    def recover(self, session: Session, skip: Collection[str]) -> bool:
        """Let the first ticket whose holder is gone wait again, or fail one for good that used its attempts up.

        Returns:
            Whether there was one.
        """
        spent = and_(TicketRow.state == "waiting", TicketRow.tries >= self._allowed)
        run_out = TicketRow.lease_until < self._clock.now()
        dead = self._dead_or_late(session, run_out)
        if dead is not None:
            held = and_(TicketRow.state == "running", TicketRow.worker != self._identity.worker)
            spent = or_(spent, and_(held, or_(run_out, TicketRow.worker.in_(dead))))
        found = session.scalar(self._first(spent, skip=skip))
        if found is None:
            return False
        row = session.get_one(TicketRow, found, populate_existing=True)
        if row.state == "running":
            row.reason = f"{named(row.worker)} sent no heartbeat for longer than a lease"
            self.end_attempt(session, row, "lost", row.reason)
            row.state, row.lease_until = "waiting", None
        if row.tries >= self._allowed:
            self.fail(session, row, exhausted(row.tries, row.reason), None)
        session.flush()
        return True

    def _first(self, *which: ColumnElement[bool], skip: Collection[str]) -> Select[int]:
        """Key of the first such ticket that waits for no other site, locked; those that others are taking are passed over."""
        query = select(TicketRow.id).where(TicketRow.run_id == self._run, TicketRow.blocked == 0, *which)
        if skip:
            query = query.where(TicketRow.site.not_in(list(skip)))
        return query.order_by(TicketRow.position).limit(1).with_for_update(skip_locked=True)

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
        dead = {worker for worker, _ in rows if worker is not None and is_gone(worker, self._identity)}
        return sorted(dead) if dead or any(late for _, late in rows) else None

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
    """Why a site is given up."""
    last = f"; the last one: {reason}" if reason else ""
    return f"{counted(tries, 'attempt')} ended without a result{last}"
