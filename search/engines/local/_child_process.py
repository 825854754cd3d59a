"""One worker process as its driver sees it: start, orders, answers, end."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TypeAlias

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.search.engines.local.worker_loop import Setup, dump
from alphasmith.search.idle_threads import passive_waiting
from alphasmith.search.large_pages import large_pages

_LOGGER = logging.getLogger("alphasmith")
_SCRIPT = Path(__file__).with_name("worker_process.py")
#: Seconds a process may take to vanish after its pipe has ended, and its last output to be read.
_GRACE = 5.0
#: Lines of its output that are kept to explain its death.
_KEPT_LINES = 20
#: What sizes the thread pools of torch and numpy, read by them as they are imported.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ChildProcess:
    """A worker process and the pipe to it.

    Nothing here waits for the worker: threads of this process write to the pipe and read from it, so that a worker that is
    frozen, slow, or busy starting cannot hold up the driver.

    It is not a ``multiprocessing.Process``, because that runs the driver's main script once more in the child: a launch
    script that calls ``run`` at its top level would launch itself.

    Args:
        index: Its number among the workers, for process lists.
        setup: How it works.
        events: Takes (this, message) for every message, in order, and (this, None) once when its pipe has ended.

    Raises:
        AlphasmithError: The system refuses to start a process.
    """

    def __init__(self, index: int, setup: Setup, events: SimpleQueue[Event]) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        arguments = (str(theirs.fileno()), str(os.getpid()), f"alphasmith worker {index}")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=(theirs.fileno(),),
                env={
                    **os.environ,
                    **passive_waiting(os.environ),
                    **large_pages(os.environ),
                    **dict.fromkeys(_THREADS, str(setup.threads)),
                },
                # The terminal sends Ctrl-C to the driver's process group; it is for the driver to decide.
                process_group=0,
            )
        except OSError as error:
            self._connection.close()
            raise AlphasmithError(f"no worker process can be started ({error})") from error
        finally:
            # The worker's end must be open in the worker alone: then the pipe ends when it does.
            theirs.close()
        for message in (json.dumps([str(entry) for entry in sys.path]).encode(), dump(setup)):
            self.send(message)
        jobs: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = (
            (_write, (self._connection, self._outbox)),
            (_read, (self._connection, self, events)),
            (_keep, (self._process.stdout, self._lines, self._process.pid)),
        )
        self._threads = [
            threading.Thread(target=job, args=needs, name=f"alphasmith-worker-{index}", daemon=True)
            for job, needs in jobs
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs, or is frozen."""
        return self._process.poll() is None

    @property
    def last_line(self) -> str:
        """The last line of its output; empty where there was none."""
        return self._lines[-1] if self._lines else ""

    def send(self, message: bytes) -> None:
        """Queue one message. Safe from any thread and from a signal handler; lost where the process is dead."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End the process, and those it started; it holds nothing that would need to be put away."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int | None:
        """Wait until the process is gone.

        Returns:
            Its exit code, see ``subprocess``; None where it does not go.
        """
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_GRACE)
        return None

    def dispose(self) -> str:
        """Put away what is left once its pipe has ended.

        Returns:
            How it died: ``was killed by signal 9 ...``.
        """
        if self.reap() is None:
            self.kill()
        code = self.reap()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join(_GRACE)
        self._connection.close()
        return _death(code, self.last_line)


#: A worker and what it said; None: nothing more will come.
Event: TypeAlias = tuple[ChildProcess, bytes | None]


def _write(connection: Connection, outbox: SimpleQueue[bytes | None]) -> None:
    with suppress(OSError):  # a dead worker reads nothing; its end is seen by the thread that reads
        while (message := outbox.get()) is not None:
            connection.send_bytes(message)


def _read(connection: Connection, child: ChildProcess, events: SimpleQueue[Event]) -> None:
    """What a process sent before it died is still in the pipe and is read to its end; a torn last message is dropped."""
    with suppress(EOFError, OSError):
        while True:
            events.put((child, connection.recv_bytes()))
    events.put((child, None))


def _keep(stream: IO[str], lines: deque[str], pid: int) -> None:
    """Output of workers is not the driver's, whose standard output may be read by a program; it can be had as a log."""
    with stream:
        for line in stream:
            if text := line.rstrip():
                lines.append(text.strip())
                _LOGGER.info("worker process %d: %s", pid, text)


def _death(code: int | None, last_line: str) -> str:
    if code is None:
        return "does not answer and cannot be ended"
    if code >= 0:
        return f"ended with code {code}" + (f" ({last_line})" if last_line else "")
    hint = "; the system does so when memory runs out" if -code == signal.SIGKILL else ""
    try:
        return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"
    except ValueError:  # real-time signals have no names
        return f"was killed by signal {-code}"
