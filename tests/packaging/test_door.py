"""The public door: what ``import alphasmith`` gives, and what neither it nor the help of a command may load."""

from __future__ import annotations

import importlib.metadata
import inspect
import pydoc
import subprocess
import sys
from rlcompleter import Completer

import click
import click.testing
import pytest

import alphasmith
import alphasmith.search
from alphasmith.search.cli.main import app

PROMISED = {"run", "resume", "search_site", "RunConfig", "load_smoothed", "load_quantized", "__version__"}
#: Any of these costs more time and memory than a page of help may.
HEAVY = ("torch", "numpy", "pandas", "scipy", "optuna", "sqlalchemy", "alembic", "transformers", "plotly", "ray")


def loaded_by(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter after ``code``."""
    told = f"try:\n    {code}\nexcept SystemExit:\n    pass\nimport sys\nprint('loaded', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True, timeout=60)
    return {module.split(".")[0] for module in done.stdout.splitlines()[-1].split()[1:]}


def groups(command: click.Command, *path: str) -> list[list[str]]:
    """Arguments that reach every group of commands."""
    if not isinstance(command, click.Group):
        return []
    return [list(path), *(found for name, inner in command.commands.items() for found in groups(inner, *path, name))]


def test_every_public_name_is_shown_and_there() -> None:
    assert set(alphasmith.__all__) >= PROMISED
    assert dir(alphasmith) == sorted(alphasmith.__all__)
    shown = pydoc.plain(pydoc.render_doc(alphasmith))
    offered = Completer({"alphasmith": alphasmith})
    for name in alphasmith.__all__:
        value = getattr(alphasmith, name)
        assert name == "__version__" or value.__name__ == name
        assert name == "__version__" or inspect.getdoc(value)
        assert f"VERSION\n    {value}" in shown if name == "__version__" else name in shown
        assert any(c.startswith(f"alphasmith.{name}") for c in offered.attr_matches(f"alphasmith.{name}"))
    assert alphasmith.__version__ == importlib.metadata.version("alphasmith")


def test_search_gives_the_same_things() -> None:
    assert set(alphasmith.search.__all__) == set(alphasmith.__all__) - {"__version__"}
    for name in alphasmith.search.__all__:
        assert getattr(alphasmith.search, name) is getattr(alphasmith, name)


@pytest.mark.parametrize("package", [alphasmith, alphasmith.search])
def test_an_unknown_name_is_an_attribute_error(package: object) -> None:
    with pytest.raises(AttributeError, match="serach_site"):
        package.serach_site  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_loads_nothing_of_other_makers() -> None:
    grown = loaded_by("import alphasmith") - loaded_by("pass")
    assert grown - sys.stdlib_module_names - {"alphasmith"} == set()


@pytest.mark.parametrize("arguments", [["--version"], *groups(app), *([*group, "--help"] for group in groups(app))])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = loaded_by(f"from alphasmith.search.cli.main import main; main({arguments!r})")
    assert "click" in loaded
    assert loaded & set(HEAVY) == set()


def test_help_lists_every_command_with_its_short_help() -> None:
    told = click.testing.CliRunner().invoke(app, ["--help"], terminal_width=200).output
    for name, command in app.commands.items():
        assert f"  {name} " in told
        assert command.get_short_help_str(200) in told
