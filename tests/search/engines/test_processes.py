"""Worker processes on one machine: they die, freeze and fail to start without harm to the run, and never outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.search.config import WorkersConfig
from alphasmith.search.engines.local.in_process import InProcess
from alphasmith.search.engines.local.processes import Processes, default_workers
from alphasmith.search.engines.types import Engine
from tests.support.engine_contract import ROOT, EngineContract, MessageLog, model_work
from tests.support.engine_scripts import PATIENCE, PERFORM, broken_metric, script, site_work


def until(happens: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process runs no more; nobody may have taken note of its end."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class TestInProcess(EngineContract):
    """The engine of a laptop keeps the contract."""

    scripted = False

    @classmethod
    def open(cls, count: int) -> Engine:
        """Searches in this process."""
        return InProcess()


class TestProcesses(EngineContract):
    """Worker processes keep it, and more."""

    @classmethod
    def open(cls, count: int) -> Engine:
        """Worker processes."""
        return Processes(count, threads=1, devices=["cpu"], perform=PERFORM)

    def test_threads_and_device_are_those_given(self, engine: Engine) -> None:
        before = os.environ.get("OMP_NUM_THREADS")
        heard = MessageLog()
        heard.run(engine, [script("facts")])
        assert heard.notes("site") == {"threads": 1, "environment": "1", "device": "cpu", "group": True}
        assert os.environ.get("OMP_NUM_THREADS") == before
        assert engine.name == "local, 2 processes"

    def test_a_judge_that_fails_fails_its_candidates(self, engine: Engine) -> None:
        work = model_work(broken_metric)
        scores = engine.racer(work.judge("cpu"), lambda: work).race([{}, {}, {}])
        assert [s.failure for s in scores] == ["ValueError: no labels"] * 3
        assert all(s.loss is None and s.samples == 0 for s in scores)

    @pytest.mark.slow
    def test_a_terminal_does_not_end_workers_but_the_kernel_does(self, engine: Engine) -> None:
        assert isinstance(engine, Processes)
        heard = MessageLog()
        engine.submit(script("wait"))
        heard.until(engine, lambda: bool(heard.messages))
        pid = heard.notes("site")["pid"]
        assert pid in engine.pids
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP):
            os.kill(pid, number)
        # Frozen: it keeps its work, and the others go on.
        heard.run(engine, [script("raise", "raised"), script("exit", "left")])
        assert engine.slots == 1
        engine.submit(script("wait", "last"))
        with pytest.raises(AlphasmithError, match="no worker is free"):
            engine.submit(site_work("one too many"))
        with pytest.raises(AlphasmithError, match="while sites are searched"):
            engine.racer(model_work().judge("cpu"), model_work).race([{}])
        heard.until(engine, lambda: "last" in heard.messages)
        assert {"raised", "left"} == heard.ended.keys()
        for site in ("site", "last"):
            os.kill(heard.notes(site)["pid"], signal.SIGKILL)
        heard.until(engine, lambda: len(heard.ended) == 4)
        assert heard.ended["site"].reason.startswith(f"worker process {pid} was killed by signal 9")
        assert " ended with code 3" in heard.ended["left"].reason
        assert heard.ended["raised"].reason == "ValueError: two lines"
        assert {site: end.lost for site, end in heard.ended.items()} == {
            "site": True,
            "last": True,
            "left": True,
            "raised": False,
        }
        # One that dies while it has nothing to do loses nothing.
        heard.run(engine, [script("facts", "idle")])
        (idle,) = engine.pids
        os.kill(idle, signal.SIGKILL)
        os.waitid(os.P_PID, idle, os.WEXITED | os.WNOWAIT)
        heard.run(engine, [site_work("next")])
        assert heard.ended["next"].result is not None


def test_workers_that_cannot_start_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = Processes(2)
    pool.submit(site_work("site"))
    heard = MessageLog()
    with pytest.raises(AlphasmithError, match=r"do not start: ImportError: libcudart\.so: no such file"):
        heard.until(pool, lambda: False)
    pool.close()
    assert not heard.ended


def test_workers_end_with_the_engine() -> None:
    closed, forgotten = Processes(1), Processes(1)
    for pool in (closed, forgotten):
        pool.submit(site_work("site"))
    pids = closed.pids + forgotten.pids
    assert len(pids) == 2
    closed.close()
    assert closed.slots == 0
    assert closed.wait(MessageLog(), 60.0) == []
    with pytest.raises(AlphasmithError):
        closed.submit(site_work("site"))
    del pool, forgotten
    until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.slow
def test_no_worker_outlives_a_killed_driver(tmp_path: Path) -> None:
    # A launch script without a guard for its main part: workers must not run it.
    launch = tmp_path / "launch.py"
    launch.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from alphasmith.search.engines.local.processes import Processes\n"
        "from tests.support.engine_scripts import PERFORM, script\n"
        "pool = Processes(1, perform=PERFORM)\n"
        "pool.submit(script('wait'))\n"
        "while True:\n"
        "    pool.wait(lambda site, message: print(message.value, flush=True), 1.0)\n"
    )
    with subprocess.Popen([sys.executable, str(launch)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        assert psutil.Process(pid).ppid() == driver.pid
        driver.kill()
    until(lambda: gone(pid))


def test_no_workers_are_refused() -> None:
    with pytest.raises(InputError, match=r"workers\.count"):
        Processes(0)


@pytest.mark.parametrize(
    ("count", "gpus", "device", "expected"),
    [
        (0, 0, None, (0, ())),
        (0, 1, None, (0, ("cuda:0",))),
        (0, 2, None, (2, ("cuda:0", "cuda:1"))),
        (0, 2, "cuda", (2, ("cuda:0", "cuda:1"))),
        (5, 2, None, (5, ("cuda:0", "cuda:1"))),
        (3, 0, None, (3, ())),
        (0, 4, "cpu", (0, ("cpu",))),
        (2, 4, "cuda:3", (2, ("cuda:3",))),
    ],
)
def test_one_worker_per_gpu_unless_told(
    count: int, gpus: int, device: str | None, expected: tuple[int, tuple[str, ...]]
) -> None:
    assert default_workers(WorkersConfig(count=count), gpus=gpus, device=device) == expected
