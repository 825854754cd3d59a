"""One run, open for work: its records, its tickets, its objects in the artifact store, the heartbeat of this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.text import error_line, one_line
from alphasmith.search.config import WorkersConfig
from alphasmith.search.interruption import Interrupted
from alphasmith.search.study.study_record import StoredLog
from alphasmith.search.study.types import StudyContext
from alphasmith.search.study.writer import Writer
from alphasmith.storage.artifacts.run_artifacts import RunArtifacts, place_of
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import Database, StorageError, optuna_storage
from alphasmith.storage.output.output_folder import (
    BLOCKS,
    OutputFolder,
    attempt_name,
    discard_partial,
    partial_folder,
    partial_folders,
)
from alphasmith.storage.queue.board import Board, Heartbeat
from alphasmith.storage.queue.records import ArtifactKind, WorkerRole
from alphasmith.storage.queue.status import past_drivers
from alphasmith.storage.runs.records import RunRecord
from alphasmith.storage.runs.run_store import RunStore

_TAKEN_OVER = "run {} was taken over by another process, which continues it"


class RunHandle:
    """Used as a context: this process joins the run, and leaves it in a state that says why.

    A driver takes the exclusive right to record the run first; an error inside marks the run as failed with its message, a
    request to stop as interrupted.

    Attributes:
        id: The run.
        store: Records of runs.
        board: Tickets of the run, claims of this process.
        kept: Objects of the run in the artifact store.
        optuna_storage: Where its studies are.
        folder: Its output folder, absolute.
        storage: Address of its database, passwords masked.
        database: The database.
        shared: Whether other processes can take part.
        now: The clock.

    Args:
        database: An initialised database; stays open.
        record: The run.
        role: Whether this process drives the run.
        engine: Display name of the engine.
        workers: Leases and attempts.
        folder: Where a driver will have the output, if elsewhere than recorded; recorded on entering.
        artifacts: Where a driver will have the objects; recorded on entering, with a copy of what the run still needs.
            None: where they are recorded.
        on_driving: Called by a driver that enters once it has the right to drive; may refuse by an error.
        on_publishing: Called right before its output folder is renamed, while nobody else can drive the run; likewise.
        clock: Zone-aware now.

    Raises:
        InputError: The artifact store cannot be used. On entering: another live process drives the run, this database serves
            one process only, or the run cannot leave the store it has.
    """

    def __init__(
        self,
        database: Database,
        record: RunRecord,
        *,
        role: WorkerRole,
        engine: str,
        workers: WorkersConfig,
        folder: Path | None = None,
        artifacts: ArtifactStore | None = None,
        on_driving: Callable[[], None] = lambda: None,
        on_publishing: Callable[[], None] = lambda: None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.id = record.id
        self.folder = folder or Path(record.folder)
        self.storage = database.masked
        self.store = RunStore(database, clock=clock)
        self.board = Board(
            database,
            record.id,
            role=role,
            engine=engine,
            lease=workers.lease,
            attempts=workers.attempts,
            clock=clock,
        )
        self.kept = RunArtifacts(database, artifacts or ArtifactStore.open(record.artifacts), record.id)
        self.optuna_storage = optuna_storage(database)
        self.database = database
        self.shared = database.backend != "sqlite"
        self.now = clock
        self._on_driving = on_driving
        self._on_publishing = on_publishing
        self._role = role
        self._record = record
        self._inside = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._role == "driver":
                self.board.drive()
                stack.callback(self.board.stop_driving)
                self._on_driving()
                # Under the right to drive the run, so that nobody else records places meanwhile.
                self._take_places()
            self.board.join()
            stack.callback(self.board.leave)
            if self._role == "driver":
                self.store.start(self.id)
            stack.enter_context(Heartbeat(self.board))
            self._inside = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A database that is gone must not hide why the run ended.
        replaced = False
        with suppress(StorageError) if error is not None else ExitStack():
            try:
                if error is not None and self._role == "driver":
                    replaced = not self._mark(error)
            finally:
                self._inside.close()
            if error is None and self._role == "driver":
                self.board.forget_driver()
        if replaced and isinstance(error, AlphasmithError) and not isinstance(error, Interrupted):
            # What such a process runs into, a folder that is taken say, is the other one's work.
            raise AlphasmithError(_TAKEN_OVER.format(self.id)) from error

    def study_name(self, of: str) -> str:
        """Name of the study of a site, of the whole model (``model``) or of the ``refinement``."""
        return f"{self.id}/{of}"

    def check_driving(self) -> None:
        """Refuse to record anything more of a run that another process has taken over.

        Raises:
            AlphasmithError: One has, because this one sent no heartbeat for longer than a lease.
        """
        self.board.renew()  # a process that was frozen may learn only now that it was replaced
        if not self.board.driving:
            raise AlphasmithError(_TAKEN_OVER.format(self.id))

    def discard_working_objects(self) -> None:
        """Drop calibration rows and weights, and what lies between blocks: a finished run needs them no more."""
        if self.blocks_folder.is_dir():
            discard_partial(self.blocks_folder)
        kinds: tuple[ArtifactKind, ...] = ("calibration", "weights")
        if self.shared:
            # Another process may be about to name one of these objects: they go with `alphasmith db gc`.
            self.kept.forget(kinds)
        else:
            self.kept.discard(kinds)

    def discard_partial_output(self) -> None:
        """Remove what earlier drivers of this run left beside its folder. Only while this process drives the run."""
        self._discard_partial(self.folder)

    def output(self) -> OutputFolder:
        """The output folder, to be written and, if this process still drives the run by then, published."""

        def publish(rename: Callable[[], None]) -> None:
            def step() -> None:
                self._on_publishing()
                rename()

            self.board.while_driving(step)

        return OutputFolder(self.folder, attempt=attempt_name(self.id, self.board.token), publish=publish)

    @property
    def blocks_folder(self) -> Path:
        """Where a run that goes block by block keeps what it goes on from."""
        return partial_folder(self.folder, attempt_name(self.id, BLOCKS))

    def finish(self) -> None:
        """Mark the run as finished, if this process still drives it.

        Raises:
            InputError: It does not.
        """
        self.store.finish(self.id, driver=self.board.worker)

    def study_context(self, of: str, writer: Writer, *, device: str, stop: Callable[[], bool]) -> StudyContext:
        """Of the study of the whole model (``model``) or of the ``refinement``, recorded while this process drives the run."""
        name = self.study_name(of)
        log = StoredLog(self.optuna_storage, name, writer=writer, fence=self.board.driver_fence())
        return StudyContext(device=device, log=log, name=name, stop=stop)

    def _take_places(self) -> None:
        before = self._record
        if before.artifacts != self.kept.store.address:
            self._take_objects_along(before.artifacts)
            self.store.keep_in(self.id, self.kept.store.address)
        if before.folder != str(self.folder):
            if before.folder:
                self._discard_partial(Path(before.folder), BLOCKS)
            self.store.place(self.id, str(self.folder))

    def _discard_partial(self, out: Path, *more: str) -> None:
        earlier = {*past_drivers(self.database, self.id), *more} - {self.board.token}
        for partial in partial_folders(out, self.id, earlier):
            discard_partial(partial)

    def _take_objects_along(self, before: str) -> None:
        """Copy what cannot be made again: results and, for workers, weights. What is there already is left."""
        new = self.kept.store
        if any(worker.alive and worker.role == "worker" for worker in self.board.workers()):
            raise InputError(
                "artifacts",
                f"workers of {self.id} still use {before}",
                "end them and wait for the end of their lease, or resume with that place",
            )
        needed: list[tuple[ArtifactKind, str]] = [("result", site) for site in self.board.results()]
        if self.shared:
            needed += [("weights", ticket.site) for ticket in self.board.tickets()]
        missing = [(kind, name) for kind, name in needed if self.kept.get(kind, name) is None]
        try:
            old = RunArtifacts(self.database, ArtifactStore.open(before), self.id) if missing else self.kept
            for kind, name in missing:
                found = old.look(kind, name)
                if found.tensors is None:
                    raise InputError("artifacts", found.reason, "restore it")
                new.put(found.tensors, found.metadata)
        except InputError as error:
            raise InputError(
                "artifacts",
                f"{len(missing)} objects that {self.id} needs are not in {new.address} and cannot be copied ({error.problem})",
                "mend that, copy the files yourself, or begin a new run with --new",
            ) from error
        new.announce(place_of(self.database))

    def _mark(self, error: BaseException) -> bool:
        """Say on record why this driver leaves; False where another one took over, which says how the run ends."""
        self.board.renew()  # a process that was frozen may learn only now that it was replaced
        if not self.board.driving:
            return False
        if isinstance(error, Interrupted | KeyboardInterrupt):
            self.store.interrupt(self.id, one_line(error) or type(error).__name__)
        else:
            self.store.fail(self.id, error_line(error))
        return True
