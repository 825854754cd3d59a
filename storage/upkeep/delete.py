"""Deleting a run: its records, those of its trainings, their studies and the objects that nothing else needs. Or a training alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import counted
from alphasmith.storage.artifacts.run_artifacts import place_of
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import Database, optuna_storage
from alphasmith.storage.database.optuna_private import STUDIES, of_run
from alphasmith.storage.database.tables import ResultRow, RunRow, StoredArtifactRow
from alphasmith.storage.output.output_folder import BLOCKS, discard_partial, partial_folders, unfinished_folders
from alphasmith.storage.output.reservation import abandoned_reservation, holder
from alphasmith.storage.output.reserved_work import driver_of
from alphasmith.storage.queue.board import Board
from alphasmith.storage.queue.status import database_now, live_runs, past_drivers
from alphasmith.storage.runs.compressions import CompressionRecord
from alphasmith.storage.runs.records import RunRecord
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.runs.trainings import TrainingRecord, TrainingStore
from alphasmith.storage.upkeep.check import children
from alphasmith.storage.upkeep.garbage import GRACE, Removal, is_old, measure, needed, output_of, usable_store

_END_IT = "wait until it has ended, or end it"


def delete_run(database: Database, run_id: str, *, dry_run: bool = False) -> list[Removal]:
    """Delete a run: its objects in the artifact store, its unfinished output folders, its Optuna studies, its records.

    The output folder itself stays, and those of its trainings. So does an object that another run refers to and, while other runs go on, one that is
    younger than ``GRACE``: they may be about to refer to it. A store that other databases use, or that cannot be used from
    here, is spared as a whole.

    The records go last and at once. A deletion that was ended before leaves a run that can be deleted again, or resumed:
    what is missing is computed anew.

    Args:
        database: Initialised.
        run_id: Full id.
        dry_run: Only tell what would go.

    Returns:
        What was removed, or would be.

    Raises:
        InputError: Field ``RUN``: no such run, or a process works on it or on one of its trainings.
        StorageError: The database was lost.
    """
    runs = RunStore(database)
    record = runs.get(run_id)
    live = live_runs(database, database_now(database))
    if worker := live.pop(record.id, None):
        raise InputError("RUN", f"{record.id} is worked on by {worker}", _END_IT)
    for training in TrainingStore(database).listing(record.id):
        if worker := driver_of(database, training):
            told = f"{training.id}, a training of {record.id}, is worked on by {worker}"
            raise InputError("RUN", told, _END_IT)
    board = Board(database, record.id, role="driver")
    if dry_run:
        return list(_parts(database, record, busy=bool(live), dry_run=True))
    board.drive()  # nobody goes on with it meanwhile
    try:
        removed = list(_parts(database, record, busy=bool(live), dry_run=False))
        runs.delete(record.id)
    finally:
        board.stop_driving()
    board.forget_driver()
    return removed


def delete_training(database: Database, training: TrainingRecord, *, dry_run: bool = False) -> list[Removal]:
    """Delete a training that nobody works on, see :func:`remove_training`.

    Args:
        database: Initialised.
        training: Its record.
        dry_run: Only tell what would go.

    Returns:
        What was removed, or would be.

    Raises:
        InputError: Field ``RUN``: a process works on it.
        StorageError: The database was lost.
    """
    _refuse_driven(database, training)
    if dry_run:
        return list(_left_of(database, training, dry_run=True))
    return remove_training(database, training)


def delete_compression(database: Database, compression: CompressionRecord, *, dry_run: bool = False) -> list[Removal]:
    """Delete a compression that nobody works on: its study, which is its record, and unfinished folders.

    The folder of a result stays, and so do the stages in the cache, which other compressions may share.

    Args:
        database: Initialised.
        compression: Its record.
        dry_run: Only tell what would go.

    Returns:
        What was removed, or would be.

    Raises:
        InputError: Field ``RUN``: a process works on it.
        StorageError: The database was lost.
    """
    _refuse_driven(database, compression)
    return list(_left_of(database, compression, dry_run))


def remove_training(database: Database, training: TrainingRecord) -> list[Removal]:
    """Delete a training: its checkpoints and unfinished folders, its study, its record. The folder of a result stays.

    Args:
        database: Initialised.
        training: Its record; nobody works on it, or the caller alone.

    Returns:
        What was removed.

    Raises:
        StorageError: The database was lost.
    """
    removed = list(_left_of(database, training, dry_run=False))
    TrainingStore(database).delete(training.id)
    return removed


def _parts(database: Database, record: RunRecord, *, busy: bool, dry_run: bool) -> Iterator[Removal]:
    yield from _objects(database, record, busy, dry_run)
    for training in TrainingStore(database).listing(record.id):
        yield from _left_of(database, training, dry_run)
    place = output_of(record.folder, record.config)
    drivers = [*past_drivers(database, record.id), BLOCKS]
    yield from _partials(() if place is None else partial_folders(place, record.id, drivers), dry_run)
    yield from _studies(database, record.id, dry_run)
    yield from _rows(database, record.id)


def _objects(database: Database, record: RunRecord, busy: bool, dry_run: bool) -> Iterator[Removal]:
    def named(session: Session) -> set[str]:
        kept = select(StoredArtifactRow.artifact_id).where(StoredArtifactRow.run_id == record.id)
        results = select(ResultRow.artifact_id).where(ResultRow.run_id == record.id)
        return {*session.scalars(kept), *session.scalars(results)}

    strays = database.transact(named) - needed(database, RunRow.id == record.id)
    if not strays:
        return
    try:
        store = usable_store(record.artifacts)
        if store is not None:
            yield from _strays(database, store, strays, busy, dry_run)
    except InputError as error:
        yield Removal(what="spared", name=f"an artifact store that cannot be used ({error.problem})")


def _strays(database: Database, store: ArtifactStore, strays: set[str], busy: bool, dry_run: bool) -> Iterator[Removal]:
    if others := store.others(place_of(database)):
        yield Removal(what="spared", name=f"{store.address}, which {counted(others, 'other database')} may need")
        return
    cutoff = database_now(database) - GRACE
    young = 0
    for artifact_id in sorted(strays):
        size = store.backend.size(artifact_id)
        if size is None:
            continue  # an earlier deletion came so far
        if busy and not is_old(store, artifact_id, cutoff):
            young += 1
            continue
        if not dry_run:
            store.remove(artifact_id)
        yield Removal(what="artifact", name=f"{store.address}/{artifact_id}", bytes=size)
    if young:
        name = f"{counted(young, 'young object')} of {store.address}; `alphasmith db gc` removes them later"
        yield Removal(what="spared", name=name)


def _refuse_driven(database: Database, work: TrainingRecord | CompressionRecord) -> None:
    if worker := driver_of(database, work):
        raise InputError("RUN", f"{work.id} is worked on by {worker}", _END_IT)


def _left_of(database: Database, work: TrainingRecord | CompressionRecord, dry_run: bool) -> Iterator[Removal]:
    """Unfinished folders, abandoned reservation and study of a training or a compression; the folder of its result stays."""
    place = Path(work.folder)
    yield from _partials(unfinished_folders(place, work.id), dry_run)
    reservation = abandoned_reservation(place, work.id)
    if reservation is not None and holder(place, work.id) is None:
        size = reservation.stat().st_size
        if not dry_run:
            reservation.unlink(missing_ok=True)
        yield Removal(what="temporary", name=str(reservation), bytes=size)
    yield from _studies(database, work.id, dry_run)


def _partials(folders: Iterable[Path], dry_run: bool) -> Iterator[Removal]:
    for partial in folders:
        size, _ = measure(partial)
        if not dry_run:
            discard_partial(partial)
        yield Removal(what="folder", name=str(partial), bytes=size)


def _studies(database: Database, run_id: str, dry_run: bool) -> Iterator[Removal]:
    query = select(STUDIES.c.study_id, STUDIES.c.study_name).where(of_run(run_id)).order_by(STUDIES.c.study_name)
    studies = database.transact(lambda session: session.execute(query).all())
    storage = optuna_storage(database) if studies and not dry_run else None
    for study_id, name in studies:
        if storage is not None:
            with suppress(KeyError):  # another process was faster
                storage.delete_study(study_id)
        yield Removal(what="study", name=name)


def _rows(database: Database, run_id: str) -> list[Removal]:
    def count(session: Session) -> list[Removal]:
        tables = [child.__table__ for child in children() if "run_id" in child.__table__.c]
        rows = [(t, session.scalar(select(func.count()).select_from(t).where(t.c.run_id == run_id))) for t in tables]
        return [Removal(what="row", name=f"{number} in {table}") for table, number in rows if number]

    return database.transact(count)
