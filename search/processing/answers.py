"""What a model answers with, as probabilities of classes that have names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.labels import is_classifier
from alphasmith.objectives.reading import parse_json, read_text
from alphasmith.objectives.text import one_line
from alphasmith.search.processing.opening import IntegerModel

#: What a model answers with; ``auto``: as the model or the answers themselves say.
Output = Literal["auto", "logits", "probabilities"]

#: How far the sum of probabilities may be from 1: a model may compute its softmax in half precision.
_NEAR_ONE = 1e-2
#: How far it may be where nobody said that they are probabilities.
_PLAINLY_ONE = 1e-4
#: Largest file of labels [bytes].
_MOST_LABELS = 2**24
#: Under which configurations keep names of classes.
_NAMED = ("id2label", "labels", "classes")
_NAMES_AS = "give one name a line, or JSON: a list of names, or an object with id2label"


def check_classifier(opened: IntegerModel) -> None:
    """Refuse, before anything is read, a model that says of itself that it is no classifier.

    Args:
        opened: The model.

    Raises:
        InputError: It is a model of transformers without a head that gives one of several classes.
    """
    if opened.setting("model_type") is None or is_classifier(opened.model):
        return
    name = type(opened.model).__name__
    if opened.setting("problem_type") == "multi_label_classification":
        problem, remedy = "gives every class a probability of its own", "give a model of one class for each item"
    elif opened.setting("num_labels") == 1 and name.endswith("Classification"):
        problem, remedy = "has a single class", "give a model of two classes or more"
    elif getattr(opened.model, "can_generate", bool)():
        problem, remedy = "writes texts and gives no classes", "use alphasmith generate"
    else:
        problem, remedy = (
            "gives no classes",
            "give a model with a classification head, such as ...ForImageClassification",
        )
    raise InputError("RUN", f"{name} {problem}", remedy)


def settled(opened: IntegerModel, output: Output) -> Output:
    """What a model answers with, where it says so.

    Args:
        opened: The model.
        output: What the user said.

    Raises:
        InputError: The user said something else.
    """
    if output not in ("auto", "logits", "probabilities"):
        raise InputError("--output", f"{output!r} is unknown", "give auto, logits or probabilities")
    return "logits" if output == "auto" and is_classifier(opened.model) else output


def class_names(opened: IntegerModel, labels: Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of a model's classes by number; None: nobody says, not even how many there are.

    Args:
        opened: The model.
        labels: Names in order, or a file of them; None: the model's own.

    Raises:
        InputError: They cannot be read, are not all different, or are not as many as the model has classes.
    """
    count = opened.setting("num_labels") if opened.setting("model_type") is not None else None
    if labels is not None:
        field = "--labels"
        given = _from_file(labels) if isinstance(labels, Path) else tuple(labels)
    else:
        field = "RUN"
        own = next((found for name in _NAMED if (found := opened.setting(name))), None)
        if own is None or isinstance(own, int):
            return None if count is None else tuple(str(number) for number in range(count))
        given = _in_order(own, field)
    names = tuple(one_line(name, 200) for name in given)
    if not names or len(set(names)) < len(names):
        told = "there are none" if not names else f"{next(n for n in names if names.count(n) > 1)!r} is there twice"
        raise InputError(field, f"names of classes: {told}", "give every class a name of its own")
    if count is not None and len(names) != count:
        raise InputError(field, f"names {len(names)} classes, and the model has {count}", "name every class once")
    return names


def probabilities_of(output: Tensor, kind: Output, names: tuple[str, ...] | None) -> Tensor:
    """(B, C) float64 probabilities of a model's main output; every row sums to 1.

    Args:
        output: (B, C), or with further dimensions of size 1.
        kind: What it holds. ``auto``: a row that is no distribution holds logits.
        names: Of the classes, where they are known.

    Raises:
        InputError: Field ``RUN``: it is of another shape. Field ``--labels``: it has another number of classes. Field ``item``: it is not finite, or holds no probabilities.
    """
    rows = output.detach().to("cpu", torch.float64)
    while rows.dim() > 2 and rows.shape[-1] == 1:
        rows = rows.squeeze(-1)
    if rows.dim() != 2 or rows.shape[1] < 2:
        shape = "x".join(map(str, output.shape[1:])) or "a single number"
        remedy = "give a classifier; a model that writes texts works with alphasmith generate"
        raise InputError("RUN", f"the model answers an item with {shape}, not with a number for each class", remedy)
    if names is not None and rows.shape[1] != len(names):
        told = f"{len(names)} classes have names, and the model answers with {rows.shape[1]}"
        raise InputError("--labels", told, "give a file that names all of them, in the order of the model's outputs")
    if not bool(torch.isfinite(rows).all()):
        raise InputError("item", "the model answers with NaN or infinity", "see that the item is like the run's data")
    sums = rows.sum(1, keepdim=True)
    off = (sums - 1).abs()
    if kind == "probabilities":
        if bool((rows < 0).any()) or float(off.max()) > _NEAR_ONE:
            told = f"the answer is no distribution: it sums to {float(sums[off.argmax()]):.4g}"
            raise InputError("item", told, "leave out --output probabilities")
        return rows / sums
    soft = torch.softmax(rows, 1)
    if kind == "logits":
        return soft
    return torch.where(are_distributions(rows)[:, None], rows / sums, soft)


def are_distributions(rows: Tensor) -> Tensor:
    """(B,) whether rows hold probabilities, as far as numbers tell: those that are not negative and sum to 1 are hardly ever logits.

    Args:
        rows: (B, C) what a model answers with.
    """
    sums = rows.double().sum(1)
    return (rows >= 0).all(1) & ((sums - 1).abs() < _PLAINLY_ONE)


def _from_file(file: Path) -> tuple[str, ...]:
    text = read_text(file, field="--labels", remedy=_NAMES_AS, most=_MOST_LABELS)
    if text.lstrip()[:1] in ("{", "["):
        content = parse_json(text, field="--labels", what=str(file), remedy=_NAMES_AS)
        if isinstance(content, dict):  # a configuration
            content = next((content[name] for name in _NAMED if isinstance(content.get(name), (dict, list))), content)
        return _in_order(content, "--labels")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _in_order(value: Any, field: str) -> tuple[str, ...]:
    """Names out of a list, or out of a mapping of numbers to them."""
    if isinstance(value, Mapping):
        try:
            numbered = {int(number): name for number, name in value.items()}
        except (TypeError, ValueError):
            numbered = {}
        if sorted(numbered) != list(range(len(value))):
            raise InputError(field, f"its classes are not numbered 0 to {len(value) - 1}", _NAMES_AS)
        value = [numbered[number] for number in range(len(value))]
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, (str, int)) for name in value):
        raise InputError(field, f"holds a {type(value).__name__} in place of names", _NAMES_AS)
    return tuple(map(str, value))
