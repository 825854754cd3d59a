"""The engine on a Ray cluster: it keeps the contract of engines, and no worker, node or driver that dies harms a run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.search.config import WorkersConfig
from alphasmith.search.engines import perform as real
from alphasmith.search.engines.cluster.engine import RayTune, gpu_fraction, searches_at_once
from alphasmith.search.engines.types import Engine, SiteWork
from alphasmith.search.interruption import never
from alphasmith.search.study.study_record import SentLog, StudyMessage, StudyNote, StudyPast, StudyStart, StudyTrials
from tests.support.engine_contract import ROOT, EngineContract, MessageLog, model_work, plain, same_result
from tests.support.engine_scripts import FACTS, PATIENCE, PERFORM, broken_metric, script, site_work

pytest.importorskip("ray", reason="ray is not installed")
from ray.cluster_utils import Cluster

from tests.support.ray_scripts import PERFORM as SCRIPTS

_NODE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with two CPUs, on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for workers to find this folder
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else workers starve on a busy machine
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **_NODE})
        try:
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def engine(cluster: Any) -> Iterator[RayTune]:
    """As many searches at once as the cluster takes, two attempts at each."""
    engine = RayTune(WorkersConfig(address=cluster.address, threads=1, attempts=2), perform=SCRIPTS)
    yield engine
    engine.close()


def until(happens: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestRay(EngineContract):
    """Searches on Ray keep the contract."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def address(cls, cluster: Any) -> Iterator[None]:
        """Engines find the cluster as users' do."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield

    @classmethod
    def open(cls, count: int) -> Engine:
        """An engine on the cluster."""
        return RayTune(WorkersConfig(count=count, threads=1, attempts=1), perform=PERFORM)


@pytest.mark.slow
def test_a_search_whose_worker_dies_goes_on_where_it_was(engine: RayTune, tmp_path: Path) -> None:
    heard = MessageLog()
    work = replace(site_work("site"), study_name=f"fragile {tmp_path / 'died'}")
    heard.run(engine, [work])
    alone: list[StudyMessage] = []
    expected = real.perform(work, SentLog(StudyPast(), alone.append), device=None, stop=never)
    assert (tmp_path / "died").exists()
    assert same_result(heard.ended["site"], expected)
    # Nothing is told twice, neither facts nor trials.
    for kind in (StudyStart, StudyNote, StudyTrials):
        told = [plain(m) for m in heard.messages["site"] if isinstance(m, kind)]
        assert told == [plain(m) for m in alone if isinstance(m, kind)]


@pytest.mark.slow
def test_a_search_is_lost_after_all_its_attempts(engine: RayTune) -> None:
    assert engine.name == "ray, 1 node, 2 CPUs"
    heard = MessageLog()
    heard.run(engine, [script("die", "fatal"), script("facts", "other")])
    end = heard.ended["fatal"]
    assert end.lost
    assert "after 2 attempts" in end.reason
    assert "\n" not in end.reason
    assert [m.name for m in heard.messages["fatal"] if isinstance(m, StudyNote)] == list(FACTS)
    assert heard.notes("other")["threads"] == 1
    assert heard.notes("other")["device"] == "cpu"
    # A worker that dies while Tune keeps it for the next search loses nothing.
    heard.run(engine, [script("pid", "idle")])
    idle = psutil.Process(heard.notes("idle")["pid"])
    idle.send_signal(signal.SIGKILL)
    until(lambda: not idle.is_running())
    heard.run(engine, [site_work("next")])
    assert heard.ended["next"].result is not None


@pytest.mark.slow
def test_searches_of_a_node_that_dies_go_on_at_another(cluster: Any, engine: RayTune, tmp_path: Path) -> None:
    before = engine.slots
    node = cluster.add_node(num_cpus=1, **_NODE)
    until(lambda: engine.slots > before)  # a node that joins brings slots
    # Its worker takes longer to start than a search takes; it gets work all the same.
    ready = tmp_path / "ready"
    ready.touch()
    first = MessageLog()
    early: list[SiteWork] = []

    def joined() -> bool:
        while engine.slots:
            early.append(replace(site_work(f"early {len(early)}"), study_name=f"hold {ready}"))
            engine.submit(early[-1])
        return any(node.node_id in first.notes(site).values() for site in first.messages)

    first.until(engine, joined)
    # Some may not have begun: until all have ended, they would be heard among the searches that follow.
    first.until(engine, lambda: len(first.ended) == len(early))
    go_on = tmp_path / "go on"
    for number in range(3):
        engine.submit(replace(site_work(f"site {number}"), study_name=f"hold {go_on}"))
    heard = MessageLog()
    heard.until(engine, lambda: len(heard.messages) == 3)
    (lost,) = [site for site in heard.messages if node.node_id in heard.notes(site).values()]
    cluster.remove_node(node, allow_graceful=False)
    other = cluster.add_node(num_cpus=1, **_NODE)
    heard.until(engine, lambda: len(heard.notes(lost)) == 2)  # begun again, elsewhere
    assert len(set(heard.notes(lost).values())) == 2
    go_on.touch()
    heard.until(engine, lambda: len(heard.ended) == 3)
    assert all(end.result is not None for end in heard.ended.values())
    cluster.remove_node(other)


@pytest.mark.slow
def test_a_judge_that_fails_fails_its_candidates(engine: RayTune) -> None:
    work = model_work(broken_metric)
    scores = engine.racer(work.judge("cpu"), lambda: work).race([{}, {}])
    assert [s.failure for s in scores] == ["ValueError: no labels"] * 2
    assert all(s.loss is None and s.samples == 0 for s in scores)


@pytest.mark.slow
def test_searches_that_wait_for_the_cluster_are_stopped_too(cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1, **_NODE)  # the workers of another engine may hold the rest
    engine = RayTune(WorkersConfig(address=cluster.address, count=1, threads=1), perform=SCRIPTS)
    heard = MessageLog()
    try:
        assert engine.slots == 2  # one runs, one waits
        for number in range(2):
            engine.submit(script("wait", f"held {number}"))
        with pytest.raises(AlphasmithError, match="takes no further search"):
            engine.submit(site_work("one too many"))
        with pytest.raises(AlphasmithError, match="while sites are searched"):
            engine.racer(model_work().judge("cpu"), model_work).race([{}])
        heard.until(engine, lambda: bool(heard.messages))
        engine.stop()
        heard.until(engine, lambda: len(heard.ended) == 2)
        assert all(end.stopped for end in heard.ended.values())
        assert engine.slots == 0
    finally:
        engine.close()
        cluster.remove_node(node)


@pytest.mark.slow
def test_nothing_outlives_a_killed_driver(tmp_path: Path) -> None:
    launch = tmp_path / "launch.py"
    launch.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from alphasmith.search.config import WorkersConfig\n"
        "from alphasmith.search.engines.cluster.engine import RayTune\n"
        "from tests.support.engine_scripts import PERFORM, script\n"
        "engine = RayTune(WorkersConfig(count=1, threads=1), perform=PERFORM)\n"
        "engine.submit(script('wait'))\n"
        "while True:\n"
        "    engine.wait(lambda site, message: print(message.value, flush=True), 1.0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    errors = tmp_path / "errors"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(launch)], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as driver,
    ):
        assert driver.stdout is not None
        worker = psutil.Process(int(driver.stdout.readline()))
        others = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    # Ray's agents go last, up to a minute later; they hold no resources.
    cluster = [process for process in others if _runs(process) and process.name() in ("raylet", "gcs_server")]
    until(lambda: not any(_runs(process) for process in (worker, *cluster)))
    assert errors.read_text() == ""  # the terminal stays clean


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_addresses_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"workers\.address.*ray job submit"):
        RayTune(WorkersConfig(address="ray://head:10001"))
    with pytest.raises(InputError, match=r"workers\.address: 'http://head/' is not of the form host:port"):
        RayTune(WorkersConfig(address="http://head/"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(InputError, match=rf"workers\.address: no Ray cluster answers at 127\.0\.0\.1:{port}"):
        RayTune(WorkersConfig(address=f"127.0.0.1:{port}"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"ray is not installed; pip install 'alphasmith\[ray\]'"):
        RayTune(WorkersConfig())


@pytest.mark.parametrize(
    ("memory", "gpu_memory", "gpus", "expected"),
    [
        (1, 80, 0, 0.0),  # no GPU
        (0, 80, 1, 1.0),  # unknown need
        (1, 0, 1, 1.0),  # unknown GPU
        (80, 80, 1, 1.0),
        (41, 80, 1, 1.0),  # a second one would not fit
        (40, 80, 1, 0.5),
        (27, 80, 8, 0.5),
        (26, 80, 8, 0.3333),
        (5, 80, 1, 0.0625),
        (1, 80, 1, 0.0625),  # at most 16
        (100, 80, 1, 1.0),  # too large; the search itself says so
    ],
)
def test_share_of_a_gpu(memory: int, gpu_memory: int, gpus: float, expected: float) -> None:
    assert gpu_fraction(memory, gpu_memory, gpus) == expected


def test_as_many_searches_share_a_gpu_as_fit_into_it() -> None:
    for memory in range(1, 200):
        share = gpu_fraction(memory, 1000, 1)
        count = searches_at_once([(64.0, 1.0)], cpus=1, gpus=share, most=0)
        assert count == max(1, min(16, 1000 // memory))
        # Ray counts in ten-thousandths.
        assert count * round(share * 10_000) <= 10_000


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "most", "expected"),
    [
        ([], 1, 0.0, 0, 0),
        ([(2.0, 0.0)], 1, 0.0, 0, 2),
        ([(2.0, 0.0), (3.0, 0.0)], 2, 0.0, 0, 2),  # no search spans nodes
        ([(8.0, 0.0), (8.0, 2.0)], 1, 0.5, 0, 4),
        ([(3.0, 2.0)], 1, 0.5, 0, 3),  # CPUs are scarcer
        ([(16.0, 0.0)], 1, 0.0, 5, 5),
        ([(4.0, 0.0)], 1, 0.0, 5, 4),
    ],
)
def test_searches_at_once(nodes: list[tuple[float, float]], cpus: int, gpus: float, most: int, expected: int) -> None:
    assert searches_at_once(nodes, cpus=cpus, gpus=gpus, most=most) == expected
