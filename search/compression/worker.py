"""One more worker on a compression: joins its study in the database, works on trials, and writes the result if nobody else does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
from optuna.trial import FrozenTrial
from torch import nn

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.joint.ports import JointTask
from alphasmith.objectives.text import error_line
from alphasmith.search.compression._launch import Launch, recorded
from alphasmith.search.compression._workers import CompressionWork, try_all, try_here
from alphasmith.search.compression.compress import finish as drive
from alphasmith.search.config import DEFAULT_STORAGE
from alphasmith.search.engines.types import SearchEnd
from alphasmith.search.interruption import Interrupted, never
from alphasmith.search.progress import Progress, Silent
from alphasmith.search.study.study_record import StudyLog
from alphasmith.search.work.waiting import appeared
from alphasmith.storage.database.connection import Database, opened
from alphasmith.storage.output.reservation import ReservedError
from alphasmith.storage.output.reserved_work import driver_of
from alphasmith.storage.queue.leases import Identity
from alphasmith.storage.queue.trial_claims import WORKER
from alphasmith.storage.runs.compressions import CompressionRecord, CompressionStore

_LOGGER = logging.getLogger("alphasmith")


@dataclass(frozen=True, kw_only=True)
class CompressionWorkSummary:
    """What a worker did.

    Attributes:
        compression: The compression.
        trials: Trials that count and that it, or a worker process of its, worked on.
        finished: Whether it wrote the result.
        folder: Where that is, or will be.
        note: Why it left, in one clause.
    """

    compression: str
    trials: int
    finished: bool
    folder: str
    note: str


def work(
    compression: str,
    *,
    storage: str | None = None,
    workers: int = 0,
    device: str | None = None,
    finish: bool = True,
    wait: float = 0.0,
    allow_code: Collection[str | Path] = (),
    model: nn.Module | None = None,
    task: JointTask | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
    sleep: Callable[[float], None] = time.sleep,
) -> CompressionWorkSummary:
    """Work on the trials of a compression until all are there, whoever tries them.

    Args:
        compression: Its id, or the beginning of it.
        storage: The database it is in; None: the default one.
        workers: Worker processes on this machine; 0: trials are worked on in this process.
        device: Torch device; None: the first GPU, else the CPU.
        finish: Test the front and write the result, if no driver is alive by the time all trials are there.
        wait: Seconds to wait for the database and the compression to appear.
        allow_code: Function and folders that the record may lead to.
        model: Where it was given by a script: the same one.
        task: Likewise.
        progress: Receives stages and notes; None: silent.
        stop: Polled; returns True to stop.
        sleep: Waits a number of seconds.

    Raises:
        InputError: No such compression, it is finished, its folder is not seen from here, its model is not what it was, or an SQLite
            file that processes of another machine work with.
        Interrupted: ``stop`` said so; the trial at hand is left to others.
    """
    progress = progress or Silent()
    if workers < 0:
        raise InputError("--workers", f"{workers} processes cannot work", "give 1 or more, or 0 for this process")
    database, record = appeared(
        storage or DEFAULT_STORAGE,
        lambda there: CompressionStore(there).get(compression),
        what=f"compression {compression}",
        wait=wait,
        progress=progress,
        stop=stop,
        sleep=sleep,
    )
    with closing(database):
        if record.status == "finished":
            raise InputError("ID", f"{record.id} is finished", f"its result is in {record.folder}")
        _check_folder(record)
        changes = {"engine": "local", "workers": {"count": workers, "threads": None}, "device": device}
        launch = recorded(record, changes, model, task, allow_code, progress, stop)
        crew = Identity.here().token
        done = try_all(launch, database, record, crew=crew)
        tried = sum(_crew_of(trial) == crew for trial in done)
        note, finished = _ended(launch, database, record, finish)
    return CompressionWorkSummary(
        compression=record.id, trials=tried, finished=finished, folder=record.folder, note=note
    )


def perform(work: CompressionWork, log: StudyLog, *, device: str | None, stop: Callable[[], bool]) -> SearchEnd:
    """What a worker of an engine does: joins the study and works on trials; every outcome is returned, nothing is raised.

    Args:
        work: Which compression.
        log: Not used: the study is in the database.
        device: Torch device; None: the CPU.
        stop: Polled.
    """
    try:
        model, task = cloudpickle.loads(work.given) if work.given else (None, None)
        with opened(work.storage) as database:
            record = CompressionStore(database).get(work.compression)
            _check_folder(record)
            launch = recorded(record, {"device": device or "cpu"}, model, task, None, Silent(), stop)
            try_here(launch, database, record, crew=work.crew)
    except Interrupted:
        return SearchEnd(site=work.site, stopped=True)
    except AlphasmithError as error:
        return SearchEnd(site=work.site, reason=str(error))
    except Exception as error:
        _LOGGER.exception("a worker on %s failed", work.compression)
        return SearchEnd(site=work.site, reason=error_line(error))
    return SearchEnd(site=work.site)


def _ended(launch: Launch, database: Database, record: CompressionRecord, finish: bool) -> tuple[str, bool]:
    """(why this worker leaves, whether it wrote the result)."""
    all_there = "all trials are there"
    if not finish:
        return all_there, False
    if CompressionStore(database).get(record.id).status == "finished":
        return f"{all_there}, the compression is finished", False
    if driver := driver_of(database, record):
        return f"{all_there}, its driver ({driver}) writes the result", False
    try:
        drive(launch, database, record)
    except ReservedError as error:  # another worker was faster
        return f"{all_there}; {error.problem}", False
    return "the result is written", True


def _check_folder(record: CompressionRecord) -> None:
    """Refuse to work where the stages that workers share, and the place of the result, are not seen."""
    place = Path(record.folder).parent
    if not place.is_dir():
        raise InputError(
            "ID",
            f"{record.id} is worked on in {place}, which is not seen from here",
            "work on a machine that sees that folder, or mount it here",
        )


def _crew_of(trial: FrozenTrial) -> str:
    worker = Identity.of(str(trial.user_attrs.get(WORKER, "")))
    return "" if worker is None else worker.token
