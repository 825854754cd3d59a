"""Schemathesis against the running service: no 5xx, no answer that the OpenAPI page does not tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphasmith.objectives.literals import MediaKind
from tests.support.services import Spelling, served

#: 422 also says that every item failed: which bytes are a picture, and which text a model takes, no schema tells.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "422"]
"""


def tried(port: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What Schemathesis says of the service; the same requests every time."""
    (folder / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json", "--no-color"]
    return subprocess.run(
        [*command, "--seed", "0", "--generation-deterministic", *options],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"HYPOTHESIS_STORAGE_DIRECTORY": str(folder)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image"])
def test_no_answer_is_an_error_of_the_service_or_against_its_schema(kind: MediaKind, tmp_path: Path) -> None:
    with served(Spelling(kind)) as port:
        done = tried(port, tmp_path, "--max-examples", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 selected" in done.stdout, done.stdout


@pytest.mark.slow
def test_a_server_error_would_be_found(tmp_path: Path) -> None:
    class Broken(Spelling):
        def classify(self, items: object, *, top: int | None = None) -> list[object]:  # type: ignore[override]
            raise ZeroDivisionError("a defect")

    model = Broken("video")  # no first item is made up of it
    with served(model) as port:
        done = tried(port, tmp_path, "--max-examples", "5")
    assert (done.returncode, "Server error" in done.stdout) == (1, True), done.stdout + done.stderr
