"""The in-process engine: searches run in the calling process, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.search.engines.perform import perform
from alphasmith.search.engines.types import ModelWork, OnMessage, SearchEnd, SiteWork
from alphasmith.search.interruption import Interrupted, never
from alphasmith.search.study.fault_isolation import Racer
from alphasmith.search.study.study_record import SentLog, StudyMessage


class InProcess:
    """Searches inside :meth:`wait`; see :class:`alphasmith.search.engines.types.Engine`.

    Args:
        device: Torch device of the searches; None: the CPU.
        stop: Asked before every batch of candidates whether to leave; beside :meth:`stop`, since a signal is seen while
            this process searches.
    """

    name = "local"

    def __init__(self, device: str | None = None, *, stop: Callable[[], bool] = never) -> None:
        self._device = device
        self._asked = stop
        self._stopped = False
        self._held: deque[SiteWork] = deque()

    @property
    def slots(self) -> int:
        """One at a time."""
        return 0 if self._held or self._stopped else 1

    def submit(self, work: Any) -> None:
        """Keep the work for :meth:`wait`."""
        self._held.append(work)

    def wait(self, receive: OnMessage, timeout: float) -> list[SearchEnd]:
        """Search what is held, however long it takes."""
        ended = []
        while self._held:
            work = self._held.popleft()
            receiver = _Receiver(work.site, receive)
            log = SentLog(work.past, receiver)
            ended.append(perform(work, log, device=self._device, stop=lambda: self._stopped or self._asked()))
            if receiver.error is not None:
                raise receiver.error
        return ended

    def racer(self, judge: ModelObjective, work: Callable[[], ModelWork]) -> Racer:
        """The judge itself."""
        return judge

    def stop(self) -> None:
        """Let the search that runs end after its batch."""
        self._stopped = True

    def close(self) -> None:
        """Forget what is held."""
        self._held.clear()


class _Receiver:
    """Passes messages on and keeps what the receiver raises: that ends the search, but is not a failure of it."""

    def __init__(self, site: str, receive: OnMessage) -> None:
        self._site = site
        self._hear = receive
        self.error: Exception | None = None

    def __call__(self, message: StudyMessage) -> None:
        try:
            self._hear(self._site, message)
        except Exception as error:
            self.error = error
            raise Interrupted("what is found cannot be recorded") from error
