"""What nothing refers to any more: objects, rows, studies and folders that ended runs left behind."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.storage.artifact_folder import FolderBackend
from alphasmith.storage.artifact_store import ArtifactStore, StoredObject, default_address, is_ours
from alphasmith.storage.database import Database, optuna_storage
from alphasmith.storage.kept import place_of
from alphasmith.storage.liveness import database_now, live_runs
from alphasmith.storage.maintenance import STUDIES, children, orphan, store_addresses
from alphasmith.storage.tables import ResultRow, RunRow, StoredArtifactRow

Garbage = Literal["artifact", "temporary", "artifact row", "row", "study", "folder", "spared"]

#: What is younger may be in the making.
GRACE = timedelta(hours=1)

_RUN_ID = re.compile(r"r-\d{8}-[0-9a-f]{6}")
_PARTIAL = re.compile(r"\.partial-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Something that was removed, or would be.

    Attributes:
        what: ``artifact``: an object no row refers to. ``temporary``: an unfinished object. ``artifact row``: a record of an
            object that only the going on of a finished run needed. ``row``: rows whose run is gone. ``study``: Optuna study whose
            run is gone. ``folder``: unfinished output folder. ``spared``: a store from which nothing, or nothing more, was removed:
            it is shared, or cannot be used from here.
        name: Which.
        bytes: What it freed outside the database [bytes].
    """

    what: Garbage
    name: str
    bytes: int = 0


def collect(
    database: Database, *, older_than: timedelta = GRACE, dry_run: bool = False, shared: bool = False
) -> list[Removed]:
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


def _in_stores(database: Database, cutoff: datetime, dry_run: bool, shared: bool) -> Iterator[Removed]:
    for address in sorted({*store_addresses(database), default_address(database.url)}):
        try:
            store = ArtifactStore.open(address)
            # A folder of another machine cannot be cleaned from here.
            if not isinstance(store.backend, FolderBackend) or store.backend.folder.is_dir():
                yield from _objects(database, store, cutoff, dry_run, shared)
        except InputError as error:
            # Not by its address, which may hold what must not be shown where it is no store's.
            yield Removed(what="spared", name=f"an artifact store that cannot be used ({error.problem})")


def _orphans(database: Database, dry_run: bool) -> list[Removed]:
    """Rows that SQLite kept when something deleted their run with keys switched off."""

    def sweep(session: Session) -> list[Removed]:
        found = []
        for child in children():
            condition = orphan(child)
            if condition is None:
                continue
            key = child.__table__.c.id
            ids = list(session.scalars(select(key).where(condition)))
            if ids:
                found.append(Removed(what="row", name=f"{len(ids)} in {child.__tablename__}"))
            if not dry_run:
                # By key, since MySQL does not delete from a table that the condition reads.
                for start in range(0, len(ids), 500):
                    session.execute(delete(child).where(key.in_(ids[start : start + 500])))
        return found

    return database.transact(sweep)


def _ended(cutoff: datetime) -> ColumnElement[bool]:
    return (RunRow.status == "finished") & (func.coalesce(RunRow.finished, RunRow.created) <= cutoff)


def _ended_artifacts(database: Database, cutoff: datetime, dry_run: bool) -> list[Removed]:
    ended = StoredArtifactRow.run_id.in_(select(RunRow.id).where(_ended(cutoff)))

    def sweep(session: Session) -> list[Removed]:
        query = select(StoredArtifactRow.run_id, func.count()).where(ended).group_by(StoredArtifactRow.run_id)
        found = [Removed(what="artifact row", name=f"{count} of {run}") for run, count in session.execute(query)]
        if found and not dry_run:
            session.execute(delete(StoredArtifactRow).where(ended))
        return found

    return database.transact(sweep)


def _objects(
    database: Database, store: ArtifactStore, cutoff: datetime, dry_run: bool, shared: bool
) -> Iterator[Removed]:
    others = store.others(place_of(database))
    if others and not shared:
        yield Removed(what="spared", name=f"{store.address}, which {others} other databases use (--shared cleans it)")
        return
    # Listed before rows are read: what comes to be referred to in between is seen, what is written later is not listed.
    listed = [item for item in store.listed() if is_ours(item.id) and item.modified <= cutoff]
    needed = _needed(database, cutoff)
    for item in listed:
        if item.id in needed or (not dry_run and not _still_old(store, item, cutoff)):
            continue
        if not dry_run:
            store.remove(item.id)
        yield Removed(what="artifact", name=f"{store.address}/{item.id}", bytes=item.bytes)
    for item in [item for item in store.unfinished() if item.modified <= cutoff]:
        if not dry_run:
            store.backend.discard(item)
        yield Removed(what="temporary", name=f"{store.address}/{item.id}", bytes=item.bytes)


def _needed(database: Database, cutoff: datetime) -> set[str]:
    """Ids of objects that rows refer to, without the rows of runs that ended."""
    ended = select(RunRow.id).where(_ended(cutoff))
    kept = select(StoredArtifactRow.artifact_id).where(StoredArtifactRow.run_id.not_in(ended))
    results = select(ResultRow.artifact_id).where(ResultRow.run_id.not_in(ended))
    return database.transact(lambda session: {*session.scalars(kept), *session.scalars(results)})


def _still_old(store: ArtifactStore, item: StoredObject, cutoff: datetime) -> bool:
    """Whether nobody asked for the object again since it was listed."""
    modified = store.backend.modified(item.id)
    return modified is not None and modified <= cutoff


def _studies(database: Database, dry_run: bool) -> list[Removed]:
    def lost(session: Session) -> Sequence[tuple[int, str]]:
        runs = set(session.scalars(select(RunRow.id)))
        studies = session.execute(select(STUDIES.c.study_id, STUDIES.c.study_name).order_by(STUDIES.c.study_name))
        found = []
        for study_id, name in studies:
            run, slash, _ = str(name).partition("/")
            if slash and _RUN_ID.fullmatch(run) and run not in runs:
                found.append((int(study_id), str(name)))
        return found

    studies = database.transact(lost)
    if studies and not dry_run:
        storage = optuna_storage(database)
        for study_id, _ in studies:
            with suppress(KeyError):  # another process was faster
                storage.delete_study(study_id)
    return [Removed(what="study", name=name) for _, name in studies]


def _folders(database: Database, cutoff: datetime, dry_run: bool) -> list[Removed]:
    live = live_runs(database, database_now(database))
    query = select(RunRow.id, RunRow.folder, RunRow.config)
    places: dict[Path, bool] = {}
    for run, folder, config in database.transact(lambda session: session.execute(query).all()):
        place = _output(folder, config)
        if place is not None:
            places[place] = places.get(place, False) or run in live
    found = []
    for place, used in sorted(places.items()):
        if used or not place.parent.is_dir():
            continue
        for partial in sorted(place.parent.iterdir()):
            if not _PARTIAL.fullmatch(partial.name.removeprefix(place.name)) or not partial.name.startswith(place.name):
                continue
            if partial.is_symlink() or not partial.is_dir():
                continue
            size, modified = _measure(partial)
            if modified > cutoff:
                continue
            if not dry_run:
                shutil.rmtree(partial, ignore_errors=True)
            found.append(Removed(what="folder", name=str(partial), bytes=size))
    return found


def _output(folder: str, config: dict[str, Any]) -> Path | None:
    told = folder or config.get("out")
    place = Path(told) if isinstance(told, str) and told else None
    # A relative one was relative to a working directory that is not known here.
    return place if place is not None and place.is_absolute() else None


def _measure(folder: Path) -> tuple[int, datetime]:
    """Bytes in a folder, and when anything in it was last changed."""
    size, latest = 0, folder.stat().st_mtime
    for path in folder.rglob("*"):
        with suppress(OSError):
            told = path.lstat()
            size += told.st_size if path.is_file() and not path.is_symlink() else 0
            latest = max(latest, told.st_mtime)
    return size, datetime.fromtimestamp(latest, UTC)
