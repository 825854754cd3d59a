"""Labels of data as classes of a model: by name or number, from folders and columns, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media import MediaBatches, MediaSource, load_media
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import FolderName
from alphasmith.objectives.model.labels import Classes, are_classes, is_classifier, required_classes, with_labels

NAMES = {0: "cat", 1: "dog", 2: "Night_Owl"}
CONFIG = SimpleNamespace(id2label=NAMES, label2id={name: i for i, name in NAMES.items()}, num_labels=3)


def media(*targets: Any) -> MediaBatches:
    def load(numbers: tuple[int, ...]) -> Batch:
        return Batch(args=(torch.tensor(numbers)[:, None],))

    return MediaBatches.of(len(targets), 2, load, targets=targets)


def labels_of(found: MediaBatches) -> list[int]:
    return [int(i) for batch in found if batch.labels is not None for i in batch.labels]


@pytest.mark.parametrize(
    "targets",
    [
        ("cat", "dog", "Night_Owl"),
        ("CAT", " dog ", "night owl"),
        (0, 1, 2),
        ("0", "1", "2"),
        (0.0, 1.0, 2.0),
        (FolderName("Cat"), FolderName("Dog"), FolderName("night_owl")),
    ],
)
def test_names_and_numbers_are_classes(targets: tuple[Any, ...]) -> None:
    found = with_labels(media(*targets), CONFIG)
    assert labels_of(found) == [0, 1, 2]
    assert are_classes(list(found), CONFIG)
    assert labels_of(found.regrouped([2, 0], 1)) == [2, 0]


def test_a_name_that_looks_like_a_number_is_a_name() -> None:
    config = SimpleNamespace(id2label={0: "7", 1: "1"}, label2id={"7": 0, "1": 1}, num_labels=2)
    assert labels_of(with_labels(media("7", "1", 0), config)) == [0, 1, 0]


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("cat", "bird"), "'bird' is no label of the model .*cat, dog, night owl"),
        ((0, 3), "3 is no label"),
        ((-1, 0), "-1 is no label"),
        ((0.5,), "0.5 is no label"),
        (("9" * 5000,), "is no label"),
        ((float("nan"),), "nan is no label"),
        (("cat", None), "some samples have no label"),
        ((FolderName("cat"), FolderName("bird")), "'bird' is no label"),
        ((["cat"],), "is no label"),
    ],
)
def test_other_labels_are_refused(targets: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        with_labels(media(*targets), CONFIG)
    assert caught.value.field == "data.label"
    assert "label2id" in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_folders_that_mean_something_else_are_noted() -> None:
    found = with_labels(media(FolderName("2023"), FolderName("2024")), CONFIG)
    assert labels_of(found) == []
    assert "2023, 2024 are no labels of the model" in found.notes[-1]
    assert not are_classes(list(found), CONFIG)
    nothing = media(None, None)
    assert with_labels(nothing, CONFIG) is nothing


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 3]), torch.tensor([0, -1]), torch.rand(2), torch.zeros(2, 1).long()]
)
def test_labels_that_are_no_classes(labels: torch.Tensor) -> None:
    assert not are_classes([Batch(args=(torch.zeros(2),), labels=labels)], CONFIG)


def test_only_classifiers_of_one_class_a_sample_are_asked() -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    def build(kind: Any, **values: Any) -> nn.Module:
        small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model: nn.Module = kind(BertConfig(**small, vocab_size=20, **values))
        return model

    assert is_classifier(build(BertForSequenceClassification, num_labels=3))
    assert not is_classifier(build(BertForSequenceClassification, num_labels=1))
    assert not is_classifier(
        build(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    )
    assert not is_classifier(build(BertModel, num_labels=3))
    assert not is_classifier(nn.Linear(2, 2))


def pictures(folder: Path, *names: str) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(file)
    return folder


def targets_of(path: Path, **settings: Any) -> dict[int, Any]:
    found = load_media(MediaSource(path=path, targets="class", image_size=8, **settings))
    return dict(enumerate(found.targets))


def test_the_classes_of_pictures_are_found(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a", "train/cat/1.png", "train/dog/2.png", "dog/3.png")
    assert sorted(targets_of(folder).values()) == ["cat", "dog", "dog"]
    assert targets_of(folder, label="none") == {}
    folder = pictures(tmp_path / "b", "1.png", "sub/2.png")
    (folder / "metadata.csv").write_text("file_name,label\n1.png,dog\nsub/2.png,cat\n")
    assert sorted(targets_of(folder).values()) == ["cat", "dog"]
    (folder / "metadata.csv").unlink()
    rows = [{"file": "1.png", "kind": 2}, {"file": "sub/2.png", "kind": 0}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(targets_of(folder, label="kind").values()) == [0, 2]
    with pytest.raises(InputError, match="names no file, or not what it stands for"):
        targets_of(folder)
    with pytest.raises(InputError, match="has no field 'colour'"):
        targets_of(folder, label="colour")


KNOWN = Classes.named(("cat", "dog", "Night_Owl"), 3)


def test_classes_of_a_model_by_name_and_number() -> None:
    found = [KNOWN.number(target) for target in ("Cat", "night owl", "1", 2, "bird", 3, None)]
    assert found == [0, 2, 1, 2, None, None, None]
    assert KNOWN.title(2) == "night owl"
    nameless = Classes.named((), 2)
    assert (nameless.number("1"), nameless.number(2), nameless.title(1)) == (1, None, "1")


def test_labels_that_a_model_can_be_trained_on() -> None:
    classes = KNOWN
    assert required_classes(["cat", "dog", 2, "cat"], classes) == (0, 1, 2, 0)
    assert required_classes(["cat", "dog"], classes, partial=True) == (0, 1)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([], "have no labels"),
        ([None, None], "have no labels"),
        (["cat", None, None], "2 of 3 samples have no label"),
        (["cat", "bird"], "'bird' is no label of the model"),
        ([0, 3], "3 is no label of the model"),
        ([FolderName("2023"), FolderName("2024")], "'2023' is no label"),
        (["cat", "cat"], "every sample is of class 'cat'"),
        (["cat", "dog"], r"2 classes, the model 3 \(none is night owl\)"),
    ],
)
def test_labels_that_no_model_can_be_trained_on(targets: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        required_classes(targets, KNOWN)
    assert caught.value.field == "data.label"
    assert "\n" not in str(caught.value)
