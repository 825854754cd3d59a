"""Run with the wheel installed and nothing else of the checkout in reach (``make wheel-check``)."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

ROOMS = ("search", "objectives", "storage", "dashboards")


def main() -> None:
    door = importlib.import_module("alphasmith")
    for name in door.__all__:
        getattr(door, name)
    count = 0
    for room in ROOMS:
        package = importlib.import_module(f"alphasmith.{room}")
        location = Path(str(package.__file__))
        if "site-packages" not in location.parts:
            raise SystemExit(f"{location} does not come from the wheel")
        for module in pkgutil.walk_packages(package.__path__, f"alphasmith.{room}."):
            if not module.name.endswith("migrations.env"):  # runs only inside Alembic
                importlib.import_module(module.name)
            count += 1
    answer = subprocess.run(
        [sys.executable, "-m", "alphasmith.search.cli.main", "hardware", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    json.loads(answer.stdout)
    print(f"wheel {importlib.metadata.version('alphasmith')}: {count} modules import, the command line answers")


if __name__ == "__main__":
    main()
