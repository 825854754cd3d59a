"""Joint compressions in SQL: each is an Optuna study that says itself what it is of, where its result goes and how far it is."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import listed
from alphasmith.storage.database.connection import Database, StorageError, optuna_storage
from alphasmith.storage.database.optuna_private import STUDIES
from alphasmith.storage.runs.records import check_json, utc
from alphasmith.storage.runs.trainings import TrainingStatus

if TYPE_CHECKING:
    from optuna.study import Study

_ID_TRIES = 5
#: Of compressions whose configuration says nothing of it [s].
_LEASE = 60.0
#: What the study of a compression is called after its id.
_NAME = "compression"
_STUDY = re.compile(r"(c-\d{8}-[0-9a-f]{6})/" + _NAME)
#: The beginning of an id that tells a compression from a run.
_LIKE_AN_ID = re.compile(r"c-\d{1,8}(-[0-9a-f]{0,6})?")
#: Attribute of the study that holds the record.
_RECORD = "alphasmith"


@dataclass(frozen=True, kw_only=True)
class CompressionSpec:
    """What is known of a compression before it starts.

    Attributes:
        config: What is asked for, JSON-able.
        config_digest: sha256 over the part of it that decides the result.
        model_digest: sha256 over the model and its task.
        folder: Where the result goes, absolute; ``{id}`` in it stands for the id.
        directions: Optuna's, one for each objective.
        scripted: Whether model and task were given by a script, so that only a script can give them again.
    """

    config: Mapping[str, Any]
    config_digest: str
    model_digest: str
    folder: str
    directions: tuple[Literal["minimize", "maximize"], ...]
    scripted: bool = False

    def __post_init__(self) -> None:
        check_json("compression", dict(self.config))


@dataclass(frozen=True, kw_only=True)
class CompressionRecord(CompressionSpec):
    """A compression as stored.

    Attributes:
        id: Short and unique, e.g. ``c-20260131-1f9c3a``.
        status: How far it is.
        reason: Why it failed or was interrupted; empty otherwise.
        created: When it was begun, zone-aware UTC.
        finished: When it finished, failed or was interrupted.
    """

    id: str
    status: TrainingStatus
    reason: str
    created: datetime
    finished: datetime | None

    @property
    def study(self) -> str:
        """Name of its Optuna study."""
        return f"{self.id}/{_NAME}"

    @property
    def lease(self) -> float:
        """Seconds after which a worker without a heartbeat counts as dead."""
        workers = self.config.get("workers")
        return float(workers["lease"]) if isinstance(workers, Mapping) and "lease" in workers else _LEASE


def is_compression_id(text: str) -> bool:
    """Whether a text is the id of a compression, or the beginning of one, and of no run.

    Args:
        text: What somebody typed.
    """
    return _LIKE_AN_ID.fullmatch(text) is not None


class CompressionStore:
    """Reads and writes the records of compressions.

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

    def create(self, spec: CompressionSpec) -> CompressionRecord:
        """Store a new compression as running, with its empty study, under an id of date and random end.

        Args:
            spec: What it is.

        Raises:
            StorageError: No free id was found.
        """
        import optuna

        now = utc(self._clock())
        for _ in range(_ID_TRIES):
            new = f"c-{now:%Y%m%d}-{self._token()}"
            record = CompressionRecord(
                **{**asdict(spec), "folder": spec.folder.replace("{id}", new)},
                id=new,
                status="running",
                reason="",
                created=now,
                finished=None,
            )
            try:
                study = optuna.create_study(
                    study_name=record.study, storage=optuna_storage(self._database), directions=list(spec.directions)
                )
            except optuna.exceptions.DuplicatedStudyError:
                continue
            study.set_user_attr(_RECORD, _values(record))
            return record
        raise StorageError(f"{self._database.masked}: no free compression id after {_ID_TRIES} tries")

    def find_unfinished(self, config_digest: str, model_digest: str) -> list[CompressionRecord]:
        """Compressions that are not finished and would find the same as one with these digests, newest first.

        Args:
            config_digest: Of what is asked for.
            model_digest: Of model and task.
        """
        return [
            record
            for record in self.listing()
            if (record.config_digest, record.model_digest) == (config_digest, model_digest)
            and record.status != "finished"
        ]

    def get(self, prefix: str) -> CompressionRecord:
        """The compression whose id is, or alone begins with, ``prefix``.

        Args:
            prefix: What somebody typed.

        Raises:
            InputError: None or several match, or the record cannot be read.
        """
        found = [name for name in self._names() if name.startswith(prefix)]
        exact = [name for name in found if name == prefix]
        if not found:
            raise InputError("ID", f"no compression {prefix!r} in {self._database.masked}", "see alphasmith list")
        if len(found) > 1 and not exact:
            raise InputError(
                "ID", f"{prefix!r} fits {len(found)} compressions ({listed(found, 3)})", "give more of the id"
            )
        return self._read((exact or found)[0])

    def listing(self) -> list[CompressionRecord]:
        """Compressions that can be read, newest first."""
        records = []
        for name in self._names():
            try:
                records.append(self._read(name))
            except InputError:  # one of two moments: before its record was written, or after it was damaged
                continue
        return sorted(records, key=lambda record: (record.created, record.id), reverse=True)

    def move(
        self,
        record: CompressionRecord,
        to: TrainingStatus,
        *,
        reason: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> CompressionRecord:
        """Store how far it is.

        Args:
            record: The compression.
            to: Its status from now on.
            reason: Why, where it failed or was interrupted.
            config: What is asked for now, where that changed; None: as before.
        """
        finished = None if to == "running" else utc(self._clock())
        moved = replace(record, status=to, reason=reason, finished=finished, config=config or record.config)
        self.study(record).set_user_attr(_RECORD, _values(moved))
        return moved

    def study(self, record: CompressionRecord) -> Study:
        """Its Optuna study.

        Args:
            record: The compression.
        """
        import optuna

        return optuna.load_study(study_name=record.study, storage=optuna_storage(self._database))

    def delete(self, record: CompressionRecord) -> None:
        """Remove record and study.

        Args:
            record: The compression.
        """
        import optuna

        optuna.delete_study(study_name=record.study, storage=optuna_storage(self._database))

    def _names(self) -> list[str]:
        """Ids, ascending."""

        def operation(session: Session) -> list[str]:
            like = STUDIES.c.study_name.like(f"c-%/{_NAME}")
            return [str(name) for name in session.scalars(select(STUDIES.c.study_name).where(like))]

        matches = (_STUDY.fullmatch(name) for name in self._database.transact(operation))
        return sorted(match.group(1) for match in matches if match)

    def _read(self, compression: str) -> CompressionRecord:
        import optuna

        study = optuna.load_study(study_name=f"{compression}/{_NAME}", storage=optuna_storage(self._database))
        values: Any = study.user_attrs.get(_RECORD)
        try:
            moments = {name: values[name] and datetime.fromisoformat(values[name]) for name in ("created", "finished")}
            return CompressionRecord(**{**values, **moments, "directions": tuple(values["directions"])})
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(
                "ID", f"{compression} cannot be read: its study says nothing of it", "restore a backup"
            ) from error


def _values(record: CompressionRecord) -> dict[str, Any]:
    """As JSON values."""
    moments = {
        name: value and value.isoformat()
        for name, value in (("created", record.created), ("finished", record.finished))
    }
    return {**asdict(record), **moments, "directions": list(record.directions)}
