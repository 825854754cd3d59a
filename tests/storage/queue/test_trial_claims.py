"""Claims on the trials of a shared study: one worker for each, heartbeats by one clock, the dead leave theirs."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.connection import Database, optuna_storage
from alphasmith.storage.queue.leases import Identity
from alphasmith.storage.queue.trial_claims import WORKER, TrialClaims, living_worker

NAMES = count()


class Clock:
    """A clock that is set by hand; servers have their own, so that leases there are ended by their length."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def study(database: Database) -> optuna.Study:
    return optuna.create_study(study_name=f"c-{next(NAMES)}-{os.getpid()}", storage=optuna_storage(database))


def proposed(x: float = 0.5) -> FrozenTrial:
    return create_trial(state=TrialState.RUNNING, params={"x": x}, distributions={"x": FloatDistribution(0, 1)})


def elsewhere(token: str = "a") -> Identity:
    """A process that cannot be seen from here."""
    return Identity(host="far", pid=7, token=token, started=9, boot="b", namespace="1")


def test_a_trial_is_begun_by_one_worker_even_where_two_propose_the_same(
    database: Database, study: optuna.Study
) -> None:
    one, two = TrialClaims(database, study, lease=60), TrialClaims(database, study, lease=60, identity=elsewhere())
    mine = one.begin(proposed(), first=0)
    assert mine is not None
    assert two.begin(proposed(), first=0) is None
    assert two.begin(proposed(0.25), first=0) is None
    theirs = two.begin(proposed(), first=1)
    assert theirs is not None
    assert [trial.user_attrs[WORKER] for trial in study.trials] == [one.worker, two.worker]
    mine.set_user_attr("found", 1)
    study.tell(mine, 2.0)
    assert (study.trials[0].values, study.trials[0].params) == ([2.0], {"x": 0.5})
    assert one.abandoned() == {}


def test_a_worker_that_reports_keeps_its_trial_and_one_that_is_silent_for_a_lease_loses_it(
    database: Database, study: optuna.Study
) -> None:
    clock = Clock()
    lease = 60.0 if database.backend == "sqlite" else -3600.0
    far = TrialClaims(database, study, lease=60, identity=elsewhere(), clock=clock)
    here = TrialClaims(database, study, lease=60, clock=clock)
    late = TrialClaims(database, study, lease=lease, clock=clock)
    assert far.begin(proposed(), first=0) is not None
    clock.now += timedelta(seconds=45)
    far.renew()
    clock.now += timedelta(seconds=45)
    assert here.abandoned() == {}
    clock.now += timedelta(seconds=45)
    assert [*late.abandoned()] == [0], "on a server, whose clock is its own, with a lease that is over already"


def test_processes_that_are_seen_to_be_gone_leave_their_trials_at_once(database: Database, study: optuna.Study) -> None:
    here = Identity.here()
    gone = TrialClaims(database, study, lease=3600, identity=replace(here, started=here.started + 1))
    assert gone.begin(proposed(), first=0) is not None
    before = TrialClaims(database, study, lease=3600)
    assert before.begin(proposed(0.1), first=1) is not None
    study.ask({"x": FloatDistribution(0, 1)})  # of nobody
    now = TrialClaims(database, study, lease=3600)
    mine = now.begin(proposed(0.2), first=3)
    assert mine is not None
    assert [*now.abandoned()] == [0, 1, 2]
    now.end()
    assert [*now.abandoned()] == [0, 1, 2, 3], "it works on none any more"


def test_a_trial_whose_worker_died_before_its_first_heartbeat_is_left_after_a_lease(
    database: Database, study: optuna.Study
) -> None:
    clock = Clock()

    class Silent(TrialClaims):
        def renew(self, *, patience: float = 0.0) -> None:
            pass

    assert Silent(database, study, lease=60, identity=elsewhere()).begin(proposed(), first=0) is not None
    lease = 60.0 if database.backend == "sqlite" else -3600.0
    assert TrialClaims(database, study, lease=60, clock=clock).abandoned() == {}
    clock.now += timedelta(seconds=120)
    assert [*TrialClaims(database, study, lease=lease, clock=clock).abandoned()] == [0]


def test_a_worker_is_named_while_it_lives(database: Database, study: optuna.Study) -> None:
    name = study.study_name
    assert living_worker(database, name, lease=60) is None
    far = TrialClaims(database, study, lease=60, identity=elsewhere())
    mine = far.begin(proposed(), first=0)
    assert mine is not None
    assert living_worker(database, name, lease=60) == far.worker
    assert living_worker(database, name, lease=-3600) is None
    assert living_worker(database, "another", lease=60) is None
    study.tell(mine, 1.0)
    assert living_worker(database, name, lease=60) is None
    here = Identity.here()
    gone = TrialClaims(database, study, lease=60, identity=replace(here, started=here.started + 1))
    assert gone.begin(proposed(), first=1) is not None
    assert living_worker(database, name, lease=60) is None


def test_sqlite_is_shared_by_processes_of_one_machine_only(database: Database, study: optuna.Study) -> None:
    here = TrialClaims(database, study, lease=60)
    here.check_machine()
    far = TrialClaims(database, study, lease=60, identity=elsewhere())
    assert far.begin(proposed(), first=0) is not None
    if database.backend != "sqlite":
        here.check_machine()
        return
    with pytest.raises(
        InputError, match=r"storage: SQLite serves one machine, and process 7 on far works on .*postgresql"
    ):
        here.check_machine()
