"""Everything a user can get wrong: one line with field and remedy, exit code 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphasmith.objectives.errors import EquivalenceError, InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.search import RunConfig, run
from alphasmith.search.cli.main import main
from alphasmith.search.progress import Silent
from tests.support.run_cases import (
    LENGTH,
    WIDTH,
    Mlp,
    Recurrent,
    alphasmith,
    launch,
    rows,
    saved_llama,
    seeded,
    tiny_llama,
    tokens,
    vectors,
    written_texts,
)

FAST: dict[str, Any] = {"search": {"noise_model": False, "trials": 4, "single_alphas": 3}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(err: str, field: str) -> str:
    """Assert that standard error is a single ``error: FIELD: problem; remedy`` (after any progress) and return it."""
    *progress, line = err.splitlines()
    assert not [p for p in progress if p.startswith(("error", "Traceback"))]
    assert line.startswith(f"error: {field}: "), err
    assert ";" in line or "See `" in line
    return line


def refused(capsys: pytest.CaptureFixture[str], field: str, *arguments: str) -> str:
    """Run the command line and assert a refusal; returns its line."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    return one_line(err, field)


def contents(folder: Path) -> set[str]:
    """Every file and folder under a folder."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------- folders and texts


def no_folder(place: Path) -> None:
    """No model at all."""
    for file in (place / "model").iterdir():
        file.unlink()
    (place / "model").rmdir()


def no_safetensors(place: Path) -> None:
    """Configuration only."""
    (place / "model" / "model.safetensors").unlink()


def pickle_only(place: Path) -> None:
    """The old format."""
    torch.save(load_file(place / "model" / "model.safetensors"), place / "model" / "pytorch_model.bin")
    no_safetensors(place)


def remote_code(place: Path) -> None:
    """A configuration that names code in the folder."""
    file = place / "model" / "config.json"
    content = json.loads(file.read_text()) | {"auto_map": {"AutoModel": "modeling.Model"}}
    file.write_text(json.dumps(content))
    (place / "model" / "modeling.py").write_text("raise SystemExit('this code must never run')\n")


def nan_weights(place: Path) -> None:
    """One weight is NaN."""
    file = place / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][2, 3] = math.nan
    save_file(weights, file, metadata={"format": "pt"})


def cut_off(place: Path) -> None:
    """Half a file."""
    file = place / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def no_data(place: Path) -> None:
    """The media are not there."""
    (place / "texts.jsonl").unlink()


def empty_data(place: Path) -> None:
    """A file without a line."""
    (place / "texts.jsonl").write_text("")


def blank_data(place: Path) -> None:
    """Lines without text: nothing but padding."""
    (place / "texts.jsonl").write_text('{"text": ""}\n' * 20)


def other_column(place: Path) -> None:
    """Texts under another name."""
    (place / "texts.jsonl").write_text('{"body": "a word"}\n' * 20)


def no_tokenizer(place: Path) -> None:
    """Texts, but nothing to read them with."""
    (place / "model" / "tokenizer.json").unlink()
    (place / "model" / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "field", "words"),
    [
        (no_folder, "model.path", "does not exist"),
        (no_safetensors, "model.path", "has no safetensors"),
        (pickle_only, "model.path", "pickle-only"),
        (remote_code, "model.trust_remote_code", "auto_map"),
        (nan_weights, "model.path", "model.layers.0.mlp.up_proj.weight"),
        (cut_off, "model.path", "damaged"),
        (no_data, "data.path", "does not exist"),
        (empty_data, "data", ""),
        (blank_data, "data", ""),
        (other_column, "data.column", "text"),
        (no_tokenizer, "data.kind", "tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folder_that_cannot_be_used(
    spoil: Callable[[Path], None], field: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_llama(here / "model")
    written_texts(here / "texts.jsonl")
    spoil(here)
    capsys.readouterr()
    before = contents(here)
    with pytest.raises(SystemExit) as caught:
        main(["run", "--model", "model", "--data", "texts.jsonl", "--out", "deep/out", "--storage", "sqlite:///x/r.db"])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"error: {field}"), err
    assert words in line
    assert ";" in line
    assert "Traceback" not in err
    assert contents(here) == before


# ------------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("search.trails", ("--set", "search.trails=9")),
        ("serch", ("--set", "serch.trials=9")),
        ("search.trials", ("--set", "search.trials=2")),
        ("search.sampler", ("--set", "search.sampler=best")),
        ("--set", ("--set", "search.trials")),
        ("scheme.group_size", ("--set", "scheme.weights=int4", "--set", "scheme.weight_granularity=group")),
        ("scheme.group_size", ("--set", "scheme.group_size=16")),
        ("hardware.memory", ("--set", "hardware.memory=lots")),
        ("engine", ("--engine", "spark")),
        ("model.demo", ("--demo", "video")),
        ("model.demo", ("--demo", "text", "--model", "somewhere")),
        ("model.factory", ("--factory", "nothing")),
        ("model.factory", ("--factory", "no_such_module_anywhere:make")),
        ("model.factory_path", ("--factory-path", ".")),
        ("model.path", ("--data", "texts.jsonl")),
        ("data.metric", ("--set", "data.metric=module:function")),
        ("CONFIG", ("absent.toml",)),
        ("storage", ("--storage", "nonsense")),
        ("storage", ("--storage", "oracle://host/name")),
        ("storage", ("--storage", "sqlite://")),
        ("storage", ("--storage", "sqlite:///taken/runs.db")),
        ("storage", ("--storage", "postgresql://someone:hush@127.0.0.1:1/runs")),
        ("out", ("--out", "full")),
        ("out", ("--out", "taken")),
        ("out", ("--out", "taken/deeper")),
        ("alphasmith run", ("--modle", "x")),
        ("alphasmith run", ("a.toml", "b.toml")),
        ("alphasmith", ("--set",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_settings_that_cannot_be_used(
    field: str, arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "taken").write_text("a file")
    (here / "full").mkdir()
    (here / "full" / "kept.txt").write_text("mine")
    before = contents(here)
    line = refused(capsys, field, "run", *arguments)
    assert "hush" not in line
    assert contents(here) == before


def test_a_folder_that_holds_a_result_is_refused_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = launch(tmp_path, seeded(Mlp), vectors(), FAST)
    storage = f"sqlite:///{tmp_path / 'runs.db'}"
    line = refused(capsys, "out", "run", "--new", "--out", str(tmp_path / "out"), "--storage", storage)
    problem = f"{tmp_path / 'out'} already exists and holds the result of run {first.id}"
    assert line == f"error: out: {problem}; choose another folder or remove it"
    assert len(statuses(tmp_path)) == 1


def test_near_misses_are_suggested(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'trials'" in refused(capsys, "search.trails", "run", "--set", "search.trails=9")
    assert "'--model'" in refused(capsys, "alphasmith run", "run", "--modle", "x")
    assert "'verify'" in refused(capsys, "alphasmith", "verfy")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("CONFIG", "[search\n"),
        ("search.seeds", "[search]\nseeds = 3\n"),
        ("groups.k", "[groups]\nk = 0\n"),
        ("scheme.activations", '[scheme]\nactivations = "int3"\n'),
    ],
)
def test_a_configuration_file_that_cannot_be_used(
    field: str, text: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run.toml").write_text(text)
    refused(capsys, field, "run", "run.toml")
    assert contents(here) == {"run.toml"}


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("storage", ("list",)),
        ("storage", ("show", "r-1")),
        ("storage", ("report", "r-1", "--out", "page.html")),
        ("storage", ("dashboard",)),
        ("nothing/manifest.json|nothing", ("verify", "nothing")),
        ("nothing/manifest.json|nothing", ("undo", "nothing", "--out", "there")),
        ("alphasmith undo", ("undo", "nothing")),
        ("alphasmith show", ("show",)),
        ("alphasmith dashboard", ("dashboard", "--port", "70000")),
    ],
)
def test_the_other_commands_make_nothing_either(
    field: str, arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.count("\n") == 1
    assert any(err.startswith(f"error: {name}: ") for name in field.split("|")), err
    assert contents(here) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--model", "{}", "--data", "x"),
        ("run", "--data", "{}", "--model", "x"),
        ("run", "--out", "{}"),
        ("run", "{}"),
        ("verify", "{}"),
        ("undo", "{}", "--out", "y"),
        ("undo", "x", "--out", "{}"),
        ("report", "r-1", "--out", "{}"),
        ("list", "--storage", "sqlite:///{}"),
        ("run", "--storage", "sqlite:///{}"),
        ("run", "--set", "artifacts={}"),
        ("db", "backup", "{}"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("path", ["x" * 300, "loop", "loop/x", "~nobodyatall/x", "pipe"])
def test_a_path_that_nothing_can_use(
    path: str, arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "loop").symlink_to("loop")
    os.mkfifo(here / "pipe")
    with pytest.raises(SystemExit) as caught:
        main([argument.format(path) for argument in arguments])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: "), err
    assert contents(here) == {"loop", "pipe"}


@pytest.mark.parametrize("command", [("list",), ("show", "r-1"), ("report", "r-1", "--out", "page.html")])
@pytest.mark.parametrize("content", ["nothing", "of others", "junk"])
def test_a_database_without_runs(
    command: tuple[str, ...], content: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = here / "found.db"
    file.write_bytes(b"no database\n" * 99 if content == "junk" else b"")
    if content == "of others":
        rows(file, "create table others (id integer)")
    line = refused(capsys, "storage", *command, "--storage", "sqlite:///found.db")
    assert ("is not an SQLite database" if content == "junk" else "holds no runs") in line
    assert not (here / "page.html").exists()


def test_a_refusal_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    told = alphasmith("run", "--model", "absent", "--data", "texts.jsonl", cwd=tmp_path)
    assert (told.returncode, told.stdout) == (2, "")
    assert "does not exist" in one_line(told.stderr, "model.path")
    assert contents(tmp_path) == set()


# ------------------------------------------------------------------------------------- models and data from a script


class NoLinear(nn.Module):
    """Nothing to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return torch.as_tensor(self.norm(x))


class Diverging(Mlp):
    """NaN inside."""

    def forward(self, x: Tensor) -> Tensor:
        """NaN for every positive input."""
        return super().forward(x / torch.where(x > 0, 0.0, 1.0) * 0)


class Unbounded(Mlp):
    """Finite activations, infinite answers."""

    def forward(self, x: Tensor) -> Tensor:
        """log of zeros."""
        return super().forward(x).clamp_min(0).log()


LATE: dict[str, Any] = {"data": {"samples": 24, "held_out": 16, "proof": 4}}


class Branching(Mlp):
    """Takes another way for batches of four, which with ``LATE`` only the proof data are."""

    def forward(self, x: Tensor) -> Tensor:
        """With four samples the norm's output is used past fc1, too."""
        normal = self.norm(x)
        inner = self.fc2(torch.relu(self.fc1(normal)))
        return torch.as_tensor(self.head(self.last(x + inner + (normal if x.shape[0] == 4 else 0))))


def masked(batches: list[Tensor]) -> list[Batch]:
    """Batches with every position marked as padding."""
    return [Batch(args=(b,), mask=torch.zeros(b.shape[:2], dtype=torch.bool)) for b in batches]


def with_nan(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """A model with one NaN in the named parameter."""
    model = seeded(build)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = math.nan
    return model


@pytest.mark.parametrize(
    ("model", "batches", "values", "words"),
    [
        (lambda: seeded(NoLinear), vectors(), {}, ("model", "no linear")),
        (lambda: with_nan(Mlp, "fc2.bias"), vectors(), {}, ("fc2.bias",)),
        (lambda: seeded(Diverging), vectors(), {}, ("activations of fc1",)),
        (lambda: seeded(Unbounded), vectors(), {}, ("model", "NaN or infinity")),
        (lambda: seeded(Mlp), [b * math.inf for b in vectors()], {}, ("batches[0]", "NaN or infinity")),
        (lambda: seeded(Mlp), [], {}, ("batches",)),
        (lambda: seeded(Mlp), masked(vectors()), {}, ("padding",)),
        (lambda: seeded(Mlp), vectors(2), {}, ("data.samples", "too few")),
        (lambda: seeded(Mlp), vectors(48, LENGTH, WIDTH + 1), {}, ("data", "RuntimeError")),
        (lambda: seeded(Mlp), [(b, b, b) for b in vectors()], {}, ("data", "TypeError")),
        (lambda: seeded(Mlp), [*vectors(24), *vectors(24, LENGTH, WIDTH + 1)], {}, ("data", "RuntimeError")),
        (lambda: seeded(Recurrent), vectors(), {}, ("data", "RuntimeError")),
        (lambda: seeded(Mlp), ["text"], {}, ("str",)),
        (lambda: seeded(Mlp), None, {}, ("data.path", "is missing")),
        (lambda: "model", vectors(), {}, ("model", "is a str")),
        (lambda: nn.Sequential(nn.Flatten()), vectors(), {}, ("no parameters",)),
        (lambda: seeded(Mlp), vectors(), {"search": {"loss": "task", "scope": "model"}}, ("search.loss", "no metric")),
        (lambda: seeded(Mlp), vectors(), {"sites": {"exclude": ["*"]}, "search": {"scope": "model"}}, ("sites",)),
        (lambda: seeded(Mlp), vectors(), {"hardware": {"search_memory": 4096}}, ("hardware.search_memory",)),
        (lambda: seeded(Mlp), vectors(), {"search": {"device": "cuda:99"}}, ("search.device",)),
    ],
)
def test_a_script_that_cannot_be_served(
    model: Callable[[], Any], batches: Any, values: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        launch(tmp_path, model(), batches, values)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert caught.value.remedy
    assert contents(tmp_path) == set()


def test_a_metric_that_is_not_finite_stops_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.metric: .*nan"):
        launch(tmp_path, seeded(Mlp), vectors(), FAST, metric=lambda _: math.nan)
    assert contents(tmp_path) == set()


def test_a_metric_that_breaks_for_a_candidate_does_not_end_the_run(tmp_path: Path) -> None:
    told: list[float] = []

    def metric(_: nn.Module) -> float:
        told.append(0.0)
        return 1.0 if len(told) in (1, 3) else math.nan

    result = launch(tmp_path, seeded(Mlp), vectors(), FAST, metric=metric)
    (kept,) = result.manifest.output.metrics
    assert (kept.float_model, kept.naive, kept.alpha_half, kept.best_single, kept.ours) == (1.0, None, 1.0, None, None)


# ----------------------------------------------------------------------------------------------- failures on the way


def statuses(folder: Path) -> list[tuple[Any, ...]]:
    """Status and reason of every run in the folder's database."""
    return rows(folder / "runs.db", "select status, reason from alphasmith_run")


def test_a_model_that_changes_under_folding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EquivalenceError) as caught:
        launch(tmp_path, seeded(Branching), vectors(), {**FAST, **LATE})
    assert caught.value.site == "fc1"
    assert caught.value.error > caught.value.tolerance
    assert not [name for name in contents(tmp_path) if name.startswith("out")]
    ((status, reason),) = statuses(tmp_path)
    assert status == "failed"
    assert "fc1" in reason
    # The remedy it names works.
    launch(tmp_path, seeded(Branching), vectors(), {**FAST, **LATE, "sites": {"exclude": ["fc1"]}})
    assert [s for s, _ in statuses(tmp_path)] == ["failed", "finished"]


@pytest.mark.parametrize(
    "place",
    [
        "alphasmith.storage.output.output_folder._write_bytes",
        "alphasmith.storage.files.tensors.write_tensors",
        "alphasmith.storage.output.output_folder.sync_file",
        "alphasmith.search.launch.recorder.save_folder",
    ],
)
def test_a_full_device_leaves_nothing(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(InputError) as caught:
        launch(tmp_path, tiny_llama(), tokens(), {**FAST, "out": tmp_path / "deep" / "out"})
    assert caught.value.field == "out"
    assert "no space left" in caught.value.problem
    assert not [name for name in contents(tmp_path) if not name.startswith("runs.db")]
    assert [status for status, _ in statuses(tmp_path)] == ["failed"]


@pytest.mark.parametrize("stage", ["searching sites", "quantizing", "writing"])
def test_an_interrupted_run_is_not_left_running(stage: str, tmp_path: Path) -> None:
    class Impatient(Silent):
        def stage(self, name: str, total: int | None = None) -> None:
            if name == stage:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="resume with: alphasmith resume r-"):
        launch(tmp_path, seeded(Mlp), vectors(), FAST, progress=Impatient())
    assert statuses(tmp_path) == [("interrupted", "KeyboardInterrupt")]
    assert not [name for name in contents(tmp_path) if not name.startswith("runs.db")]


def test_an_interrupt_ends_the_command_with_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("alphasmith.search.launch.pipeline.run", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["run"])
    assert (caught.value.code, capsys.readouterr().err) == (130, "starting ...\n\nerror: interrupted\n")


def test_a_folder_that_fills_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    class Rival(Silent):
        def stage(self, name: str, total: int | None = None) -> None:
            if name == "writing":
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "theirs").write_text("first")

    with pytest.raises(InputError, match=r"^out: .*not empty"):
        launch(tmp_path, seeded(Mlp), vectors(), FAST, progress=Rival())
    assert contents(tmp_path / "out") == {"theirs"}
    assert [status for status, _ in statuses(tmp_path)] == ["failed"]


def test_a_report_needs_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EquivalenceError):
        launch(tmp_path, seeded(Branching), vectors(), {**FAST, **LATE})
    storage = f"sqlite:///{tmp_path / 'runs.db'}"
    ((id_,),) = rows(tmp_path / "runs.db", "select id from alphasmith_run")
    line = refused(capsys, "RUN", "report", id_, "--out", str(tmp_path / "page.html"), "--storage", storage)
    assert "is failed" in line
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(SystemExit):
        main(["show", id_, "--storage", storage])
    assert "status: failed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["show", "r-unknown", "--storage", storage])
    assert caught.value.code == 2


def test_no_batches_for_a_configured_model_are_asked_for(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path / "model")
    with pytest.raises(InputError, match=r"^data\.path"):
        run(RunConfig.build({"model": {"path": folder}, "storage": f"sqlite:///{tmp_path / 'runs.db'}"}))
