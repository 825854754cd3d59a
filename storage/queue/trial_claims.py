"""Trials of a study that several processes share: which is whose, and which belong to nobody any more.

A running trial says in an attribute whose it is. Its worker reports in Optuna's table of heartbeats, by the clock of
:class:`~alphasmith.storage.queue.leases.LeaseClock`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, func, insert, select, update
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.connection import Database, StorageError
from alphasmith.storage.database.optuna_private import (
    ATTRIBUTES,
    HEARTBEATS,
    STATE,
    STUDIED,
    STUDIES,
    TRIALS,
    begin_trial,
    begun_trial,
)
from alphasmith.storage.queue.leases import Identity, LeaseClock, is_gone, named, utc_now

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

#: Attribute of a running trial: whose it is.
WORKER = "worker"
#: Trials with their heartbeats.
_BEATEN = STUDIED.outerjoin(HEARTBEATS, HEARTBEATS.c.trial_id == TRIALS.c.trial_id)


def living_worker(database: Database, study: str, *, lease: float) -> str | None:
    """Id of a process that is at a running trial of a study, as far as is seen from here; None: there is none. Changes nothing.

    Args:
        database: Where the study is.
        study: Its name.
        lease: Seconds after which a worker without a heartbeat counts as dead.
    """
    here, clock = Identity.here(), LeaseClock(database.backend)

    def operation(session: Session) -> list[str]:
        source = _BEATEN.join(ATTRIBUTES, (ATTRIBUTES.c.trial_id == TRIALS.c.trial_id) & (ATTRIBUTES.c.key == WORKER))
        lives = _is_running(study) & ~_is_silent(clock, lease)
        query = select(ATTRIBUTES.c.value_json).select_from(source).where(lives).order_by(TRIALS.c.number)
        return [str(json.loads(value)) for value in session.scalars(query)]

    return next((worker for worker in database.transact(operation) if not is_gone(worker, here)), None)


def _is_running(study: str) -> ColumnElement[bool]:
    return (STUDIES.c.study_name == study) & (STATE == "RUNNING")


def _is_silent(clock: LeaseClock, lease: float) -> ColumnElement[bool]:
    """Whether the last sign of life is older than a lease: the last heartbeat, before the first one the beginning."""
    return func.coalesce(HEARTBEATS.c.heartbeat, TRIALS.c.datetime_start) < clock.after(-lease)


class TrialClaims:
    """The claims of one process on the trials of a study; it works on one trial at a time.

    Attributes:
        worker: Id of this process.

    Args:
        database: Where the study is.
        study: The study.
        lease: Seconds after which a worker without a heartbeat counts as dead where its process cannot be seen.
        identity: Of this process; None: found out.
        clock: Time of this machine; used on SQLite only, see ``LeaseClock``.
    """

    def __init__(
        self,
        database: Database,
        study: optuna.Study,
        *,
        lease: float,
        identity: Identity | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database, self._study = database, study
        self._lease = lease
        self._identity = identity or Identity.here()
        self._clock = LeaseClock(database.backend, clock)
        self._at: int | None = None

    @property
    def worker(self) -> str:
        """Id of this process."""
        return self._identity.worker

    @property
    def lease(self) -> float:
        """Seconds after which a worker without a heartbeat counts as dead."""
        return self._lease

    def check_machine(self) -> None:
        """Refuse to share an SQLite file with processes of other machines.

        Raises:
            InputError: Field ``storage``: one of them works on the study.
        """
        if self._database.backend != "sqlite":
            return
        for trial in self._running():
            other = Identity.of(str(trial.user_attrs.get(WORKER, "")))
            if other is not None and (other.host, other.boot) != (self._identity.host, self._identity.boot):
                raise InputError(
                    "storage",
                    f"SQLite serves one machine, and {named(other.worker)} works on {self._study.study_name}",
                    "use postgresql://... for workers on several machines",
                )

    def begin(self, trial: FrozenTrial, *, first: int) -> optuna.Trial | None:
        """Add a running trial that is this process's, unless others have added one since this process looked.

        Args:
            trial: With its parameters.
            first: How many trials there were.

        Returns:
            The trial, to be written to; None: look again.

        Raises:
            StorageError: The database refused it or was lost.
        """
        trial.user_attrs = {**trial.user_attrs, WORKER: self.worker}
        try:
            trial_id, stored = begin_trial(self._study, trial, first=first)
        except StorageError:
            if len(self._study.get_trials(deepcopy=False)) > first:
                return None
            raise
        # Two processes may propose the very same trial; what was stored says whose it is.
        if stored.get(WORKER) != self.worker:
            return None
        self._at = trial_id
        self.renew()
        return begun_trial(self._study, trial_id)

    def end(self) -> None:
        """This process works on no trial any more."""
        self._at = None

    def renew(self, *, patience: float = 0.0) -> None:
        """Report that this process works on its trial.

        Args:
            patience: Seconds after which a lost database is not asked again.
        """
        trial_id = self._at
        if trial_id is None:
            return

        def operation(session: Session) -> None:
            now = {"heartbeat": self._clock.now()}
            beaten: Any = session.execute(update(HEARTBEATS).where(HEARTBEATS.c.trial_id == trial_id).values(now))
            if not beaten.rowcount:
                session.execute(insert(HEARTBEATS).values(trial_id=trial_id, **now))

        self._database.transact(operation, patience=patience)

    def abandoned(self) -> dict[int, Mapping[str, Any]]:
        """Running trials that nobody works on: number -> attributes.

        Their process is gone, or worked on another trial since, or sent no heartbeat for a lease.
        """
        running = self._running()
        silent = self._silent() if running else set()
        return {trial.number: trial.user_attrs for trial in running if trial.number in silent or self._is_left(trial)}

    def _running(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _is_left(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(WORKER)
        if worker is None or is_gone(str(worker), self._identity):
            return True
        other, mine = Identity.of(str(worker)), self._identity
        if other is None:
            return True
        # A process works on a study once at a time: an earlier attempt of this one is over.
        same = (other.host, other.boot, other.pid, other.started) == (mine.host, mine.boot, mine.pid, mine.started)
        return same and (other.token != mine.token or self._at is None)

    def _silent(self) -> set[int]:
        """Numbers of running trials without a heartbeat for a lease; one that never had any counts from its beginning."""

        def operation(session: Session) -> set[int]:
            late = _is_running(self._study.study_name) & _is_silent(self._clock, self._lease)
            query = select(TRIALS.c.number).select_from(_BEATEN).where(late)
            return set(session.scalars(query))

        return self._database.transact(operation)
