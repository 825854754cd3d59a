"""Trainings of compressed models in SQL, beside the runs that made these."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, cast, get_args

from sqlalchemy import CursorResult, delete, insert, select, update
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import parse_json
from alphasmith.objectives.text import listed
from alphasmith.storage.database.connection import Database, DuplicateError, StorageError
from alphasmith.storage.database.tables import RunRow, TrainingRow
from alphasmith.storage.files.durable import canonical_json
from alphasmith.storage.runs.entries import prose
from alphasmith.storage.runs.records import check_json, utc

TrainingStatus = Literal["running", "finished", "failed", "interrupted"]

_ID_TRIES = 5
_SEE = "see alphasmith list"
_ID = re.compile(r"t-\d{8}-[0-9a-f]{6}")
#: The beginning of an id that tells a training from a run.
_LIKE_AN_ID = re.compile(r"t-\d{1,8}(-[0-9a-f]{0,6})?")


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What is known of a training before it starts.

    Attributes:
        parent: Id of the run whose compressed model is trained, as its folder says.
        parent_digest: sha256 of that folder's manifest.
        config: Settings, data and places, JSON-able.
        config_digest: sha256 over the part of them that decides the result.
        data_digest: sha256 over the samples and which of them are used.
        folder: Where the result goes, absolute; ``{id}`` in it stands for the id of the training.
    """

    parent: str
    parent_digest: str
    config: Mapping[str, Any]
    config_digest: str
    data_digest: str
    folder: str

    def __post_init__(self) -> None:
        check_json("training", dict(self.config))


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(TrainingSpec):
    """A training as stored.

    Attributes:
        id: Short and unique, e.g. ``t-20260131-1f9c3a``.
        run_id: The run, where it is in the same database; None otherwise.
        status: See the states in ``tables``.
        reason: Why it failed or was interrupted; empty otherwise.
        created: When the record was made, zone-aware UTC.
        finished: When it finished, failed or was interrupted.
        entry: The section ``training`` of its manifest; None until it has finished.
    """

    id: str
    run_id: str | None
    status: TrainingStatus
    reason: str
    created: datetime
    finished: datetime | None
    entry: Mapping[str, Any] | None


_SPEC = tuple(item.name for item in fields(TrainingSpec))


def is_training_id(text: str) -> bool:
    """Whether a text is the id of a training, or the beginning of one, and of no run."""
    return _LIKE_AN_ID.fullmatch(text) is not None


def owner_of_study(name: str) -> str | None:
    """The training that a study belongs to by its name; None: it is of no training."""
    owner, slash, _ = name.partition("/")
    return owner if slash and _ID.fullmatch(owner) else None


class TrainingStore:
    """Reads and writes the records of trainings; every method is one transaction, as of ``RunStore``.

    Args:
        database: An initialised database.
        clock: Returns the current time with its zone.
        token: Returns the random end of a new id.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        token: Callable[[], str] = lambda: secrets.token_hex(3),
    ) -> None:
        self._database = database
        self._clock = clock
        self._token = token

    def create(self, spec: TrainingSpec) -> TrainingRecord:
        """Store a new training as running, under an id of date and random end.

        Raises:
            StorageError: No free id was found.
        """
        now = utc(self._clock())
        for _ in range(_ID_TRIES):
            made = self._insert(f"t-{now:%Y%m%d}-{self._token()}", now, spec)
            if made is not None:
                return made
        raise StorageError(f"{self._database.masked}: no free training id after {_ID_TRIES} tries")

    def find_unfinished(self, config_digest: str, parent_digest: str, data_digest: str) -> list[TrainingRecord]:
        """Trainings that are not finished and would find the same as one with these digests, newest first."""
        same = (
            TrainingRow.status != "finished",
            TrainingRow.config_digest == config_digest,
            TrainingRow.parent_digest == parent_digest,
            TrainingRow.data_digest == data_digest,
        )
        return self._database.transact(lambda session: _read(session, *same))

    def start(self, training_id: str) -> TrainingRecord:
        """Mark it as running again.

        Raises:
            InputError: No such training, or it is finished.
        """
        return self._move(training_id, "running", reason="", finished=None)

    def finish(self, training_id: str, entry: Mapping[str, Any]) -> TrainingRecord:
        """Mark it as finished; said twice, the first word counts.

        Args:
            training_id: The training.
            entry: The section ``training`` of its manifest.

        Raises:
            InputError: No such training.
            NonFiniteError: The entry holds NaN or infinity.
        """
        text = canonical_json(dict(entry), indent=None)
        return self._move(training_id, "finished", entry=text, reason="", finished=utc(self._clock()))

    def fail(self, training_id: str, reason: str) -> TrainingRecord:
        """Mark it as failed; it can be started again.

        Raises:
            InputError: No such training, or it is finished.
        """
        return self._move(training_id, "failed", reason=prose(reason), finished=utc(self._clock()))

    def interrupt(self, training_id: str, reason: str) -> TrainingRecord:
        """Mark it as interrupted: it can be resumed where it stood.

        Raises:
            InputError: No such training, or it is finished.
        """
        return self._move(training_id, "interrupted", reason=prose(reason), finished=utc(self._clock()))

    def delete(self, training_id: str) -> None:
        """Remove the record; one that is gone already is none too many."""

        def operation(session: Session) -> None:
            session.execute(delete(TrainingRow).where(TrainingRow.id == training_id))

        self._database.transact(operation)

    def get(self, prefix: str) -> TrainingRecord:
        """The training whose id is, or alone begins with, ``prefix``.

        Raises:
            InputError: None or several match.
        """

        def operation(session: Session) -> TrainingRecord:
            found = _read(session, TrainingRow.id.startswith(prefix, autoescape=True))
            found = [record for record in found if record.id.startswith(prefix)]
            exact = [record for record in found if record.id == prefix]
            if not found:
                raise InputError("RUN", f"no training {prefix!r} in {self._database.masked}", _SEE)
            if len(found) > 1 and not exact:
                ids = listed(sorted(record.id for record in found), 3)
                raise InputError("RUN", f"{prefix!r} fits {len(found)} trainings ({ids})", "give more of the id")
            return (exact or found)[0]

        return self._database.transact(operation)

    def listing(self, run_id: str | None = None) -> list[TrainingRecord]:
        """Trainings that can be read, newest first.

        Args:
            run_id: Only those of this run; None: all.
        """
        of_run = () if run_id is None else (TrainingRow.run_id == run_id,)
        return self._database.transact(lambda session: _read(session, *of_run, strict=False))

    def _insert(self, training_id: str, now: datetime, spec: TrainingSpec) -> TrainingRecord | None:
        """The record; None where another one has this id."""
        tried = False

        def operation(session: Session) -> TrainingRecord | None:
            nonlocal tried
            found = session.get(TrainingRow, training_id)
            if found is None:
                known = session.scalar(select(RunRow.id).where(RunRow.id == spec.parent))
                values = {name: getattr(spec, name) for name in _SPEC}
                values |= {
                    "id": training_id,
                    "run_id": known,
                    "folder": spec.folder.replace("{id}", training_id),
                    "config": dict(spec.config),
                    "status": "running",
                    "reason": "",
                    "created": now,
                }
                tried = True
                session.execute(insert(TrainingRow).values(**values))
            elif not tried or found.created != now:
                return None
            (record,) = _read(session, TrainingRow.id == training_id)
            return record

        try:
            return self._database.transact(operation)
        except DuplicateError:
            return None

    def _move(self, training_id: str, to: TrainingStatus, **values: object) -> TrainingRecord:
        rows = update(TrainingRow).where(TrainingRow.id == training_id, TrainingRow.status != "finished")

        def operation(session: Session) -> TrainingRecord:
            moved = cast("CursorResult[Any]", session.execute(rows.values(status=to, **values))).rowcount
            found = _read(session, TrainingRow.id == training_id)
            if not found:
                raise InputError("RUN", f"no training {training_id!r} in {self._database.masked}", _SEE)
            if not moved and found[0].status != to:
                told = f"{training_id} is {found[0].status} and cannot become {to}"
                raise InputError("RUN", told, f"its result is in {found[0].folder}")
            return found[0]

        return self._database.transact(operation)


def _read(session: Session, *where: Any, strict: bool = True) -> list[TrainingRecord]:
    """The trainings for which all conditions hold, newest first; unless ``strict``, without rows that hold none."""
    order = (TrainingRow.created.desc(), TrainingRow.id.desc())
    found = []
    for row in session.scalars(select(TrainingRow).where(*where).order_by(*order)):
        try:
            found.append(_record(row))
        except InputError:
            if strict:
                raise
    return found


def _record(row: TrainingRow) -> TrainingRecord:
    remedy = "restore a backup"
    if row.status not in get_args(TrainingStatus) or not isinstance(row.config, dict):
        raise InputError("RUN", f"{row.id} cannot be read: it holds no training", remedy)
    what = f"the result of {row.id}"
    entry = None if row.entry is None else parse_json(row.entry, field="RUN", what=what, remedy=remedy)
    values = {item.name: getattr(row, item.name) for item in fields(TrainingRecord)}
    return TrainingRecord(**{**values, "entry": entry})
