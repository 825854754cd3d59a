"""A finished run to train from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alphasmith.search import RunResult
from tests.support.training_cases import finished_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A finished run."""
    return finished_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: RunResult, tmp_path: Path) -> Path:
    """The folder that holds a run's folder, database and pictures; its own copy."""
    shutil.copytree(made.folder.parent, tmp_path / "own")
    return tmp_path / "own"
