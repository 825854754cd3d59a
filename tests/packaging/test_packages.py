"""The package list, the direction of imports and the built wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("search", "objectives", "storage", "dashboards")
#: architecture.md section 1: who may know whom.
MAY_IMPORT = {
    "objectives": {"objectives"},
    "storage": {"storage", "objectives"},
    "dashboards": {"dashboards", "storage", "objectives"},
    "search": {"search", "storage", "objectives", "dashboards"},
}
NEVER = {
    "objectives": {"optuna", "ray", "sqlalchemy", "alembic", "plotly", "optuna_dashboard"},
    "storage": {"ray", "optuna_dashboard", "plotly"},
    "dashboards": {"torch", "transformers", "sqlalchemy"},
    "search": {"sqlalchemy", "plotly"},
}


def packages_on_disk() -> set[str]:
    return {
        "alphasmith." + ".".join(init.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for init in (ROOT / room).rglob("__init__.py")
    }


def imported_modules(source: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_every_package_on_disk_is_listed() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(configured) == packages_on_disk()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    wrong = []
    for source in sources(room):
        for module in imported_modules(source):
            top, *rest = module.split(".")
            if (top == "alphasmith" and rest and rest[0] not in MAY_IMPORT[room]) or top in NEVER[room]:
                wrong.append(f"{source.relative_to(ROOT)} imports {module}")
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_bursts(room: str) -> None:
    sizes = {s.relative_to(ROOT): len(s.read_text(encoding="utf-8").splitlines()) for s in sources(room)}
    assert {s: n for s, n in sizes.items() if n > 600} == {}


def test_modules_say_what_they_are_for() -> None:
    without = [s for room in ROOMS for s in sources(room) if not ast.get_docstring(ast.parse(s.read_text("utf-8")))]
    assert without == []


def test_asserts_are_for_tests() -> None:
    found = [
        f"{s.relative_to(ROOT)}:{node.lineno}"
        for room in ROOMS
        for s in sources(room)
        for node in ast.walk(ast.parse(s.read_text("utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


@pytest.mark.slow
def test_wheel_holds_every_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in packages_on_disk():
        assert f"{package.replace('.', '/')}/__init__.py" in names
    for room in ROOMS:
        assert f"alphasmith/{room}/py.typed" in names
    assert not {n for n in names if n.split("/")[0] in ROOMS}, "bare top-level packages would clash with other wheels"
