"""The promise of a run, on a real model out of a package: MiniLM, the short form of the benchmark of real models."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real_folders import AbsentError, home_folder
from benchmarks.real_models import broken_promises, finding
from benchmarks.real_runs import CONTESTANTS, Request


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_model_written_is_no_worse_than_any_baseline(tmp_path: Path) -> None:
    request = Request(model="MiniLM", scheme="w8a8-channel-static", seed=0, short=True, sweep=False, home=home_folder())
    try:
        found = finding(request, tmp_path, threads=1, resume=False)
    except AbsentError as absent:
        pytest.skip(str(absent))
    assert set(found.judged) == set(CONTESTANTS)
    assert list(broken_promises(found)) == []
    assert found.judged["ours"].loss < 0.5 * found.judged["none"].loss
