"""A Hugging Face model and labelled media as a task of joint compression: accuracy of a classifier, perplexity of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.tasks import SampleTask
from alphasmith.objectives.media import MediaSource, load_media
from alphasmith.objectives.model.hf_folder import read_folder
from alphasmith.objectives.model.labels import Classes, is_classifier, required_classes
from alphasmith.objectives.reading import usable_path
from alphasmith.search.inputs.labelled_samples import LabelledSamples

#: Shares of the samples that are trained on and that decide; what is left is tested on.
_SHARES = (0.6, 0.2)
#: Fewest samples of a class, or of a text, that every part gets one of.
_FEWEST = 5


@dataclass(frozen=True, kw_only=True)
class FolderData:
    """Media for a model.

    Attributes:
        path: File or folder.
        column: Field or column that holds the text.
        label: Field or column that holds the class; ``auto``: by the usual names, else a folder for each class.
        max_length: Longest text [tokens].
    """

    path: Path
    column: str = "text"
    label: str = "auto"
    max_length: int = 256


def folder_task(folder: Path, data: FolderData, seed: int) -> tuple[nn.Module, SampleTask]:
    """The model of a folder in evaluation mode, and its task on media: 60 % are trained on, 20 % decide and 20 % are tested on.

    Args:
        folder: With ``config.json`` and safetensors; code in it is not run.
        data: Labelled for a classifier; texts for a model that predicts the next token.
        seed: Draws the parts, class by class.

    Raises:
        InputError: The model cannot be read or is of another kind, or its data are missing, unlabelled or too few.
    """
    model, _ = read_folder(folder, trust_remote_code=False)
    kind = _kind(model)
    source = MediaSource(
        path=usable_path("task.data", data.path),
        column=data.column,
        targets="class" if kind == "classes" else None,
        label=data.label,
        whole=True,
        batch_size=1,
        max_length=data.max_length,
    )
    config: Any = model.config
    media = load_media(source, model_folder=folder, model_config=config, seed=seed)
    classes: tuple[int, ...] | None = None
    if kind == "classes":
        names = [str(config.id2label[number]) for number in range(config.num_labels)]
        classes = required_classes(media.targets, Classes.named(names, config.num_labels))
    count = sum(len(numbers) for numbers in media.plan)
    train, study, test = (
        LabelledSamples(media=media, numbers=numbers, classes=classes)
        for numbers in _parts([0] * count if classes is None else classes, seed)
    )
    return model.eval(), SampleTask(kind=kind, train=train, study=study, test=test)


def _kind(model: nn.Module) -> Literal["classes", "tokens"]:
    if is_classifier(model):
        return "classes"
    if type(model).__name__.endswith("ForCausalLM"):
        return "tokens"
    problem = f"holds {type(model).__name__}, which tells no classes apart and predicts no token"
    raise InputError("task.model", problem, "give a classifier or a causal language model, or task.factory")


def _parts(classes: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Numbers of samples of the three parts, ascending, drawn class by class."""
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[], [], []]
    labels = np.asarray(classes)
    for label in sorted(set(classes)):
        places = generator.permutation(np.flatnonzero(labels == label))
        if len(places) < _FEWEST:
            told = f"{len(places)} samples" + (f" of class {label}" if len(set(classes)) > 1 else "")
            raise InputError("task.data", f"holds {told}", f"give {_FEWEST} or more, for three parts")
        ends = [round(len(places) * _SHARES[0]), round(len(places) * sum(_SHARES))]
        for part, taken in zip(parts, np.split(places, ends), strict=True):
            part += [int(place) for place in taken]
    return [tuple(sorted(part)) for part in parts]
