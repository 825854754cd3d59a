"""Ctrl-C twice: the second one leaves at once, whatever is being computed, and the run can still be finished."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import nn

from alphasmith.objectives.judge.candidate_batch import CandidateBatch
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.smoothing import Smoothing
from tests.chaos import subject
from tests.support.run_cases import alphasmith, rows

ROOT = Path(__file__).resolve().parents[2]
#: A file in the working folder: while it is there, scoring a batch of candidates takes an hour.
ENDLESS = "endless"
#: Written by who began to score a batch then.
BEGAN = "began"
#: A background shell may have told its children to ignore SIGINT.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from alphasmith.search.cli.main import main
main()
"""


def model() -> nn.Module:
    """The model of the chaos suite, in a process whose searches may take an hour."""
    score = SiteObjective.batch

    def batch(self: SiteObjective, smoothings: Sequence[Smoothing]) -> CandidateBatch:
        if Path(ENDLESS).exists():
            Path(BEGAN).touch()
            time.sleep(3600)
        return score(self, smoothings)

    SiteObjective.batch = batch  # type: ignore[method-assign]
    return subject.model()


def until(happened: Callable[[], bool], process: subprocess.Popen[bytes], said: Path) -> None:
    """Wait for something while a process runs."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_and_the_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / ENDLESS).touch()
    said, storage = tmp_path / "stderr", f"sqlite:///{tmp_path / 'runs.db'}"
    options = subject.options(
        model__factory="tests.search.test_interruption:model", search__trials=4, search__refine=False
    )
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "run", *options, "--storage", storage, "--out", "out"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            until((tmp_path / BEGAN).exists, process, said)
            process.send_signal(signal.SIGINT)
            until(lambda: "Ctrl-C again leaves at once" in said.read_text(), process, said)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)  # the first one waits for the batch
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130, said.read_text()
        finally:
            process.kill()
            process.wait()
    (state, run_id), *others = rows(tmp_path / "runs.db", "SELECT status, id FROM alphasmith_run")
    assert (state, others) == ("interrupted", [])
    assert said.read_text().splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in said.read_text()

    (tmp_path / ENDLESS).unlink()
    allowed = ("--allow-code", "tests.search.test_interruption:model", *subject.allowed())
    answer = alphasmith("resume", run_id, "--storage", storage, *allowed, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert rows(tmp_path / "runs.db", "SELECT status, id FROM alphasmith_run") == [("finished", run_id)]
    done = rows(tmp_path / "runs.db", "SELECT count(*) FROM alphasmith_ticket WHERE state = 'done'")
    assert done == [(subject.SITES,)]
