"""An autonomous worker: searches sites of a run through its database, without its model or its data."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import optuna

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.judge.memory import return_large_blocks
from alphasmith.objectives.text import duration
from alphasmith.search.config import DEFAULT_STORAGE, RunConfig, resume_command
from alphasmith.search.devices import search_device, thread_budget
from alphasmith.search.engines.choose import make_engine
from alphasmith.search.inputs.permission import CodeNotAllowedError, check_code
from alphasmith.search.interruption import leave, never
from alphasmith.search.launch._lookup import named, stored_config
from alphasmith.search.launch.pipeline import ScriptInputs, drive
from alphasmith.search.progress import Progress, Silent
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.writer import Writer
from alphasmith.search.work.session import RunHandle
from alphasmith.search.work.site_results import SiteResults
from alphasmith.search.work.site_sources import PublishedSites
from alphasmith.search.work.site_stage import SiteStage
from alphasmith.search.work.waiting import POLL, appeared
from alphasmith.storage.artifacts.store import ArtifactStore, MissingArtifactError
from alphasmith.storage.database.connection import Database
from alphasmith.storage.database.urls import mask
from alphasmith.storage.queue.board import Board
from alphasmith.storage.queue.records import WorkerRecord
from alphasmith.storage.runs.records import RunRecord, RunStatus
from alphasmith.storage.runs.run_store import RunStore


@dataclass(frozen=True, kw_only=True)
class WorkSummary:
    """What a worker did.

    Attributes:
        run: The run.
        searched: Sites whose accepted result is this worker's.
        finished: Whether it wrote the result of the run.
        folder: Where that is, or will be.
        note: Why it left, in one clause.
    """

    run: str
    searched: int
    finished: bool
    folder: str
    note: str


def work(
    run: str,
    *,
    storage: str | None = None,
    workers: int = 0,
    artifacts: str | None = None,
    device: str | None = None,
    finish: bool = True,
    wait: float = 0.0,
    allow_code: Collection[str | Path] = (),
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
    sleep: Callable[[float], None] = time.sleep,
) -> WorkSummary:
    """Search sites of a run until all are done, whoever searches them.

    Args:
        run: Its id, the beginning of it, or its name.
        storage: The database it is in, a server that several processes can write to.
        workers: Worker processes on this machine; 0 searches in this one.
        artifacts: Where the run's objects are, if another address leads there from here.
        device: Torch device of the searches; None: the first GPU, else the CPU.
        finish: Write the run's result, if no driver is alive by the time all sites are done and its model can be loaded here.
        wait: Seconds to wait for the database and the run to appear, where driver and workers are launched together; also for
            a driver to come back to a run that is not planned yet.
        allow_code: Functions ``module:function`` and folders that the writing of the result may lead to, as of ``resume``.
            Searching needs none of them.
        progress: Receives stages and notes; None: silent.
        stop: Polled; returns True to stop.
        sleep: Waits a number of seconds.

    Raises:
        InputError: No such run, a database for one process only, or a run with scope ``model``, whose one study its driver
            searches. Nobody alive plans the run. Only its result is missing, and writing it needs code that was not allowed. Its objects cannot be read from here, or there is no such device.
        AlphasmithError: A site failed for good.
        Interrupted: ``stop`` said so; the site at hand is given back.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return_large_blocks()
    progress = progress or Silent()
    url = storage or DEFAULT_STORAGE
    database, record = appeared(
        url,
        lambda database: RunStore(database).get(run),
        what=f"run {run}",
        wait=wait,
        progress=progress,
        stop=stop,
        sleep=sleep,
    )
    with closing(database):
        if record.scope == "model":
            raise InputError(
                "RUN", f"{record.id} has scope 'model': one study", "give its driver --workers, or --engine ray"
            )
        if record.status == "finished":
            return _left(record, 0, "the run is finished")
        if artifacts is not None:
            record = replace(record, artifacts=artifacts)
        config = _local(stored_config(record, url), workers, device)
        if device is not None:
            search_device(config)  # a device that only this machine lacks must not fail a site
        with _objects_needed(record, url):
            try:
                searched = _search(database, record, config, wait, progress, stop, sleep)
            except (InputError, IntegrityError):
                # Whoever was away for a while, or joins late, finds nothing left of what a run needed until its end.
                if RunStore(database).get(record.id).status != "finished":
                    raise
                return _left(record, 0, "the run is finished")
            if not finish:
                return _left(record, searched, "all sites are searched")
            return _finish(database, record, config, allow_code, searched, progress, stop, sleep)


def _search(
    database: Database,
    record: RunRecord,
    config: RunConfig,
    wait: float,
    progress: Progress,
    stop: Callable[[], bool],
    sleep: Callable[[float], None],
) -> int:
    with make_engine(config, stop) as engine:
        handle = RunHandle(database, record, role="worker", engine=engine.name, workers=config.workers)
        with named(record.id, handle.storage), handle, thread_budget(config.search.threads), Writer() as writer:
            order = _planned(handle, wait, progress, stop, sleep)
            source = PublishedSites(handle.kept, order)
            keeper = SiteResults(
                handle.board, handle.kept, scheme=lambda site: config.scheme.of(site).name, position=source.position
            )
            settings = SiteSettings(
                scheme=config.scheme.build(),
                groups=config.groups,
                search=config.site_search,
                rho=float(record.hardware["rho"]),
            )
            SiteStage(
                handle,
                source,
                settings,
                scheme=config.scheme.of,
                engine=engine,
                keeper=keeper,
                writer=writer,
                progress=progress,
                stop=stop,
                sleep=sleep,
            ).run()
            return sum(winner.worker == handle.board.worker for winner in handle.board.results().values())


def _planned(
    handle: RunHandle, wait: float, progress: Progress, stop: Callable[[], bool], sleep: Callable[[float], None]
) -> list[str]:
    """Sites of the run, once its driver has planned them.

    Raises:
        InputError: No driver was alive for ``wait`` seconds; for a lease at least where none has shown itself yet.
    """
    told, alone = False, 0.0
    while not (tickets := handle.board.tickets()):
        status = handle.store.get(handle.id).status
        if status == "finished":
            tickets = handle.board.tickets()  # planned and searched since; or it had no sites
            break
        drivers = [worker for worker in handle.board.workers() if worker.role == "driver"]
        # A run is on record before its driver has joined it.
        patience = wait if drivers else max(wait, handle.board.lease)
        if any(driver.alive for driver in drivers):
            alone = 0.0
        elif alone < patience:
            alone += POLL
        else:
            raise InputError(
                "RUN",
                f"{handle.id} is {status} and was never planned, and no driver has been alive for {duration(alone)}",
                f"resume with: {resume_command(handle.id, handle.storage)}",
            )
        if not told:
            progress.note(f"waiting for the driver of {handle.id} to plan its sites")
            told = True
        leave(stop)
        sleep(POLL)
    return [ticket.site for ticket in tickets]


def _finish(
    database: Database,
    record: RunRecord,
    config: RunConfig,
    allow_code: Collection[str | Path],
    searched: int,
    progress: Progress,
    stop: Callable[[], bool],
    sleep: Callable[[float], None],
) -> WorkSummary:
    status, driver = _await_driver(database, record, config, stop, sleep)
    if status == "finished":
        return _left(record, searched, "all sites are searched, the run is finished")
    if driver:
        return _left(record, searched, f"all sites are searched, its driver ({driver}) writes the result")
    # Before this process becomes the driver: what is missing here alone must not make the run count as failed.
    _check_results(database, record)
    given = ScriptInputs(model=None, batches=None, metric=None)
    try:
        check_code(config, allow_code, f"run {record.id}")
        # Not `resume`: the objects are where this machine sees them, which need not be where the record says.
        result = drive(config, given, progress, stop, recorded=(database, record))
    except InputError as error:
        if isinstance(error, CodeNotAllowedError) and not searched:
            raise  # there was nothing else to do here
        progress.note(f"the result is not written here: {error}")
        command = resume_command(record.id, database.masked)
        return _left(record, searched, f"all sites are searched; finish with: {command}")
    return WorkSummary(
        run=record.id, searched=searched, finished=True, folder=str(result.folder), note="the result is written"
    )


def _check_results(database: Database, record: RunRecord) -> None:
    """Refuse to finish a run whose accepted results cannot be read from here."""
    winners = Board(database, record.id, role="worker").results()
    store = ArtifactStore.open(record.artifacts)
    for winner in winners.values():
        store.check(winner.artifact_id)


@contextmanager
def _objects_needed(record: RunRecord, url: str) -> Iterator[None]:
    """Replace errors about a missing artifact by one that names ``--artifacts``; the run is not changed."""
    try:
        yield
    except MissingArtifactError as error:
        raise InputError(
            "artifacts",
            str(error),
            f"name with --artifacts where they are, or resume with: {resume_command(record.id, mask(url))}",
        ) from error


def _await_driver(
    database: Database, record: RunRecord, config: RunConfig, stop: Callable[[], bool], sleep: Callable[[float], None]
) -> tuple[RunStatus, str]:
    """(status of the run, its live driver): waits for a sign of life of the driver, or until its lease has run out."""
    store, board = RunStore(database), Board(database, record.id, role="worker", lease=config.workers.lease)
    first: WorkerRecord | None = None
    while True:
        status = store.get(record.id).status
        driver = next((w for w in board.workers() if w.role == "driver" and w.alive), None)
        if driver is None or status == "finished":
            return status, ""
        if first is not None and (driver.id != first.id or driver.heartbeat > first.heartbeat):
            return status, f"{driver.host}, process {driver.pid}"
        first = first or driver
        leave(stop)
        sleep(POLL)


def _left(record: RunRecord, searched: int, note: str) -> WorkSummary:
    return WorkSummary(run=record.id, searched=searched, finished=False, folder=record.folder, note=note)


def _local(config: RunConfig, workers: int, device: str | None) -> RunConfig:
    """The run's configuration for this machine."""
    return config.model_copy(
        update={
            "engine": "local",
            "workers": config.workers.model_copy(update={"count": workers, "threads": None}),
            "search": config.search.model_copy(update={"device": device}),
        }
    )
