"""The documentation says what the program does: commands, fields, snippets, links."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from alphasmith.objectives.training.settings import TrainingSettings
from alphasmith.search.cli.main import app
from alphasmith.search.compression.config import CompressConfig
from alphasmith.search.config import RunConfig
from alphasmith.search.training.config import FinetuneConfig
from alphasmith.storage.output.entries import SiteEntry
from alphasmith.storage.output.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
COMMANDS = {
    name: command
    for context in [click.Context(app)]
    for name in app.list_commands(context)
    if (command := app.get_command(context, name)) is not None
}
#: Keeps what the README shows and makes it quick.
QUICK = [
    part
    for field in ("search.trials=4", "search.rows=64", "search.single_alphas=3", "data.samples=16", "data.held_out=8")
    for part in ("--set", field)
]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def shown_commands(page: str) -> list[list[str]]:
    """Arguments of every ``$ alphasmith ...`` line of console blocks, continued lines joined."""
    lines = "".join(content for language, content in blocks(page) if language == "console").replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in lines.splitlines() if line.startswith("$ alphasmith")]


def section(page: str, title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    return match.group(1) if match else ""


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> default of every plain field."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.default, BaseModel):
            found |= fields(type(info.default), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = info.default
    return found


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_option_is_documented(name: str) -> None:
    described = section(text("docs/cli.md"), f"alphasmith {name}")
    options = [o for p in COMMANDS[name].params if isinstance(p, click.Option) for o in p.opts]
    assert described
    assert [option for option in options if f"`{option}`" not in described] == []


def test_no_command_is_documented_that_does_not_exist() -> None:
    assert set(re.findall(r"^## alphasmith (\S+)$", text("docs/cli.md"), flags=re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize(
    "line", [line for page in PAGES for line in shown_commands(page.read_text("utf-8"))], ids=" ".join
)
def test_shown_commands_can_be_parsed(line: list[str]) -> None:
    command: click.Command = click.Group(commands=COMMANDS)
    while isinstance(command, click.Group):
        name, *line = line
        command = command.commands[name]
    assert command.make_context(command.name, line).args == [], "nothing is left over"


def test_the_readme_shows_a_run() -> None:
    assert ["run"] in shown_commands(text("README.md"))


def test_every_configuration_field_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \|", text("docs/configuration.md"), flags=re.MULTILINE)
    expected = {name: "none" if value is None else json.dumps(value) for name, value in fields(RunConfig).items()}
    assert dict(rows) == expected


def test_every_field_of_a_training_is_documented_with_its_default() -> None:
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| `(.*?)` \|", section(text("docs/training.md"), "Settings"), flags=re.MULTILINE
    )
    plain = {name: value for name, value in fields(FinetuneConfig).items() if name != "training"}
    plain |= {f"training.{item.name}": item.default for item in dataclasses.fields(TrainingSettings)}
    assert dict(rows) == {name: "none" if value is None else json.dumps(value) for name, value in plain.items()}


def test_every_field_of_a_compression_is_documented_with_its_default() -> None:
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| `(.*?)` \|", section(text("docs/compress.md"), "Settings"), flags=re.MULTILINE
    )
    expected = {name: "none" if value is None else json.dumps(value) for name, value in fields(CompressConfig).items()}
    assert dict(rows) == expected


@pytest.mark.parametrize("model", [Manifest, SiteEntry], ids=lambda model: model.__name__)
def test_every_manifest_field_is_documented(model: type[BaseModel]) -> None:
    named = set(re.findall(r"`([a-z_]+)`", text("docs/manifest.md")))
    assert set(model.model_fields) - named == set()


@pytest.mark.parametrize(
    "name",
    [path.relative_to(ROOT).as_posix() for path in EXAMPLES if path.suffix == ".toml"],
    ids=lambda name: "-".join(Path(name).parts[1:]),
)
def test_example_configurations_are_valid(name: str) -> None:
    config = RunConfig.from_toml(ROOT / name)
    assert config != RunConfig()
    assert name in text("docs/configuration.md")


def test_toml_blocks_are_valid(tmp_path: Path) -> None:
    shown = [content for page in PAGES for kind, content in blocks(page.read_text("utf-8")) if kind == "toml"]
    assert shown
    for content in shown:
        (tmp_path / "shown.toml").write_text(content, encoding="utf-8")
        assert RunConfig.from_toml(tmp_path / "shown.toml") != RunConfig()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", content):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def anchors(file: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.name)
def test_no_path_of_a_machine(page: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:work|tmp|root|home|Users)\b\S*", page.read_text(encoding="utf-8")) == []


def test_images_are_small_and_shown() -> None:
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for image in (ROOT / "docs" / "images").iterdir():
        assert image.stat().st_size < 150_000
        assert f"images/{image.name}" in shown


@pytest.mark.slow
def test_readme_snippets_run_in_order(tmp_path: Path) -> None:
    steps = []
    for language, content in blocks(text("README.md")):
        if language == "python":
            steps.append(content)
        for arguments in shown_commands(f"```{language}\n{content}```"):
            if (arguments[0] == "run" and "--model" in arguments) or arguments[0] == "export":
                quick = QUICK if arguments[0] == "run" else []
                command = ["-m", "alphasmith.search.cli.main", *arguments, *quick]
                steps.append(f"import subprocess, sys\nsubprocess.run([sys.executable, *{command!r}], check=True)\n")
    assert len(steps) >= 5
    (tmp_path / "readme.py").write_text("\n".join(steps), encoding="utf-8")
    done = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "served" / "export.json").is_file()


@pytest.mark.slow
def test_the_launch_script_runs(tmp_path: Path) -> None:
    script = ROOT / "examples" / "launch.py"
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (manifest,) = tmp_path.glob("alphasmith-runs/*/manifest.json")
    metrics = json.loads(manifest.read_text(encoding="utf-8"))["output"]["metrics"]
    assert f"quantized {metrics[0]['ours']:.4f}" in done.stdout
