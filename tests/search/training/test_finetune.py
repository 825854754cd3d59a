"""From a run to a trained model beside it: what is kept, what stays untouched, what goes on after a kill, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import text
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.search import TrainingResult, finetune, load_quantized, load_smoothed
from alphasmith.search.checkpoints.verification import undo, verify
from alphasmith.search.cli import commands
from alphasmith.search.cli.answers import training_text
from alphasmith.search.interruption import Interrupted
from alphasmith.search.processing.classifier import Classifier
from alphasmith.search.progress import Silent
from alphasmith.search.training.finetune import resume_training
from alphasmith.storage.database.connection import opened
from alphasmith.storage.files.durable import digest_file
from alphasmith.storage.files.tensors import read_tensors
from alphasmith.storage.output.manifest import read_manifest
from alphasmith.storage.output.reservation import Reservation
from alphasmith.storage.queue.leases import Identity
from alphasmith.storage.runs.trainings import TrainingStore
from tests.support.boards import elsewhere
from tests.support.processed import RATE, WAYS, Hearing, saved_watcher, written_sounds, written_videos
from tests.support.run_cases import Pictures, alphasmith, launch, saved_llama, seeded, settings, vectors, written_texts
from tests.support.training_cases import NAMES, STEPS, wanted

WEIGHTS = "quantized/model.safetensors"


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): digest_file(path).sha256 for path in folder.rglob("*") if path.is_file()
    }


def entries(folder: Path) -> set[str]:
    """What lies in a folder, but for what SQLite keeps beside its file."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("runs.db")}


def stopping(after: int) -> Callable[[], bool]:
    """Asks to stop before the update of that number."""
    polls = 0

    def stop() -> bool:
        nonlocal polls
        polls += 1
        return polls > after

    return stop


def test_a_trained_model_is_an_integer_model_again(run: Path) -> None:
    before = digests(run / "out"), digests(run / "model")
    result = finetune(run / "out", wanted(run))
    entry = result.manifest.training
    assert entry is not None
    assert result.kept
    assert (digests(run / "out"), digests(run / "model")) == before, "nothing of the run is touched"
    assert result.folder == run / result.id
    assert (entry.parent, entry.parent_digest) == (read_manifest(run / "out").run.id, before[0]["manifest.json"])
    assert (entry.equivalence, result.manifest.proof) == ("does not apply", None)
    assert entry.samples == 60
    assert (len(entry.trained), len(entry.held_out)) == (24, 24)
    assert not set(entry.trained) & set(entry.held_out)
    # Samples are numbered by their paths: 20 of each colour, and a colour's share of each part is a third.
    assert [sum(number // 20 == kind for number in entry.trained) for kind in range(3)] == [8, 8, 8]
    assert [point.step for point in entry.curve] == [0, 3, 6, 9, 12]
    assert entry.curve[-1].held_out_loss < entry.curve[0].held_out_loss
    assert entry.classes == NAMES
    values = {tensor.dtype for name, tensor in read_tensors(result.folder / WEIGHTS).items() if "weight_values" in name}
    assert values == {torch.uint8}
    assert digest_file(result.folder / WEIGHTS).sha256 != before[0][WEIGHTS]
    assert verify(result.folder) == {"folder": str(result.folder), "artifacts": 5, "training": result.id}
    report = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "Training" in report
    assert entry.reason in report
    assert json.loads((result.folder / "manifest.json").read_text())["training"]["kept"] is True
    classified = load_quantized(result.folder)
    assert type(classified).__name__ == "ViTForImageClassification"


def test_what_is_on_record_is_listed_and_shown(run: Path) -> None:
    storage = f"sqlite:///{run / 'runs.db'}"
    result = finetune(run / "out", wanted(run))
    (row,) = commands.list_runs(storage)
    (training,) = row["trainings"]
    assert (training["id"], training["status"], training["kept"]) == (result.id, "finished", True)
    shown = commands.shown_facts(commands.show_run(row["id"], storage))
    assert shown["trainings"] == [training]
    alone = commands.show_training(result.id[:10], storage)
    assert result.manifest.training is not None
    assert alone["training"] == result.manifest.training.model_dump(mode="json")
    commands.report(result.id, run / "again.html", storage)
    assert "Training" in (run / "again.html").read_text(encoding="utf-8")


def test_the_untrained_model_stays_where_training_makes_nothing_better(run: Path) -> None:
    result = finetune(run / "out", wanted(run, {"training": {"learning_rate": 1e-12, "steps": 2}}))
    assert not result.kept
    assert "the untrained model stays" in result.reason
    untrained, kept = digests(run / "out"), digests(result.folder)
    same = [name for name in untrained if name.startswith("quantized/")]
    assert {name: kept[name] for name in same} == {name: untrained[name] for name in same}
    assert verify(result.folder)["training"] == result.id
    for entry, changed in (
        (result.manifest.training, False),
        (finetune(run / "out", wanted(run)).manifest.training, True),
    ):
        assert entry is not None
        shown = training_text(entry.model_dump(mode="json"), "there")
        assert shown.splitlines()[0] == entry.reason
        assert ("the trained integer model is in there" in shown) == changed
        assert ("equivalence with the float model does not apply" in shown) == changed


def test_a_trained_model_is_trained_further(run: Path) -> None:
    first = finetune(run / "out", wanted(run))
    second = finetune(first.folder, wanted(run, {"training": {"seed": 1}}))
    assert second.manifest.training is not None
    assert second.manifest.training.parent_digest == digest_file(first.folder / "manifest.json").sha256
    assert second.folder.parent == first.folder.parent


def test_what_needs_a_float_form_says_that_there_is_none(run: Path) -> None:
    result = finetune(run / "out", wanted(run))
    with pytest.raises(InputError, match="give the folder of run"):
        load_smoothed(result.folder)
    with pytest.raises(InputError, match="undo the folder of run"):
        undo(result.folder, run / "undone")
    with pytest.raises(InputError, match="no float model"):
        finetune(result.folder, wanted(run, {"training": {"distill": 0.5}}))


#: Kills its process, as nothing else can, before the update of a number.
KILLED = """
import os, signal, sys
from pathlib import Path
from alphasmith.search import finetune
from tests.support.training_cases import wanted

polls = 0

def stop():
    global polls
    polls += 1
    if polls > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return False

folder = Path(sys.argv[1])
finetune(folder / "out", wanted(folder, {"out": folder / "trained"}), stop=stop)
"""


@pytest.mark.parametrize("updates", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, STEPS - 1))])
def test_a_killed_training_ends_as_an_undisturbed_one(run: Path, updates: int) -> None:
    root = Path(__file__).parents[3]
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(run), str(updates)], cwd=root, check=False, capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert {name.partition("-t-")[0] for name in entries(run)} >= {"trained.partial", ".trained.alphasmith-run"}
    with opened(f"sqlite:///{run / 'runs.db'}") as database:
        (left,) = TrainingStore(database).listing()
    assert left.status == "running"
    polls = stopping(10**9)
    done = finetune(run / "out", wanted(run, {"out": run / "trained"}), stop=polls)
    assert done.id == left.id
    undisturbed = finetune(run / "out", wanted(run, {"out": run / "undisturbed"}))
    assert same_result(done, undisturbed)
    assert entries(run) == {"out", "model", "pictures", "trained", "undisturbed"}


def same_result(left: TrainingResult, right: TrainingResult) -> bool:
    """Whether two trainings came to the same bits and the same record."""
    weights = [digest_file(result.folder / WEIGHTS).sha256 for result in (left, right)]
    told = [result.manifest.without_times() for result in (left, right)]
    return weights[0] == weights[1] and told[0] == told[1]


@pytest.mark.slow
def test_a_killed_training_is_found_and_deleted(run: Path) -> None:
    root = Path(__file__).parents[3]
    storage = f"sqlite:///{run / 'runs.db'}"
    before = entries(run)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(run), "3"], cwd=root, check=False, capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    (row,) = commands.list_runs(storage)
    (left,) = row["trainings"]
    checked = alphasmith("db", "check", "--storage", storage, cwd=run)
    assert (checked.returncode, checked.stdout.count(f"`alphasmith delete {left['id']}`")) == (1, 1)
    listed = alphasmith("list", "--storage", storage, cwd=run)
    assert "running (no live driver)" in listed.stdout
    deleted = alphasmith("delete", left["id"][:9], "--yes", "--json", "--storage", storage, cwd=run)
    assert deleted.returncode == 0, deleted.stderr
    answer = json.loads(deleted.stdout)
    assert answer["training"] == left["id"]
    assert {item["what"] for item in answer["removed"]} == {"folder", "temporary"}
    assert entries(run) == before
    assert alphasmith("db", "check", "--storage", storage, cwd=run).returncode == 0
    assert [row["trainings"] for row in commands.list_runs(storage)] == [[]]


def test_a_training_that_goes_on_is_not_deleted_with_its_run(run: Path) -> None:
    storage = f"sqlite:///{run / 'runs.db'}"
    refused: list[str] = []

    def stop() -> bool:
        (row,) = commands.list_runs(storage)
        (training,) = row["trainings"]
        assert training["driver"] == f"process {os.getpid()} on {Identity.here().host}"
        for name in (row["id"], training["id"]):
            with pytest.raises(InputError, match="is worked on by process") as caught:
                commands.delete(name, storage, sure=lambda *_: True)
            refused.append(str(caught.value))
        return len(refused) >= 4

    with pytest.raises(Interrupted):
        finetune(run / "out", wanted(run), stop=stop)
    assert len(refused) == 4
    assert not any("\n" in line for line in refused)
    (row,) = commands.list_runs(storage)
    assert commands.delete(row["id"], storage, sure=lambda *_: True) is not None
    assert {name.partition("-")[0] for name in entries(run)} == {"out", "model", "pictures"}


def test_an_interrupted_training_is_resumed_by_its_id(run: Path) -> None:
    storage = f"sqlite:///{run / 'runs.db'}"
    with pytest.raises(Interrupted, match="alphasmith resume t-"):
        finetune(run / "out", wanted(run), stop=stopping(5))
    (row,) = commands.list_runs(storage)
    (left,) = row["trainings"]
    assert left["status"] == "interrupted"
    done = resume_training(left["id"], storage=storage)
    assert same_result(done, finetune(run / "out", wanted(run, {"out": run / "undisturbed"})))
    with pytest.raises(InputError, match="is finished"):
        resume_training(left["id"], storage=storage)


def test_a_training_that_another_process_drives_is_left_to_it(run: Path) -> None:
    config = wanted(run, {"out": run / "trained"})
    with pytest.raises(Interrupted):
        finetune(run / "out", config, stop=stopping(5))
    before = entries(run)
    with Reservation(run / "trained", storage="", lease=60, identity=elsewhere("another")) as theirs:
        theirs.take()
        with pytest.raises(InputError, match="trained is reserved for"):
            finetune(run / "out", config)
        assert entries(run) == before | {".trained.alphasmith-run"}
    with opened(str(config["storage"])) as database:
        assert [record.status for record in TrainingStore(database).listing()] == ["interrupted"]
    assert finetune(run / "out", config).kept


def test_a_training_whose_data_changed_is_not_resumed(run: Path) -> None:
    with pytest.raises(Interrupted):
        finetune(run / "out", wanted(run), stop=stopping(5))
    for file in (run / "pictures" / "red").iterdir():
        shutil.copy(run / "pictures" / "blue" / "002.png", file)
    with pytest.raises(InputError, match="data: changed since t-"):
        resume_training("t-", storage=f"sqlite:///{run / 'runs.db'}")


def test_a_training_killed_after_its_folder_was_written_only_finishes_its_record(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = wanted(run, {"out": run / "trained"})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStore, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(run / "out", config)
    written = digests(run / "trained")
    done = finetune(run / "out", config)
    assert digests(run / "trained") == written
    assert done.manifest.training is not None
    assert done.manifest.training.id == done.id
    with opened(str(config["storage"])) as database:
        assert [record.status for record in TrainingStore(database).listing()] == ["finished"]


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_training_that_diverges_says_when_and_leaves_nothing(run: Path, rate: float) -> None:
    before = entries(run)
    with pytest.raises(InputError, match=r"at step \d+.*checkpoint of step \d+.*lower --learning-rate") as caught:
        finetune(run / "out", wanted(run, {"training": {"learning_rate": rate, "warm_up": 0.0, "patience": 0}}))
    assert "\n" not in str(caught.value)
    assert entries(run) == before
    with opened(f"sqlite:///{run / 'runs.db'}") as database:
        assert TrainingStore(database).listing() == []


def single_class(run: Path) -> dict[str, Any]:
    return {"data": {"path": run / "pictures" / "red", "label": "auto"}}


def some_classes(run: Path) -> dict[str, Any]:
    shutil.rmtree(run / "pictures" / "blue")
    return {}


def other_names(run: Path) -> dict[str, Any]:
    (run / "pictures" / "red").rename(run / "pictures" / "crimson")
    return {}


def one_kind(run: Path) -> dict[str, Any]:
    for name in NAMES[1:]:
        shutil.rmtree(run / "pictures" / name)
    return {}


def sounds(run: Path) -> dict[str, Any]:
    import soundfile

    (run / "sounds" / "red").mkdir(parents=True)
    soundfile.write(run / "sounds" / "red" / "a.wav", np.zeros(1600, np.float32), 16000)
    return {"data": {"path": run / "sounds"}}


def too_many_names(run: Path) -> dict[str, Any]:
    (run / "names.txt").write_text("a\nb\nc\nd\n")
    return {"data": {"labels": run / "names.txt"}}


def changed_file(run: Path) -> dict[str, Any]:
    (run / "out" / "quantized" / "preprocessor_config.json").write_text("{}")
    return {}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: {"data": {"path": None}}, "--data: is missing"),
        (lambda run: {"data": {"path": run / "nowhere"}}, "does not exist"),
        (single_class, "the samples have no labels"),
        (some_classes, r"2 classes, the model 3 \(none is blue\); .*--partial-classes"),
        (other_names, "'crimson' is no label of the model"),
        (lambda run: {"data": {"label": "kind"}}, "data.label: no table lies in .* a column 'kind'; leave it out"),
        (one_kind, "every sample is of class 'red'"),
        (sounds, "holds audio, and the model takes image"),
        (too_many_names, "names 4 classes, and the model has 3"),
        (lambda run: {"data": {"fraction": 0.001}}, "data.fraction: 0.001 of 60 samples is no sample"),
        (lambda run: {"data": {"held_out": 0.02}}, "data.held_out: 0.02 of 60 samples is 1, fewer than two"),
        (lambda run: {"data": {"fraction": 0.9, "held_out": 0.2}}, "more than there is"),
        (lambda run: {"training": {"loss": "focal"}}, "training.loss"),
        (lambda run: {"training": {"learning_rate": -1.0}}, "training.learning_rate: is -1.0"),
        (lambda run: {"training": {"learning_rate": "fast"}}, "training.learning_rate"),
        (lambda run: {"training": {"rate": 1.0}}, "training.rate: unknown field"),
        (lambda run: {"training": 3}, "training"),
        (lambda run: {"study": -1}, "study"),
        (lambda run: {"out": run / "out"}, "already exists and holds the result of run"),
        (lambda run: {"device": "abacus"}, "device"),
        (changed_file, "the file was changed or damaged"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Path, spoil: Callable[[Path], dict[str, Any]], words: str
) -> None:
    values = spoil(run)
    before = entries(run)
    with pytest.raises(InputError, match=words) as caught:
        finetune(run / "out", wanted(run, values))
    assert "\n" not in str(caught.value)
    assert entries(run) == before
    with opened(f"sqlite:///{run / 'runs.db'}") as database:
        assert TrainingStore(database).listing() == []


def test_only_finished_runs_are_trained(run: Path) -> None:
    storage = f"sqlite:///{run / 'runs.db'}"
    with opened(storage) as database, database.session() as session:
        session.execute(text("UPDATE alphasmith_run SET status = 'interrupted'"))
    (row,) = commands.list_runs(storage)
    before = entries(run)
    with pytest.raises(InputError, match="is interrupted, not finished; alphasmith resume"):
        finetune(row["id"], wanted(run))
    with pytest.raises(InputError, match="RUN: no run 'r-9'"):
        finetune("r-9", wanted(run))
    assert entries(run) == before


def test_a_finished_run_is_found_by_its_id(run: Path) -> None:
    storage = f"sqlite:///{run / 'runs.db'}"
    with opened(storage) as database, database.session() as session:
        session.execute(text("UPDATE alphasmith_run SET folder = :folder"), {"folder": str(run / "out")})
    (row,) = commands.list_runs(storage)
    assert finetune(row["id"], wanted(run)).folder.parent == run


def test_a_training_is_found_by_its_id(run: Path) -> None:
    storage = f"sqlite:///{run / 'runs.db'}"
    with pytest.raises(Interrupted):
        finetune(run / "out", wanted(run), stop=stopping(5))
    with pytest.raises(InputError, match=r"training t-.* is interrupted, not finished; alphasmith resume t-"):
        Classifier.opened("t-2", storage=storage)
    first = finetune(run / "out", wanted(run))
    trained = Classifier.opened(first.id, storage=storage)
    assert trained.description.folder == str(first.folder)
    picture = run / "pictures" / "red" / "000.png"
    (by_id,), (untrained,) = (c.classify([picture]) for c in (trained, Classifier.opened(run / "out")))
    assert by_id == Classifier.opened(first.folder).classify([picture])[0]
    assert by_id != untrained
    assert finetune(first.id, wanted(run, {"training": {"seed": 1}})).manifest.training is not None


def test_missing_classes_may_be_allowed(run: Path) -> None:
    shutil.rmtree(run / "pictures" / "blue")
    result = finetune(run / "out", wanted(run, {"data": {"partial_classes": True}}))
    assert result.manifest.training is not None
    assert result.manifest.training.samples == 40


def test_samples_and_models_from_a_script(tmp_path: Path) -> None:
    model = seeded(Pictures)
    launch(tmp_path, model, vectors(48, 3, 8, 8))
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(100) % 5
    inputs = torch.randn(100, 3, 8, 8, generator=generator) * 0.1 + labels[:, None, None, None]
    pairs = list(zip(inputs.split(10), labels.split(10), strict=True))
    config = wanted(tmp_path, {"data": {"path": None}, "training": {"steps": 20}})
    result = finetune(tmp_path / "out", config, model=model, batches=pairs)
    assert result.kept
    answers = main_output(call(load_quantized(result.folder, model), Batch(args=(inputs,))))
    untrained = main_output(call(load_quantized(tmp_path / "out", model), Batch(args=(inputs,))))
    assert cross_entropy(answers, labels) < cross_entropy(untrained, labels)
    assert "handed over by a script" in verify(result.folder)["skipped"]
    with pytest.raises(InputError, match="5 is no label of the model"):
        finetune(tmp_path / "out", config, model=model, batches=[(inputs, labels + 1)])
    with pytest.raises(InputError, match="--factory"):
        finetune(tmp_path / "out", config, batches=pairs)


def cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return float(nn.functional.cross_entropy(scores.detach(), labels))


class Told(Silent):
    """Keeps what was noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def test_sounds_of_another_rate_are_resampled_with_a_note(tmp_path: Path) -> None:
    from alphasmith.search import run as start

    model = seeded(Hearing)
    own = written_sounds(tmp_path / "own", RATE)
    data = {"path": own, "sampling_rate": RATE, "samples": 12, "held_out": 6, "proof": 2}
    folder = start(settings(tmp_path, {"search": {"trials": 4}, "data": data}), model=model).folder
    told = Told()
    faster = written_sounds(tmp_path / "faster", 2 * RATE, 3200)
    values = wanted(tmp_path, {"data": {"path": faster, "sampling_rate": RATE}})
    result = finetune(folder, values, model=model, progress=told)
    assert result.manifest.training is not None
    assert [note for note in told.notes if "resampled from 16000 to 8000 Hz" in note] != []


def test_videos_are_learned_from(tmp_path: Path) -> None:
    from alphasmith.search import run as start

    model, clips = saved_watcher(tmp_path / "model"), written_videos(tmp_path / "clips")
    data = {"path": clips, "samples": 12, "held_out": 6, "proof": 2}
    start(settings(tmp_path, {"search": {"trials": 4}, "model": {"path": model}, "data": data}))
    values = {"data": {"path": clips}, "training": {"steps": 20}}
    result = finetune(tmp_path / "out", wanted(tmp_path, values))
    assert result.kept
    assert result.manifest.training is not None
    assert result.manifest.training.classes == WAYS
    (answer,) = Classifier.opened(result.folder).classify([clips / "left" / "00.mkv"])
    assert answer.best.name in WAYS


def test_texts_without_labels_teach_a_language_model(tmp_path: Path) -> None:
    model = saved_llama(tmp_path / "model")
    texts = written_texts(tmp_path / "texts.jsonl", 60)
    run_config = settings(tmp_path, {"model": {"path": model}, "data": {"path": texts}, "search": {"trials": 4}})
    from alphasmith.search import run as start

    start(run_config)
    values = {"data": {"path": texts}, "training": {"steps": 20, "learning_rate": 1e-2}}
    result = finetune(tmp_path / "out", wanted(tmp_path, values))
    entry = result.manifest.training
    assert entry is not None
    assert result.kept
    assert (entry.classes, entry.metric_name) == ((), None)
    with pytest.raises(InputError, match=r"training.loss: hinge"):
        finetune(tmp_path / "out", wanted(tmp_path, {**values, "training": {"loss": "hinge"}}))
    assert {name for name in entries(tmp_path) if ".partial-" in name} == set()


def test_the_float_model_can_be_learned_from(run: Path) -> None:
    result = finetune(run / "out", wanted(run, {"training": {"distill": 0.5}}))
    assert result.manifest.training is not None
    assert result.manifest.training.settings["distill"] == 0.5


@pytest.mark.slow
def test_the_command_line(run: Path) -> None:
    options = ["--storage", "sqlite:///runs.db", "--fraction", "0.4", "--held-out", "0.4", "--steps", "6"]
    options += ["--learning-rate", "5e-3", "--batch-size", "8", "--set", "training.evaluate_every=3"]
    done = alphasmith("finetune", "out", "--data", "pictures", *options, "--json", cwd=run)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["manifest"]["training"]["settings"]["learning_rate"] == 5e-3
    shown = alphasmith("show", answer["training"], "--storage", "sqlite:///runs.db", cwd=run)
    assert "losses by updates" in shown.stdout
    checked = alphasmith("verify", answer["training"], cwd=run)
    assert "the integer model has the same bits" in checked.stdout
    listed = alphasmith("list", "--storage", "sqlite:///runs.db", cwd=run)
    assert answer["training"] in listed.stdout
    refused = alphasmith("finetune", "out", "--data", "pictures", *options, "--fraction", "0.001", cwd=run)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: data.fraction: 0.001 of 60 samples is no sample")
    os.truncate(run / "out" / WEIGHTS, 100)
    damaged = alphasmith("finetune", "out", "--data", "pictures", *options, cwd=run)
    assert (damaged.returncode, damaged.stderr.count("error: ")) == (2, 1)
