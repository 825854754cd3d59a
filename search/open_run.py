"""From a configuration or a recorded run to a run that is open for work."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from alphasmith.objectives.errors import InputError
from alphasmith.search.config import RunConfig
from alphasmith.search.defaults import DEFAULT_OUT, DEFAULT_STORAGE
from alphasmith.search.interruption import Interrupted
from alphasmith.search.prepare import Survey
from alphasmith.search.progress import Progress
from alphasmith.search.progress_texts import resume_command
from alphasmith.search.recorder import versions
from alphasmith.search.resuming import config_digest, stored_values
from alphasmith.search.run_handle import RunHandle
from alphasmith.search.task import Task
from alphasmith.storage import record_types as stored
from alphasmith.storage.artifact_folder import FolderBackend
from alphasmith.storage.artifact_store import ArtifactStore, default_address
from alphasmith.storage.database import Database, initialise, is_there, open_database, open_existing
from alphasmith.storage.kept import KeptArtifacts
from alphasmith.storage.output import check_target, result_in
from alphasmith.storage.records import RunStore

#: Written to a bucket and removed again, to see that it can be.
_PROBE = "probe"


def find_run(config: RunConfig, task: Task, progress: Progress) -> stored.RunRecord | None:
    """An unfinished run of the same configuration, model and data, the newest one; None where there is none.

    Raises:
        InputError: The storage cannot be used.
    """
    url = config.storage or DEFAULT_STORAGE
    if not is_there(url):
        return None
    database = open_existing(url)
    try:
        same = RunStore(database).find_unfinished(config_digest(config), task.loaded.digest, task.data_digest)
    finally:
        database.close()
    if not same:
        return None
    progress.note(f"run {same[0].id} of the same configuration, model and data is {same[0].status}: going on with it")
    return same[0]


def check_out(config: RunConfig, record: stored.RunRecord | None, *, new: bool) -> None:
    """Refuse an output folder that is in use, as soon as that is certain.

    Args:
        config: This launch's configuration.
        record: The run that is continued; None: a new one, or not known yet.
        new: Whether there will be a new one if there is no record. A folder that holds a result is let through before that
            is known: a run that was killed at its very end finds its own there.

    Raises:
        InputError: Field ``out``.
    """
    if record is not None:
        check_target(output_of(config, record), record.id)
    elif config.out is not None:
        out = config.out.expanduser().resolve()
        if new or result_in(out) is None:
            check_target(out, None)


def output_of(config: RunConfig, record: stored.RunRecord) -> Path:
    """Where the result of a run goes: where this launch wants it, else where it was to go before. Absolute."""
    recorded = Path(record.folder) if record.folder else DEFAULT_OUT / record.id
    return (config.out or recorded).expanduser().resolve()


def writable_store(config: RunConfig, record: stored.RunRecord | None = None) -> ArtifactStore:
    """The artifact store of a launch, seen to be writable before anything is computed. Nothing stays in it.

    Args:
        config: This launch's configuration.
        record: The run that is continued, whose store is used unless another one is given; None: a new one.

    Raises:
        InputError: Field ``artifacts``: it cannot be reached or written.
    """
    recorded = "" if record is None else record.artifacts
    store = ArtifactStore.open(config.artifacts or recorded or default_address(config.storage or DEFAULT_STORAGE))
    backend = store.backend
    if not isinstance(backend, FolderBackend):
        backend.write(_PROBE, io.BytesIO())
        backend.remove(_PROBE)
    elif backend.folder.is_dir():
        with backend.drafted() as draft:
            draft.write_bytes(b"?")
    else:
        parent = next(folder for folder in backend.folder.parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(
                "artifacts",
                f"{backend.folder} cannot be made in {parent}",
                "choose another folder or correct its permissions",
            )
    return store


@contextmanager
def objects_of_others(config: RunConfig, store: ArtifactStore) -> Iterator[KeptArtifacts | None]:
    """What the runs of a database keep in a store, for a run that is not on record yet; None where there is no database.

    Raises:
        InputError: The storage cannot be used.
    """
    url = config.storage or DEFAULT_STORAGE
    if not is_there(url):
        yield None
        return
    database = open_existing(url)
    try:
        yield KeptArtifacts(database, store, "")
    finally:
        database.close()


def new_run(config: RunConfig, task: Task, found: Survey, store: ArtifactStore) -> stored.RunRecord:
    """A run on record, in a database that is made where there is none.

    Args:
        config: Its configuration.
        task: Model and data.
        found: Its sites.
        store: Where its objects will be.

    Raises:
        InputError: The storage cannot be used.
    """
    url = config.storage or DEFAULT_STORAGE
    database = open_database(url)
    try:
        initialise(database)
        return _create(config, task, found, RunStore(database), store.address)
    finally:
        database.close()


def open_run(config: RunConfig, record: stored.RunRecord, store: ArtifactStore, *, engine: str) -> RunHandle:
    """A recorded run, to be driven by this process.

    Args:
        config: Its configuration; the places it names are recorded once the run is entered.
        record: The run.
        store: Where its objects are, or go from now on.
        engine: What it is searched with, for people.

    Raises:
        InputError: The storage cannot be used.
    """
    if config.artifacts in (None, record.artifacts):
        # The same place, however it is written; a worker that finishes a run may see it under a name of its own.
        record = replace(record, artifacts=store.address)
    database = open_database(config.storage or DEFAULT_STORAGE)
    try:
        initialise(database)
        return RunHandle(
            database,
            record,
            role="driver",
            engine=engine,
            workers=config.workers,
            folder=output_of(config, record),
            artifacts=store,
        )
    except BaseException:
        database.close()
        raise


def _create(config: RunConfig, task: Task, found: Survey, store: RunStore, artifacts: str) -> stored.RunRecord:
    record = store.create(
        stored.RunSpec(
            name=config.name or task.name,
            model_digest=task.loaded.digest,
            data_digest=task.data_digest,
            config=stored_values(config),
            scheme=config.scheme.build().name,
            hardware={"rho": found.scarcity.rho, "explanation": found.scarcity.explanation},
            scope=config.search.scope,
            versions=versions(),
            space_hash="",
            config_digest=config_digest(config),
            artifacts=artifacts,
        )
    )
    return store.place(record.id, str(output_of(config, record)))


@contextmanager
def named(run_id: str, storage: str) -> Iterator[None]:
    """Tell who interrupts a run how to go on with it.

    Args:
        run_id: The run.
        storage: Address of its database, passwords masked.

    Raises:
        Interrupted: The block was asked to stop.
        KeyboardInterrupt: It was left by a second Ctrl-C.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        told = f"interrupted; what was found is on record, go on with: {resume_command(run_id, storage)}"
        raise type(error)(told) from error


def open_existing_run(database: Database, run: str) -> stored.RunRecord:
    """A run that is on record, by id or the beginning of it.

    Raises:
        InputError: There is none, or it is finished.
    """
    record = RunStore(database).get(run)
    if record.status == "finished":
        raise InputError("RUN", f"{record.id} is finished", f"its result is in {Path(record.folder)}")
    return record
