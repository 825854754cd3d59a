"""Progress from anywhere: what is shown is what the database holds, until the run ends, whatever happens to the database."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import make_url

from alphasmith.objectives.errors import InputError
from alphasmith.search.cli import answers, commands
from alphasmith.search.cli import tables as texts
from alphasmith.search.cli.watching import status as progress_texts
from alphasmith.search.cli.watching.watch import watch_run
from alphasmith.search.config import resume_command
from alphasmith.search.launch.worker import WorkSummary
from alphasmith.storage.database.connection import Database, initialise, open_database, optuna_storage
from alphasmith.storage.queue.board import Board, Identity
from alphasmith.storage.queue.records import RunProgress, Ticket, WorkerRecord
from alphasmith.storage.queue.status import RunSnapshot
from alphasmith.storage.runs.entries import Losses, LossPair, SiteRecord
from alphasmith.storage.runs.records import RunRecord
from alphasmith.storage.runs.run_store import RunStore
from tests.support.boards import SPEC, board, chain, elsewhere, finish, need, new_run
from tests.support.servers import empty_database

SITES = ("a", "b", "c")
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """An SQLite database."""
    opened = open_database(f"sqlite:///{tmp_path_factory.mktemp('database')}/runs.db")
    initialise(opened)
    with closing(opened):
        yield opened


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    """A PostgreSQL database."""
    with empty_database("postgresql") as url, closing(open_database(url)) as opened:
        initialise(opened)
        yield opened


class DrivenRun:
    """A run with a driver and three sites, moved on by hand."""

    def __init__(self, database: Database) -> None:
        self.store = RunStore(database)
        self.id = new_run(database)
        self.store.place(self.id, "results/here")
        self.board = board(database, self.id, engine="local, 2 processes")
        self.board.drive()
        self.board.join()
        self.store.start(self.id)

    def plan(self) -> None:
        """Three sites wait."""
        self.board.plan(chain(*SITES))

    def search(self) -> None:
        """One more site is done."""
        finish(self.board, need(self.board.claim()), run_id=self.id)

    def leave(self) -> None:
        """The driver ends in good order."""
        self.board.leave()
        self.board.stop_driving()

    def finish(self) -> None:
        """The run ends well."""
        self.store.finish(self.id)
        self.leave()


class Steps:
    """What happens between the looks, one step for each; a test ends rather than watch for ever."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._left = list(steps)
        self.waits: list[float] = []

    def __call__(self, seconds: float) -> None:
        """Wait so many seconds."""
        self.waits.append(seconds)
        self._left.pop(0)()


def nothing() -> None:
    """Nothing happens."""


def watched(database: Database, run: str, steps: Steps, *, address: str = "", as_json: bool = False) -> list[str]:
    """Lines that were printed until the end."""
    out = io.StringIO()
    watch_run(run, address or database.url, interval=7.0, as_json=as_json, out=out, sleep=steps)
    return out.getvalue().splitlines()


def listed(database: Database, run_id: str) -> dict[str, Any]:
    """The run as ``alphasmith list`` has it."""
    (row,) = (row for row in commands.list_runs(database.url) if row["id"] == run_id)
    return row


def test_a_line_for_every_change_and_none_without(database: Database) -> None:
    run = DrivenRun(database)
    claims: list[Any] = []
    steps = Steps(
        run.plan,
        run.search,
        nothing,
        nothing,
        lambda: claims.append(run.board.claim()),
        lambda: finish(run.board, claims[0], run_id=run.id),
        nothing,
        run.search,
        run.finish,
    )
    lines = watched(database, run.id[:-2], steps)
    told = [re.search(r"not planned|\d of 3 done(, 1 running)?", line) for line in lines[:-1]]
    assert [match and match[0] for match in told] == [
        "not planned",
        "0 of 3 done",
        "1 of 3 done",
        "1 of 3 done, 1 running",
        "2 of 3 done",
        "3 of 3 done",
        "3 of 3 done",
    ]
    assert all(line.startswith(f"{run.id} shared: ") for line in lines[:-1])
    assert "finished" in lines[-2]
    assert lines[-1] == "results in results/here"
    assert set(steps.waits) == {7.0}


def test_json_lines_are_looks(database: Database) -> None:
    run = DrivenRun(database)
    study = optuna.create_study(study_name=f"{run.id}/a", storage=optuna_storage(database))
    steps = Steps(run.plan, run.search, lambda: study.ask(), nothing, run.search, run.search, run.finish)
    looks = [json.loads(line) for line in watched(database, run.id, steps, as_json=True)]
    assert [look["progress"]["done"] for look in looks] == [0, 0, 1, 1, 1, 2, 3, 3]
    assert [look["progress"]["sites"] for look in looks] == [0, *[3] * 7]
    assert [look["progress"]["trials"] for look in looks] == [0, 0, 0, *[1] * 5]
    assert [look["status"] for look in looks] == [*["running"] * 7, "finished"]
    assert len({tuple(look) for look in looks}) == 1
    assert {worker["state"] for look in looks[:-1] for worker in look["progress"]["workers"]} == {"alive"}
    assert looks[-1]["progress"]["workers"][0]["state"] == "left"
    assert all(datetime.fromisoformat(look["time"]).tzinfo for look in looks)


def test_an_ended_run_says_why_and_how_to_go_on(database: Database) -> None:
    run = DrivenRun(database)
    run.plan()

    def end() -> None:
        run.board.fail(need(run.board.claim()), "no rows\nat all")
        run.store.fail(run.id, "site a: no rows at all")
        run.leave()

    lines = watched(database, run.id, Steps(end))
    assert "failed (site a: no rows at all), 0 of 3 done, 1 failed (no rows at all)" in lines[-2]
    assert lines[-1] == f"nobody works on it; resume with: alphasmith resume {run.id} --storage {database.masked}"
    run.board.drive()
    run.store.interrupt(run.id, "asked to stop")
    run.leave()
    assert "interrupted (asked to stop)" in watched(database, run.id, Steps())[0]


def test_a_dead_driver_is_known_at_once(database: Database) -> None:
    run_id = new_run(database)
    # The same process id at another start time: the number was given to another process since.
    dead = board(database, run_id, identity=replace(Identity.here(), started=1))
    dead.drive()
    dead.join()
    RunStore(database).start(run_id)
    dead.plan(chain(*SITES))
    need(dead.claim())

    def leave() -> None:
        raise KeyboardInterrupt

    (line,) = watched(database, run_id, Steps(nothing, leave))
    assert "running (no live driver)" in line
    assert "0 workers" in line
    row = listed(database, run_id)
    assert (row["status"], row["driver"]) == ("running", None)
    assert "running (no live driver)" in answers.runs_table([row])
    details = commands.show_run(run_id, database.url)
    shown = texts.run_text(details)
    assert "sites: 0 of 3 done, 1 running" in shown
    assert re.search(rf"worker: process {os.getpid()} on .*, driver, silent for [\d.]+ s", shown)
    assert commands.shown_facts(details)["progress"]["running"][0]["worker"] == dead.worker
    dead.stop_driving()


def test_a_live_driver_is_listed_and_shown(database: Database) -> None:
    run = DrivenRun(database)
    run.plan()
    run.search()
    row = listed(database, run.id)
    assert row["driver"] == run.board.worker
    assert "no live driver" not in answers.runs_table([row])
    details = commands.show_run(run.id, database.url)
    assert json.loads(json.dumps(commands.shown_facts(details), allow_nan=False))["progress"]["done"] == 1
    shown = texts.run_text(details)
    assert "sites: 1 of 3 done" in shown
    assert f"worker: process {os.getpid()} on {socket.gethostname()}, driver, local, 2 processes, alive" in shown
    run.finish()
    assert "worker:" not in texts.run_text(commands.show_run(run.id, database.url))


def test_a_run_at_work_shows_the_sites_that_are_done(database: Database) -> None:
    run = DrivenRun(database)
    run.plan()
    run.search()
    losses = Losses(identity=8e-3, alpha_half=4e-4, best_single=2.5e-4, best_single_alpha=0.65, ours=2e-4)
    pair = LossPair(search=losses, held_out=losses)
    run.store.add_site(run.id, SiteRecord(name=SITES[0], position=0, mode="fold", channels=64, losses=pair))
    shown = texts.run_text(commands.show_run(run.id, database.url), 80)
    assert "sites: 1 of 3 done" in shown
    (row,) = (line.split() for line in shown.splitlines() if line.startswith(f"{SITES[0]} "))
    assert row[1:] == ["fold", "64", "8.00e-3", "4.00e-4", "2.50e-4", "0.65", "2.00e-4"]
    assert "whole model" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    run.leave()


def test_no_run_is_an_input_error(database: Database, tmp_path: Path) -> None:
    for address in (database.url, f"sqlite:///{tmp_path}/other.db"):
        with pytest.raises(InputError):
            watch_run("r-0", address, out=io.StringIO(), sleep=Steps())
    assert not (tmp_path / "other.db").exists()


def test_a_terminal_shows_a_block_that_ends_with_the_result(database: Database) -> None:
    run = DrivenRun(database)
    run.plan()
    ours, theirs = os.openpty()
    heard = bytearray()

    def read() -> None:
        with suppress(OSError):  # the other end was closed
            while part := os.read(ours, 4096):
                heard.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as terminal:
        steps = Steps(run.search, run.search, run.search, run.finish)
        watch_run(run.id, database.url, out=terminal, sleep=steps)
    reader.join(60)
    os.close(ours)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", heard.decode())
    for told in ("0 of 3 done", "3 of 3 done", "driver, local, 2 processes, alive", "results in results/here"):
        assert told in shown
    assert "\u2501 3 of 3 done" in shown  # beside the bar
    assert "\x1b[?25h" in heard.decode()  # the cursor is there again


class Line:
    """The way to a server, which can be cut and mended: a port of this machine that passes everything on."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._accept()

    def cut(self) -> None:
        """Drop every connection and refuse new ones."""
        for end in (self._listener, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def mend(self) -> None:
        """Take connections again."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._accept()

    def _accept(self) -> None:
        listener = self._listener

        def serve() -> None:
            with suppress(OSError):  # cut
                while True:
                    near, _ = listener.accept()
                    far = socket.create_connection(self._target)
                    self._ends += [near, far]
                    for one, other in ((near, far), (far, near)):
                        threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while part := one.recv(65536):
            other.sendall(part)
    with suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("as_json", [False, True], ids=["lines", "json"])
def test_a_database_that_is_away_is_waited_for(server: Database, as_json: bool) -> None:
    run = DrivenRun(server)
    run.plan()
    url = make_url(server.url)
    line = Line(url.host or "127.0.0.1", url.port or 5432)
    address = url.set(host="127.0.0.1", port=line.port, password="hidden").render_as_string(hide_password=False)
    steps = Steps(run.search, line.cut, nothing, run.search, line.mend, run.search, run.finish)
    lines = watched(server, run.id, steps, address=address, as_json=as_json)
    line.cut()
    assert not any("hidden" in told for told in lines)
    if as_json:
        looks = [json.loads(told) for told in lines]
        assert [bool(look["storage_trouble"]) for look in looks] == [*[False] * 2, *[True] * 3, *[False] * 3]
        assert looks[-1]["status"] == "finished"
        assert len({tuple(look) for look in looks}) == 1
        return
    away = [index for index, told in enumerate(lines) if "does not answer, trying again" in told]
    assert away
    assert "1 of 3 done" in lines[away[0] - 1]
    assert "2 of 3 done" in lines[away[-1] + 1]
    assert "finished" in lines[-2]


def test_workers_that_go_on_are_watched_on(server: Database) -> None:
    run = DrivenRun(server)
    run.plan()
    worker = Board(server, run.id, role="worker", engine="local", identity=elsewhere("w1"))
    worker.join()
    seen: list[int] = []

    def interrupt() -> None:
        run.store.interrupt(run.id, "asked to stop")
        run.leave()

    def search() -> None:
        seen.append(len(seen))
        finish(worker, need(worker.claim()), run_id=run.id)

    steps = Steps(interrupt, search, search, search, worker.leave)
    lines = watched(server, run.id, steps)
    assert seen == [0, 1, 2]
    assert all("interrupted (asked to stop)" in line for line in lines[1:-1])
    assert "3 of 3 done" in lines[-2]
    assert "nobody works on it; resume with: alphasmith resume" in lines[-1]


# ----------------------------------------------------------------------------------------------------------- words


def looked(**changes: Any) -> RunSnapshot:
    """A run that was looked at: 12 of 18 sites are done, one fails, three workers have joined."""
    values = {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__}
    record = RunRecord(id="r-1", status="running", created=NOON, folder="results/r-1", driver="d", **values)
    ticket = Ticket(
        site="layers.0.fc1",
        position=0,
        state="running",
        attempts=2,
        worker=elsewhere("w").worker,
        lease_until=NOON,
        started=NOON - timedelta(seconds=34),
        ended=None,
        reason="",
    )
    workers = [
        WorkerRecord(
            id=f"w{number}",
            role="driver" if number == 0 else "worker",
            host=f"host{number}",
            pid=100 + number,
            engine="local",
            alive=number == 0,
            left=number == 2,
            joined=NOON,
            heartbeat=NOON,
            age=75.0 * number,
        )
        for number in range(3)
    ]
    progress = RunProgress(
        waiting=3,
        running=(ticket, replace(ticket, site="layers.0.fc2", attempts=1)),
        done=12,
        failed=(("layers.9.fc1", "out of\nmemory"),),
        trials=340,
        workers=tuple(workers),
        rate=1.9,
        seconds_left=158.0,
    )
    look = RunSnapshot(record=record, progress=progress, driver="d", present=NOON)
    return replace(look, **changes)


def test_a_block_tells_everything_once() -> None:
    lines = progress_texts.watch_lines(looked(), "sqlite:///alphasmith.db")
    assert lines == [
        "r-1 shared: running",
        "12 of 18 done, 2 running, 1 failed (out of memory), 1.9 sites/min, about 3 min left",
        "340 trials",
        "  running: layers.0.fc1, attempt 2, 34 s, process 1 on elsewhere",
        "  running: layers.0.fc2, attempt 1, 34 s, process 1 on elsewhere",
        "  failed: layers.9.fc1: out of memory",
        "  worker: process 100 on host0, driver, local, alive",
        "  worker: process 101 on host1, worker, local, silent for 75 s",
    ]


def test_what_is_too_long_is_counted() -> None:
    look = looked()
    many = tuple(replace(look.progress.running[0], site=f"layers.{i}.{'x' * 40}") for i in range(300))
    look = replace(look, progress=replace(look.progress, running=many, failed=(("a", "b" * 5000),)))
    lines = progress_texts.watch_lines(look, "sqlite:///alphasmith.db")
    assert len(lines) < 40
    assert max(map(len, lines)) < 300
    assert "and 288 more" in "\n".join(lines)
    assert planned(look) == 300 + 12 + 3 + 1


def planned(look: RunSnapshot) -> int:
    """Sites that the JSON form counts, which must be those of the text."""
    facts = progress_texts.progress_facts(look)
    total = progress_texts.planned_sites(look)
    assert facts["sites"] == total == facts["waiting"] + len(facts["running"]) + facts["done"] + len(facts["failed"])
    return int(facts["sites"])


def test_runs_without_sites() -> None:
    empty = RunProgress(waiting=0, running=(), done=0, failed=(), trials=14, workers=(), rate=None, seconds_left=None)
    look = looked(progress=empty)
    assert progress_texts.watch_line(look) == "r-1 shared: running, sites not planned yet, 14 trials, 0 workers"
    record = replace(look.record, scope="model", config={"search": {"trials": 24}})
    told = progress_texts.watch_line(replace(look, record=record))
    assert told == "r-1 shared: running, one study over the whole model, 14 of 24 trials, 0 workers"
    assert progress_texts.progress_lines(progress_texts.progress_facts(look)) == []


def test_a_command_can_be_pasted() -> None:
    assert resume_command("r-1", "sqlite:///alphasmith.db") == "alphasmith resume r-1"
    told = resume_command("r-1", "sqlite:////my runs/a.db")
    assert told == "alphasmith resume r-1 --storage 'sqlite:////my runs/a.db'"


def test_what_a_worker_did_is_two_lines() -> None:
    done = WorkSummary(run="r-1", searched=1, finished=True, folder="results/r-1", note="the result is written")
    for summary in (done, replace(done, finished=False)):
        told = answers.worker_text(summary).splitlines()
        assert len(told) == 2
        assert "1 site of r-1" in told[0]
        assert "results/r-1" in told[1]
