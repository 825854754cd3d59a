"""Claims of one process while others take sites over: nothing is searched twice at once, and only what was accepted counts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.engines.types import Engine, OnMessage, SearchEnd, SiteWork
from alphasmith.search.progress import Silent
from alphasmith.search.site.result import SiteResult
from alphasmith.search.study.writer import Writer
from alphasmith.search.work.session import RunHandle
from alphasmith.search.work.site_results import SiteResults
from alphasmith.search.work.site_stage import SiteStage
from alphasmith.storage.database.connection import Database, initialise, open_database, optuna_storage
from alphasmith.storage.queue.board import Board
from alphasmith.storage.queue.records import Claim, TicketSpec
from tests.support.boards import board, chain, elsewhere, finish, need, new_run, states, until
from tests.support.engine_scripts import site_work

#: Nothing is waited for longer than this [s]: then the test fails.
PATIENCE = 30.0

WORK = site_work("any")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """An SQLite database."""
    opened = open_database(f"sqlite:///{tmp_path_factory.mktemp('database')}/runs.db")
    initialise(opened)
    with closing(opened):
        yield opened


def found(site: str, scale: float) -> SiteResult:
    """A result that is told from others by its scale."""
    smoothing = Smoothing(scales=torch.full((12,), scale))
    return cast(SiteResult, SimpleNamespace(name=site, smoothing=smoothing, held_out_loss=0.25))


class Scripted:
    """An engine with two slots that does what ``steps`` say, one at a time.

    A step is given the sites it holds and returns those that end now.
    """

    name = "scripted"

    def __init__(self, *steps: Callable[[list[str]], Sequence[SiteResult]]) -> None:
        self._steps = deque(steps)
        self.held: list[str] = []

    @property
    def slots(self) -> int:
        """Two in all."""
        return 2 - len(self.held)

    def submit(self, work: SiteWork) -> None:
        """Take a site, which must not be here already."""
        assert work.site not in self.held, f"{work.site} is searched here already"
        self.held.append(work.site)

    def wait(self, hear: OnMessage, timeout: float) -> list[SearchEnd]:
        """What the next step says; after the last one everything ends."""
        step = self._steps.popleft() if self._steps else lambda held: [found(site, 1.0) for site in held]
        results = step(list(self.held))
        for result in results:
            self.held.remove(result.name)
        return [SearchEnd(site=result.name, result=result) for result in results]

    def stop(self) -> None:
        """Nobody asks."""


class Results:
    """Accepts what the board accepts; one memory for all processes, as the database is.

    Args:
        owner: Board of one of the processes.
        run_id: The run.
        accepted: Shared with the other processes.
        before: Called before a result is recorded.
    """

    def __init__(
        self,
        owner: Board,
        run_id: str,
        accepted: dict[str, SiteResult],
        before: Callable[[str], object] = lambda site: None,
    ) -> None:
        self._owner = owner
        self._run = run_id
        self._accepted = accepted
        self._before = before

    def keep(self, claim: Claim, site: Site, result: SiteResult) -> bool:
        """As ``SiteResults.keep``."""
        self._before(claim.site)
        # Accepted by the same transaction: whoever claims a dependent next finds it.
        previous = self._accepted.get(claim.site)
        self._accepted[claim.site] = result
        if finish(self._owner, claim, run_id=self._run):
            return True
        if previous is not None:
            self._accepted[claim.site] = previous
        return False

    def results(self, sites: Sequence[str]) -> dict[str, SiteResult]:
        """As ``SiteResults.results``."""
        return {site: self._accepted[site] for site in sites}

    def check(self) -> None:
        """No site fails."""


class Source:
    """Sites that all have the same data; remembers which smoothings were folded into which."""

    def __init__(self, *order: str) -> None:
        self.order: Sequence[str] = order
        self.folded: dict[str, dict[str, float]] = {}
        self.asked = threading.Condition()

    def site(self, name: str) -> Site:
        """A stand-in."""
        return cast(Site, SimpleNamespace(name=name, shiftable=True))

    def position(self, name: str) -> int:
        """Its place."""
        return self.order.index(name)

    def rows(self, name: str, smoothings: Mapping[str, Smoothing]) -> tuple[SiteData, SiteData]:
        """The same for all."""
        with self.asked:
            self.folded[name] = {site: float(smoothing.scales[0]) for site, smoothing in smoothings.items()}
            self.asked.notify_all()
        return WORK.data, WORK.held_out

    def until_asked(self, name: str) -> None:
        """Wait until the rows of a site were asked for."""
        with self.asked:
            assert self.asked.wait_for(lambda: name in self.folded, PATIENCE), f"nobody began {name}"


def stage(
    database: Database, mine: Board, run_id: str, source: Source, engine: Scripted, keeper: Results
) -> dict[str, float]:
    """Run a stage to its end; the scale of every site's result."""

    def stop() -> bool:
        return False

    def study_name(of: str) -> str:
        return f"{run_id}/{of}"

    def never(seconds: float) -> None:
        raise AssertionError("everything was to be done here")

    with Writer() as writer:
        made = SiteStage(
            cast(
                RunHandle, SimpleNamespace(board=mine, optuna_storage=optuna_storage(database), study_name=study_name)
            ),
            source,
            WORK.settings,
            scheme=lambda _: WORK.settings.scheme,
            engine=cast(Engine, engine),
            keeper=cast(SiteResults, keeper),
            writer=writer,
            progress=Silent(),
            stop=stop,
            sleep=never,
        )
        made.run()
        return {name: float(result.smoothing.scales[0]) for name, result in made.results().items()}


def late(database: Database, run_id: str, specs: list[TicketSpec]) -> Board:
    """A planned run, as seen by a process whose leases run out at once because it was frozen."""
    made = board(database, run_id, lease=0.05, identity=elsewhere("frozen"))
    made.plan(specs)
    return made


def test_a_site_that_was_taken_over_and_given_back_is_claimed_again_only_when_its_old_search_has_ended(
    database: Database,
) -> None:
    run_id = new_run(database)
    mine, other = late(database, run_id, chain("a", "b", "c")), board(database, run_id)
    accepted: dict[str, SiteResult] = {}
    seen: list[list[str]] = []

    def frozen(held: list[str]) -> list[SiteResult]:
        """While this process slept, another one took ``a`` over and was asked to stop; here only ``b`` has ended."""
        taken = until(lambda: other.claim(skip={"b", "c"}))
        other.give_back(taken, reason="asked to stop", counted=False)
        return [found("b", 1.0)]

    def goes_on(held: list[str]) -> list[SiteResult]:
        seen.append(held)
        return [found("a", 7.0)]

    engine = Scripted(frozen, goes_on)
    results = stage(database, mine, run_id, Source("a", "b", "c"), engine, Results(mine, run_id, accepted))
    assert seen == [["a", "c"]]
    assert results == {"a": 1.0, "b": 1.0, "c": 1.0}, "what was found under the lost lease is refused"
    attempts = [attempt for attempt in states(database, run_id) if attempt[0] == "a"]
    assert attempts == [("a", 1, "lost"), ("a", 2, "returned"), ("a", 3, "done")]


@pytest.mark.parametrize("refused", [True, False])
def test_a_dependent_is_given_the_result_that_was_accepted(database: Database, refused: bool) -> None:
    run_id = new_run(database)
    specs = [*chain("a", "b"), TicketSpec(site="c", position=2, depends_on=("a",), digest="c-digest")]
    mine, other = late(database, run_id, specs), board(database, run_id)
    source, accepted = Source("a", "b", "c"), cast(dict[str, Any], {})

    def before(site: str) -> None:
        """The late result is written only when the dependent has begun."""
        if site == "a" and refused:
            source.until_asked("c")

    def frozen(held: list[str]) -> list[SiteResult]:
        if refused:
            taken = until(lambda: other.claim(skip={"b"}))
            assert Results(other, run_id, accepted).keep(taken, source.site("a"), found("a", 3.0))
        return [found("a", 7.0)]

    results = stage(database, mine, run_id, source, Scripted(frozen), Results(mine, run_id, accepted, before))
    wanted = 3.0 if refused else 7.0
    assert source.folded["c"] == {"a": wanted}
    assert results == {"a": wanted, "b": 1.0, "c": 1.0}


def test_nobody_claims_a_site_while_its_late_result_is_being_written(database: Database) -> None:
    run_id = new_run(database)
    mine, other = late(database, run_id, chain("a", "b")), board(database, run_id)
    written, looked = threading.Event(), threading.Event()
    claim = mine.claim

    def watched(skip: Sequence[str] = ()) -> Claim | None:
        answer = claim(skip)
        if answer is not None and answer.site == "a" and answer.attempt > 1:
            assert written.is_set(), "a is still being written"
        if "a" in skip:
            looked.set()
        return answer

    def frozen(held: list[str]) -> list[SiteResult]:
        other.give_back(need(until(lambda: other.claim(skip={"b"}))), reason="asked to stop", counted=False)
        return [found("a", 7.0)]

    class Slow(Results):
        def keep(self, claim: Claim, site: Site, result: SiteResult) -> bool:
            """Only after the stage has looked for more to do."""
            if claim.site == "a" and claim.attempt == 1:
                looked.wait(PATIENCE)
                kept = super().keep(claim, site, result)
                written.set()
                return kept
            return super().keep(claim, site, result)

    watching = cast(Board, SimpleNamespace(claim=watched, done=mine.done, fence=mine.fence, driving=False))
    results = stage(database, watching, run_id, Source("a", "b"), Scripted(frozen), Slow(mine, run_id, {}))
    assert results == {"a": 1.0, "b": 1.0}
    assert mine.tickets()[0].attempts == 3
