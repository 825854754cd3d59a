"""The package list, the direction of imports and the built wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.rooms import ROOT, imported_modules, product_files
from tests.support.rooms import TOPS as ROOMS

#: Who may know whom.
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
    inits = [ROOT / "__init__.py", *(init for room in ROOMS for init in (ROOT / room).rglob("__init__.py"))]
    return {".".join(("alphasmith", *init.parent.relative_to(ROOT).parts)) for init in inits}


def sources(room: str) -> list[Path]:
    return [ROOT / file for file in product_files(room)]


def test_every_package_on_disk_is_listed() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(configured) == packages_on_disk()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    wrong = []
    for source in sources(room):
        for module in imported_modules(source):
            top, *rest = module.split(".")
            if (top == "alphasmith" and "".join(rest[:1]) not in MAY_IMPORT[room]) or top in NEVER[room]:
                wrong.append(f"{source.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_modules_say_what_they_are_for() -> None:
    without = [s for room in ROOMS for s in sources(room) if not ast.get_docstring(ast.parse(s.read_text("utf-8")))]
    assert without == []


def test_words_are_written_once() -> None:
    """A set of three words or more has one name, wherever it is needed."""
    homes: dict[frozenset[str], list[str]] = {}
    for source in (s for room in ROOMS for s in sources(room)):
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
                words = {part.value for part in ast.walk(node.slice) if isinstance(part, ast.Constant)}
                if len(words) > 2:
                    homes.setdefault(frozenset(map(str, words)), []).append(f"{source.relative_to(ROOT)}:{node.lineno}")
    assert {words: where for words, where in homes.items() if len(where) > 1} == {}


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
    assert "alphasmith/py.typed" in names
    # The root package is the checkout's folder: nothing else that lies there may come along, nor a bare top-level package.
    allowed = {*(f"alphasmith/{room}" for room in ROOMS), "alphasmith/__init__.py", "alphasmith/py.typed"}
    assert {n for n in names if ".dist-info/" not in n and "/".join(n.split("/")[:2]) not in allowed} == set()
