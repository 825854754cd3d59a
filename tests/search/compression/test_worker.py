"""Several workers on one compression: who works, who finishes, who is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.search import CompressionResult, compress, load_compressed
from alphasmith.search.cli.main import main as command
from alphasmith.search.compression import _workers
from alphasmith.search.compression.compress import resume_compression
from alphasmith.search.compression.worker import work
from alphasmith.search.engines.types import SearchEnd
from alphasmith.search.interruption import Interrupted
from alphasmith.search.progress import Silent
from alphasmith.search.toml_values import merged
from alphasmith.storage.database.connection import opened, optuna_storage
from alphasmith.storage.output.reservation import Reservation
from alphasmith.storage.runs.compressions import CompressionRecord, CompressionStore
from alphasmith.storage.upkeep.check import violations
from tests.support.compressed_models import SETTINGS, Listener, listener, task
from tests.support.run_cases import alphasmith

SUPPORT = Path(__file__).parents[2] / "support"
#: Codebooks alone, without a training: what workers do is the same, and costs little.
QUICK = {
    "train": {"steps": 0},
    "study": {"trials": 4, "inner": 2, "roles": ["off"]},
    "drop": {"tolerances": {"accuracy": 50.0}},
}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    places = {"storage": f"sqlite:///{folder / 'studies.db'}", "out": str(folder / "out")}
    return merged(merged({**SETTINGS, **places}, QUICK), changes)


def record_of(given: dict[str, Any]) -> CompressionRecord:
    with opened(given["storage"]) as database:
        (record,) = CompressionStore(database).listing()
        assert list(violations(database)) == []
    return record


def trials_of(url: str, compression: str) -> list[FrozenTrial]:
    with opened(url) as database:
        study = optuna.load_study(study_name=f"{compression}/compression", storage=optuna_storage(database))
    return study.trials


def told(trials: list[FrozenTrial]) -> list[Any]:
    return [(t.params, t.values, t.user_attrs.get("drop.accuracy")) for t in trials if t.state == TrialState.COMPLETE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> CompressionResult:
    return compress(listener(), task(), settings(folder))


class Leaving(Silent):
    """Wants to leave as soon as a trial has ended."""

    def __init__(self) -> None:
        self._ended = 0

    def advance(self, text: str = "") -> None:
        """A trial has ended."""
        self._ended += 1

    def stop(self) -> bool:
        """Whether to leave."""
        return self._ended > 0


@pytest.fixture
def interrupted(tmp_path: Path) -> dict[str, Any]:
    """A compression whose driver has left after the first trial."""
    given, driver = settings(tmp_path), Leaving()
    with pytest.raises(Interrupted):
        compress(listener(), task(), given, progress=driver, stop=driver.stop)
    assert record_of(given).status == "interrupted"
    return given


def test_a_worker_goes_on_without_a_driver_and_finishes_as_an_undisturbed_one(
    interrupted: dict[str, Any], undisturbed: CompressionResult, folder: Path
) -> None:
    record = record_of(interrupted)
    assert [t.state for t in trials_of(interrupted["storage"], record.id)] == [TrialState.COMPLETE]
    done = work(record.id[:6], storage=interrupted["storage"], model=listener(), task=task())
    assert (done.compression, done.trials, done.finished) == (record.id, 3, True)
    assert record_of(interrupted).status == "finished"
    found = trials_of(interrupted["storage"], record.id)
    assert told(found) == told(trials_of(settings(folder)["storage"], undisturbed.id))
    ours, theirs = (load_compressed(one, Listener()).state_dict() for one in (done.folder, undisturbed.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_worker_leaves_the_result_to_a_driver_that_lives(interrupted: dict[str, Any]) -> None:
    record = record_of(interrupted)
    with Reservation(Path(record.folder), storage="", lease=60.0) as place:
        place.hold(record.id)
        done = work(record.id, storage=interrupted["storage"], model=listener(), task=task())
    assert not done.finished
    assert f"its driver (process {os.getpid()} on " in done.note
    assert not Path(record.folder).exists()
    unasked = work(record.id, storage=interrupted["storage"], model=listener(), task=task(), finish=False)
    assert (unasked.trials, unasked.finished, unasked.note) == (0, False, "all trials are there")
    looked = resume_compression(record.id, storage=interrupted["storage"], model=listener(), task=task())
    assert looked.id == record.id


def test_who_has_nothing_to_work_on_is_told_so(
    undisturbed: CompressionResult, interrupted: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    url = settings(folder)["storage"]
    with pytest.raises(InputError, match=rf"ID: {undisturbed.id} is finished; its result is in"):
        work(undisturbed.id, storage=url)
    with pytest.raises(InputError, match=r"ID: no compression 'c-1999' in .*; see alphasmith list"):
        work("c-1999", storage=url)
    with pytest.raises(InputError, match=r"storage: no database"):
        work("c-1999", storage=f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(InputError, match="--workers: -1 processes cannot work"):
        work(undisturbed.id, storage=url, workers=-1)
    record = record_of(interrupted)
    with pytest.raises(
        InputError, match=r"task: model and task of c-.* were given by a script; go on with it from that"
    ):
        work(record.id, storage=interrupted["storage"])
    with opened(interrupted["storage"]) as database:
        store = CompressionStore(database)
        study = store.study(record)
        moved = study.user_attrs["alphasmith"] | {"folder": "/nowhere/at/all/out"}
        study.set_user_attr("alphasmith", moved)
    with pytest.raises(
        InputError, match=r"ID: c-.* is worked on in /nowhere/at/all, which is not seen from here; work on"
    ):
        work(record.id, storage=interrupted["storage"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": {"count": -1}}, "workers.count"),
        ({"engine": "dask"}, "engine"),
        ({"engine": "ray", "workers": {"address": "somewhere:6379"}}, "storage: SQLite serves one machine"),
    ],
)
def test_workers_that_cannot_be_had_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        compress(listener(), task(), settings(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_the_command_wants_at_least_one_worker(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command(["compress", "--workers", "0"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: alphasmith compress: Invalid value for '--workers': 0")


def test_a_task_that_cannot_be_sent_to_workers_is_named(tmp_path: Path) -> None:
    given = task()
    held = type("Held", (), {"__reduce__": lambda self: (_ for _ in ()).throw(TypeError("a lock"))})()
    object.__setattr__(given, "held", held)
    with pytest.raises(InputError, match=r"task: model and task cannot be sent to workers .*task\.factory"):
        compress(listener(), given, settings(tmp_path, workers={"count": 1}))


class Engine:
    """Workers whose ends are given; they never work."""

    name, slots = "pretended", 2

    def __init__(self, ends: Iterator[SearchEnd]) -> None:
        self._ends = ends

    def submit(self, work: Any) -> None:
        self.slots = 1

    def wait(self, receive: Any, timeout: float) -> list[SearchEnd]:
        return [next(self._ends)]

    def stop(self) -> None:
        pass


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (
            SearchEnd(site="worker 0", reason="worker process 7 was killed by signal 11", lost=True),
            "3 workers died and no",
        ),
        (SearchEnd(site="worker 0", reason="the model has no weights"), "worker 0 failed: the model has no weights"),
    ],
)
def test_workers_that_die_again_and_again_or_fail_end_it_with_a_reason(
    end: SearchEnd, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def workers(*arguments: Any, **more: Any) -> Iterator[Engine]:
        yield Engine(iter([end] * 5))

    monkeypatch.setattr(_workers, "make_workers", workers)
    given = settings(tmp_path, workers={"count": 1})
    with pytest.raises(AlphasmithError, match=said):
        compress(listener(), task(), given)
    record = record_of(given)
    assert (record.status, said in record.reason) == ("failed", True)


class Killing(Silent):
    """Kills one of the workers, and then another one, while they are at a trial."""

    def __init__(self, url: str) -> None:
        self._url, self.killed = url, set[int]()

    def advance(self, text: str = "") -> None:
        """A trial has ended."""
        with opened(self._url) as database:
            (record,) = CompressionStore(database).listing()
            running = CompressionStore(database).study(record).get_trials(states=(TrialState.RUNNING,))
        for trial in running:
            pid = int(trial.user_attrs["worker"].split("/")[1])
            if len(self.killed) < 2 and pid not in self.killed and pid != os.getpid():
                self.killed.add(pid)
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_worker_processes_share_the_trials_and_may_be_killed(tmp_path: Path) -> None:
    given = settings(
        tmp_path, study={"trials": 12}, workers={"count": 2, "threads": 1}, clusters={"k": [2, 4, 16, 256]}
    )
    watch = Killing(given["storage"])
    found = compress(listener(), task(), given, progress=watch)
    record = record_of(given)
    assert record.status == "finished"
    trials = trials_of(given["storage"], found.id)
    counted = [trial for trial in trials if trial.state != TrialState.FAIL]
    assert sorted(trial.user_attrs["place"] for trial in counted) == list(range(12))
    assert len([t for t in trials if t.state == TrialState.FAIL]) == len(watch.killed)
    assert {int(trial.user_attrs["worker"].split("/")[1]) for trial in trials} & {os.getpid()} == set()
    assert not list(tmp_path.rglob("*.alphasmith-run"))


@pytest.mark.slow
def test_workers_of_two_shells_finish_what_a_driver_left(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    named = {"task": {"factory": "compressed_models:made", "factory_path": str(SUPPORT)}, "study": {"trials": 16}}
    given, driver = settings(tmp_path, **named), Leaving()
    with pytest.raises(Interrupted):
        compress(config=given, progress=driver, stop=driver.stop)
    compression = record_of(given).id
    allowed = ("--allow-code", "compressed_models:made", "--allow-code", str(SUPPORT))
    with ThreadPoolExecutor(2) as shells:
        join = partial(alphasmith, "worker", compression, "--storage", url, *allowed, "--json", cwd=tmp_path)
        ended = [shell.result() for shell in [shells.submit(join) for _ in range(2)]]
    answers = [json.loads(one.stdout) for one in ended if not one.returncode]
    assert sum(answer["finished"] for answer in answers) == 1, [one.stderr for one in ended]
    for one in ended:  # one that came when all was done
        assert one.returncode == 0 or "is finished; its result is in" in one.stderr
    trials = [trial for trial in trials_of(url, compression) if trial.state != TrialState.FAIL]
    assert sorted(trial.user_attrs["place"] for trial in trials) == list(range(16))
    made_before = len({trial.user_attrs["worker"] for trial in trials}) - len(answers)
    assert made_before <= 1
    assert record_of(given).status == "finished"


@pytest.mark.slow
def test_actors_of_a_ray_cluster_share_the_trials_and_may_be_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    given = settings(tmp_path, engine="ray", workers={"count": 2, "threads": 1}, study={"trials": 12})
    watch = Killing(given["storage"])
    found = compress(listener(), task(), given, progress=watch)
    assert record_of(given).status == "finished"
    trials = trials_of(given["storage"], found.id)
    assert sorted(t.user_attrs["place"] for t in trials if t.state != TrialState.FAIL) == list(range(12))
    assert len([t for t in trials if t.state == TrialState.FAIL]) == len(watch.killed)
    assert {int(trial.user_attrs["worker"].split("/")[1]) for trial in trials} & {os.getpid()} == set()
