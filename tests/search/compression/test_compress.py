"""Joint compressions from first to last: what is written, what goes on after a kill, what is picked, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.joint.ports import JointMetric, Measured
from alphasmith.search import CompressionResult, compress, load_compressed
from alphasmith.search.cli import commands
from alphasmith.search.compression.compress import pick, resume_compression
from alphasmith.search.interruption import Interrupted
from alphasmith.search.toml_values import merged
from alphasmith.storage.database.connection import opened, optuna_storage
from alphasmith.storage.output.compressed_folder import CompressedFolder
from alphasmith.storage.runs.compressions import CompressionStore
from tests.support.compressed_models import SETTINGS, Listener, Tones, listener, task, tones
from tests.support.run_cases import alphasmith

SUPPORT = Path(__file__).parents[2] / "support"


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    url = f"sqlite:///{folder / 'studies.db'}"
    return merged({**SETTINGS, "storage": url, "out": str(folder / "out")}, changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compressed")


@pytest.fixture(scope="module")
def result(folder: Path) -> CompressionResult:
    return compress(listener(), task(), settings(folder))


@pytest.fixture(scope="module")
def study(result: CompressionResult, folder: Path) -> Iterator[optuna.Study]:
    with opened(settings(folder)["storage"]) as database:
        yield optuna.load_study(study_name=f"{result.id}/compression", storage=optuna_storage(database))


def test_the_smallest_model_within_the_limits_is_written(result: CompressionResult, study: optuna.Study) -> None:
    within = [
        trial for trial in study.trials if trial.values and all(value <= 0 for value in trial.constraints.values())
    ]
    smallest = min(trial.values[0] for trial in within)
    assert result.manifest.bytes.stored == smallest
    assert result.manifest.bytes.original == 4 * sum(p.numel() for p in listener().parameters()) + 2 * 4 * 40 + 2 * 8
    files = {path.name: path.stat().st_size for path in result.folder.iterdir()}
    assert set(files) == {"compressed.safetensors", "structure.json", "manifest.json", "report.html"}
    header = int.from_bytes((result.folder / "compressed.safetensors").read_bytes()[:8], "little") + 8
    assert files["compressed.safetensors"] - header + files["structure.json"] == smallest


def test_it_is_loaded_by_one_call_and_measures_what_the_manifest_says(result: CompressionResult) -> None:
    model = load_compressed(result.folder, Listener())
    (metric,) = result.manifest.metrics
    assert task().measure(model, "study").values["accuracy"] == metric.study_compressed
    assert task().measure(model, "test").values["accuracy"] == metric.test_compressed
    assert task().measure(listener(), "test").values["accuracy"] == metric.test_float
    again = load_compressed(result.folder, listener())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_every_role_was_tried_and_everything_is_readable(study: optuna.Study) -> None:
    assert {trial.params["role"] for trial in study.trials} == {"off", "truncate", "branch"}
    for trial in study.trials:
        told = trial.user_attrs
        assert ("dropped" in told) == (trial.state.name == "PRUNED")
        if trial.values:
            assert told["stored bytes"] == trial.values[0]
            assert told["drop.accuracy"] - 3.0 == pytest.approx(told["constraint.accuracy"])


def test_the_front_is_on_record_with_its_test_metrics(result: CompressionResult, study: optuna.Study) -> None:
    assert [entry.number for entry in result.manifest.front] == list(result.front)
    sizes = [entry.stored_bytes for entry in result.manifest.front]
    assert sizes == sorted(sizes)
    for entry in result.manifest.front:
        assert entry.test == study.user_attrs["tested"][str(entry.number)]
    assert set(study.user_attrs["tested"]) == {"original", *map(str, result.front)}, "nothing else was looked at"


def test_the_dashboard_shows_the_front(study: optuna.Study, result: CompressionResult) -> None:
    from optuna_dashboard._note import get_note_from_system_attrs

    note = get_note_from_system_attrs(study._storage.get_study_system_attrs(study._study_id), None)["body"]
    assert note.startswith("## Joint compression")
    assert all(f"| {entry.number}" in note for entry in result.manifest.front)
    assert study.metric_names == ["stored bytes"]


def test_the_test_split_is_touched_once(tmp_path: Path) -> None:
    looked: list[str] = []

    class Watched(type(task())):  # type: ignore[misc]  # a class of its own
        def measure(self, model: nn.Module, split: str) -> Measured:
            looked.append(split)
            measured: Measured = super().measure(model, split)
            return measured

    given = task()
    watched = Watched(kind="classes", train=given.train, study=given.study, test=given.test)
    found = compress(listener(), watched, settings(tmp_path, study={"trials": 3}))
    assert looked.count("test") == 1 + len(found.front)
    assert "test" not in looked[: -(1 + len(found.front))], "not before everything is decided"


def test_another_point_of_the_front_can_be_written(result: CompressionResult, folder: Path, tmp_path: Path) -> None:
    number = result.front[-1]
    url = settings(folder)["storage"]
    found = pick(result.id, number, tmp_path / "other", storage=url, model=listener(), task=task())
    assert found.manifest.trial is not None
    assert found.manifest.trial.number == number
    assert found.manifest.bytes.stored == result.manifest.front[-1].stored_bytes
    with pytest.raises(InputError, match=r"trial 99 of .* is not on its front; use one of"):
        pick(result.id, 99, tmp_path / "none", storage=url, model=listener(), task=task())
    assert not (tmp_path / "none").exists()


def test_picking_needs_no_cache(result: CompressionResult, folder: Path, tmp_path: Path) -> None:
    for place in (folder / ".stages").iterdir():
        for file in place.iterdir():
            file.unlink()
    url = settings(folder)["storage"]
    found = pick(result.id, result.front[0], tmp_path / "again", storage=url, model=listener(), task=task())
    assert CompressedFolder(found.folder).packed().stored_bytes == result.manifest.bytes.stored
    ours, theirs = (load_compressed(one.folder, Listener()).state_dict() for one in (result, found))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_an_interrupted_one_goes_on_by_its_id(tmp_path: Path) -> None:
    given = settings(tmp_path, study={"trials": 3})
    polls = 0

    def stop() -> bool:
        nonlocal polls
        polls += 1
        return polls > 30

    with pytest.raises(Interrupted, match=r"resume with: alphasmith resume c-"):
        compress(listener(), task(), given, stop=stop)
    with opened(given["storage"]) as database:
        (record,) = CompressionStore(database).listing()
    assert record.status == "interrupted"
    found = resume_compression(record.id, storage=given["storage"], model=listener(), task=task())
    assert found.id == record.id
    with pytest.raises(InputError, match="is finished"):
        resume_compression(record.id, storage=given["storage"], model=listener(), task=task())


def test_killed_after_its_folder_was_published_it_is_finished_and_not_made_again(tmp_path: Path) -> None:
    given = settings(tmp_path, study={"trials": 2})
    done = compress(listener(), task(), given)
    with opened(given["storage"]) as database:
        store = CompressionStore(database)
        store.move(store.get(done.id), "running")
    again = compress(listener(), task(), given)
    assert (again.id, again.front, again.manifest) == (done.id, done.front, done.manifest)
    with opened(given["storage"]) as database:
        assert CompressionStore(database).get(done.id).status == "finished"
    with pytest.raises(InputError, match="already exists"):
        compress(listener(), task(), given)


def test_where_nothing_keeps_within_the_limits_it_says_how_near_it_came_and_more_trials_go_on(tmp_path: Path) -> None:
    given = settings(tmp_path, drop={"tolerances": {"accuracy": 0.0}}, clusters={"k": [2]}, study={"trials": 2})
    given["study"]["roles"] = ["off"]
    given["train"] = {"steps": 0}
    with pytest.raises(
        InputError, match=r"none of \d trials? keeps within the limits; trial \d misses them by"
    ) as caught:
        compress(listener(), task(), given)
    assert caught.value.field == "drop"
    assert not (tmp_path / "out").exists()
    with opened(given["storage"]) as database:
        (record,) = CompressionStore(database).listing()
        assert record.status == "failed"
    with pytest.raises(InputError, match="none of 4 trials"):
        compress(listener(), task(), merged(given, {"study": {"trials": 4}}))
    with opened(given["storage"]) as database:
        assert [one.id for one in CompressionStore(database).listing()] == [record.id]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"drop": {"tolerances": {"accuracy": -1.0}}}, "tolerances.accuracy.drop"),
        ({"drop": {"tolerances": {"si_sdr": 1.0}}}, "si_sdr"),
        ({"drop": {"tolerances": {}, "floors": {"accuracy": 101.0}}}, "accuracy"),
        ({"clusters": {"k": [1]}}, "clusters.k"),
        ({"study": {"roles": ["shrink"]}}, "study.roles"),
        ({"train": {"encoder": [1e-3, 1e-4]}}, "train.encoder"),
        ({"rounds": {"log_drop": [-1.0, -2.0]}}, "rounds.log_drop"),
        ({"branch": {"alpha": [0.5, 1.5]}}, "branch.alpha"),
        ({"task": {"path": "somewhere"}}, "task.path"),
        ({"task": {"factory": "a:b", "metrics": ["stoi"]}}, "task.metrics"),
        ({"task": {"metrics": ["loudness"]}}, "task.metrics"),
        ({"sparsity": {}}, "sparsity"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        compress(listener(), task(), settings(tmp_path, **changes))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("studies.db")] == []


@pytest.mark.skipif(find_spec("pesq") is not None, reason="the extra pesq is installed")
def test_pesq_without_its_extra_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    given = {"storage": f"sqlite:///{tmp_path / 'studies.db'}", "out": str(tmp_path / "out")}
    with pytest.raises(InputError, match=r"PESQ is not installed; install alphasmith\[pesq\]"):
        compress(config={**given, "task": {"metrics": ["si_sdr", "pesq"]}})
    assert not (tmp_path / ".stages").exists()


class Silence:
    """A task that is missing what it must have, or has too much of it."""

    def __init__(self, **parts: Any) -> None:
        for name, part in {"metrics": task().metrics, "train": tones(8, 0), **parts}.items():
            setattr(self, name, part)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return torch.zeros(())

    def measure(self, model: nn.Module, split: str) -> Measured:
        return Measured(values={"accuracy": 1.0})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((listener, None), "task: is missing"),
        ((None, task), "model: is missing"),
        ((lambda: "model", task), "its model is a str"),
        ((listener, object), "its task has no metrics"),
        ((listener, lambda: Silence(metrics=())), "measures nothing"),
        ((listener, lambda: Silence(metrics=(JointMetric(name="a", goal="max"),) * 2)), "two metrics of one name"),
        ((listener, lambda: Silence(train=Tones(torch.zeros(0, 48), torch.zeros(0)))), "no sample to train on"),
    ],
)
def test_a_model_without_a_usable_task_is_refused(given: Any, said: str, tmp_path: Path) -> None:
    model, wanted = (None if part is None else part() for part in given)
    with pytest.raises(InputError, match=said):
        compress(model, wanted, settings(tmp_path))


def test_a_changed_file_is_named(result: CompressionResult, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(result.folder, copy)
    data = bytearray((copy / "compressed.safetensors").read_bytes())
    data[-3] ^= 1
    (copy / "compressed.safetensors").write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"compressed\.safetensors"):
        load_compressed(copy, Listener())


def test_list_show_and_delete_know_it(tmp_path: Path) -> None:
    given = settings(tmp_path, study={"trials": 2})
    found = compress(listener(), task(), given)
    url = given["storage"]
    assert [row["id"] for row in commands.list_compressions(url)] == [found.id]
    shown = commands.show_compression(found.id[:6], url)
    assert (shown["status"], shown["driver"]) == ("finished", None)
    assert shown["manifest"]["bytes"]["stored"] == found.manifest.bytes.stored
    done = commands.delete(found.id, url, sure=lambda record, would: True)
    assert done is not None
    assert [removal.what for removal in done[1]] == ["study"]
    assert commands.list_compressions(url) == []
    assert found.folder.is_dir()


def configuration(folder: Path, **changes: Any) -> Path:
    """A TOML file that compresses the small model."""
    values = merged({**SETTINGS, "task": {"factory": "compressed_models:made", "factory_path": str(SUPPORT)}}, changes)
    lines = []
    for section, fields in values.items():
        lines.append(f"[{section}]")
        for name, value in fields.items():
            shown = (
                "{" + ", ".join(f"{k} = {v}" for k, v in value.items()) + "}"
                if isinstance(value, dict)
                else json.dumps(value)
            )
            lines.append(f"{name} = {shown}")
    (folder / "compress.toml").write_text("\n".join(lines))
    return folder / "compress.toml"


@pytest.mark.slow
def test_the_command_compresses_shows_picks_and_refuses(tmp_path: Path) -> None:
    configuration(tmp_path)
    made = alphasmith("compress", "compress.toml", "--trials", "3", "--out", "small", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    answer = json.loads(made.stdout)
    assert (tmp_path / "small" / "compressed.safetensors").is_file()
    name = answer["compression"]
    shown = alphasmith("show", name, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "times smaller" in shown.stdout
    report = alphasmith("report", name, "--out", "page.html", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "page.html").read_bytes() == (tmp_path / "small" / "report.html").read_bytes()
    verified = alphasmith("verify", "small", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert f"of compression {name} are read back" in verified.stdout
    listed = alphasmith("list", cwd=tmp_path)
    assert name in listed.stdout
    refused = alphasmith("compress", name, "--pick", str(answer["front"][0]), "--out", "other", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--allow-code compressed_models:made" in refused.stderr
    allowed = ("--allow-code", "compressed_models:made", "--allow-code", str(SUPPORT))
    picked = alphasmith("compress", name, "--pick", str(answer["front"][0]), "--out", "other", *allowed, cwd=tmp_path)
    assert picked.returncode == 0, picked.stderr
    for arguments, said in (
        (("compress", "none.toml"), "none.toml"),
        (("compress", "compress.toml", "--out", "small"), "small"),
        (("compress", "compress.toml", "--tolerance", "accuracy"), "--set"),
        (("compress", "compress.toml", "--tolerance", "f1=0.1"), "f1"),
        (("compress", "--pick", "1", "--out", "x"), "ID"),
        (("compress", name, "--pick", "1"), "--out"),
        (("compress", "c-1999"), "c-1999"),
        (("report", "c-1999", "--out", "none.html"), "c-1999"),
    ):
        refused = alphasmith(*arguments, cwd=tmp_path)
        assert refused.returncode == 2, arguments
        assert said in refused.stderr
        assert len([line for line in refused.stderr.splitlines() if line.startswith("error")]) == 1, refused.stderr
