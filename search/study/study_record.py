"""Logs of a study: kept in the database of this process, or sent to the process that has one."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from alphasmith.search.study.space import SPACE, SPACE_DIGEST
from alphasmith.search.study.writer import Writer
from alphasmith.storage.database.connection import StorageError
from alphasmith.storage.database.optuna_private import insert_trials, storage_trouble
from alphasmith.storage.database.retries import retry_lost
from alphasmith.storage.queue.board import LeaseLostError


@dataclass(frozen=True, kw_only=True)
class StudyStart:
    """A study begins, or goes on: its frozen search space and where its candidates are scored."""

    space: str
    space_digest: str
    device: str


@dataclass(frozen=True, kw_only=True)
class StudyNote:
    """A fact of a study, kept as its attribute ``name``; ``value`` is JSON-able."""

    name: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class StudyTrials:
    """Finished trials that were scored together: recorded whole or not at all.

    Attributes:
        first: Number of the first one.
        trials: In the order of their numbers.
    """

    first: int
    trials: tuple[FrozenTrial, ...]


#: What a search tells of its study, in the order in which it must be recorded.
StudyMessage: TypeAlias = StudyStart | StudyNote | StudyTrials


@dataclass(frozen=True, kw_only=True)
class StudyPast:
    """What is recorded of a study already.

    Attributes:
        trials: Finished trials, by number from 0.
        notes: Facts noted so far.
    """

    trials: tuple[FrozenTrial, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def after(self, message: StudyMessage) -> StudyPast:
        """What is recorded once ``message`` is."""
        match message:
            case StudyStart():
                frozen = {SPACE: message.space, SPACE_DIGEST: message.space_digest, "device": message.device}
                return replace(self, notes={**frozen, **self.notes})
            case StudyNote():
                return replace(self, notes={**self.notes, message.name: message.value})
            case StudyTrials():
                return replace(self, trials=(*self.trials[: message.first], *message.trials))


#: Called with the connection of every transaction that adds trials; raises where they must not be added, see ``Board.fence``.
Fence: TypeAlias = Callable[[Any], None]


class StudyLog(Protocol):
    """Takes what a study finds, in order, and knows what was recorded before.

    Attributes:
        past: What was recorded before this search began, and its messages since.
    """

    past: StudyPast

    def tell(self, message: StudyMessage) -> None:
        """Record one message; a batch of trials whole or not at all."""
        ...


class SentLog:
    """Sends everything to another process, which records it.

    Attributes:
        past: What was recorded before, and what was sent since.

    Args:
        past: What that process has recorded before.
        send: Sends one message, e.g. over a pipe.
    """

    def __init__(self, past: StudyPast, send: Callable[[StudyMessage], None]) -> None:
        self.past = past
        self._send = send

    def tell(self, message: StudyMessage) -> None:
        """Send one message."""
        self._send(message)
        self.past = self.past.after(message)


class StoredLog:
    """Records a study in Optuna's tables, off the caller's path where there is a writer.

    Attributes:
        past: What the tables held when this log was made, and all messages since.
        lost: Whether the right to record this study went to another process; from then on nothing is recorded.

    Args:
        storage: Optuna storage.
        name: Name of the study; it is made by the first message.
        writer: Its thread writes; None: written at once.
        fence: Called inside every transaction that adds trials; raises LeaseLostError where another process has taken over.
    """

    def __init__(
        self, storage: BaseStorage, name: str, *, writer: Writer | None = None, fence: Fence | None = None
    ) -> None:
        self._storage = storage
        self._name = name
        self._writer = writer
        self._fence = fence
        self._study: optuna.Study | None = None
        self._waiting: deque[StudyTrials] = deque()
        self.lost = False
        self.past = retry_lost(self._read)
        self._fresh = SPACE_DIGEST not in self.past.notes

    def tell(self, message: StudyMessage) -> None:
        """Record one message, after all earlier ones.

        Raises:
            AlphasmithError: The database refused it; with a writer, at a later call.
        """
        self.past = self.past.after(message)
        if isinstance(message, StudyTrials):
            self._waiting.append(message)
            self._write(self._insert, self._waiting)
            return
        self._waiting = deque()  # trials that come later must not be stored before this
        self._write(self._begin if isinstance(message, StudyStart) else self._note, message)

    def _write(self, job: Callable[..., None], argument: Any) -> None:
        if self._writer is None:
            self._unless_lost(job, argument)
        else:
            self._writer.submit(self._unless_lost, job, argument)

    def _unless_lost(self, job: Callable[..., None], argument: Any) -> None:
        if self.lost:
            return
        try:
            retry_lost(lambda: job(argument))
        except LeaseLostError:
            self.lost = True
        except StorageInternalError as error:  # Optuna's own; people get one line, as of every other refusal
            raise StorageError(f"{self._name}: {storage_trouble(error, self._storage)}") from error

    def _read(self) -> StudyPast:
        try:
            study_id = self._storage.get_study_id_from_name(self._name)
        except KeyError:
            return StudyPast()
        trials = tuple(trial for trial in self._storage.get_all_trials(study_id) if trial.state.is_finished())
        for trial in trials:
            # Ours have none. Samplers keep their states there, CMA-ES as a pickle: whoever writes a row must not run code.
            trial.system_attrs = {}
        return StudyPast(trials=trials, notes=self._storage.get_study_user_attrs(study_id))

    def _begin(self, message: StudyStart) -> None:
        self._study = study = optuna.create_study(
            study_name=self._name, storage=self._storage, load_if_exists=True, sampler=optuna.samplers.RandomSampler()
        )
        if self._fresh:
            study.set_user_attr(SPACE, message.space)
            study.set_user_attr(SPACE_DIGEST, message.space_digest)
            study.set_user_attr("device", message.device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(["quantization loss"])  # the dashboard's axis label

    def _note(self, message: StudyNote) -> None:
        self._known().set_user_attr(message.name, message.value)

    def _insert(self, waiting: deque[StudyTrials]) -> None:
        """Insert all batches that wait by now; the jobs queued for the later ones of them then find nothing to do."""
        batches = list(waiting)
        if not batches:
            return
        trials = [trial for batch in batches for trial in batch.trials]
        study_id = self._storage.get_study_id_from_name(self._name)
        insert_trials(self._storage, study_id, trials, first=batches[0].first, fence=self._fence)
        for _ in batches:
            waiting.popleft()  # only now: a repeat after a lost connection must find them

    def _known(self) -> optuna.Study:
        return self._study or optuna.load_study(study_name=self._name, storage=self._storage)
