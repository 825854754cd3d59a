"""Interrupts: the first Ctrl-C stops a run in good order, the second one at once. What was recorded stays."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from alphasmith.objectives.errors import AlphasmithError

#: Exit code of a command that was interrupted.
_INTERRUPTED = 130


class Interrupted(AlphasmithError):
    """The run was asked to stop; everything it found so far is on record."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


def leave(stop: Callable[[], bool]) -> None:
    """End the work here if ``stop`` says so.

    Raises:
        Interrupted: It does.
    """
    if stop():
        raise Interrupted("asked to stop")


def _end() -> None:
    os.write(2, b"error: stopped at once, without waiting for what does not answer; resume with alphasmith resume\n")
    os._exit(_INTERRUPTED)


class Interruption:
    """Turns the first SIGINT or SIGTERM into a request and lets the second one through. For a process that is not shared.

    After the second one the run is marked and worker processes are ended, where that is a matter of moments. A database that
    does not answer would be waited for: then the process ends all the same, as by a kill, and the run can be resumed.

    Used as a context, which restores the handlers. Signals reach the main thread only; elsewhere nothing is installed.
    SIGTERM is what Slurm and Kubernetes send before they kill.

    Args:
        on_signal: Called at the first signal, e.g. to say what will happen; must be quick and raise nothing.
        patience: Seconds after the second signal after which the process ends whatever it waits for [s].
    """

    def __init__(self, on_signal: Callable[[], None] = lambda: None, *, patience: float = 5.0) -> None:
        self._on_signal = on_signal
        self._patience = patience
        self._before: dict[int, Any] = {}
        self.requested = False

    def __call__(self) -> bool:
        """Whether a signal came: what ``stop`` parameters ask."""
        return self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            end = threading.Timer(self._patience, _end)
            end.daemon = True
            end.start()
            raise KeyboardInterrupt
        self.requested = True
        self._on_signal()
