"""Labels of data as the classes of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import FolderName, MediaBatches
from alphasmith.objectives.text import counted, listed

_HEADS = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification", "ForVideoClassification")


_NAME_LABELS = "use the names or numbers of the model's classes, or name them with --labels FILE"


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes that a model tells apart, and what data may call them.

    Attributes:
        count: How many there are: values of the model's output.
        names: Name, without case and underscores -> class; empty where the model does not say.
    """

    count: int
    names: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def named(cls, names: Sequence[str], count: int) -> Self:
        """Those that names are given for, in the order of the model's outputs.

        Args:
            names: One for each class; empty: nobody names them.
            count: Values of the model's output.
        """
        return cls(count=count, names={_plain(name): number for number, name in enumerate(names)})

    def number(self, target: Any) -> int | None:
        """The class that a name or a number stands for; None: none."""
        return _class(target, self.names, self.count)

    def title(self, number: int) -> str:
        """What a class is called."""
        return next((name for name, of in self.names.items() if of == number), str(number))

    def __str__(self) -> str:
        return f"{self.count} classes" + (f": {listed(sorted(self.names), 4)}" if self.names else ", 0 and on")


def required_classes(targets: Sequence[Any], classes: Classes, *, partial: bool = False) -> tuple[int, ...]:
    """The class of every sample, where a model is to be trained on them.

    Args:
        targets: What each sample stands for, as the data say it.
        classes: Of the model.
        partial: Whether classes of the model may be missing in the data.

    Raises:
        InputError: Field ``data.label``: a sample without a label, one that is none of the model's, a single class, or other
            classes than the model has.
    """
    if all(target is None for target in targets):
        remedy = "give a folder for each class, or a table and the column with --label"
        raise InputError("data.label", "the samples have no labels", remedy)
    found = [classes.number(target) for target in targets]
    if None in found:
        wrong = targets[found.index(None)]
        if wrong is None:
            without = sum(target is None for target in targets)
            told = f"{without} of {counted(len(targets), 'sample')} have no label"
            raise InputError("data.label", told, "label or remove them")
        raise InputError("data.label", f"{repr(wrong)[:80]} is no label of the model ({classes})", _NAME_LABELS)
    numbers = tuple(number for number in found if number is not None)
    seen = sorted(set(numbers))
    if len(seen) == 1:
        raise InputError(
            "data.label", f"every sample is of class {classes.title(seen[0])!r}", "give samples of several classes"
        )
    missing = [classes.title(number) for number in range(classes.count) if number not in set(seen)]
    if missing and not partial:
        problem = f"the data have {len(seen)} classes, the model {classes.count} (none is {listed(missing, 3)})"
        remedy = "give samples of every class, or allow that some are missing with --partial-classes"
        raise InputError("data.label", problem, remedy)
    return numbers


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
