"""Where a run goes unless told otherwise."""

from __future__ import annotations

from pathlib import Path

DEFAULT_STORAGE = "sqlite:///alphasmith.db"
DEFAULT_OUT = Path("alphasmith-runs")
