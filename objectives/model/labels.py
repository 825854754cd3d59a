"""Labels of data as the classes of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import FolderName, MediaBatches
from alphasmith.objectives.text import listed

_HEADS = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification", "ForVideoClassification")


def is_classifier(model: nn.Module) -> bool:
    """Whether a transformers model gives every sample exactly one of several classes."""
    config: Any = getattr(model, "config", None)
    single = getattr(config, "problem_type", None) in (None, "single_label_classification")
    return type(model).__name__.endswith(_HEADS) and single and getattr(config, "num_labels", 0) > 1


def with_labels(media: MediaBatches, config: Any) -> MediaBatches:
    """Batches that carry the class of every sample.

    Args:
        media: Samples with targets. Where these are names of folders, which may as well mean something else, and none of them
            names a class, that is noted, not refused.
        config: Configuration of a classifier; its ``label2id`` names the classes, case ignored, its ``num_labels`` counts them.

    Returns:
        The same samples with labels; without, where none is known.

    Raises:
        InputError: A label is none of the model's, or some samples have one and others do not.
    """
    known = [target for target in media.targets if target is not None]
    if not known:
        return media
    names = _names(config)
    classes = [_class(target, names, int(config.num_labels)) for target in media.targets]
    has = f"the model has {listed(sorted(names), 4)}" if names else f"the model has {config.num_labels}"
    if all(number is None for number in classes) and all(isinstance(target, FolderName) for target in known):
        told = listed(sorted({str(target) for target in known}), 3)
        note = f"no accuracy: the folders {told} are no labels of the model ({has})"
        return replace(media, notes=(*media.notes, note))
    wrong = next((target for target, number in zip(media.targets, classes, strict=True) if number is None), "")
    numbers = tuple(number for number in classes if number is not None)
    if len(numbers) < len(classes):
        problem = (
            f"{repr(wrong)[:80]} is no label of the model ({has})"
            if wrong is not None
            else "some samples have no label"
        )
        raise InputError("data.label", problem, "use the names in label2id of config.json, or set data.label = 'none'")
    load = media.load

    def labelled(samples: tuple[int, ...]) -> Batch:
        return replace(load(samples), labels=torch.tensor([numbers[i] for i in samples]))

    return replace(media, load=labelled)


def are_classes(batches: Sequence[Batch], config: Any) -> bool:
    """Whether every batch has one class of a model for each sample."""
    found = [batch.labels for batch in batches]
    return bool(found) and all(
        isinstance(labels, torch.Tensor)
        and labels.dim() == 1
        and not labels.is_floating_point()
        and bool(((labels >= 0) & (labels < config.num_labels)).all())
        for labels in found
    )


def _names(config: Any) -> dict[str, int]:
    by_name, by_number = getattr(config, "label2id", None), getattr(config, "id2label", None)
    names = {str(name): int(number) for number, name in by_number.items()} if isinstance(by_number, Mapping) else {}
    names |= {str(name): int(number) for name, number in by_name.items()} if isinstance(by_name, Mapping) else {}
    return {_plain(name): number for name, number in names.items()}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _class(target: Any, names: Mapping[str, int], count: int) -> int | None:
    """The class that a name or number stands for."""
    if target is None:
        return None
    if isinstance(target, float) and target.is_integer():
        target = int(target)
    name = str(target).strip()
    if _plain(name) in names:
        return names[_plain(name)]
    whole = name.isascii() and name.isdigit() and len(name) <= len(str(count))
    return int(name) if whole and int(name) < count else None
