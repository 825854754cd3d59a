"""The worker's side of ``processes``: orders come in over one pipe, answers go out over the same.

Every message is one pickle, but for two: nothing at all asks the worker to stop, and what follows ``Hold`` is the pickle of
a ``ModelWork``, passed on as it is because it may be as large as the model.
"""

from __future__ import annotations

import os
import pickle
import pkgutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NoReturn, Protocol

import optuna
import torch
from torch import Tensor

from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.text import error_line
from alphasmith.search.engines.local._packing import packed
from alphasmith.search.engines.types import ModelWork, SearchEnd, Work
from alphasmith.search.study.study_record import SentLog, StudyLog, StudyMessage

#: Asks a worker to end the search it is at, and all that follow.
STOP = b""


class Perform(Protocol):
    """Does one piece of work: of ``alphasmith.search.engines.perform.perform`` a ``SiteWork``."""

    def __call__(self, work: Any, log: StudyLog, *, device: str | None, stop: Callable[[], bool]) -> SearchEnd:
        """Search; what is found goes to ``log``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Setup:
    """First order: how this worker works.

    Attributes:
        perform: Dotted name ``module:function`` of a :class:`Perform`.
        device: Torch device; None: the CPU.
        threads: Torch threads.
    """

    perform: str
    device: str | None
    threads: int


@dataclass(frozen=True)
class Hold:
    """Order: keep the model work that follows under ``key``. No answer."""

    key: int


@dataclass(frozen=True)
class Drop:
    """Order: forget the model work ``key``. No answer."""

    key: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Race:
    """Order: race candidate models, see ``ModelObjective.race``; tensors are on the CPU.

    Attributes:
        key: The model work that judges them.
    """

    key: int
    smoothings: tuple[Mapping[str, Smoothing], ...]
    incumbent: Tensor | None
    protected: int


@dataclass(frozen=True)
class Ready:
    """Answer: the worker has started and takes orders."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Answer to ``Race``: one score per candidate, in order."""

    scores: tuple[ModelScore, ...]


@dataclass(frozen=True)
class Failure:
    """Answer: an order was not carried out, and why, in one line."""

    reason: str


def dump(message: Any) -> bytes:
    """The bytes of a message; tensors are copied into them, so that nothing is shared between the processes."""
    return packed(message)


def serve(connection: Connection) -> NoReturn:
    """Carry out orders until the other end of the pipe is closed, then end the process."""
    setup: Setup = pickle.loads(connection.recv_bytes())
    torch.set_num_threads(setup.threads)
    torch.set_num_interop_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs a line per study
    worker = _Worker(connection, pkgutil.resolve_name(setup.perform), setup.device)
    threading.Thread(target=worker.listen, name="orders", daemon=True).start()
    worker.work()


class _Worker:
    """Carries out orders one after the other, while a thread listens."""

    def __init__(self, connection: Connection, perform: Perform, device: str | None) -> None:
        self._connection = connection
        self._perform = perform
        self._device = device
        self._orders: SimpleQueue[bytes] = SimpleQueue()
        self._sending = threading.Lock()
        self._stopped = False
        self._models: dict[int, bytes] = {}
        self._judges: dict[int, ModelObjective] = {}

    def listen(self) -> None:
        """Take in orders; a pipe that ends means that nobody is left to work for."""
        try:
            while True:
                order = self._connection.recv_bytes()
                if order == STOP:
                    self._stopped = True
                else:
                    self._orders.put(order)
        except (EOFError, OSError):
            os._exit(0)

    def work(self) -> NoReturn:
        """Answer orders."""
        self._send(dump(Ready()))
        while True:
            try:
                # No name for its bytes: they are as large as the site, and would be kept through the search.
                answer = self._answer(pickle.loads(self._orders.get()))
                message = None if answer is None else dump(answer)
            except Exception as error:  # noqa: BLE001  the border of the process: whatever it is, the driver is told
                message = dump(Failure(error_line(error)))
            if message is not None:
                self._send(message)

    def _answer(self, order: Work | Race | Hold | Drop) -> SearchEnd | Scores | None:
        match order:
            case Race():
                scores = self._judge(order.key).race(
                    order.smoothings, incumbent=order.incumbent, protected=order.protected
                )
                return Scores(tuple(scores))
            case Hold():
                self._models[order.key] = self._orders.get()
            case Drop():
                self._models.pop(order.key, None)
                self._judges.pop(order.key, None)
            case _:
                log = SentLog(order.past, self._tell)
                return self._perform(order, log, device=self._device, stop=lambda: self._stopped)
        return None

    def _judge(self, key: int) -> ModelObjective:
        """The judge of a model work, made when it is first needed."""
        if key not in self._judges:
            work: ModelWork = pickle.loads(self._models[key])
            self._judges[key] = work.judge(self._device or "cpu")
            del self._models[key]
        return self._judges[key]

    def _tell(self, message: StudyMessage) -> None:
        self._send(dump(message))

    def _send(self, message: bytes) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(message)
        except OSError:  # the driver is gone; nothing that is found now can be kept
            os._exit(0)
