"""Consistency checks of a database and its artifact stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.storage.artifacts.folder import FolderBackend
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import Database, StorageError
from alphasmith.storage.database.optuna_private import STATE, STUDIED, STUDIES, TRIALS, optuna_migrations
from alphasmith.storage.database.tables import Base, ResultRow, RunRow, StoredArtifactRow, TicketRow
from alphasmith.storage.migrations import CONTEXT_OPTIONS, VERSION_TABLE
from alphasmith.storage.output.reserved_work import driver_of
from alphasmith.storage.queue.status import database_now, live_runs
from alphasmith.storage.runs.compressions import CompressionRecord, CompressionStore
from alphasmith.storage.runs.trainings import TrainingRecord, TrainingStore

_MIGRATIONS = Path(__file__).parents[1] / "migrations"


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Something that must hold and does not.

    Attributes:
        check: Which check found it: ``schema``, ``orphans``, ``results``, ``artifacts``, ``trials``, ``leases``,
            ``trainings`` or ``compressions``.
        subject: What it is about: a run and what in it, a table, a store.
        problem: What is wrong, in one clause.
    """

    check: str
    subject: str
    problem: str

    def __str__(self) -> str:
        return f"{self.check}: {self.subject}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Revisions of the two sets of tables in a database; None: they are not there.

    Attributes:
        ours: Of our tables.
        ours_head: What this Alphasmith needs.
        ours_known: Every revision this Alphasmith can start from.
        optuna: Of Optuna's tables.
        optuna_head: What this Optuna needs.
        optuna_known: Every revision this Optuna can start from.
    """

    ours: str | None
    ours_head: str
    ours_known: frozenset[str]
    optuna: str | None
    optuna_head: str
    optuna_known: frozenset[str]

    @property
    def current(self) -> bool:
        """Whether nothing is to be upgraded."""
        return self.ours == self.ours_head and self.optuna == self.optuna_head


def heads(database: Database) -> Heads:
    """Read both revisions; changes nothing.

    Raises:
        StorageError: The database was lost.
    """
    ours, optuna = ScriptDirectory(str(_MIGRATIONS)), ScriptDirectory(str(optuna_migrations()))
    try:
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            return Heads(
                ours=context.get_current_revision(),
                ours_head=str(ours.get_current_head()),
                ours_known=_revisions(ours),
                optuna=MigrationContext.configure(connection).get_current_revision(),
                optuna_head=str(optuna.get_current_head()),
                optuna_known=_revisions(optuna),
            )
    except SQLAlchemyError as error:
        raise StorageError(f"{database.masked}: its schema cannot be read") from error


def violations(
    database: Database, store: ArtifactStore | None = None, *, deep: bool = False, now: datetime | None = None
) -> list[Violation]:
    """Everything that must hold in a database and does not; changes nothing.

    Checked: both schemas; no row without its run, site or ticket; a done ticket has one result and a result a done ticket;
    objects named by rows are in their store; a trial is in Optuna's tables once and has ended; nothing is marked as running that
    nobody works on. While runs go on, what they are about to write may look like a violation for a moment.

    Args:
        database: Open.
        store: Where all objects are looked for; None: where each run kept them.
        deep: Compare the digest of every object, too, which reads them all.
        now: By which leases end; None: the clock of the database.

    Returns:
        Nothing where all is well. A database of another schema has no other violation than that.

    Raises:
        StorageError: The database was lost.
    """
    found = list(_schema(database))
    if found:
        return found
    moment = database_now(database) if now is None else now
    live = live_runs(database, moment)

    def read(session: Session) -> list[Violation]:
        return [*_orphans(session), *_results(session), *_trials(session), *_leases(session, moment, live)]

    return [*database.transact(read), *_left_running(database), *_artifacts(database, store, deep=deep)]


def orphan(child: type[Base]) -> ColumnElement[bool] | None:
    """Condition of rows of a table whose run, site or ticket is not there; None where the table has no such reference."""
    broken = []
    for key in sorted(child.__table__.foreign_keys, key=lambda key: str(key.parent)):
        parent = key.column.table.alias()
        broken.append(
            and_(key.parent.is_not(None), ~select(parent.c.id).where(parent.c[key.column.name] == key.parent).exists())
        )
    return or_(*broken) if broken else None


def children() -> list[type[Base]]:
    """Every table with references, parents before their children."""
    order = {item.name: place for place, item in enumerate(Base.metadata.sorted_tables)}
    mapped = [mapper.class_ for mapper in Base.registry.mappers]
    return sorted((row for row in mapped if row.__table__.foreign_keys), key=lambda row: order[row.__tablename__])


def store_addresses(database: Database) -> dict[str, list[str]]:
    """Artifact store -> runs that keep objects there."""
    query = select(RunRow.artifacts, RunRow.id).where(RunRow.artifacts != "").order_by(RunRow.id)
    found: dict[str, list[str]] = {}
    for address, run in database.transact(lambda session: session.execute(query).all()):
        found.setdefault(address, []).append(run)
    return found


def _revisions(scripts: ScriptDirectory) -> frozenset[str]:
    return frozenset(script.revision for script in scripts.walk_revisions())


def _schema(database: Database) -> Iterator[Violation]:
    found = heads(database)
    for whose, is_, head in (("ours", found.ours, found.ours_head), ("Optuna's", found.optuna, found.optuna_head)):
        if is_ != head:
            told = "there are no tables" if is_ is None else f"schema {is_}, not {head}; run `alphasmith db upgrade`"
            yield Violation(check="schema", subject=f"tables, {whose}", problem=told)
            return
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=dict(CONTEXT_OPTIONS))
        for difference in compare_metadata(context, Base.metadata):
            # A change of a column comes as a list of changes, everything else as one.
            step = difference[0] if isinstance(difference, list) else difference
            named = [str(getattr(part, "name", part)) for part in step[1:4] if part is not None]
            yield Violation(check="schema", subject=" ".join(named), problem=f"{step[0]} would be needed")


def _orphans(session: Session) -> Iterator[Violation]:
    for child in children():
        condition = orphan(child)
        if condition is None:
            continue
        rows = session.execute(select(func.count()).select_from(child).where(condition)).scalar_one()
        if rows:
            problem = f"{rows} rows without their run, site or ticket; `alphasmith db gc` removes them"
            yield Violation(check="orphans", subject=child.__tablename__, problem=problem)


def _results(session: Session) -> Iterator[Violation]:
    same = and_(ResultRow.run_id == TicketRow.run_id, ResultRow.site == TicketRow.site)
    counted = func.count(ResultRow.id)
    done = select(TicketRow.run_id, TicketRow.site, counted).outerjoin(ResultRow, same).where(TicketRow.state == "done")
    for run, site, number in session.execute(
        done.group_by(TicketRow.id, TicketRow.run_id, TicketRow.site).having(counted != 1)
    ):
        yield Violation(check="results", subject=f"{run}, site {site}", problem=f"done, with {number} results")
    states = select(ResultRow.run_id, ResultRow.site, TicketRow.state).outerjoin(TicketRow, same)
    for run, site, state in session.execute(states.where(or_(TicketRow.id.is_(None), TicketRow.state != "done"))):
        problem = "has a result, but no ticket" if state is None else f"has a result, but is {state}"
        yield Violation(check="results", subject=f"{run}, site {site}", problem=problem)


def _leases(session: Session, now: datetime, live: dict[str, str]) -> Iterator[Violation]:
    running = select(TicketRow.run_id, TicketRow.site, TicketRow.worker).where(
        TicketRow.state == "running", or_(TicketRow.lease_until.is_(None), TicketRow.lease_until <= now)
    )
    for run, site, worker in session.execute(running):
        if run not in live:
            problem = f"is marked as running by {worker}, whose lease ran out; nobody drives the run"
            yield Violation(check="leases", subject=f"{run}, site {site}", problem=problem)


def _left_running(database: Database) -> Iterator[Violation]:
    works: tuple[TrainingRecord | CompressionRecord, ...] = (
        *reversed(TrainingStore(database).listing()),
        *reversed(CompressionStore(database).listing()),
    )
    for work in works:
        if work.status == "running" and driver_of(database, work) is None:
            problem = (
                f"is marked as running, and nobody works on it; go on with `alphasmith resume {work.id}`, "
                f"or remove it with `alphasmith delete {work.id}`"
            )
            check = "trainings" if isinstance(work, TrainingRecord) else "compressions"
            yield Violation(check=check, subject=work.id, problem=problem)


def _trials(session: Session) -> Iterator[Violation]:
    runs = set(session.scalars(select(RunRow.id)))
    numbered = select(STUDIES.c.study_name, TRIALS.c.number).select_from(STUDIED)
    twice = numbered.group_by(STUDIES.c.study_name, TRIALS.c.number).having(func.count() > 1)
    for query, problem in (
        (twice, "is there more than once"),
        (numbered.where(STATE == "RUNNING"), "is RUNNING; trials of ours are recorded when they have ended"),
    ):
        for study, number in session.execute(query):
            if study.partition("/")[0] in runs:
                yield Violation(check="trials", subject=f"study {study}, trial {number}", problem=problem)


@dataclass(frozen=True, kw_only=True)
class _RecordedObject:
    address: str
    subject: str
    artifact_id: str
    sha256: str
    bytes: int | None = None


def _artifacts(database: Database, store: ArtifactStore | None, *, deep: bool) -> Iterator[Violation]:
    by_address: dict[str, list[_RecordedObject]] = {}
    for named in database.transact(_named):
        by_address.setdefault(named.address, []).append(named)
    if store is not None:
        every = [named for group in by_address.values() for named in group]
        yield from _in_store(store, every, deep=deep)
        return
    for address, group in sorted(by_address.items()):
        if not address:
            yield Violation(check="artifacts", subject=group[0].subject, problem="its run names no artifact store")
            continue
        try:
            yield from _in_store(ArtifactStore.open(address), group, deep=deep)
        except InputError as error:
            yield Violation(check="artifacts", subject=address, problem=f"cannot be read ({error.problem})")


def _named(session: Session) -> list[_RecordedObject]:
    """Objects that rows name. Those of a finished run's results may be gone: its output folder holds them."""
    kept = select(
        RunRow.artifacts,
        RunRow.id,
        StoredArtifactRow.kind,
        StoredArtifactRow.name,
        StoredArtifactRow.artifact_id,
        StoredArtifactRow.sha256,
        StoredArtifactRow.bytes,
    ).join(RunRow, RunRow.id == StoredArtifactRow.run_id)
    results = select(RunRow.artifacts, RunRow.id, ResultRow.site, ResultRow.artifact_id, ResultRow.sha256).join(
        RunRow, RunRow.id == ResultRow.run_id
    )
    found = [
        _RecordedObject(
            address=address, subject=f"{run}, {kind} {name}", artifact_id=artifact_id, sha256=sha256, bytes=size
        )
        for address, run, kind, name, artifact_id, sha256, size in session.execute(kept)
    ]
    seen = {(named.address, named.artifact_id) for named in found}
    for address, run, site, artifact_id, sha256 in session.execute(results.where(RunRow.status != "finished")):
        if (address, artifact_id) not in seen:
            subject = f"{run}, result {site}"
            found.append(_RecordedObject(address=address, subject=subject, artifact_id=artifact_id, sha256=sha256))
    return found


def _in_store(store: ArtifactStore, group: Iterable[_RecordedObject], *, deep: bool) -> Iterator[Violation]:
    named = list(group)
    if not named:
        return
    if isinstance(store.backend, FolderBackend) and not store.backend.folder.is_dir():
        yield Violation(
            check="artifacts",
            subject=store.address,
            problem=f"is no folder of this machine; {len(named)} artifacts are due",
        )
        return
    there = {item.id: item.bytes for item in store.listed()}
    for item in named:
        size = there.get(item.artifact_id)
        if size is None:
            yield Violation(check="artifacts", subject=item.subject, problem=f"{item.artifact_id} is gone")
        elif item.bytes is not None and size != item.bytes:
            problem = f"{item.artifact_id} has {size} bytes, not {item.bytes}"
            yield Violation(check="artifacts", subject=item.subject, problem=problem)
        elif deep:
            try:
                store.check(item.artifact_id, sha256=item.sha256)
            except IntegrityError as error:
                yield Violation(check="artifacts", subject=item.subject, problem=str(error))
