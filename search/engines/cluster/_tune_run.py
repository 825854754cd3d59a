"""The Tune run of an engine: a thread in which Ray Tune schedules the searches of sites as its trials."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from alphasmith.objectives.text import one_line
from alphasmith.search.engines.cluster._actors import SiteTrainable
from alphasmith.search.engines.cluster._ray_private import actor_of, keep_idle, next_for_idle_actor

#: Tune's own logs, checkpoints and reports are off: the database has the records. The engine bounds what waits.
_SETTINGS = {
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class _LocalComponent:
    """What Tune calls in this process: its copies are the thing itself, and the state that it pickles is empty."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Feed(_LocalComponent, Searcher):  # type: ignore[misc]  # Ray's class is untyped
    """Gives Tune the next work: the ``suggest`` of a searcher that only passes on what was submitted.

    Tune asks in a loop. Where it has nothing to do, the answer is held back until there is work: an answer "not now" would
    make it sleep for a second.
    """

    def __init__(self) -> None:
        super().__init__(metric=None, mode=None)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, dict[str, Any]]] = deque()
        self._live: set[str] = set()
        self._closed = False

    def submit(self, key: str, resources: dict[str, Any]) -> None:
        """Queue one piece of work."""
        with self._changed:
            self._waiting.append((key, resources))
            self._changed.notify()

    def withdraw(self) -> list[str]:
        """Take back what Tune has not got yet."""
        with self._changed:
            keys = [key for key, _ in self._waiting]
            self._waiting.clear()
            return keys

    def finish(self) -> None:
        """No more work will come."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next work; None: not now, ``FINISHED``: never again."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting or self._live or self._closed))
            if self._closed:
                return str(Searcher.FINISHED)
            if not self._waiting:
                return None
            key, resources = self._waiting.popleft()
            self._live.add(trial_id)
            return {"key": key, **resources}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial ended, well or not."""
        with self._changed:
            self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept, but Tune expects the file."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


class _Watch(_LocalComponent, tune.Callback):  # type: ignore[misc]  # Ray's class is untyped
    """Knows the actors of running trials, and is notified of trials that Tune gives up."""

    def __init__(self, given_up: Callable[[str, str], None]) -> None:
        self._given_up = given_up
        self._running: dict[str, Trial] = {}

    def actors(self) -> list[Any]:
        """Handles of the actors that search now."""
        actors = [actor_of(trial) for trial in list(self._running.values())]
        return [actor for actor in actors if actor is not None]

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._running[trial.trial_id] = trial

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._running.pop(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._running.pop(trial.trial_id, None)
        self._given_up(trial.config["key"], _cause(trial))


class _WarmScheduler(_LocalComponent, FIFOScheduler):  # type: ignore[misc]  # Ray's class is untyped
    """First come, first served; and the actors of all slots are started once and kept for later trials.

    A new actor imports torch, which takes longer than many a search. Left alone, Tune ends all idle actors but one; and it
    gives an actor that got free to a trial whose own actor is just starting, and drops that one: where searches are short, or
    a node joins later, the slot would never be used. There are no settings for it.

    Args:
        count: Idle actors to keep.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self._kept: Any = None

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Keep actors of the size of the newest trial; others would hold resources that it needs."""
        if trial.placement_group_factory != self._kept:
            if self._kept is not None:
                keep_idle(tune_controller, self._kept, -self._count)
            self._kept = trial.placement_group_factory
            keep_idle(tune_controller, self._kept, self._count)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The trial that takes an idle actor: the first one for which no actor is starting yet."""
        try:
            return next_for_idle_actor(tune_controller)
        except AttributeError:
            return super().choose_trial_to_run(tune_controller)


class _RunStopper(_LocalComponent, tune.Stopper):  # type: ignore[misc]  # Ray's class is untyped
    """Stops the Tune run on request."""

    def __init__(self) -> None:
        self._now = threading.Event()

    def end(self) -> None:
        self._now.set()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._now.is_set()


class TuneRun:
    """A Tune run that goes on until it is closed.

    Args:
        mailbox: Handle of the mailbox.
        mailbox_name: Name under which trials find it.
        perform: What searches a site, ``module:function``.
        attempts: How often a trial is tried where its worker dies.
        at_once: Trials that the cluster takes at once; Tune keeps so many idle actors.
    """

    def __init__(self, mailbox: Any, mailbox_name: str, *, perform: str, attempts: int, at_once: int) -> None:
        self._mailbox = mailbox
        self._constants = {"mailbox": mailbox_name, "perform": perform}
        self._attempts = attempts
        self._at_once = max(1, at_once)
        self._feed = Feed()
        self._watch = _Watch(self._given_up)
        self._ending = _RunStopper()
        self._held: dict[str, dict[str, Any]] = {}
        self._repeated: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="alphasmith-tune", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still takes work."""
        return self._thread.is_alive()

    def submit(self, key: str, *, cpus: int, gpus: float) -> None:
        """Queue one piece of work that the mailbox has."""
        self._held[key] = {"cpus": cpus, "gpus": gpus}
        self._feed.submit(key, self._held[key])

    def forget(self, key: str) -> None:
        """One piece of work has ended."""
        self._held.pop(key, None)
        self._repeated.discard(key)

    def withdraw(self) -> list[str]:
        """Take back what no trial was made of yet."""
        return self._feed.withdraw()

    def close(self, deadline: float) -> None:
        """End all trials at once; returns after ``deadline`` seconds at the latest."""
        self._feed.finish()
        self._ending.end()
        for actor in self._watch.actors():
            ray.kill(actor)
        self._thread.join(deadline)

    def _run(self) -> None:
        reason = "the Tune run ended"
        try:
            with tempfile.TemporaryDirectory(prefix="alphasmith-tune-", ignore_cleanup_errors=True) as folder:
                self._fit(folder)
        except Exception as error:  # noqa: BLE001  the end of a thread: whoever waits must get it
            reason = f"the Tune run failed: {type(error).__name__}: {one_line(error)[-300:]}"
        if not self._ending.stop_all():
            for key in list(self._held):
                self._mailbox.give_up.remote(key, reason)

    def _fit(self, folder: str) -> None:
        with _environment(_SETTINGS), _silenced(logging.getLogger("ray.tune")):
            tuner = tune.Tuner(
                SiteTrainable,
                param_space=self._constants,
                tune_config=tune.TuneConfig(
                    num_samples=-1,
                    search_alg=self._feed,
                    scheduler=_WarmScheduler(self._at_once),
                    reuse_actors=True,
                    trial_name_creator=_trial_name,
                    trial_dirname_creator=_trial_name,
                ),
                run_config=tune.RunConfig(
                    name="sites",
                    storage_path=folder,
                    verbose=0,
                    stop=self._ending,
                    callbacks=[self._watch],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=self._attempts - 1),
                ),
            )
            tuner.fit()

    def _given_up(self, key: str, cause: str) -> None:
        """Tune gave a trial up. One that never reached a worker, e.g. as its actor died in between, is tried once more."""
        resources = self._held.get(key)
        if resources is None or self._ending.stop_all():
            return
        begun = ray.get(self._mailbox.begun.remote(key))
        if begun == 0 and key not in self._repeated:
            self._repeated.add(key)
            self._feed.submit(key, resources)
            return
        tried = f"after {begun} attempts" if begun else "before the search began"
        self._mailbox.give_up.remote(key, f"its Ray worker was lost {tried}: {cause}")


def _trial_name(trial: Trial) -> str:
    return str(trial.trial_id)


def _cause(trial: Trial) -> str:
    """Why a trial failed, one line."""
    lines = [line.strip() for line in (trial.get_error() or "").splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line]
    return (said or lines or ["no reason given"])[-1][:300]


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Tune reads these settings from the environment only. What the user has set stays."""
    new = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    """The driver reports lost workers; Tune would print tracebacks as well."""
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
