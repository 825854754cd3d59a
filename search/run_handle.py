"""One run, open for work: its records, its tickets, its objects in the artifact store, the heartbeat of this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.search.config import WorkersConfig
from alphasmith.search.interruption import Interrupted
from alphasmith.search.study_log import StoredLog
from alphasmith.search.writer import Writer
from alphasmith.storage.artifact_store import ArtifactStore
from alphasmith.storage.board import Board, Heartbeat
from alphasmith.storage.database import Database, StorageError, optuna_storage
from alphasmith.storage.kept import KeptArtifacts, place_of
from alphasmith.storage.output import partial_folders
from alphasmith.storage.record_types import RunRecord
from alphasmith.storage.records import RunStore
from alphasmith.storage.work_records import ArtifactKind, WorkerRole

_TAKEN_OVER = "run {} was taken over by another process, which goes on with it"


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

    Args:
        database: An initialised database; closed at the end.
        record: The run.
        role: Whether this process drives the run.
        engine: What it searches with, for people.
        workers: Leases and attempts.
        folder: Where a driver will have the output, if elsewhere than recorded; recorded on entering.
        artifacts: Where a driver will have the objects; recorded on entering, with a copy of what the run still needs.
            None: where they are recorded.
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
        self.kept = KeptArtifacts(database, artifacts or ArtifactStore.open(record.artifacts), record.id)
        self.optuna_storage = optuna_storage(database)
        self.database = database
        self.shared = database.backend != "sqlite"
        self._role = role
        self._record = record
        self._inside = ExitStack()
        self._replaced = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self.database.close)
            if self._role == "driver":
                self.board.drive()
                stack.callback(self.board.stop_driving)
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
        with suppress(StorageError) if error is not None else ExitStack():
            try:
                if error is not None and self._role == "driver":
                    self._mark(error)
            finally:
                self._inside.close()
            if error is None and self._role == "driver":
                self.board.forget_driver()
            if isinstance(error, AlphasmithError) and self._replaced and not isinstance(error, Interrupted):
                # What such a process runs into, a folder that is taken say, is the other one's work.
                raise AlphasmithError(_TAKEN_OVER.format(self.id)) from error

    def study_name(self, of: str) -> str:
        """Name of the study of a site, of the whole model (``model``) or of the ``refinement``."""
        return f"{self.id}/{of}"

    def check_driving(self) -> None:
        """Refuse to record anything more of a run that another process has taken over.

        Raises:
            AlphasmithError: One has, because this one was not heard of for longer than a lease.
        """
        if not self.board.driving:
            raise AlphasmithError(_TAKEN_OVER.format(self.id))

    def discard_working_objects(self) -> None:
        """Drop calibration rows and weights: a finished run needs them no more."""
        kinds: tuple[ArtifactKind, ...] = ("calibration", "weights")
        if self.shared:
            self.kept.forget(
                kinds
            )  # the objects go with `alphasmith db gc`, which knows whether others write to the store
        else:
            self.kept.discard(kinds)

    def discard_partial_output(self) -> None:
        """Remove what a killed driver of this run left beside its folder. Only while this process drives the run."""
        for partial in partial_folders(self.folder):
            shutil.rmtree(partial, ignore_errors=True)

    def study_log(self, of: str, writer: Writer | None = None) -> StoredLog:
        """Where a study that is no site's is recorded, for as long as this process drives the run."""
        return StoredLog(self.optuna_storage, self.study_name(of), writer=writer, fence=self.board.driver_fence())

    def _take_places(self) -> None:
        before = self._record
        if before.artifacts != self.kept.store.address:
            self._take_objects_along(before.artifacts)
            self.store.keep_in(self.id, self.kept.store.address)
        if before.folder != str(self.folder):
            for partial in partial_folders(Path(before.folder)) if before.folder else ():
                shutil.rmtree(partial, ignore_errors=True)
            self.store.place(self.id, str(self.folder))

    def _take_objects_along(self, before: str) -> None:
        """Copy what cannot be made again: results and, for workers, weights. What is in the new store already is left as it is.

        Raises:
            InputError: A worker still writes to the store before, or something is in neither store.
        """
        new = self.kept.store
        if any(worker.alive and worker.role == "worker" for worker in self.board.workers()):
            raise InputError(
                "artifacts",
                f"workers of {self.id} still use {before}",
                "end them and wait for the end of their lease, or go on with that place",
            )
        needed: list[tuple[ArtifactKind, str]] = [("result", site) for site in self.board.results()]
        if self.shared:
            needed += [("weights", ticket.site) for ticket in self.board.tickets()]
        missing = [(kind, name) for kind, name in needed if self.kept.get(kind, name) is None]
        try:
            old = KeptArtifacts(self.database, ArtifactStore.open(before), self.id) if missing else self.kept
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

    def _mark(self, error: BaseException) -> None:
        self.board.renew()  # a process that was frozen may learn only now that it was replaced
        if not self.board.driving:
            self._replaced = True
            return  # whoever took over says how the run ends
        reason = str(error) or type(error).__name__
        if isinstance(error, Interrupted | KeyboardInterrupt):
            self.store.interrupt(self.id, reason)
        else:
            self.store.fail(
                self.id, reason if isinstance(error, AlphasmithError) else f"{type(error).__name__}: {reason}"
            )
