"""One thread that writes to the database while the search goes on: order is kept, errors come back to the caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

#: Jobs that may wait: bounds what kill -9 can lose and what a slow database can pile up.
_DEPTH = 128


class Writer:
    """Runs jobs one after the other in its own thread.

    After a job has failed no later one is run, so that the database holds a prefix of what was found. The error is raised
    by the next ``submit``, ``flush`` or by leaving the context.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="alphasmith-writer")
        self._pending: deque[Future[None]] = deque()
        self._broken = False

    def submit(self, job: Callable[..., object], *args: Any) -> None:
        """Queue ``job(*args)``; waits while too many jobs are queued.

        Raises:
            Exception: Whatever an earlier job raised.
        """
        while self._pending and (self._pending[0].done() or len(self._pending) >= _DEPTH):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._run, job, *args))

    def flush(self) -> bool:
        """Wait until everything is written; whether there was anything to wait for.

        Raises:
            Exception: Whatever a job raised.
        """
        waited = bool(self._pending)
        while self._pending:
            self._pending.popleft().result()
        return waited

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            # What was found before an error is written, too; only then the thread ends.
            self._pool.shutdown(wait=True)

    def _run(self, job: Callable[..., object], *args: Any) -> None:
        if self._broken:
            return
        self._broken = True
        job(*args)
        self._broken = False
