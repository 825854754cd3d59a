"""Environments of other tools: made once, made anew where the requirements change, and a reason where they cannot be had."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.tools import environments
from benchmarks.tools.environments import InstallError, environment, isolated, last_line


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands in place of which a folder with a Python appears."""
    made: list[list[str]] = []

    def called(command: list[str], **keywords: object) -> SimpleNamespace:
        made.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", called)
    return made


def test_an_environment_is_made_once_for_the_same_requirements(tmp_path: Path, calls: list[list[str]]) -> None:
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("tool==1\n", encoding="utf-8")
    python = environment(wanted, tmp_path / "made")
    assert python == tmp_path / "made" / "bin" / "python"
    assert [command[0] for command in calls[1:]] == [str(python)], "pip of that environment installs"
    assert calls[1][-2:] == ["-r", str(wanted)]
    environment(wanted, tmp_path / "made")
    assert len(calls) == 2
    wanted.write_text("tool==2\n", encoding="utf-8")
    environment(wanted, tmp_path / "made")
    assert len(calls) == 4


def test_half_an_environment_is_none(tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("tool==1\n", encoding="utf-8")
    works = subprocess.run
    hint = "ERROR: No matching distribution found for tool==1\nhint: look elsewhere\n"

    def fails(command: list[str], **keywords: object) -> object:
        return SimpleNamespace(returncode=1, stderr=hint) if "pip" in command else works(command, **keywords)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(InstallError, match=r"^No matching distribution found for tool==1$"):
        environment(wanted, tmp_path / "made")
    monkeypatch.setattr(subprocess, "run", works)
    environment(wanted, tmp_path / "made")
    assert sum("venv" in command for command in calls) == 2


def test_a_folder_that_cannot_be_made_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wanted = tmp_path / "wanted.txt"
    wanted.touch()
    with pytest.raises(InstallError, match="file"):
        environment(wanted, tmp_path / "file" / "made")


def test_too_long_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_PATIENCE", 0.001)
    wanted = tmp_path / "wanted.txt"
    wanted.touch()
    with pytest.raises(InstallError, match="no end within"):
        environment(wanted, tmp_path / "made")


def test_nothing_of_this_environment_reaches_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.setenv("VIRTUAL_ENV", "here")
    given = isolated()
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(given)
    assert given["HF_HUB_OFFLINE"] == "1"


def test_the_last_line_says_something() -> None:
    assert last_line("first\nlast \n\n") == "last"
    assert last_line("\n") == "no word"
