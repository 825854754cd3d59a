"""Runs and their sites in SQL, and the trials that Optuna's tables hold of them: one contract, any backend."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, CursorResult, delete, insert, select, update
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import listed
from alphasmith.storage.database.connection import Database, DuplicateError, StorageError
from alphasmith.storage.database.tables import RunRow, SiteRow
from alphasmith.storage.runs._run_rows import read_run, read_runs, record_of
from alphasmith.storage.runs._trials import count_trials, read_trials
from alphasmith.storage.runs.entries import Group, SiteRecord, prose
from alphasmith.storage.runs.records import (
    RunRecord,
    RunSpec,
    RunStatus,
    TrialRecord,
    TrialState,
    UnreadableRun,
    check_json,
    check_label,
    utc,
)

_SPEC = tuple(item.name for item in fields(RunSpec))
_GROUPS = TypeAdapter(tuple[Group, ...])
# Rows that a session has loaded are not looked at one by one.
_UNSYNCED = {"synchronize_session": False}
_ID_TRIES = 5
_SEE = "see alphasmith list"
_RESTORE = "restore a backup"
_REMEDIES: dict[RunStatus, str] = {
    "running": "launch a new run",
    "finished": "start or resume it first",
    "failed": "a finished run keeps its result",
    "interrupted": "a finished run keeps its result",
}
#: States from which a run can go on.
_OPEN: tuple[RunStatus, ...] = ("created", "running", "failed", "interrupted")


def _now() -> datetime:
    return datetime.now(UTC)


def _token() -> str:
    return secrets.token_hex(3)


class RunStore:
    """Reads and writes the records of runs.

    Every method is one transaction: what it stores is stored whole or not at all, and what it returns is a snapshot that
    never changes. A transaction that the database lost is repeated, see ``Database.transact``; none stores anything twice.
    One store may be used from many threads; every process opens its own database. Writers in several processes are
    serialised by the database. On SQLite a writer waits up to 60 s for another.

    Methods that take ``run_id`` need the full id; ``get`` resolves a prefix.

    Every method may raise StorageError when the database refuses or loses the operation; nothing was written then.

    Args:
        database: An initialised database.
        clock: Returns the current time with its zone.
        token: Returns the random end of a new id.
    """

    def __init__(
        self, database: Database, *, clock: Callable[[], datetime] = _now, token: Callable[[], str] = _token
    ) -> None:
        self._database = database
        self._clock = clock
        self._token = token

    def create(self, spec: RunSpec) -> RunRecord:
        """Store a new run in state ``created`` under an id of date and random end.

        Raises:
            InputError: The clock gives a time without zone, or the name holds control characters.
            StorageError: No free id was found.
        """
        check_label("run.name", spec.name)
        now = utc(self._clock())
        for _ in range(_ID_TRIES):
            run_id = f"r-{now:%Y%m%d}-{self._token()}"
            values = {
                "id": run_id,
                "status": "created",
                "reason": "",
                "folder": "",
                "created": now,
                **{name: getattr(spec, name) for name in _SPEC},
            }
            try:
                made = self._database.transact(_Insertion(values))
            except DuplicateError:
                continue
            if made:
                return self._record(run_id)
        raise StorageError(f"{self._database.masked}: no free run id after {_ID_TRIES} tries")

    def place(self, run_id: str, folder: str) -> RunRecord:
        """Say where the output of a run will be.

        Args:
            run_id: The run.
            folder: Absolute path; nothing needs to be there.

        Raises:
            InputError: No such run.
        """

        return self._set(run_id, folder=folder)

    def keep_in(self, run_id: str, artifacts: str) -> RunRecord:
        """Say where the objects of a run are from now on.

        Args:
            run_id: The run.
            artifacts: Address of the store, absolute. What the run still needs must be there.

        Raises:
            InputError: No such run.
        """

        return self._set(run_id, artifacts=artifacts)

    def start(self, run_id: str) -> RunRecord:
        """Mark a run as running, for the first time or again after a failure, an interruption or a kill.

        Raises:
            InputError: No such run, or it is finished.
        """
        return self._move(run_id, "running", _OPEN, reason="", started=utc(self._clock()), finished=None)

    def conclude(
        self, run_id: str, *, space_hash: str, folder: str, refinement: Mapping[str, Any] | None = None
    ) -> RunRecord:
        """Add what only the end of a search knows.

        Args:
            run_id: A running run.
            space_hash: Digest of the search spaces of its studies.
            folder: Output folder, absolute.
            refinement: What the refinement at the model's output did, JSON-able; None: there was none.

        Raises:
            InputError: No such run, or it is not running.
            NonFiniteError: The refinement holds NaN or infinity.
        """
        told = None if refinement is None else dict(refinement)
        check_json("run.refinement", told)
        return self._move(run_id, "running", ("running",), space_hash=space_hash, folder=folder, refinement=told)

    def finish(self, run_id: str, *, driver: str | None = None) -> RunRecord:
        """Mark a running run as finished; nobody drives it any more.

        Args:
            run_id: The run.
            driver: Only if this process drives it; None: whoever does.

        Raises:
            InputError: No such run, it is not running, or another process drives it.
        """
        nobody = {"driver": None, "driver_until": None}
        ours = None if driver is None else RunRow.driver == driver
        return self._move(run_id, "finished", ("running",), ours, finished=utc(self._clock()), **nobody)

    def fail(self, run_id: str, reason: str) -> RunRecord:
        """Mark a run as failed. It can be started again.

        Raises:
            InputError: No such run, it is finished, or the reason is empty.
        """
        if not reason.strip():
            raise InputError("reason", "is empty", "say why the run failed")
        return self._move(run_id, "failed", _OPEN, reason=prose(reason), finished=utc(self._clock()))

    def interrupt(self, run_id: str, reason: str) -> RunRecord:
        """Mark a run as interrupted: it was asked to stop and can be resumed where it stood.

        Raises:
            InputError: No such run, it is finished, or the reason is empty.
        """
        if not reason.strip():
            raise InputError("reason", "is empty", "say why the run was interrupted")
        return self._move(run_id, "interrupted", _OPEN, reason=prose(reason), finished=utc(self._clock()))

    def find_unfinished(self, config_digest: str, model_digest: str, data_digest: str) -> list[RunRecord]:
        """Runs that are not finished and would find the same as one with these digests, newest first.

        Args:
            config_digest: See ``RunSpec``.
            model_digest: See ``RunSpec``.
            data_digest: See ``RunSpec``.
        """

        same = (
            RunRow.status != "finished",
            RunRow.config_digest == config_digest,
            RunRow.model_digest == model_digest,
            RunRow.data_digest == data_digest,
        )
        return _readable(self._database.transact(lambda session: read_runs(session, *same)))

    def runs(self) -> list[RunRecord]:
        """All runs that can be read, newest first."""
        return _readable(self.listing())

    def listing(self) -> list[RunRecord | UnreadableRun]:
        """All runs, newest first; where a row holds no record, that in its place."""
        return self._database.transact(read_runs)

    def get(self, prefix: str) -> RunRecord:
        """The run whose id is, or alone begins with, ``prefix``; else the newest one of that name.

        Raises:
            InputError: No run or several runs match.
        """
        if not prefix:
            raise InputError("RUN", "is empty", _SEE)

        def operation(session: Session) -> RunRecord:
            query = select(RunRow.id).where(RunRow.id.startswith(prefix, autoescape=True)).order_by(RunRow.id)
            # SQLite's LIKE ignores case; ids do not.
            found = [run_id for run_id in session.scalars(query) if run_id.startswith(prefix)]
            exact = [run_id for run_id in found if run_id == prefix]
            if not found:
                named = select(RunRow.id).where(RunRow.name == prefix).order_by(RunRow.created.desc(), RunRow.id.desc())
                found = list(session.scalars(named.limit(1)))
            if not found:
                raise InputError("RUN", f"no run {prefix!r} in {self._database.masked}", _SEE)
            if len(found) > 1 and not exact:
                ids = listed(found, 3)
                raise InputError("RUN", f"{prefix!r} fits {len(found)} runs ({ids})", "give more of the id")
            return read_run(session, (exact or found)[0])

        return self._database.transact(operation)

    def delete(self, run_id: str) -> None:
        """Delete a run with everything of ours under it. Its Optuna studies and objects are for ``upkeep.delete``.

        Raises:
            InputError: No such run.
        """
        tried = False

        def operation(session: Session) -> None:
            nonlocal tried
            deleted = cast("CursorResult[Any]", session.execute(delete(RunRow).where(RunRow.id == run_id))).rowcount
            if not deleted and not tried:
                self._require(session, run_id)
            tried = True  # a repetition: only the answer was lost

        self._database.transact(operation)

    def add_site(self, run_id: str, site: SiteRecord) -> None:
        """Store a site.

        A site of the same name is replaced, so that a step repeated after a crash stores the same thing once.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> None:
            self._require(session, run_id)
            store_site(session, run_id, site)

        self._database.transact(operation)

    def set_groups(self, run_id: str, groups: Sequence[Group]) -> None:
        """Store the groups of the whole model (scope ``model``), replacing earlier ones.

        Raises:
            InputError: No such run.
        """
        self._set(run_id, model_groups=_GROUPS.dump_json(tuple(groups)).decode())

    def sites(self, run_id: str) -> list[SiteRecord]:
        """The sites of a run with their groups, in forward order.

        Raises:
            InputError: No such run, or one of its sites cannot be read.
        """

        def operation(session: Session) -> list[SiteRecord]:
            self._require(session, run_id)
            query = select(SiteRow.entry).where(SiteRow.run_id == run_id).order_by(SiteRow.position, SiteRow.id)
            with _recorded(run_id, "sites"):
                return [SiteRecord.model_validate_json(entry) for entry in session.scalars(query)]

        return self._database.transact(operation)

    def groups(self, run_id: str) -> list[Group]:
        """The groups of the whole model (scope ``model``), in order.

        Raises:
            InputError: No such run, or they cannot be read.
        """
        text = self._database.transact(lambda session: self._require(session, run_id).model_groups)
        with _recorded(run_id, "groups"):
            return [] if text is None else list(_GROUPS.validate_json(text))

    def trials(self, run_id: str, *, study_name: str | None = None) -> list[TrialRecord]:
        """The ended trials of a run by study and number, from Optuna's tables.

        Args:
            run_id: The run.
            study_name: Only those of one study.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> list[TrialRecord]:
            self._require(session, run_id)
            return read_trials(session, run_id, study_name=study_name)

        return self._database.transact(operation)

    def trial_counts(self, run_id: str) -> dict[TrialState, int]:
        """Number of ended trials by state, counted by the database; states without trials are left out. An unknown run has none."""
        return self._database.transact(lambda session: count_trials(session, run_id))

    def _record(self, run_id: str) -> RunRecord:
        return self._database.transact(lambda session: record_of(self._require(session, run_id)))

    def _require(self, session: Session, run_id: str) -> RunRow:
        row = session.get(RunRow, run_id)
        if row is None:
            raise InputError("RUN", f"no run {run_id!r} in {self._database.masked}", _SEE)
        return row

    def _set(self, run_id: str, **values: object) -> RunRecord:
        def operation(session: Session) -> RunRecord:
            row = self._require(session, run_id)
            for name, value in values.items():
                setattr(row, name, value)
            return record_of(row)

        return self._database.transact(operation)

    def _move(
        self,
        run_id: str,
        to: RunStatus,
        allowed: tuple[RunStatus, ...],
        condition: ColumnElement[bool] | None = None,
        **values: object,
    ) -> RunRecord:
        # One conditional statement: of two processes that finish a run, one wins and the other is told.
        statement = update(RunRow).where(RunRow.id == run_id, RunRow.status.in_(allowed)).values(status=to, **values)
        if condition is not None:
            statement = statement.where(condition)

        def operation(session: Session) -> RunRecord:
            moved = cast("CursorResult[Any]", session.execute(statement)).rowcount
            row = self._require(session, run_id)
            # A repetition finds its own values, down to the microsecond of its clock.
            ours = row.status == to and all(getattr(row, name) == value for name, value in values.items())
            if not moved and not ours:
                raise InputError("RUN", f"{run_id} is {row.status} and cannot become {to}", _REMEDIES[to])
            return record_of(row)

        return self._database.transact(operation)


def store_site(session: Session, run_id: str, site: SiteRecord) -> None:
    """Store a site in a transaction; one of the same name is replaced."""
    drop_site(session, run_id, site.name)
    session.add(SiteRow(run_id=run_id, name=site.name, position=site.position, entry=site.model_dump_json()))
    session.flush()


def drop_site(session: Session, run_id: str, name: str) -> None:
    """Remove a site in a transaction, if it is there; its study stays."""
    session.execute(delete(SiteRow).where(SiteRow.run_id == run_id, SiteRow.name == name), execution_options=_UNSYNCED)


@contextmanager
def _recorded(run_id: str, what: str) -> Iterator[None]:
    """One line about JSON that some other program, or a damaged file, put in the place of ours."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise InputError("RUN", f"{what} of {run_id} cannot be read ({first['msg'].lower()})", _RESTORE) from error


def _readable(found: Sequence[RunRecord | UnreadableRun]) -> list[RunRecord]:
    return [run for run in found if isinstance(run, RunRecord)]


class _Insertion:
    """Inserts a run, unless its id is taken by another; the same insertion may be made again."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._tried = False

    def __call__(self, session: Session) -> bool:
        found = session.get(RunRow, self._values["id"])
        if found is not None:
            return self._tried and found.created == self._values["created"]
        self._tried = True
        session.execute(insert(RunRow).values(**self._values))
        return True
