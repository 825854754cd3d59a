"""A virtual environment for every tool, made where it is not there yet. A tool that does not install is told, with pip's last word."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: Names the folder of the environments where it is not the usual one.
ENVIRONMENTS_VARIABLE = "ALPHASMITH_TOOLS"
_PATIENCE = 3600.0  # seconds for one environment
#: Holds the requirements that an environment was made from; written last, so that half an environment is none.
_MARK = "alphasmith-requirements.txt"


class InstallError(Exception):
    """A tool cannot be installed here; the message says why."""


def environments_folder() -> Path:
    """Where environments are kept: what ``ALPHASMITH_TOOLS`` names, else ``build/tools`` of the repository."""
    named = os.environ.get(ENVIRONMENTS_VARIABLE)
    return Path(named).expanduser() if named else Path(__file__).resolve().parents[2] / "build" / "tools"


def is_made(requirements: Path, folder: Path) -> bool:
    """Whether a folder holds the environment of a requirements file."""
    python, mark = folder / "bin" / "python", folder / _MARK
    return (
        python.exists()
        and mark.is_file()
        and mark.read_text(encoding="utf-8") == requirements.read_text(encoding="utf-8")
    )


def environment(requirements: Path, folder: Path) -> Path:
    """The Python of an environment that holds what a file asks for; made, or made anew where the file has changed.

    Args:
        requirements: A requirements file of pip.
        folder: Of the environment.

    Raises:
        InstallError: It cannot be made; the message is the last line that pip or venv wrote.
    """
    python = folder / "bin" / "python"
    if is_made(requirements, folder):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _call(sys.executable, "-m", "venv", str(folder))
    _call(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements))
    (folder / _MARK).write_text(requirements.read_text(encoding="utf-8"), encoding="utf-8")
    return python


def isolated() -> dict[str, str]:
    """Variables for a process of a tool's environment: nothing of this one's packages, no hub."""
    kept = {n: v for n, v in os.environ.items() if n not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def last_line(told: str) -> str:
    """The last line that says anything."""
    return next((line.strip() for line in reversed(told.splitlines()) if line.strip()), "no word")


def _call(*command: str) -> None:
    try:
        done = subprocess.run(
            list[str](command), env=isolated(), check=False, capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise InstallError(f"no end within {_PATIENCE:.0f} s") from None
    if done.returncode:
        raise InstallError(_reason(done.stderr.splitlines()))


def _reason(lines: Sequence[str]) -> str:
    """The last error of pip, which writes hints behind it; else the last line."""
    errors = [line.strip() for line in lines if line.startswith("ERROR:")]
    return errors[-1].removeprefix("ERROR:").strip() if errors else last_line("\n".join(lines))
