"""Autonomous workers on PostgreSQL: what they refuse, when they leave, what they finish, and what they never print."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, make_url, text

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.search import RunConfig
from alphasmith.search.cli import main as cli
from alphasmith.search.config import WorkersConfig
from alphasmith.search.interruption import Interrupted
from alphasmith.search.launch.pipeline import run
from alphasmith.search.launch.worker import work
from alphasmith.search.progress import Silent
from alphasmith.search.work.session import RunHandle
from alphasmith.storage.database.connection import Database, initialise, open_database
from alphasmith.storage.output.manifest import FILE_NAME
from alphasmith.storage.queue.board import Board
from alphasmith.storage.runs.records import RunRecord
from alphasmith.storage.runs.run_store import RunStore
from tests.chaos import subject
from tests.support.boards import SPEC, chain
from tests.support.run_cases import Mlp, seeded, vectors
from tests.support.servers import SERVERS, administrator, drop, empty_database

PASSWORD = "s3cr3t"
#: The smallest search that still finds something.
QUICK: dict[str, Any] = {
    "data.samples": 16,
    "groups.k": 1,
    "search.trials": 4,
    "search.rows": 32,
    "search.single_alphas": 3,
    "search.refine": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Engine]:
    """A PostgreSQL server, past all of our own code."""
    with administrator("postgresql") as engine:
        yield engine


@pytest.fixture
def address() -> Iterator[str]:
    """Address of an empty database, with a password."""
    with empty_database("postgresql", password=PASSWORD) as url:
        yield url


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A database for records of runs, which the tests share."""
    with empty_database("postgresql", password=PASSWORD) as url, closing(open_database(url)) as opened:
        initialise(opened)
        yield opened


class Notes(Silent):
    """Remembers what it was told; says whether sites are searched."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.lines: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        """Remember."""
        self.stages.append(name)

    def note(self, text: str) -> None:
        """Remember."""
        self.lines.append(text)

    def searching(self) -> bool:
        """Whether the sites are planned."""
        return "searching sites" in self.stages


class Naps:
    """Sleeps without waiting; ``then`` happens at the nap of that number.

    Args:
        at: Number of the nap, from 1.
        then: What happens.
    """

    def __init__(self, at: int = 0, then: Callable[[], object] = lambda: None) -> None:
        self.count = 0
        self._at = at
        self._then = then

    def __call__(self, seconds: float) -> None:
        """Count; a test ends rather than sleep for ever."""
        self.count += 1
        if self.count == self._at:
            self._then()
        assert self.count < 500, "it waits for ever"


def quick(address: str, folder: Path, **values: object) -> list[str]:
    """Options of a run of the smallest model, with everything it writes in ``folder``."""
    more = {**QUICK, "artifacts": str(folder / "artifacts"), **values}
    return [*subject.options(**more), "--storage", address, "--out", str(folder / "out")]


def left(address: str, folder: Path, **given: Any) -> str:
    """Id of a run whose driver planned the sites and was then asked to stop."""
    settings: dict[str, Any] = {**subject.SETTINGS, **QUICK, "artifacts": str(folder / "artifacts")}
    if given:
        settings = {name: value for name, value in settings.items() if not name.endswith(".factory")}
    nested: dict[str, Any] = {"storage": address, "out": folder / "out"}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        if field:
            nested.setdefault(section, {})[field] = value
        else:
            nested[section] = value
    notes = Notes()
    with pytest.raises(Interrupted) as caught:
        run(RunConfig.build(nested), progress=notes, stop=notes.searching, **given)
    return str(caught.value).partition("alphasmith resume ")[2].split()[0]


def unplanned(database: Database, **values: Any) -> str:
    """Id of a run that nobody planned."""
    return RunStore(database).create(replace(SPEC, **{"artifacts": "/nowhere", "hardware": {"rho": 0.0}, **values})).id


def driver(database: Database, run_id: str) -> Board:
    """A driver that has just begun."""
    made = Board(database, run_id, role="driver")
    made.drive()
    made.join()
    RunStore(database).start(run_id)
    return made


def killed(database: Database, owner: Board) -> None:
    """Its last report was an hour ago."""
    with database.session() as session:
        aged = "UPDATE alphasmith_worker SET heartbeat = heartbeat - INTERVAL '1 hour' WHERE id = :id"
        session.execute(text(aged), {"id": owner.worker})


def record(address: str, run_id: str) -> RunRecord:
    """What is on record of a run."""
    with closing(open_database(address)) as opened:
        return RunStore(opened).get(run_id)


def done(address: str, run_id: str) -> int:
    """Sites that are done."""
    with closing(open_database(address)) as opened:
        return len(Board(opened, run_id, role="worker").done())


class TestRefusals:
    def test_sqlite_with_the_reason(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path / 'runs.db'}"
        with closing(open_database(url)) as opened:
            initialise(opened)
            run_id = unplanned(opened)
        with pytest.raises(InputError, match=r"^storage: SQLite hands work to one process only.*use postgresql://"):
            work(run_id, storage=url)

    def test_a_run_over_the_whole_model(self, database: Database) -> None:
        run_id = unplanned(database, scope="model")
        with pytest.raises(InputError, match=r"^RUN: r-\S+ has scope 'model': one study; give its driver --workers"):
            work(run_id, storage=database.url)

    def test_a_database_without_runs(self, address: str) -> None:
        with pytest.raises(InputError, match=r"^storage: \S+ holds no runs"):
            work("any", storage=address)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_unknown_device_without_failing_a_site(self, database: Database, workers: int) -> None:
        run_id = unplanned(database)
        owner = driver(database, run_id)
        owner.plan(chain("a"))
        with pytest.raises(InputError, match="'abacus' is not usable"):
            work(run_id, storage=database.url, workers=workers, device="abacus", sleep=Naps())
        assert [(ticket.state, ticket.attempts) for ticket in owner.tickets()] == [("waiting", 0)]


class TestWaiting:
    def test_for_a_run_that_never_appears(self, database: Database) -> None:
        naps, notes = Naps(), Notes()
        with pytest.raises(InputError, match="no run 'never'"):
            work("never", storage=database.url, wait=3.0, progress=notes, sleep=naps)
        assert naps.count == 3
        assert notes.lines == ["waiting up to 3 s for run never"]

    def test_for_a_run_that_appears(self, database: Database) -> None:
        def appears() -> None:
            run_id = unplanned(database, name="later")
            driver(database, run_id)
            RunStore(database).finish(run_id)

        naps = Naps(2, appears)
        answer = work("later", storage=database.url, wait=60.0, sleep=naps)
        assert (answer.note, answer.finished, naps.count) == ("the run is finished", False, 2)

    @pytest.mark.parametrize("wait", [0.0, 7.0])
    def test_no_longer_than_asked_for_a_plan_that_nobody_alive_makes(self, database: Database, wait: float) -> None:
        run_id = unplanned(database)
        killed(database, driver(database, run_id))
        naps = Naps()
        with pytest.raises(InputError) as caught:
            work(run_id, storage=database.url, wait=wait, sleep=naps)
        assert naps.count == wait
        assert f"{run_id} is running and was never planned, and no driver has been alive" in str(caught.value)
        assert f"alphasmith resume {run_id} --storage" in str(caught.value)
        assert record(database.url, run_id).status == "running"

    def test_as_long_as_the_driver_lives(self, database: Database) -> None:
        run_id = unplanned(database)
        owner = driver(database, run_id)
        naps = Naps(200, lambda: killed(database, owner))
        with pytest.raises(InputError, match="no driver has been alive for 5 s"):
            work(run_id, storage=database.url, wait=5.0, sleep=naps)
        assert naps.count == 205

    def test_a_lease_for_a_driver_that_is_still_starting(self, database: Database) -> None:
        run_id = unplanned(database, config={"workers": {"lease": 9.0}})
        naps = Naps()
        with pytest.raises(InputError, match="is created and was never planned"):
            work(run_id, storage=database.url, sleep=naps)
        assert naps.count == 9

    def test_for_a_driver_that_comes_back_to_a_run_that_was_interrupted_early(self, database: Database) -> None:
        run_id = unplanned(database)
        first = driver(database, run_id)
        RunStore(database).interrupt(run_id, "asked to stop")
        first.leave()
        first.stop_driving()

        def returns() -> None:
            driver(database, run_id).plan(chain("a"))

        with pytest.raises(InputError, match="site a is not published"):  # so it was about to search it
            work(run_id, storage=database.url, wait=30.0, sleep=Naps(5, returns))

    def test_for_nothing_where_the_run_was_finished_meanwhile(self, database: Database) -> None:
        run_id = unplanned(database)
        owner = driver(database, run_id)

        def ends() -> None:
            owner.plan(chain("a"))
            RunStore(database).conclude(run_id, space_hash="", folder="/gone", refinement=None)
            RunStore(database).finish(run_id)

        done = work(run_id, storage=database.url, wait=30.0, sleep=Naps(3, ends))
        assert (done.searched, done.finished, done.note) == (0, False, "the run is finished")


def test_a_driver_that_was_replaced_says_so_whatever_it_runs_into(address: str, tmp_path: Path) -> None:
    with closing(open_database(address)) as opened:
        initialise(opened)
        run_id = unplanned(opened, artifacts=str(tmp_path))
        handle = RunHandle(
            opened, RunStore(opened).get(run_id), role="driver", engine="local", workers=WorkersConfig(lease=3600.0)
        )

        def drive() -> None:
            with handle:
                with opened.session() as session:  # while this process was frozen
                    session.execute(text("UPDATE alphasmith_run SET driver = 'another', status = 'finished'"))
                raise InputError("out", "already exists", "choose another folder")

        with pytest.raises(AlphasmithError, match=r"was taken over by another process, which continues it$"):
            drive()
        assert RunStore(opened).get(run_id).status == "finished"


class TestFinishing:
    def test_a_run_whose_driver_is_gone(self, address: str, tmp_path: Path) -> None:
        run_id = left(address, tmp_path)
        answer = work(run_id, storage=address, allow_code=subject.FUNCTIONS, sleep=Naps())
        assert (answer.searched, answer.finished, answer.note) == (subject.SITES, True, "the result is written")
        assert answer.folder == str(tmp_path / "out")
        assert (tmp_path / "out" / FILE_NAME).is_file()
        assert record(address, run_id).status == "finished"

    def test_is_left_to_others_on_request_and_where_the_objects_are_is_told_to_all_that_follows(
        self, address: str, tmp_path: Path
    ) -> None:
        run_id = left(address, tmp_path)
        answer = work(run_id, storage=address, finish=False, sleep=Naps())
        assert (answer.searched, answer.finished, answer.note) == (subject.SITES, False, "all sites are searched")
        assert done(address, run_id) == subject.SITES
        assert record(address, run_id).status == "interrupted"
        assert not (tmp_path / "out").exists()

        (tmp_path / "artifacts").rename(tmp_path / "elsewhere")
        (tmp_path / "file").touch()
        for place, told in ((None, r"is gone; name with --artifacts where they are"), ("file", "is a file")):
            with pytest.raises(InputError, match=rf"^artifacts: .*{told}"):
                work(run_id, storage=address, artifacts=place and str(tmp_path / place), sleep=Naps())
            assert record(address, run_id).status == "interrupted", "it is none the worse for that"
            assert not (tmp_path / "out").exists()

        elsewhere: dict[str, Any] = {"storage": address, "artifacts": str(tmp_path / "elsewhere"), "sleep": Naps()}
        allowed = "--allow-code tests.chaos.subject:model --allow-code tests.chaos.subject:data"
        with pytest.raises(InputError, match=rf"^--allow-code: run {run_id} .*; if you trust it, add {allowed}$"):
            work(run_id, **elsewhere)
        assert record(address, run_id).status == "interrupted"
        answer = work(run_id, allow_code=subject.FUNCTIONS, **elsewhere)
        assert (answer.searched, answer.finished) == (0, True)
        assert record(address, run_id).status == "finished"
        assert not (tmp_path / "artifacts").exists()

    def test_needs_code_allowed_only_for_the_result(self, address: str, tmp_path: Path) -> None:
        run_id, notes = left(address, tmp_path), Notes()
        answer = work(run_id, storage=address, progress=notes, sleep=Naps())
        assert (answer.searched, answer.finished) == (subject.SITES, False)
        assert [line for line in notes.lines if line.startswith("the result is not written here: --allow-code: ")]
        assert not (tmp_path / "out").exists()

    def test_needs_the_objects_for_searching_too(self, address: str, tmp_path: Path) -> None:
        run_id = left(address, tmp_path)
        (tmp_path / "artifacts").rename(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=r"^artifacts: site \S+ is not published .* is gone"):
            work(run_id, storage=address, sleep=Naps())
        assert record(address, run_id).status == "interrupted"
        answer = work(run_id, storage=address, artifacts=str(tmp_path / "elsewhere"), finish=False, sleep=Naps())
        assert answer.searched == subject.SITES
        assert not (tmp_path / "artifacts").exists()

    def test_is_left_to_a_driver_that_lives(self, address: str, tmp_path: Path) -> None:
        run_id = left(address, tmp_path)
        with closing(open_database(address)) as opened:
            owner = driver(opened, run_id)
            naps = Naps(3, owner.renew)
            answer = work(run_id, storage=address, sleep=naps)
        assert answer.note.startswith("all sites are searched, its driver (")
        assert (answer.finished, record(address, run_id).status) == (False, "running")
        assert naps.count >= 3

    def test_is_left_to_resume_where_the_model_cannot_be_loaded(self, address: str, tmp_path: Path) -> None:
        run_id = left(address, tmp_path, model=seeded(Mlp), batches=vectors())
        notes = Notes()
        answer = work(run_id, storage=address, progress=notes, sleep=Naps())
        assert (answer.finished, record(address, run_id).status) == (False, "interrupted")
        assert answer.note.startswith(f"all sites are searched; finish with: alphasmith resume {run_id} --storage ")
        assert PASSWORD not in answer.note
        assert [line for line in notes.lines if line.startswith("the result is not written here: data: ")]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Calls the command line, which must fail; everything it printed or logged, in which the password must not be."""
    caplog.set_level(logging.DEBUG)

    def call(*arguments: str, code: int, traced: bool = False) -> str:
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        said = "".join(capfd.readouterr()) + caplog.text
        assert ended.value.code == code, said
        assert PASSWORD not in said
        assert ("Traceback" in said) is traced
        assert "error: " in said
        return said

    return call


class TestPasswords:
    def test_are_not_told_where_the_database_is_missing(
        self, server: Engine, told: Callable[..., str], tmp_path: Path
    ) -> None:
        nowhere = make_url(SERVERS["postgresql"]).set(database="alphasmith_nowhere", password=PASSWORD)
        address = nowhere.render_as_string(hide_password=False)
        for command in (
            ["run", *quick(address, tmp_path)],
            ["resume", "any", "--storage", address],
            ["worker", "any", "--storage", address],
        ):
            assert "alphasmith_nowhere" in told(*command, code=2)

    def test_are_not_told_where_a_search_fails(
        self, address: str, told: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: SiteObjective, *_: object) -> None:
            raise RuntimeError("no kernel image")

        monkeypatch.setattr(SiteObjective, "batch", broken)
        assert "no kernel image" in told("run", *quick(address, tmp_path), code=1, traced=True)
        with closing(open_database(address)) as opened:
            (known,) = RunStore(opened).runs()
        for command in ("worker", "resume"):
            options = ("--storage", address, *subject.allowed())
            assert "no kernel image" in told(command, known.id, *options, code=1, traced=True)
        assert PASSWORD not in str(record(address, known.id))

    @pytest.mark.parametrize("command", ["run", "resume", "worker"])
    def test_are_not_told_where_the_database_vanishes(
        self,
        command: str,
        server: Engine,
        address: str,
        told: Callable[..., str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        arguments = quick(address, tmp_path)
        if command != "run":
            arguments = [left(address, tmp_path), "--storage", address, *subject.allowed()]

        def vanishes(self: Board, *_: object, **__: object) -> None:
            drop(server, str(make_url(address).database))
            self.tickets()

        monkeypatch.setattr(Board, "claim", vanishes)
        said = told(command, *arguments, code=1)
        assert "does not exist" in said
