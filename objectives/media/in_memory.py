"""Batches as a launch script has them: tensors, arrays, frames, loaders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media._source import is_transformers_config
from alphasmith.objectives.media.batch import Batch

#: Names that data sets and models give to what a sample should be answered with.
_LABELS = ("labels", "label", "targets", "target")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the forward of a model takes by position, so that labels can be told from arguments.

    Attributes:
        names: Names of the positional arguments.
        endless: Whether any number of them is taken.
        classes: Whether it is a transformers model, whose arguments hold no single whole number a sample, but labels do.
    """

    names: tuple[str, ...]
    endless: bool = False
    classes: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Arguments:
        """Those of a model."""
        parameters = inspect.signature(model.forward).parameters.values()
        return cls(
            names=tuple(p.name for p in parameters if p.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD),
            endless=any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters),
            classes=is_transformers_config(getattr(model, "config", None)),
        )

    def end_with_labels(self, given: Sequence[Any]) -> bool:
        """Whether the last of some values is no argument of the model."""
        place = len(given) - 1
        if place < 1 or self.endless:
            return False
        if place >= len(self.names):
            return place == len(self.names)
        last = given[place]
        single = isinstance(last, torch.Tensor) and last.dim() == 1 and not last.is_floating_point()
        return self.names[place] in _LABELS or (self.classes and single)


def as_tensor(value: Any, where: str) -> torch.Tensor:
    """Numbers as a tensor, as the models have them: floating ones in float32.

    Args:
        value: A tensor, a NumPy array, a data frame or lists of numbers.
        where: What it is, for the error.

    Raises:
        InputError: It holds something that is no real number, or rows of different lengths.
    """
    if not isinstance(value, torch.Tensor):
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, RuntimeError):  # lists of unequal lengths, or of other things than numbers
            array = np.empty(0, dtype=object)
        if array.dtype.kind not in "biuf":
            remedy = "give a tensor, an array of numbers, or the numeric columns of a frame"
            raise InputError(where, f"is a {type(value).__name__} that does not hold numbers only", remedy)
        native = np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
        return torch.from_numpy(np.require(array.astype(native, order="C", copy=False), requirements="W"))
    if value.is_complex():
        raise InputError(where, "holds complex numbers", "give real ones")
    dense: torch.Tensor = value.to_dense()
    return dense.to(torch.float32) if dense.is_floating_point() else dense


def in_memory(batches: Any, *, limit: int | None = None, arguments: Arguments | None = None) -> list[Batch]:
    """Take batches as a launch script has them.

    Args:
        batches: An iterable, such as a ``DataLoader``, of tensors (the one positional argument), tuples or lists (positional
            arguments, with labels behind them), mappings (keyword arguments; ``labels`` or ``label`` are kept apart, a two-dimensional ``attention_mask`` also
            becomes the mask), or ``Batch``; or a tensor or mapping of all samples. NumPy arrays and data frames stand for
            tensors. The first dimension of every tensor is the sample.
        limit: Stop once this many samples were taken [samples]; None: take all, so the iterable must end.
        arguments: What the model takes by position, by which labels are told in a tuple; None: there are none.

    Returns:
        One ``Batch`` for each.

    Raises:
        InputError: Nothing was given, an item is of no such type, holds no tensor, no sample, padding only, tensors
            that disagree about the number of samples, or a non-finite number.
    """
    if _is_array(batches) or isinstance(batches, (Mapping, Batch)):
        batches = [batches]
    if isinstance(batches, (str, bytes, Dataset)) or not hasattr(batches, "__iter__"):
        remedy = "give an iterable of batches, e.g. DataLoader(dataset, batch_size=32), or an array of all samples"
        raise InputError("batches", f"is a {type(batches).__name__}", remedy)
    taken: list[Batch] = []
    total = 0
    for number, item in enumerate(batches):
        if limit is not None and total >= limit:
            break
        batch = _as_batch(item, f"batches[{number}]", arguments)
        if limit is not None and total + batch.size > limit:
            batch = batch.narrow(0, limit - total)
        total += batch.size
        taken.append(batch)
    if not taken:
        raise InputError("batches", "there is none", "give at least three samples")
    return taken


def labelled(batches: Any, *, limit: int) -> tuple[list[Batch], tuple[Any, ...]]:
    """Take labelled samples as a launch script has them.

    Args:
        batches: An iterable of (inputs, labels), such as a ``DataLoader``, or of what :func:`in_memory` takes by name (mappings with
            ``labels``, ``Batch``, tensors without labels for what needs none). Inputs: a tensor, a tuple of arguments or a mapping.
            Labels: a class or a name for every sample, or a float tensor of the output's shape. A single label makes one sample
            of inputs without a sample dimension.
        limit: Samples that are taken at most [samples].

    Returns:
        One ``Batch`` for each, with labels that are float tensors; and the class or name of every sample, where there are any.

    Raises:
        InputError: As :func:`in_memory`; or labels that are neither, or not one for each sample, or not on every batch.
    """
    remedy = "give an iterable of (inputs, labels), e.g. DataLoader(dataset, batch_size=32)"
    if isinstance(batches, (str, bytes, Mapping, Batch)) or _is_array(batches) or not hasattr(batches, "__iter__"):
        raise InputError("batches", f"is a {type(batches).__name__}", remedy)
    taken: list[Batch] = []
    targets: list[Any] = []
    total = 0
    for number, item in enumerate(batches):
        if total >= limit:
            break
        where = f"batches[{number}]"
        batch, labels = _with_labels(item, where)
        taken.append(batch)
        targets += labels
        total += batch.size
        if labels and len(labels) != batch.size:
            raise InputError(where, f"has {len(labels)} labels for {batch.size} samples", "give one for each")
        if targets and len(targets) != total:
            raise InputError(where, "has labels where other batches have none, or none where they do", "label them all")
    if not taken:
        raise InputError("batches", "there is none", remedy)
    return taken, tuple(targets)


def _with_labels(item: Any, where: str) -> tuple[Batch, list[Any]]:
    """A batch, and its labels where they are classes or names."""
    if not isinstance(item, (tuple, list)):
        batch = _as_batch(item, where, None)
        labels: Any = batch.labels
    else:
        if len(item) != 2:
            raise InputError(where, f"holds {len(item)} things", "give (inputs, labels)")
        inputs, labels = item
        single = isinstance(labels, (str, int)) or (isinstance(labels, (torch.Tensor, np.ndarray)) and labels.ndim == 0)
        batch = _as_batch(_one_more(inputs) if single else inputs, where, None)
        labels = [labels] if single else labels
    if labels is None:
        return batch, []
    if isinstance(labels, (tuple, list)) and any(isinstance(label, str) for label in labels):
        return replace(batch, labels=None), list(labels)
    values = as_tensor(labels, f"labels of {where}")
    if values.is_floating_point():
        found = replace(batch, labels=values)
        _check(found, where)
        return found, []
    if values.dim() != 1:
        problem = f"are whole numbers of shape {tuple(values.shape)}"
        raise InputError(f"labels of {where}", problem, "give one class for each sample")
    return replace(batch, labels=None), values.tolist()


def _one_more(inputs: Any) -> Any:
    """The inputs of one sample with a sample dimension."""
    if isinstance(inputs, Mapping):
        return {name: _one_more(value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_one_more(value) for value in inputs)
    return as_tensor(inputs, "batches")[None] if _is_array(inputs) else inputs


def _as_batch(item: Any, where: str, arguments: Arguments | None) -> Batch:
    labels = mask = None
    if isinstance(item, Batch):
        batch = item.to(dtype=torch.float32)
    else:
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if _is_array(item):
            args = (as_tensor(item, where),)
        elif isinstance(item, Mapping):
            kwargs = {str(name): _argument(value, f"{where}[{name!r}]") for name, value in item.items()}
            taken = () if arguments is None else arguments.names
            name = next((n for n in _LABELS if n in kwargs and (n == "labels" or n not in taken)), "labels")
            labels = kwargs.pop(name, None)
            labels = None if labels is None else as_tensor(labels, f"labels of {where}")
            mask = _mask(kwargs.get("attention_mask"))
        elif isinstance(item, (tuple, list)):
            args = tuple(_argument(value, f"{where} argument {i}") for i, value in enumerate(item))
            if arguments is not None and arguments.end_with_labels(args):
                args, labels = args[:-1], as_tensor(args[-1], f"labels of {where}")
        else:
            raise InputError(
                where, f"is a {type(item).__name__}", "give a tensor, a tuple of arguments, a dict of them, or a Batch"
            )
        batch = Batch(args=args, kwargs=kwargs, mask=mask, labels=labels)
    _check(batch, where)
    return batch


def _is_array(value: Any) -> bool:
    """Whether it stands for one tensor: that, a NumPy array, or a data frame or series, of which pandas is one maker."""
    return isinstance(value, (torch.Tensor, np.ndarray)) or hasattr(value, "to_numpy")


def _argument(value: Any, where: str) -> Any:
    return as_tensor(value, where) if _is_array(value) else value


def _mask(attention: Any) -> torch.Tensor | None:
    """An attention mask as ``Batch.mask``; None where nothing is padded, or where it has no (B, L) shape."""
    if not isinstance(attention, torch.Tensor) or attention.dim() != 2 or attention.is_floating_point():
        return None
    mask = attention.bool()
    return None if bool(mask.all()) else mask


def _check(batch: Batch, where: str) -> None:
    named = [(f"{where} argument {i}", v) for i, v in enumerate(batch.args)]
    named += [(f"{where}[{k!r}]", v) for k, v in batch.kwargs.items()] + [(f"labels of {where}", batch.labels)]
    tensors = [(name, v) for name, v in named if isinstance(v, torch.Tensor) and v.dim() > 0]
    if not tensors:
        raise InputError(where, "holds no tensor with a sample dimension", "give the model's input tensors")
    for name, value in tensors:
        if value.numel() == 0:
            raise InputError(name, "is empty", "give at least one sample")
        if value.shape[0] != batch.size:
            raise InputError(
                name,
                f"has {value.shape[0]} samples, another argument has {batch.size}",
                "let the first dimension of every tensor be the sample, or bind shared tensors in the model",
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(name, "holds NaN or infinity", "clean the data")
    if batch.mask is not None and not bool(batch.mask.any()):
        raise InputError(where, "is padding only", "give data with at least one real position")
