"""Worker processes on one machine, one per GPU or as many as are asked for."""

from __future__ import annotations

import os
import pickle
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count as counter
from queue import Empty, SimpleQueue

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.text import counted
from alphasmith.search.config import WorkersConfig
from alphasmith.search.engines.local._child_process import ChildProcess, Event
from alphasmith.search.engines.local._shared_race import Share, SharedRace
from alphasmith.search.engines.local.worker_loop import STOP, Drop, Failure, Hold, Ready, Scores, Setup, dump
from alphasmith.search.engines.types import ModelWork, OnMessage, SearchEnd, Work
from alphasmith.search.study.fault_isolation import Racer
from alphasmith.search.study.study_record import StudyMessage

PERFORM = "alphasmith.search.engines.perform:perform"
#: Workers that die one after the other before they are ready, until that is an error.
_FAILED_STARTS = 3
#: How often a share of a race is raced again because its worker died.
_RACED_AGAIN = 2


def default_workers(config: WorkersConfig, *, gpus: int, device: str | None = None) -> tuple[int, tuple[str, ...]]:
    """How many worker processes, and on which devices.

    Args:
        config: ``count``: as many as given; 0: one per GPU where there are several, else none.
        gpus: GPUs of this machine.
        device: The configured torch device; None and ``cuda``: all GPUs. Any other is that of every worker.

    Returns:
        Count, 0 for none, and devices in turn; no devices: the CPU.
    """
    if device not in (None, "cuda"):
        return config.count, (device,)
    devices = tuple(f"cuda:{index}" for index in range(gpus))
    return config.count or (gpus if gpus > 1 else 0), devices


class Processes:
    """Long-lived worker processes; see :class:`alphasmith.search.engines.types.Engine`.

    A worker is started when there is work for it, and again after it died. After a request to stop the engine takes no more work.

    Args:
        count: Worker processes, at least 1.
        threads: CPU threads of each; None: the cores this process may use, shared out.
        devices: Torch device of worker i is number ``i % len(devices)``; none: the CPU.
        perform: Dotted name ``module:function`` of what does a piece of work.
        clock: Seconds, monotonic.

    Raises:
        InputError: No workers are asked for.
    """

    def __init__(
        self,
        count: int,
        *,
        threads: int | None = None,
        devices: Sequence[str] = (),
        perform: str = PERFORM,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if count < 1:
            raise InputError("workers.count", f"{count} worker processes cannot work", "give at least 1")
        self._threads = threads or max(1, _cores() // count)
        self._devices = tuple(devices)
        self._perform = perform
        self._clock = clock
        self._slots = [_Slot(index) for index in range(count)]
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._ended: list[SearchEnd] = []
        self._failed_starts = 0
        self._stopped = False
        self._models = counter()
        # Also at exit, and when the engine is forgotten: no worker may outlive it.
        self._kill = weakref.finalize(self, _kill_all, self._slots, os.getpid())

    @property
    def name(self) -> str:
        """Display name."""
        return f"local, {counted(len(self._slots), 'process')}"

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that were started."""
        return tuple(slot.child.pid for slot in self._slots if slot.child is not None)

    @property
    def slots(self) -> int:
        """Workers without work."""
        if self._stopped or not self._kill.alive:
            return 0
        return sum(slot.task is None for slot in self._slots)

    def submit(self, work: Work) -> None:
        """Give one piece of work to a worker.

        Raises:
            AlphasmithError: No worker is free, or none can be started.
        """
        slot = self._free_slot() if self.slots else None
        if slot is None:
            raise AlphasmithError(f"no worker is free for the search at site {work.site}")
        self._give(slot, _Search(work.site, dump(work)))

    def wait(self, receive: OnMessage, timeout: float) -> list[SearchEnd]:
        """Pass on what searches tell until one has ended; see the interface.

        Raises:
            AlphasmithError: Workers do not start.
        """
        deadline = self._clock() + timeout
        while self._searching() and not self._ended:
            left = deadline - self._clock()
            try:
                event = self._events.get(timeout=max(left, 0.0))
            except Empty:
                break
            self._take(event, receive)
            if left <= 0:
                break
        for _ in range(self._events.qsize()):  # what came meanwhile, and no more than that
            self._take(self._events.get(), receive)
        ended, self._ended = self._ended, []
        return ended

    def racer(self, judge: ModelObjective, work: Callable[[], ModelWork]) -> Racer:
        """The workers together; each takes a share of the candidates and has its own model."""
        racer = SharedRace(self.race, key=next(self._models), workers=len(self._slots), work=work)
        weakref.finalize(racer, _forget_model, self._slots, racer.key).atexit = False
        return racer

    def race(self, shares: Sequence[Share]) -> None:
        """Let the workers race all shares; for :meth:`racer`.

        Raises:
            AlphasmithError: Site work is held, workers do not start, or they die of a share.
        """
        if self._searching():
            raise AlphasmithError("candidate models cannot be scored while sites are searched")
        while True:
            for share in shares:
                if share.scores is None and all(slot.task is not share for slot in self._slots):
                    slot = self._free_slot()
                    if slot is not None:
                        self._give(slot, share)
            if all(share.scores is not None for share in shares):
                return
            self._take(self._events.get(), _nobody)

    def stop(self) -> None:
        """Let every search end after the batch it is at. May be called from any thread."""
        # In this order: a worker that is started meanwhile sees the flag.
        self._stopped = True
        for slot in self._slots:
            child = slot.child
            if child is not None:
                child.send(STOP)

    def close(self) -> None:
        """End the workers at once; work still held is forgotten. A second call does nothing."""
        self._kill()
        for slot in self._slots:
            child = slot.empty()
            if child is not None:
                child.dispose()

    def _searching(self) -> bool:
        return any(isinstance(slot.task, _Search) for slot in self._slots)

    def _free_slot(self) -> _Slot | None:
        """A slot without a task, rather one whose worker runs already."""
        if not self._kill.alive:
            raise AlphasmithError("the workers were ended")
        free = [slot for slot in self._slots if slot.task is None]
        for slot in free:
            if slot.child is not None and not slot.child.alive:  # it died idle, and nothing was lost with it
                self._remove_dead(slot)
        return min(free, key=lambda slot: slot.child is None, default=None)

    def _give(self, slot: _Slot, task: _Search | Share) -> None:
        child = slot.child
        if child is None:
            device = self._devices[slot.index % len(self._devices)] if self._devices else None
            setup = Setup(perform=self._perform, device=device, threads=self._threads)
            child = slot.child = ChildProcess(slot.index, setup, self._events)
            if self._stopped:
                child.send(STOP)
        slot.task = task
        if isinstance(task, Share) and task.key not in slot.models:
            slot.models.add(task.key)
            child.send(dump(Hold(task.key)))
            child.send(task.model)
        child.send(task.order)
        if slot.ready and isinstance(task, _Search):
            task.order = STOP

    def _take(self, event: Event, receive: OnMessage) -> None:
        """Act on what a worker said, or on its end."""
        child, message = event
        slot = next((slot for slot in self._slots if slot.child is child), None)
        if slot is None:  # it was given up before
            return
        if message is None:
            self._remove_dead(slot)
            return
        said: Ready | SearchEnd | Scores | Failure | StudyMessage = pickle.loads(message)
        task = slot.task
        if isinstance(said, Ready):
            slot.ready, self._failed_starts = True, 0
            if isinstance(task, _Search):
                task.order = STOP
        elif isinstance(said, SearchEnd):
            slot.task = None
            self._ended.append(said)
        elif isinstance(said, Scores | Failure):
            slot.task = None
            if isinstance(task, Share):
                task.answer(said)
            elif task is not None and isinstance(said, Failure):
                self._ended.append(SearchEnd(site=task.site, reason=said.reason))
        elif isinstance(task, _Search):
            receive(task.site, said)

    def _remove_dead(self, slot: _Slot) -> None:
        """The worker of this slot is dead: its search is lost, its share of a race is still to be raced."""
        task, ready = slot.task, slot.ready
        child = slot.empty()
        if child is None:
            return
        how = f"worker process {child.pid} {child.dispose()}"
        if not ready:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                self._failed_starts = 0
                raise AlphasmithError(f"worker processes do not start: {child.last_line or how}")
            if isinstance(task, _Search):
                self._give(slot, task)
        elif isinstance(task, _Search):
            self._ended.append(SearchEnd(site=task.site, lost=True, reason=how))
        elif task is not None:
            task.deaths += 1
            if task.deaths > _RACED_AGAIN:
                raise AlphasmithError(f"candidate models cannot be scored: {how}, as {_RACED_AGAIN} before it")


@dataclass(eq=False)
class _Search:
    """A search that a worker is at. ``order`` is kept until the worker is ready: if it dies before, another gets it."""

    site: str
    order: bytes


@dataclass(eq=False)
class _Slot:
    """One worker slot: its process, if it has one now, whether it is ready, what it does and which models it holds."""

    index: int
    child: ChildProcess | None = None
    ready: bool = False
    task: _Search | Share | None = None
    models: set[int] = field(default_factory=set)

    def empty(self) -> ChildProcess | None:
        """Take the process away, with all that was known of it."""
        child = self.child
        self.child, self.ready, self.task, self.models = None, False, None, set()
        return child


def _forget_model(slots: Sequence[_Slot], key: int) -> None:
    """Free the memory that a racer's model takes in the workers."""
    for slot in slots:
        if slot.child is not None and key in slot.models:
            slot.models.discard(key)
            slot.child.send(dump(Drop(key)))


def _kill_all(slots: Sequence[_Slot], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the driver owns nothing
        return
    children = [slot.child for slot in slots if slot.child is not None]
    for child in children:
        child.kill()
    for child in children:
        child.reap()


def _nobody(site: str, message: StudyMessage) -> None:
    """Nobody listens to searches during a race: there are none."""


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
