"""Garbage collection: objects, rows, studies and folders of ended runs that nothing refers to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import counted
from alphasmith.storage.artifacts.folder import FolderBackend
from alphasmith.storage.artifacts.run_artifacts import place_of
from alphasmith.storage.artifacts.store import ArtifactStore, default_address, is_ours
from alphasmith.storage.database.connection import Database, optuna_storage
from alphasmith.storage.database.optuna_private import STUDIES
from alphasmith.storage.database.tables import ResultRow, RunRow, StoredArtifactRow, TrainingRow
from alphasmith.storage.output.output_folder import BLOCKS, discard_partial, partial_folders
from alphasmith.storage.output.reservation import abandoned_reservation
from alphasmith.storage.queue.status import database_now, live_runs, past_drivers
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.runs.trainings import owner_of_study
from alphasmith.storage.upkeep.check import children, orphan, store_addresses

Garbage = Literal["artifact", "temporary", "artifact row", "row", "study", "folder", "spared"]

#: What is younger may be in the making.
GRACE = timedelta(hours=1)

_RUN_ID = re.compile(r"r-\d{8}-[0-9a-f]{6}")


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Something that was removed, or would be.

    Attributes:
        what: ``artifact``: an object no row refers to. ``temporary``: an unfinished object. ``artifact row``: a record of an
            object that only the going on of a finished run needed. ``row``: rows whose run is gone. ``study``: Optuna study whose
            run or training is gone. ``folder``: unfinished output folder. ``spared``: a store from which nothing, or nothing more, was removed:
            it is shared, or cannot be used from here.
        name: Which.
        bytes: What it freed outside the database [bytes].
    """

    what: Garbage
    name: str
    bytes: int = 0


def collect(
    database: Database, *, older_than: timedelta = GRACE, dry_run: bool = False, shared: bool = False
) -> list[Removal]:
    """Remove what nothing refers to. Runs that go on, and those that can be resumed, lose nothing.

    What is younger than ``older_than`` stays: an object is written before its row. Of a finished run its records stay, while
    calibration, weights and results of its sites go: its output folder holds what they were for. Stores are found by the runs that
    are recorded; one that other databases use, too, is spared, since their rows are not known here. So is one that cannot be
    used: a run may name a place that was never there.

    Args:
        database: Initialised.
        older_than: Age below which nothing outside the database is removed.
        dry_run: Only tell.
        shared: Do not spare stores that other databases use.

    Raises:
        StorageError: The database was lost.
    """
    cutoff = database_now(database) - older_than
    return [
        *_orphans(database, dry_run),
        *_ended_artifacts(database, cutoff, dry_run),
        *_in_stores(database, cutoff, dry_run, shared),
        *_studies(database, dry_run),
        *_folders(database, cutoff, dry_run),
    ]


def _in_stores(database: Database, cutoff: datetime, dry_run: bool, shared: bool) -> Iterator[Removal]:
    for address in sorted({*store_addresses(database), default_address(database.url)}):
        try:
            store = usable_store(address)
            if store is not None:
                yield from _objects(database, store, cutoff, dry_run, shared)
        except InputError as error:
            # Not by its address, which may hold what must not be shown where it is no store's.
            yield Removal(what="spared", name=f"an artifact store that cannot be used ({error.problem})")


def usable_store(address: str) -> ArtifactStore | None:
    """A store to remove objects from; None for a folder that is not there or on another machine: it cannot be cleaned from here.

    Raises:
        InputError: Field ``artifacts``: it cannot be used.
    """
    store = ArtifactStore.open(address)
    there = not isinstance(store.backend, FolderBackend) or store.backend.folder.is_dir()
    return store if there else None


def _orphans(database: Database, dry_run: bool) -> list[Removal]:
    """Rows that SQLite kept when something deleted their run with keys switched off."""

    def sweep(session: Session) -> list[Removal]:
        found = []
        for child in children():
            condition = orphan(child)
            if condition is None:
                continue
            key = child.__table__.c.id
            ids = list(session.scalars(select(key).where(condition)))
            if ids:
                found.append(Removal(what="row", name=f"{len(ids)} in {child.__tablename__}"))
            if not dry_run:
                # By key, since MySQL does not delete from a table that the condition reads.
                for start in range(0, len(ids), 500):
                    session.execute(delete(child).where(key.in_(ids[start : start + 500])))
        return found

    return database.transact(sweep)


def _ended(cutoff: datetime) -> ColumnElement[bool]:
    return (RunRow.status == "finished") & (func.coalesce(RunRow.finished, RunRow.created) <= cutoff)


def _ended_artifacts(database: Database, cutoff: datetime, dry_run: bool) -> list[Removal]:
    ended = StoredArtifactRow.run_id.in_(select(RunRow.id).where(_ended(cutoff)))

    def sweep(session: Session) -> list[Removal]:
        query = select(StoredArtifactRow.run_id, func.count()).where(ended).group_by(StoredArtifactRow.run_id)
        found = [Removal(what="artifact row", name=f"{count} of {run}") for run, count in session.execute(query)]
        if found and not dry_run:
            session.execute(delete(StoredArtifactRow).where(ended))
        return found

    return database.transact(sweep)


def _objects(
    database: Database, store: ArtifactStore, cutoff: datetime, dry_run: bool, shared: bool
) -> Iterator[Removal]:
    others = store.others(place_of(database))
    if others and not shared:
        yield Removal(
            what="spared",
            name=f"{store.address}, which {counted(others, 'other database')} may need (--shared cleans it)",
        )
        return
    # Listed before rows are read: what comes to be referred to in between is seen, what is written later is not listed.
    listed = [item for item in store.listed() if is_ours(item.id) and item.modified <= cutoff]
    wanted = needed(database, _ended(cutoff))
    for item in listed:
        if item.id in wanted or (not dry_run and not is_old(store, item.id, cutoff)):
            continue
        if not dry_run:
            store.remove(item.id)
        yield Removal(what="artifact", name=f"{store.address}/{item.id}", bytes=item.bytes)
    for item in [item for item in store.unfinished() if item.modified <= cutoff]:
        if not dry_run:
            store.backend.discard(item)
        yield Removal(what="temporary", name=f"{store.address}/{item.id}", bytes=item.bytes)


def needed(database: Database, gone: ColumnElement[bool]) -> set[str]:
    """Ids of objects that rows refer to, without the rows of runs for which ``gone`` holds."""
    runs = select(RunRow.id).where(gone)
    kept = select(StoredArtifactRow.artifact_id).where(StoredArtifactRow.run_id.not_in(runs))
    results = select(ResultRow.artifact_id).where(ResultRow.run_id.not_in(runs))
    return database.transact(lambda session: {*session.scalars(kept), *session.scalars(results)})


def is_old(store: ArtifactStore, artifact_id: str, cutoff: datetime) -> bool:
    """Whether an object is there and nobody wrote it, or asked for it again, since ``cutoff``."""
    modified = store.backend.modified(artifact_id)
    return modified is not None and modified <= cutoff


def _studies(database: Database, dry_run: bool) -> list[Removal]:
    def lost(session: Session) -> Sequence[tuple[int, str]]:
        runs = set(session.scalars(select(RunRow.id)))
        trainings = set(session.scalars(select(TrainingRow.id)))
        studies = session.execute(select(STUDIES.c.study_id, STUDIES.c.study_name).order_by(STUDIES.c.study_name))
        found = []
        for study_id, name in studies:
            run, slash, _ = str(name).partition("/")
            of_lost_run = slash and _RUN_ID.fullmatch(run) and run not in runs
            if of_lost_run or owner_of_study(str(name)) not in {None, *trainings}:
                found.append((int(study_id), str(name)))
        return found

    studies = database.transact(lost)
    if studies and not dry_run:
        storage = optuna_storage(database)
        for study_id, _ in studies:
            with suppress(KeyError):  # another process was faster
                storage.delete_study(study_id)
    return [Removal(what="study", name=name) for _, name in studies]


def _folders(database: Database, cutoff: datetime, dry_run: bool) -> list[Removal]:
    live = live_runs(database, database_now(database))
    found = []
    for record in reversed(RunStore(database).runs()):
        place = output_of(record.folder, record.config)
        if place is None or record.id in live:
            continue
        found += list(_reservation(place, record.id, cutoff, dry_run))
        for partial in partial_folders(place, record.id, [*past_drivers(database, record.id), BLOCKS]):
            size, modified = measure(partial)
            if modified > cutoff:
                continue
            if not dry_run:
                discard_partial(partial)
            found.append(Removal(what="folder", name=str(partial), bytes=size))
    return found


def _reservation(place: Path, run: str, cutoff: datetime, dry_run: bool) -> Iterator[Removal]:
    file = abandoned_reservation(place, run)
    if file is None or datetime.fromtimestamp(file.stat().st_mtime, UTC) > cutoff:
        return
    size = file.stat().st_size
    if not dry_run:
        file.unlink(missing_ok=True)
    yield Removal(what="temporary", name=str(file), bytes=size)


def output_of(folder: str, config: Mapping[str, Any]) -> Path | None:
    """Where a run writes its result, absolute; None where that is not known."""
    told = folder or config.get("out")
    place = Path(told) if isinstance(told, str) and told else None
    # A relative one was relative to a working directory that is not known here.
    return place if place is not None and place.is_absolute() else None


def measure(folder: Path) -> tuple[int, datetime]:
    """Bytes in a folder, and when anything in it was last changed."""
    size, latest = 0, folder.stat().st_mtime
    for path in folder.rglob("*"):
        with suppress(OSError):
            told = path.lstat()
            size += told.st_size if path.is_file() and not path.is_symlink() else 0
            latest = max(latest, told.st_mtime)
    return size, datetime.fromtimestamp(latest, UTC)
