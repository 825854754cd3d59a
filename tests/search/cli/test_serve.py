from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from alphasmith.search.cli.main import main


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert (ended.value.code, len(lines)) == (2, 1), lines
    return lines[0]


def test_a_missing_extra_is_told_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    line = failed(capsys, "result")
    assert line == "error: serve: uvicorn is not installed; pip install 'alphasmith[serve]'"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-bytes", "many"], "'many' is not a size"),
        (["--max-bytes", "0"], "'0' is not above 0"),
        (["--batch", "0"], "0 is not in the range"),
        (["--wait", "nan"], "nan is not a number of seconds"),
        (["--host", "no such host"], "host: 'no such host' cannot be resolved"),
        (["--token", "short"], "token: is no token"),
        (["--allow-host", "a/b"], "host: 'a/b' is not a host name"),
        ([], "RUN: "),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in failed(capsys, "./nowhere", "--port", "0", *arguments)
    assert list(tmp_path.iterdir()) == []
