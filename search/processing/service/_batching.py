"""Dynamic batching: items of many requests, taken together into one forward call in one worker thread.

Source: the adaptive batching of Clipper (Crankshaw et al., NSDI 2017): a call takes what waits when the one before
ends, up to a most, and a first item waits a moment for others to come. The queue is bounded by the places handed out, from
before an item is decoded until its request is answered; whoever finds none is told when to come again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from alphasmith.objectives.errors import AlphasmithError, InputError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_LOG = logging.getLogger(__name__)


class QueueFull(AlphasmithError):
    """No place is free.

    Args:
        retry_after: When one probably is [s].
    """

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"the queue is full; come again in {retry_after} s")


class Stopping(AlphasmithError):
    """The service stops and accepts nothing any more."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How items are taken together.

    Attributes:
        most: Largest number of items in a forward call.
        wait: How long the first item waits for others to share its call [s]; 0: not at all.
        places: Items that are accepted and not answered yet, at most.

    Raises:
        InputError: A number is out of range.
    """

    most: int = 32
    wait: float = 0.003
    places: int = 512

    def __post_init__(self) -> None:
        for field in ("most", "places"):
            if getattr(self, field) < 1:
                raise InputError(field, f"{getattr(self, field)} is not positive", "give at least 1")
        if not 0 <= self.wait < math.inf:
            raise InputError("wait", f"{self.wait} is no time", "give a number of seconds from 0")


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward call.

    Attributes:
        items: How many shared it.
        seconds: How long it took [s].
        waited: How long its first item had waited [s].
    """

    items: int
    seconds: float
    waited: float


@dataclass(frozen=True, kw_only=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    future: Future[Answer]
    since: float


class Batcher(Generic[Item, Answer]):
    """Takes items of many callers together. Safe under any number of threads; only its own thread calls ``forward``.

    Args:
        forward: Items -> an answer for each, in order. Where it raises, halves of the items are tried, so that only the items
            at fault fail, each with what was raised for it alone.
        settings: How items are taken together.
        seen: Called in the worker thread after every call.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[Item]], Sequence[Answer]],
        settings: BatchSettings,
        *,
        seen: Callable[[Forward], None] = lambda call: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._forward = forward
        self._settings = settings
        self._seen = seen
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[_Waiting[Item, Answer]] = deque()
        self._taken = 0
        self._last_seconds = 0.0
        self._stopping = False
        # A forward call that never ends must not keep the process: what it would answer is lost either way.
        self._thread = threading.Thread(target=self._work, name="forward", daemon=True)
        self._thread.start()

    @property
    def taken(self) -> int:
        """Places that are taken now."""
        return self._taken

    @property
    def waiting(self) -> int:
        """Items in the queue now."""
        return len(self._queue)

    @property
    def accepts(self) -> bool:
        """Whether it works and is not about to stop."""
        return self._thread.is_alive() and not self._stopping

    @contextmanager
    def places(self, count: int) -> Iterator[Callable[[Item], Future[Answer]]]:
        """Take places for the items of a request, until the block ends.

        Args:
            count: How many items there will be.

        Yields:
            What puts one item into the queue; its future may be cancelled as long as no call has taken the item.

        Raises:
            QueueFull: So many are not free.
            Stopping: No places are given any more.
        """
        with self._changed:
            self.check(count)
            self._taken += count
        try:
            yield self._put
        finally:
            with self._changed:
                self._taken -= count

    def check(self, count: int = 1) -> None:
        """Refuse early what :meth:`places` would refuse now.

        Args:
            count: How many items there would be.

        Raises:
            QueueFull: So many are not free.
            Stopping: No places are given any more.
        """
        if not self.accepts:
            raise Stopping("the service stops; ask another one, or come again later")
        if self._taken + count > self._settings.places:
            raise QueueFull(self._until_free())

    def close(self, timeout: float | None = None) -> None:
        """Give no places any more, answer what is in the queue, and wait for that.

        Args:
            timeout: How long [s]; None: until it is done.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _put(self, item: Item) -> Future[Answer]:
        future: Future[Answer] = Future()
        with self._changed:
            self._queue.append(_Waiting(item=item, future=future, since=self._clock()))
            # Else the worker waits for its time, which one more item does not change.
            if len(self._queue) in (1, self._settings.most):
                self._changed.notify_all()
        return future

    def _until_free(self) -> int:
        """When the calls that are needed for what was accepted will be done [s], by how long the last one took."""
        calls = math.ceil(self._taken / self._settings.most)
        return min(max(1, math.ceil(calls * self._last_seconds)), 60)

    def _work(self) -> None:
        while batch := self._next():
            start = self._clock()
            self._answer(batch)
            self._last_seconds = self._clock() - start
            self._seen(Forward(items=len(batch), seconds=self._last_seconds, waited=start - batch[0].since))

    def _next(self) -> list[_Waiting[Item, Answer]]:
        """What shares the next call; nothing where it is time to stop."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if not self._queue:
                    return []
                until = self._queue[0].since + self._settings.wait
                while len(self._queue) < self._settings.most and not self._stopping:
                    left = until - self._clock()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                taken = [self._queue.popleft() for _ in range(min(len(self._queue), self._settings.most))]
                # Whoever cancelled has gone away.
                if wanted := [waiting for waiting in taken if waiting.future.set_running_or_notify_cancel()]:
                    return wanted

    def _answer(self, batch: Sequence[_Waiting[Item, Answer]]) -> None:
        try:
            answers = self._forward([waiting.item for waiting in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers for {len(batch)} items")
        except Exception as error:  # noqa: BLE001  of one item; the others are none the worse
            if len(batch) == 1:
                if not isinstance(error, AlphasmithError):
                    _LOG.error("an item could not be classified", exc_info=error)
                batch[0].future.set_exception(error)
                return
            middle = len(batch) // 2
            self._answer(batch[:middle])
            self._answer(batch[middle:])
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.future.set_result(answer)
