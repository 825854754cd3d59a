"""One contract of the board, on every backend: who may work on what, and that nothing is done or counted twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import optuna
import pytest
from sqlalchemy import delete, text
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.connection import Database, DuplicateError, StorageError, optuna_storage
from alphasmith.storage.database.optuna_private import insert_trials
from alphasmith.storage.database.tables import ResultRow
from alphasmith.storage.queue.board import Board, Heartbeat, LeaseLostError, reusable_winners
from alphasmith.storage.queue.leases import Identity, utc_now
from alphasmith.storage.queue.records import Claim, TicketSpec
from alphasmith.storage.runs.run_store import RunStore
from tests.support.boards import (
    SPEC,
    board,
    chain,
    elsewhere,
    finish,
    forgetful,
    need,
    new_run,
    states,
    until,
)

#: A process that drives a run, claims two sites and waits for its death.
_DRIVER = """
import sys, time
from alphasmith.storage.queue.board import Board
from alphasmith.storage.database.connection import open_database
board = Board(open_database(sys.argv[1]), sys.argv[2], role="driver", lease=3600.0)
board.join()
board.drive()
print(board.claim().site, board.claim().site, flush=True)
time.sleep(600)
"""

Change = Callable[[list[TicketSpec]], list[TicketSpec]]


@pytest.fixture
def run_id(database: Database) -> Iterator[str]:
    """A new run, deleted afterwards."""
    made = new_run(database)
    yield made
    RunStore(database).delete(made)


def together(count: int, work: Callable[[], None]) -> None:
    """Call ``work`` from several threads at once."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class TestClaims:
    def test_many_workers_get_every_ticket_once(self, database: Database, run_id: str) -> None:
        sites = [f"s{number:02}" for number in range(60)]
        board(database, run_id).plan(chain(*sites))
        taken: list[Claim] = []
        # A thread that starts first could take everything: nobody takes a second ticket before each has one.
        each_has_one = threading.Barrier(6)

        def work() -> None:
            mine = board(database, run_id)
            taken.append(need(mine.claim()))
            each_has_one.wait(timeout=300)
            while (claim := mine.claim()) is not None:
                taken.append(claim)

        together(6, work)
        assert sorted(claim.site for claim in taken) == sites
        assert {claim.attempt for claim in taken} == {1}
        assert len({ticket.worker for ticket in board(database, run_id).tickets()}) == 6

    def test_the_first_is_taken_first_and_some_may_be_skipped(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id)
        assert mine.claim() is None
        mine.plan([replace(spec, position=9 - spec.position) for spec in chain("c", "b", "a")])
        assert need(mine.claim(skip={"a"})).site == "b"
        assert need(mine.claim()).site == "a"
        assert mine.claim(skip={"c"}) is None

    def test_what_a_claim_says(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id)
        reused = {"run": "r-1", "candidate": {"kind": "sampler", "params": {"alpha_0": 0.5}}}
        mine.plan([replace(chain("a")[0], reused=reused), TicketSpec(site="b", position=1, depends_on=("a",))])
        claim = need(mine.claim())
        (stored, blocked) = mine.tickets()
        assert claim.ticket == stored
        assert (stored.reused, stored.digest, stored.state, stored.attempts) == (reused, "a-digest", "running", 1)
        assert stored.worker == mine.worker
        assert stored.lease_until is not None
        assert stored.started is not None
        assert timedelta(seconds=3500) < stored.lease_until - stored.started < timedelta(seconds=3700)
        assert (blocked.depends_on, blocked.reused, blocked.lease_until) == (("a",), None, None)
        assert mine.claim() is None, "b waits for a"
        finish(mine, claim, run_id=run_id)
        assert need(mine.claim()).site == "b"

    def test_a_plan_grows_by_parts_whoever_works_on_it(self, database: Database, run_id: str) -> None:
        driver, other = board(database, run_id), board(database, run_id)

        def part(first: str, second: str, position: int) -> list[TicketSpec]:
            one, two = chain(first, second)
            return [replace(one, position=position), replace(two, position=position + 1, depends_on=(first,))]

        driver.plan(part("a", "b", 0), part=True)
        for name in ("a", "b"):
            claim = need(other.claim())
            assert (claim.site, finish(other, claim, run_id=run_id)) == (name, True)
        later = part("c", "d", 2)
        driver.plan(later, part=True)
        driver.plan(later, part=True)  # a run that goes on plans it again
        for name in ("c", "d"):
            claim = need(other.claim())
            assert (claim.site, finish(other, claim, run_id=run_id)) == (name, True)
        assert driver.done() == {"a", "b", "c", "d"}
        with pytest.raises(InputError, match="has another digest"):
            driver.plan([replace(later[0], digest="f" * 64), later[1]], part=True)

    def test_a_site_waits_for_those_it_depends_on(self, database: Database, run_id: str) -> None:
        chance = random.Random(0)
        specs = [
            TicketSpec(
                site=f"s{n}", position=n, depends_on=tuple(f"s{m}" for m in sorted(chance.sample(range(n), min(n, 2))))
            )
            for n in range(12)
        ]
        board(database, run_id).plan(specs)
        needs = {spec.site: set(spec.depends_on) for spec in specs}
        done: list[str] = []
        early: list[str] = []

        def work() -> None:
            mine = board(database, run_id)
            while len(done) < len(specs):
                if (claim := mine.claim()) is None:
                    continue
                early.extend(needs[claim.site] - set(mine.done()))
                finish(mine, claim, run_id=run_id)
                done.append(claim.site)

        together(3, work)
        assert early == []
        assert sorted(done) == sorted(needs)
        assert {ticket.state for ticket in board(database, run_id).tickets()} == {"done"}

    def test_given_back_it_is_open_again(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id, attempts=2)
        mine.plan(chain("a"))
        for _ in range(3):
            mine.give_back(need(mine.claim()), reason="stopped", counted=False)
        mine.give_back(need(mine.claim()), reason="its worker died", counted=True)
        claim = need(mine.claim())
        assert claim.attempt == 5
        mine.give_back(claim, reason="its worker died too", counted=True)
        assert mine.claim() is None
        (ticket,) = mine.tickets()
        assert ticket.state == "failed"
        assert ticket.reason == "2 attempts ended without a result; the last one: its worker died too"
        assert [state for _, _, state in states(database, run_id)] == ["returned"] * 4 + ["failed"]

    def test_a_failed_search_is_not_tried_again(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id)
        mine.plan(chain("a", "b"))
        mine.fail(need(mine.claim()), "every loss is nan")
        assert need(mine.claim()).site == "b"
        assert mine.progress().failed == (("a", "every loss is nan"),)

    def test_who_leaves_gives_back(self, database: Database, run_id: str) -> None:
        mine, other = board(database, run_id), board(database, run_id, attempts=1)
        mine.join()
        mine.plan(chain("a", "b"))
        need(mine.claim())
        mine.leave()
        assert (need(other.claim()).site, need(other.claim()).site) == ("a", "b")
        mine.renew()
        assert [worker.alive for worker in mine.workers()] == [False]


class TestPlans:
    def test_planning_again_keeps_what_was_done(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id)
        specs = chain("a", "b", "c")
        mine.plan(specs)
        finish(mine, need(mine.claim()), run_id=run_id)
        mine.fail(need(mine.claim()), "no memory")
        claim = need(mine.claim())
        before = mine.tickets()
        mine.plan([replace(spec, reused={"run": "another"}) for spec in specs])
        after = mine.tickets()
        assert (after[0], after[2]) == (before[0], before[2])
        assert (after[1].state, after[1].reason, after[1].attempts) == ("waiting", "", 1)
        assert finish(mine, claim, run_id=run_id)
        assert need(mine.claim()).attempt == 2, "the number of an attempt is never given again"

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda specs: [*specs, TicketSpec(site="c", position=2), TicketSpec(site="d", position=3)], r"c is new \(and 1"),
            (lambda specs: specs[:1], "b is missing"),
            (lambda specs: [specs[0], replace(specs[1], digest="other")], "b has another digest"),
            (lambda specs: [specs[0], replace(specs[1], depends_on=("a",))], "b depends on other sites"),
        ],
    )  # fmt: skip
    def test_another_plan_is_refused(self, database: Database, run_id: str, change: Change, told: str) -> None:
        mine = board(database, run_id)
        mine.plan(chain("a", "b"))
        before = mine.tickets()
        with pytest.raises(InputError, match=told) as caught:
            mine.plan(change(chain("a", "b")))
        assert caught.value.field == "RUN"
        assert mine.tickets() == before

    def test_plans_that_cannot_be_worked_off_are_refused(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id)
        for specs in (
            [TicketSpec(site="a", position=0, depends_on=("b",)), TicketSpec(site="b", position=1)],
            [TicketSpec(site="a", position=0, depends_on=("a",))],
            [TicketSpec(site="a", position=0), TicketSpec(site="a", position=1)],
        ):
            with pytest.raises(InputError, match="planned"):
                mine.plan(specs)
        assert mine.tickets() == []

    def test_without_a_run_nothing_works(self, database: Database) -> None:
        nowhere = board(database, "r-nowhere")
        for call in (nowhere.join, nowhere.drive, lambda: nowhere.plan(chain("a"))):
            with pytest.raises(InputError, match="no run 'r-nowhere'"):
                call()


class TestResults:
    def test_a_result_is_stored_whole(self, database: Database, run_id: str) -> None:
        mine, store = board(database, run_id), RunStore(database)
        mine.plan(chain("a", "b"))
        claim = need(mine.claim())
        assert finish(mine, claim, run_id=run_id)
        assert [site.name for site in store.sites(run_id)] == ["a"]
        assert [site.trials for site in store.sites(run_id)] == [2]
        winner = mine.results()["a"]
        assert (winner.run, winner.worker, winner.attempt, winner.digest) == (run_id, mine.worker, 1, "a-digest")
        assert winner.winner == {"kind": "sampler", "params": {"alpha_0": 0.5}}
        assert mine.done() == {"a"}
        assert states(database, run_id) == [("a", 1, "done")]
        assert finish(mine, claim, run_id=run_id), "the same result again is no news"
        assert len(mine.results()) == 1

    def test_a_refused_result_leaves_nothing(self, database: Database, run_id: str) -> None:
        mine, store = board(database, run_id), RunStore(database)
        mine.plan(chain("a"))
        claim = need(mine.claim())
        with database.session() as session:  # as no attempt of ours leaves it
            session.add(
                ResultRow(
                    run_id=run_id, site="a", attempt=9, worker="w", digest="", scheme="w8a8", winner={}, loss=1.0,
                    artifact_id="x", sha256="e" * 64, accepted=datetime.now(UTC),
                )
            )  # fmt: skip
        with pytest.raises(DuplicateError):
            finish(mine, claim, run_id=run_id)
        assert (store.sites(run_id), mine.done(), mine.results()["a"].attempt) == ([], frozenset(), 9)
        with database.session() as session:
            session.execute(delete(ResultRow).where(ResultRow.run_id == run_id))
        assert finish(mine, claim, run_id=run_id)
        assert [site.name for site in store.sites(run_id)] == ["a"]

    def test_winners_are_found_again_by_digest(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id)
        mine.plan(chain("a", "b", "c"))
        for loss in (0.5, 0.25, 0.125):
            finish(mine, need(mine.claim()), run_id=run_id, loss=loss)
        second = new_run(database)
        other = board(database, second)
        other.plan(chain("a", "b"))
        for loss in (0.25, 0.5):
            finish(other, need(other.claim()), run_id=second, loss=loss)
        digests = {"a-digest", "b-digest", "c-digest", "x-digest", ""}
        found = reusable_winners(database, digests, SPEC.scheme, not_run="r-third")
        assert {digest: (winner.run, winner.loss) for digest, winner in found.items()} == {
            "a-digest": (second, 0.25),
            "b-digest": (run_id, 0.25),
            "c-digest": (run_id, 0.125),
        }
        assert set(reusable_winners(database, digests, SPEC.scheme, not_run=run_id)) == {"a-digest", "b-digest"}
        assert reusable_winners(database, digests, "another", not_run="") == {}
        RunStore(database).delete(second)


class TestLeases:
    def test_a_lease_that_ran_out_is_taken_over_and_the_late_result_refused(
        self, database: Database, run_id: str
    ) -> None:
        late, next_ = board(database, run_id, lease=0.05, identity=elsewhere("late")), board(database, run_id)
        late.plan(chain("a"))
        old = need(late.claim())
        new = until(next_.claim)
        assert (new.site, new.attempt) == ("a", 2)
        assert states(database, run_id) == [("a", 1, "lost"), ("a", 2, "running")]
        assert not finish(late, old, run_id=run_id)
        late.give_back(old, reason="late", counted=True)
        late.fail(old, "late")
        assert RunStore(database).sites(run_id) == []
        assert finish(next_, new, run_id=run_id)
        assert not finish(late, old, run_id=run_id)
        assert next_.results()["a"].attempt == 2

    def test_a_frozen_holder_keeps_what_nobody_took_and_leaves_what_was_taken(
        self, database: Database, run_id: str
    ) -> None:
        frozen = board(database, run_id, lease=0.05, identity=elsewhere("frozen"))
        frozen.plan(chain("a", "b"))
        first, second = need(frozen.claim()), need(frozen.claim())
        other = board(database, run_id)
        until(lambda: other.claim(skip={"b"}))
        long_ago = frozen.tickets()[1].lease_until
        frozen.renew()
        renewed = frozen.tickets()
        assert renewed[0].worker == other.worker
        assert long_ago is not None
        assert renewed[1].lease_until is not None
        assert renewed[1].lease_until > long_ago
        assert not finish(frozen, first, run_id=run_id)
        assert finish(frozen, second, run_id=run_id)

    def test_nobody_is_handed_his_own_claim_again(self, database: Database, run_id: str) -> None:
        frozen = board(database, run_id, lease=0.05, identity=elsewhere("frozen"))
        gone = board(database, run_id, lease=0.05, identity=elsewhere("gone"))
        frozen.plan(chain("a", "b"))
        assert (need(frozen.claim()).site, need(gone.claim(skip={"a"})).site) == ("a", "b")
        assert until(frozen.claim).site == "b"
        assert frozen.claim() is None
        assert states(database, run_id) == [("a", 1, "running"), ("b", 1, "lost"), ("b", 2, "running")]

    def test_what_ends_while_it_is_renewed_stays_ended(self, database: Database, run_id: str) -> None:
        weak = forgetful(database)
        mine = board(weak, run_id)
        mine.plan(chain("a", "b"))
        first, second = need(mine.claim()), need(mine.claim())
        for end in (
            lambda: finish(mine, first, run_id=run_id),
            lambda: mine.give_back(second, reason="stopped", counted=False),
        ):
            weak.before.append(end)
            mine.renew()
        assert weak.before == []
        assert [(ticket.state, ticket.lease_until) for ticket in mine.tickets()] == [("done", None), ("waiting", None)]

    def test_a_site_whose_result_is_damaged_is_open_again(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id)
        mine.plan([*chain("a"), TicketSpec(site="b", position=1, depends_on=("a",), digest="b-digest")])
        assert finish(mine, need(mine.claim()), run_id=run_id)
        mine.reopen("b", "is not done yet")
        assert [t.state for t in mine.tickets()] == ["done", "waiting"]
        mine.reopen("a", "damaged")
        mine.reopen("a", "damaged")
        assert [t.state for t in mine.tickets()] == ["waiting", "waiting"]
        assert mine.results() == {}
        assert RunStore(database).sites(run_id) == []
        claim = need(mine.claim())
        assert (claim.site, claim.attempt) == ("a", 2)
        assert mine.claim() is None, "b waits for a again, once"
        assert finish(mine, claim, run_id=run_id)
        assert need(mine.claim()).site == "b"
        assert [(site, state) for site, _, state in states(database, run_id)] == [
            ("a", "lost"),
            ("a", "done"),
            ("b", "running"),
        ]

    def test_attempts_are_bounded(self, database: Database, run_id: str) -> None:
        number = iter(range(99))

        def another() -> Board:
            return board(database, run_id, lease=0.05, attempts=2, identity=elsewhere(str(next(number))))

        another().plan(chain("a"))
        need(another().claim())
        until(lambda: another().claim())
        until(lambda: another().claim() is None and another().tickets()[0].state == "failed")
        (ticket,) = another().tickets()
        assert "2 attempts ended without a result" in ticket.reason
        assert [state for _, _, state in states(database, run_id)] == ["lost", "lost"]
        another().plan(chain("a"))
        assert need(another().claim()).attempt == 3

    def test_only_the_holder_may_write_trials(self, database: Database, run_id: str) -> None:
        storage = optuna_storage(database)
        study = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], f"{run_id}/a")
        trials = [optuna.trial.create_trial(value=1.0)]
        holder = board(database, run_id, lease=0.05, identity=elsewhere("holder"))
        holder.plan(chain("a"))
        claim = need(holder.claim())
        insert_trials(storage, study, trials, first=0, fence=holder.fence(claim))
        other = board(database, run_id)
        taken = until(other.claim)
        with pytest.raises(LeaseLostError, match="taken over"):
            insert_trials(storage, study, trials, first=1, fence=holder.fence(claim))
        insert_trials(storage, study, trials, first=1, fence=other.fence(taken))
        assert storage.get_n_trials(study) == 2
        assert finish(other, taken, run_id=run_id)
        with pytest.raises(LeaseLostError):
            insert_trials(storage, study, trials, first=2, fence=other.fence(taken))
        storage.delete_study(study)

    def test_a_heartbeat_keeps_them_and_survives_lost_answers(self, database: Database, run_id: str) -> None:
        weak = forgetful(database)
        mine = board(weak, run_id, lease=2.0)
        mine.join()
        mine.drive()
        mine.plan(chain("a"))
        claim = need(mine.claim())
        began = claim.ticket.lease_until
        assert began is not None
        with Heartbeat(mine):
            weak.losses.append("out")
            until(lambda: not weak.losses)
            until(lambda: (mine.tickets()[0].lease_until or began) > began + timedelta(seconds=2))
        assert mine.driving
        assert finish(mine, claim, run_id=run_id)
        mine.stop_driving()

    def test_a_clock_that_jumps_changes_nothing(self, database: Database, run_id: str) -> None:
        ahead = [timedelta(0)]

        def jumping() -> datetime:
            return utc_now() + ahead[0]

        mine = board(database, run_id, clock=jumping)
        mine.join()
        mine.drive()
        mine.plan(chain("a", "b"))
        claim = need(mine.claim())
        for hours in (25, -25):
            ahead[0] = timedelta(hours=hours)
            with pytest.raises(InputError, match="is driven by"):
                board(database, run_id, clock=jumping).drive()
            assert mine.claim(skip={"b"}) is None, "a worker never takes its own claim"
            mine.renew()
            assert mine.tickets()[0].worker == mine.worker
        if database.backend != "sqlite":
            assert board(database, run_id, clock=lambda: utc_now() + timedelta(hours=25)).claim(skip={"b"}) is None
        assert mine.driving
        assert finish(mine, claim, run_id=run_id)
        mine.stop_driving()


class TestDrivers:
    def test_only_the_driver_may_write_the_trials_of_a_whole_model(self, database: Database, run_id: str) -> None:
        storage = optuna_storage(database)
        study = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], f"{run_id}/model")
        trials = [optuna.trial.create_trial(value=1.0)]
        mine, other = board(database, run_id), board(database, run_id)
        mine.drive()
        insert_trials(storage, study, trials, first=0, fence=mine.driver_fence())
        mine.stop_driving()
        other.drive()
        with pytest.raises(LeaseLostError, match="taken over"):
            insert_trials(storage, study, trials, first=1, fence=mine.driver_fence())
        insert_trials(storage, study, trials, first=1, fence=other.driver_fence())
        assert storage.get_n_trials(study) == 2
        other.stop_driving()
        storage.delete_study(study)

    def test_there_is_one(self, database: Database, run_id: str) -> None:
        mine, other = board(database, run_id), board(database, run_id)
        mine.join()
        mine.drive()
        mine.drive()
        with pytest.raises(InputError, match=r"is driven by process \d+ on .*, last heartbeat [\d.]+ s ago") as caught:
            other.drive()
        assert caught.value.field == "RUN"
        assert (mine.driving, other.driving) == (True, False)
        other.stop_driving()  # has nothing to give back
        assert RunStore(database).get(run_id).driver == mine.worker
        mine.stop_driving()
        other.drive()
        assert RunStore(database).get(run_id).driver == other.worker
        other.stop_driving()
        assert RunStore(database).get(run_id).driver is None

    def test_of_many_at_once_one_drives(self, database: Database, run_id: str) -> None:
        told: list[str] = []
        boards = [board(database, run_id) for _ in range(4)]
        waiting = iter(boards)

        def work() -> None:
            mine = next(waiting)
            try:
                mine.drive()
            except InputError as error:
                told.append(error.field)

        together(4, work)
        assert told == ["RUN"] * 3
        assert [one.driving for one in boards].count(True) == 1
        for one in boards:
            one.stop_driving()

    def test_one_that_was_not_heard_of_is_replaced_and_does_not_come_back(
        self, database: Database, run_id: str
    ) -> None:
        if database.backend == "sqlite":
            pytest.skip("on SQLite the right ends with the process, see the next test")
        frozen = board(database, run_id, lease=0.05, attempts=1, identity=elsewhere("frozen"))
        frozen.drive()
        frozen.plan(chain("a", "b"))
        need(frozen.claim())
        live = board(database, run_id, attempts=1, identity=elsewhere("live"))
        need(live.claim(skip={"a"}))
        next_ = board(database, run_id, attempts=1)

        def replace_it() -> bool:
            try:
                next_.drive()
            except InputError:
                return False
            return True

        until(replace_it)
        assert states(database, run_id) == [("a", 1, "lost"), ("b", 1, "running")]
        next_.stop_driving()
        frozen.renew()
        assert not frozen.driving
        assert RunStore(database).get(run_id).driver is None
        assert need(next_.claim()).site == "a", "the death of a driver counts against no site"

    def test_one_that_was_killed_here_is_replaced_at_once(self, database: Database, run_id: str) -> None:
        board(database, run_id).plan(chain("a", "b", "c"))
        command = [sys.executable, "-c", _DRIVER, database.url, run_id]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        next_ = board(database, run_id, attempts=1)
        assert child.stdout is not None
        try:
            assert child.stdout.readline().split() == ["a", "b"]
            with pytest.raises(InputError, match=rf"process {child.pid} on .*, last heartbeat"):
                next_.drive()
            assert need(next_.claim()).site == "c"
            assert next_.claim() is None
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        worker = board(database, run_id)
        taken = need(worker.claim())
        assert (taken.site, taken.attempt) == ("a", 2), "a dead process of this machine holds nothing"
        worker.give_back(taken, reason="", counted=False)
        next_.drive()
        again = need(next_.claim(skip={"a"}))
        assert (again.site, again.attempt) == ("b", 2)
        ended = {(site, number): state for site, number, state in states(database, run_id)}
        assert (ended["a", 1], ended["b", 1]) == ("lost", "lost")
        assert [worker.alive for worker in next_.workers()] == [False]
        next_.stop_driving()


class TestViews:
    def test_workers(self, database: Database, run_id: str) -> None:
        worker = Board(database, run_id, role="worker", engine="local", lease=0.05, identity=elsewhere("w"))
        if database.backend == "sqlite":
            with pytest.raises(InputError, match="one process only") as caught:
                worker.join()
            assert caught.value.field == "storage"
            return
        worker.join()
        driver = board(database, run_id, engine="local, 2 processes")
        driver.join()
        assert [(w.role, w.engine) for w in driver.workers()] == [("driver", "local, 2 processes"), ("worker", "local")]
        (first, last) = driver.workers()
        assert (first.alive, first.host, first.pid) == (True, Identity.here().host, Identity.here().pid)
        assert last.age >= first.age >= 0
        until(lambda: not worker.workers()[1].alive)
        worker.renew()
        driver.leave()
        assert {w.role: w.alive for w in driver.workers()} == {"driver": False, "worker": True}

    def test_progress(self, database: Database, run_id: str) -> None:
        mine = board(database, run_id)
        mine.plan(chain(*"abcdef"))
        assert (mine.progress().rate, mine.progress().seconds_left) == (None, None)
        for _ in range(2):
            finish(mine, need(mine.claim()), run_id=run_id)
        mine.fail(need(mine.claim()), "why")
        need(mine.claim())
        storage = optuna_storage(database)
        named = (f"{run_id}/a", f"{run_id}/b", f"x-{run_id}/a")
        minimize = [optuna.study.StudyDirection.MINIMIZE]
        studies = [storage.create_new_study(minimize, name) for name in named]
        for study in studies:
            insert_trials(storage, study, [optuna.trial.create_trial(value=1.0)] * 2, first=0)
        seen = mine.progress()
        assert (seen.waiting, seen.done, seen.failed, seen.trials) == (2, 2, (("c", "why"),), 4)
        assert [ticket.site for ticket in seen.running] == ["d"]
        assert seen.rate is not None
        assert seen.rate > 0
        assert seen.seconds_left == pytest.approx(180 / seen.rate)
        for study in studies:
            storage.delete_study(study)


class TestLostAnswers:
    """The commit happened, its answer did not arrive: everything is done once all the same."""

    def test_every_step(self, database: Database, run_id: str) -> None:
        weak = forgetful(database)
        mine = board(weak, run_id, attempts=1)

        def lose() -> None:
            assert weak.losses == [], "the last loss did not happen"
            weak.losses.extend(["out"] * 2)

        lose()
        mine.join()
        lose()
        mine.drive()
        lose()
        mine.plan(chain("a", "b", "c"))
        lose()
        claims = [need(mine.claim()) for _ in range(2)]
        assert [(claim.site, claim.attempt) for claim in claims] == [("a", 1), ("b", 1)]
        assert [ticket.state for ticket in mine.tickets()] == ["running", "running", "waiting"]
        lose()
        assert finish(mine, claims[0], run_id=run_id)
        assert len(mine.results()) == 1
        lose()
        mine.give_back(claims[1], reason="stopped", counted=False)
        last = need(mine.claim())
        assert (last.site, last.attempt) == ("b", 2)
        lose()
        mine.fail(last, "why")
        lose()
        mine.renew()
        lose()
        mine.leave()
        lose()
        mine.stop_driving()
        assert states(database, run_id) == [("a", 1, "done"), ("b", 1, "returned"), ("b", 2, "failed")]

    def test_a_claim_that_was_given_up_on_is_found_by_the_next(self, database: Database, run_id: str) -> None:
        weak = forgetful(database)
        mine = board(weak, run_id)
        mine.plan(chain("a", "b"))

        weak.losses.append("for good")
        with pytest.raises(StorageError, match="answer was lost"):
            mine.claim()
        assert [need(mine.claim()).site, need(mine.claim()).site] == ["a", "b"]
        assert {number for _, number, _ in states(database, run_id)} == {1}

    def test_a_connection_that_is_cut_is_not_seen(self, database: Database, run_id: str) -> None:
        if database.backend == "sqlite":
            pytest.skip("SQLite has no connection to cut")
        calls: list[object] = []

        def operation(session: Session) -> int:
            calls.append(session.execute(text("UPDATE alphasmith_run SET folder = :n"), {"n": str(len(calls))}))
            if len(calls) == 1:
                cut(database, session)
            return int(session.execute(text("SELECT COUNT(*) FROM alphasmith_run")).scalar_one())

        assert database.transact(operation) >= 1
        assert len(calls) == 2
        assert RunStore(database).get(run_id).folder == "1"


def cut(database: Database, session: Session) -> None:
    """Let the server end the session's connection."""
    postgresql = database.backend == "postgresql"
    own = session.execute(text("SELECT pg_backend_pid()" if postgresql else "SELECT CONNECTION_ID()")).scalar_one()
    with database.engine.connect() as other:
        other.execute(text(f"SELECT pg_terminate_backend({own})" if postgresql else f"KILL {own}"))
