"""The trials of a compression worked on: in this process, or by worker processes and actors that join its study in the database."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import cloudpickle
import optuna
from optuna.trial import FrozenTrial

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.text import counted, one_line
from alphasmith.search.compression._launch import Launch
from alphasmith.search.compression._study import counted as counted_trials
from alphasmith.search.compression._study import fixed, run_study
from alphasmith.search.engines.choose import make_workers
from alphasmith.search.engines.types import Engine, SearchEnd
from alphasmith.search.interruption import leave
from alphasmith.search.study.study_record import StudyMessage, StudyPast
from alphasmith.storage.database.connection import Database, StorageError, driver_line
from alphasmith.storage.queue.leases import Heartbeat, Identity
from alphasmith.storage.queue.trial_claims import TrialClaims
from alphasmith.storage.runs.compressions import CompressionRecord, CompressionStore

#: What a worker does, as a dotted name.
PERFORM = "alphasmith.search.compression.worker:perform"
#: Seconds between two looks at the study.
_LOOK = 1.0


@dataclass(frozen=True, kw_only=True)
class CompressionWork:
    """Membership of one worker: to work on trials until there are as many as asked for. See ``engines.types.Work``.

    Attributes:
        site: Which worker it is.
        crew: Stands in the ids of all workers that were started together.
        storage: Address of the database, passwords included.
        compression: Id of the compression.
        given: Pickle of model and task, where a script gave them; else empty.
        memory: Not predicted.
        past: Nothing: what a worker finds is in the study.
    """

    site: str
    crew: str
    storage: str = field(repr=False)
    compression: str
    given: bytes = field(default=b"", repr=False)
    memory: int = 0
    past: StudyPast = field(default_factory=StudyPast)


def try_all(launch: Launch, database: Database, record: CompressionRecord, *, crew: str = "") -> list[FrozenTrial]:
    """Work on the trials of a compression until all are there, as its configuration asks for it: here or by workers.

    Args:
        launch: The compression, open in this process.
        database: Its database.
        record: Its record.
        crew: Stands in the ids of the workers; empty: random.

    Returns:
        All trials that count, by number.

    Raises:
        InputError: Workers cannot be had, or cannot share the database.
        AlphasmithError: Workers die again and again, or one failed.
        Interrupted: The launch was asked to stop.
    """
    config = launch.config
    done = counted_trials(CompressionStore(database).study(record))
    if len(done) >= config.study.trials:
        return done  # before any worker is started in vain
    if config.engine == "local" and not config.workers.count:
        return try_here(launch, database, record, crew=crew)
    address = config.workers.address or os.environ.get("RAY_ADDRESS")
    if config.engine == "ray" and database.backend == "sqlite" and address not in (None, "local"):
        raise InputError(
            "storage",
            "SQLite serves one machine, and a Ray cluster may have more",
            "use postgresql://... for workers on a cluster",
        )
    work = CompressionWork(
        site="worker",
        crew=crew or Identity.here().token,
        storage=database.url,
        compression=record.id,
        given=b"" if launch.given is None else _pickled(launch),
    )
    with make_workers(config.engine, config.workers, device=config.device, perform=PERFORM) as engine:
        return _Crew(launch, engine, work, database, record).run()


def try_here(launch: Launch, database: Database, record: CompressionRecord, *, crew: str = "") -> list[FrozenTrial]:
    """Work on the trials of a compression in this process, beside any other that does, until all are there.

    Args:
        launch: The compression, open in this process.
        database: Its database.
        record: Its record.
        crew: Stands in the ids of the workers; empty: random.

    Returns:
        All trials that count, by number.

    Raises:
        InputError: The database cannot be shared with the processes that work already.
        StorageError: The database was lost.
        Interrupted: The launch was asked to stop.
    """
    study = CompressionStore(database).study(record)
    here = Identity.here()
    identity = replace(here, token=crew or here.token)
    claims = TrialClaims(database, study, lease=launch.config.workers.lease, identity=identity)
    claims.check_machine()
    with Heartbeat(claims):
        try:
            return run_study(
                study, launch.space, launch.stages, claims=claims, progress=launch.progress, stop=launch.stop
            )
        except optuna.exceptions.StorageInternalError as error:
            told = driver_line(error.__cause__ or error, database.engine.url)
            raise StorageError(f"{database.masked}: {told}") from error


class _Crew:
    """The workers of one engine, each a member until all trials are there; one that dies is replaced."""

    def __init__(
        self, launch: Launch, engine: Engine, work: CompressionWork, database: Database, record: CompressionRecord
    ) -> None:
        self._launch, self._engine, self._work = launch, engine, work
        self._study = CompressionStore(database).study(record)
        self._held = self._shown = self._lost = 0
        self._stopping = False

    def run(self) -> list[FrozenTrial]:
        launch = self._launch
        total, count = launch.config.study.trials, launch.config.workers.count
        launch.progress.note(f"trials are worked on by {self._engine.name}")
        launch.progress.stage("trials", total)
        # An engine takes as many pieces again as it works on at once, to have them at hand; here they would wait in vain.
        for number in range(count or max(1, self._engine.slots // 2)):
            self._join(number)
        while self._held:
            for end in self._engine.wait(_ignored, _LOOK):
                self._ended(end)
            self._show()
            if launch.stop() and not self._stopping:
                self._stopping = True
                self._engine.stop()
        leave(launch.stop)
        done = counted_trials(self._study)
        if len(done) < total:
            raise AlphasmithError(f"workers ended with {counted(len(done), 'trial')} of {total}")
        return done

    def _join(self, number: int) -> None:
        if self._engine.slots:
            self._engine.submit(replace(self._work, site=f"{self._work.site} {number}"))
            self._held += 1

    def _ended(self, end: SearchEnd) -> None:
        self._held -= 1
        if end.reason and not end.lost:
            raise AlphasmithError(f"{end.site} failed: {end.reason}")
        if end.lost and not self._stopping:
            self._lost += 1
            if self._lost >= self._launch.config.workers.attempts:
                told = f"{counted(self._lost, 'worker')} died and no trial ended meanwhile"
                raise AlphasmithError(f"{told}; the last one: {end.reason}")
            self._launch.progress.note(f"{end.reason}; its trial is tried again")
            self._join(int(end.site.rpartition(" ")[2]))

    def _show(self) -> None:
        """Tell of trials that ended since the last look."""
        done = counted_trials(self._study)
        for trial in done[self._shown :]:
            self._lost = 0
            self._launch.progress.advance(str(self._launch.space.suggest(fixed(trial))))
        self._shown = len(done)


def _ignored(site: str, message: StudyMessage) -> None:
    """Workers tell the database, nobody else."""


def _pickled(launch: Launch) -> bytes:
    try:
        return bytes(cloudpickle.dumps(launch.given))
    except Exception as error:  # whatever a model or a task of the user's raises
        raise InputError(
            "task",
            f"model and task cannot be sent to workers ({one_line(error, 200)})",
            "name a function that makes them as task.factory, or leave the workers out",
        ) from error
