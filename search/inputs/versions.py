"""Versions that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Name -> version, of Python and of the packages that a result depends on."""
    names = ("alphasmith", "numpy", "optuna", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
