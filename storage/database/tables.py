"""Our tables, beside Optuna's and without keys into them.

Runs own sites, sites own groups and trial digests; deleting a run deletes everything under it. A trial is named by study
name and trial number: Optuna may rename, copy or delete a study without breaking or blocking on these rows.

States of a run::

    created -> running -> finished
                  |  ^
                  v  |
           failed, interrupted

States of a ticket (one site that is to be searched), moved only under a lease::

    waiting -> running -> done
       ^          |
       +----------+-----> failed

States of a training::

    running -> finished
      |  ^
      v  |
    failed, interrupted
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

#: Longest run id and longest names [characters]; names stay below the index limit of MySQL (3072 bytes).
RUN_ID_LENGTH = 40
NAME_LENGTH = 512

_NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}

# None is NULL, not the JSON text "null".
_OPTIONAL_JSON = JSON(none_as_null=True)

# Names differ by case in models; MySQL's default collation would call them equal.
_OPTIONS = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


class UtcDateTime(TypeDecorator[datetime]):
    """Zone-aware in Python, naive UTC with microseconds in the database, alike on every backend."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """MySQL drops microseconds unless asked to keep them."""
        return dialect.type_descriptor(mysql.DATETIME(fsp=6) if dialect.name == "mysql" else DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To naive UTC.

        Raises:
            ValueError: The time has no zone.
        """
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To zone-aware UTC."""
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Metadata of our tables only; migrations see nothing else."""

    metadata = MetaData(naming_convention=_NAMING)
    type_annotation_map = {  # noqa: RUF012 (read by SQLAlchemy on the class)
        datetime: UtcDateTime(),
        float: Double(),
        # MySQL's TEXT ends at 64 kB; reasons and explanations may carry long messages.
        str: Text().with_variant(mysql.LONGTEXT(), "mysql"),
        dict[str, Any]: JSON(),
        list[str]: JSON(),
    }


class RunRow(Base):
    """One launch. ``status`` follows the states at the head of this file; ``reason`` is filled for failed and interrupted runs."""

    __tablename__ = "alphasmith_run"
    __table_args__ = (
        CheckConstraint("status IN ('created', 'running', 'finished', 'failed', 'interrupted')", name="status"),
        CheckConstraint("scope IN ('site', 'model')", name="scope"),
        Index("ix_alphasmith_run_created", "created"),
        _OPTIONS,
    )

    id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str]
    model_digest: Mapped[str] = mapped_column(String(64))
    data_digest: Mapped[str] = mapped_column(String(64))
    config: Mapped[dict[str, Any]]
    scheme: Mapped[str] = mapped_column(String(64))
    hardware: Mapped[dict[str, Any]]
    scope: Mapped[str] = mapped_column(String(16))
    versions: Mapped[dict[str, Any]]
    space_hash: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    finished: Mapped[datetime | None]
    folder: Mapped[str]
    refinement: Mapped[dict[str, Any] | None] = mapped_column(_OPTIONAL_JSON)
    config_digest: Mapped[str] = mapped_column(String(64), server_default="")
    artifacts: Mapped[str] = mapped_column(String(NAME_LENGTH), server_default="")
    driver: Mapped[str | None] = mapped_column(String(NAME_LENGTH))
    driver_until: Mapped[datetime | None]
    #: Groups of the whole model (scope ``model``) as JSON text.
    model_groups: Mapped[str | None]


class SiteRow(Base):
    """One site of a run. ``entry`` is its ``SiteRecord`` as JSON text: a field of a site needs no column."""

    __tablename__ = "alphasmith_site"
    __table_args__ = (UniqueConstraint("run_id", "name"), _OPTIONS)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("alphasmith_run.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    position: Mapped[int]
    entry: Mapped[str]


class WorkerRow(Base):
    """A process that works on a run: its driver, or an autonomous worker. ``state``: ``alive`` or ``left``."""

    __tablename__ = "alphasmith_worker"
    __table_args__ = (Index("ix_alphasmith_worker_run_id", "run_id"), _OPTIONS)

    id: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("alphasmith_run.id", ondelete="CASCADE"))
    role: Mapped[str] = mapped_column(String(16))
    host: Mapped[str] = mapped_column(String(NAME_LENGTH))
    pid: Mapped[int]
    engine: Mapped[str] = mapped_column(String(NAME_LENGTH))
    state: Mapped[str] = mapped_column(String(16))
    joined: Mapped[datetime]
    heartbeat: Mapped[datetime]


class TicketRow(Base):
    """One site of a run that is to be searched, and the lease of whoever searches it.

    ``attempts`` counts the claims and fences them: what an earlier attempt writes is refused; it never falls. ``tries`` counts
    those that speak against the site: not the ones given back, nor those that ended because the driver itself died.
    ``blocked`` counts the sites that must be done first. ``reused`` is the recorded winner of an earlier run that the search
    starts from.
    """

    __tablename__ = "alphasmith_ticket"
    __table_args__ = (
        UniqueConstraint("run_id", "site"),
        Index("ix_alphasmith_ticket_state", "run_id", "state", "position"),
        CheckConstraint("state IN ('waiting', 'running', 'done', 'failed')", name="state"),
        CheckConstraint("state <> 'running' OR (worker IS NOT NULL AND lease_until IS NOT NULL)", name="lease"),
        _OPTIONS,
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("alphasmith_run.id", ondelete="CASCADE"))
    site: Mapped[str] = mapped_column(String(NAME_LENGTH))
    position: Mapped[int]
    depends_on: Mapped[list[str]]
    blocked: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64))
    reused: Mapped[dict[str, Any] | None] = mapped_column(_OPTIONAL_JSON)
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int]
    tries: Mapped[int]
    worker: Mapped[str | None] = mapped_column(String(NAME_LENGTH))
    lease_until: Mapped[datetime | None]
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]
    reason: Mapped[str]


class AttemptRow(Base):
    """One claim of a ticket and how it ended: ``running``, ``done``, ``failed``, ``lost`` (its lease ran out) or ``returned``."""

    __tablename__ = "alphasmith_attempt"
    __table_args__ = (
        UniqueConstraint("ticket_id", "number"),
        Index("ix_alphasmith_attempt_run_id", "run_id"),
        CheckConstraint("state IN ('running', 'done', 'failed', 'lost', 'returned')", name="state"),
        _OPTIONS,
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("alphasmith_run.id", ondelete="CASCADE"))
    ticket_id: Mapped[int] = mapped_column(ForeignKey("alphasmith_ticket.id", ondelete="CASCADE"))
    number: Mapped[int]
    worker: Mapped[str] = mapped_column(String(NAME_LENGTH))
    state: Mapped[str] = mapped_column(String(16))
    started: Mapped[datetime]
    ended: Mapped[datetime | None]
    reason: Mapped[str]


class ResultRow(Base):
    """The accepted result of one site: exactly one per site, made by one attempt, its tensors in the artifact store."""

    __tablename__ = "alphasmith_result"
    __table_args__ = (
        UniqueConstraint("run_id", "site"),
        Index("ix_alphasmith_result_digest", "digest", "scheme"),
        _OPTIONS,
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("alphasmith_run.id", ondelete="CASCADE"))
    site: Mapped[str] = mapped_column(String(NAME_LENGTH))
    attempt: Mapped[int]
    worker: Mapped[str] = mapped_column(String(NAME_LENGTH))
    digest: Mapped[str] = mapped_column(String(64))
    scheme: Mapped[str] = mapped_column(String(64))
    #: The winner, JSON-able, for later runs at the same site.
    winner: Mapped[dict[str, Any]]
    loss: Mapped[float]
    artifact_id: Mapped[str] = mapped_column(String(128))
    sha256: Mapped[str] = mapped_column(String(64))
    accepted: Mapped[datetime]


class StoredArtifactRow(Base):
    """An object in the artifact store that a run needs to go on: calibration rows, weights, results. Found again by ``key``."""

    __tablename__ = "alphasmith_stored_artifact"
    __table_args__ = (
        UniqueConstraint("run_id", "kind", "name"),
        Index("ix_alphasmith_stored_artifact_key", "kind", "key"),
        _OPTIONS,
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("alphasmith_run.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(String(32))
    name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    key: Mapped[str] = mapped_column(String(64))
    artifact_id: Mapped[str] = mapped_column(String(128))
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger())
    created: Mapped[datetime]


class TrainingRow(Base):
    """One training of the compressed model of a run. ``run_id`` is empty where the folder's run is not in this database.

    ``entry`` is the section ``training`` of the manifest as JSON text; empty until the training has finished.
    """

    __tablename__ = "alphasmith_training"
    __table_args__ = (
        CheckConstraint("status IN ('running', 'finished', 'failed', 'interrupted')", name="status"),
        Index("ix_alphasmith_training_run_id", "run_id"),
        _OPTIONS,
    )

    id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), primary_key=True)
    run_id: Mapped[str | None] = mapped_column(
        String(RUN_ID_LENGTH), ForeignKey("alphasmith_run.id", ondelete="CASCADE")
    )
    parent: Mapped[str] = mapped_column(String(RUN_ID_LENGTH))
    parent_digest: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str]
    config: Mapped[dict[str, Any]]
    config_digest: Mapped[str] = mapped_column(String(64))
    data_digest: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime]
    finished: Mapped[datetime | None]
    folder: Mapped[str]
    entry: Mapped[str | None]


class DatabaseRow(Base):
    """One row: an id of this database, by which artifact stores tell those apart that have the same address on two machines."""

    __tablename__ = "alphasmith_database"
    __table_args__ = (_OPTIONS,)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
