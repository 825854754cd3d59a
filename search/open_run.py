"""From a configuration or a recorded run to a run that is open for work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from alphasmith.storage.artifact_store import default_address
from alphasmith.storage.database import Database, initialise, is_there, open_database, open_existing
from alphasmith.storage.records import RunStore


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


def new_run(config: RunConfig, task: Task, found: Survey) -> stored.RunRecord:
    """A run on record, in a database that is made where there is none.

    Raises:
        InputError: The storage cannot be used.
    """
    url = config.storage or DEFAULT_STORAGE
    database = open_database(url)
    try:
        initialise(database)
        return _create(config, task, found, RunStore(database), url)
    finally:
        database.close()


def open_run(config: RunConfig, record: stored.RunRecord, *, engine: str) -> RunHandle:
    """A recorded run, to be driven by this process.

    Args:
        config: Its configuration.
        record: The run.
        engine: What it is searched with, for people.

    Raises:
        InputError: The storage cannot be used.
    """
    database = open_database(config.storage or DEFAULT_STORAGE)
    initialise(database)
    return RunHandle(database, record, role="driver", engine=engine, workers=config.workers)


def _create(config: RunConfig, task: Task, found: Survey, store: RunStore, url: str) -> stored.RunRecord:
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
            artifacts=config.artifacts or default_address(url),
        )
    )
    folder = (config.out or DEFAULT_OUT / record.id).expanduser().resolve()
    return store.place(record.id, str(folder))


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
