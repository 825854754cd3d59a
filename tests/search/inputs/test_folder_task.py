"""A Hugging Face folder and labelled media as a task: parts that do not overlap, and a compression by the names of two paths."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.hf_folder import read_folder
from alphasmith.search import compress, load_compressed
from alphasmith.search.compression.config import CompressConfig
from alphasmith.search.inputs.folder_task import FolderData, folder_task
from tests.support.processed import MOODS, saved_reader
from tests.support.run_cases import saved_llama

COUNT = 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    (folder / "reader").mkdir()
    (folder / "llama").mkdir()
    saved_reader(folder / "reader")
    saved_llama(folder / "llama")
    generator = torch.Generator().manual_seed(0)
    with (folder / "moods.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(COUNT):
            mood = MOODS[number % len(MOODS)]
            letters = torch.randint(97, 123, (int(torch.randint(3, 20, (), generator=generator)),), generator=generator)
            rows.writerow([mood[0] + "".join(map(chr, letters.tolist())), mood])
    return folder


@pytest.mark.parametrize("name", ["reader", "llama"])
def test_parts_hold_every_sample_once_and_every_class(home: Path, name: str) -> None:
    model, task = folder_task(home / name, FolderData(path=home / "moods.csv"), seed=3)
    parts = [part.numbers for part in (task.train, task.study, task.test)]  # type: ignore[attr-defined]
    assert sorted(number for part in parts for number in part) == list(range(COUNT))
    assert len(parts[0]) > len(parts[1]) > 0 < len(parts[2])
    assert not model.training
    kind = "classes" if name == "reader" else "tokens"
    assert task.kind == kind
    if kind == "classes":
        seen = {int(task.study.batch([place]).labels[0]) for place in range(len(task.study))}  # type: ignore[index]
        assert seen == set(range(len(MOODS)))
    (value,) = task.measure(model, "study").values.values()
    # One by one: samples of several lengths in a batch change nothing.
    (alone,) = replace(task, batch_size=1).measure(model, "study").values.values()
    assert value == pytest.approx(alone, rel=1e-4)
    assert task.loss(model, task.train.batch([0, 1, 2])).requires_grad


@pytest.mark.parametrize("name", ["reader", "llama"])
def test_two_paths_are_enough_to_compress(home: Path, name: str, tmp_path: Path) -> None:
    given = {
        "storage": f"sqlite:///{tmp_path / 'studies.db'}",
        "out": str(tmp_path / "out"),
        "task": {"model": str(home / name), "data": str(home / "moods.csv")},
        "drop": {"tolerances": {"accuracy": 100.0} if name == "reader" else {"perplexity": 1e6}},
        "train": {"steps": 2},
        "clusters": {"k": [16], "finetune": 2},
        "study": {"trials": 1, "roles": ["off"]},
    }
    result = compress(config=given)
    assert (result.manifest.model.kind, result.manifest.model.name) == ("hf", name)
    assert result.manifest.bytes.stored < result.manifest.bytes.original / 2
    architecture, _ = read_folder(home / name, trust_remote_code=False)
    _, task = folder_task(home / name, FolderData(path=home / "moods.csv"), seed=0)
    measured = task.measure(load_compressed(result.folder, architecture), "test").values
    (metric,) = result.manifest.metrics
    assert measured[metric.name] == metric.test_compressed


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"model": "reader"}, "task.data: is missing beside task.model; give both"),
        ({"data": "moods.csv"}, "task.model: is missing beside task.data; give both"),
        ({"model": "reader", "data": "moods.csv", "factory": "a:b"}, "task.factory: given together with a model"),
        ({"model": "reader", "data": "moods.csv", "metrics": ["stoi"]}, "task.metrics: given together with a model"),
        ({"model": "reader", "data": "moods.csv", "max_length": 0}, "task.max_length"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(task: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        CompressConfig.build({"task": task})
    assert str(caught.value).startswith(told)


def headless(home: Path, folder: Path) -> FolderData:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(folder / "reader")
    return FolderData(path=home / "moods.csv")


def few(home: Path, folder: Path) -> FolderData:
    (folder / "few.csv").write_text("text,label\n" + "".join(f"abc,{mood}\n" for mood in MOODS) * 4)
    return FolderData(path=folder / "few.csv")


def unlabelled(home: Path, folder: Path) -> FolderData:
    (folder / "plain.csv").write_text("text\nabc\nabd\n")
    return FolderData(path=folder / "plain.csv")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (headless, "task.model: holds BertModel, which tells no classes apart and predicts no token"),
        (few, "task.data: holds 4 samples of class 0; give 5 or more"),
        (unlabelled, "data.label: the samples have no labels"),
        (lambda home, folder: FolderData(path=folder / "none"), "data.path: "),
        (lambda home, folder: FolderData(path=home / "moods.csv", column="body"), "data.column"),
    ],
    ids=["headless", "few", "unlabelled", "missing", "column"],
)
def test_models_and_data_of_no_use_are_refused_in_one_line(
    spoil: Callable[[Path, Path], FolderData], told: str, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "reader").symlink_to(home / "reader") if spoil is not headless else (tmp_path / "reader").mkdir()
    with pytest.raises(InputError) as caught:
        folder_task(tmp_path / "reader", spoil(home, tmp_path), seed=0)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
