"""Samples kept in memory once they are decoded: a training sees each of them many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import Loader


class KeptSamples:
    """Reads samples one by one, keeps them as long as there is room, and joins them where their shapes are equal.

    What a batch holds does not depend on what is kept: samples are joined in the same way whether they were read now or before.
    Samples that cannot be joined, since their shapes differ, are read together as they would be without this class.

    Args:
        load: Reads samples as one batch.
        most: What is kept at most [bytes].
    """

    def __init__(self, load: Loader, most: int) -> None:
        self._load = load
        self._room = most
        self._kept: dict[int, Batch] = {}

    def __call__(self, numbers: tuple[int, ...]) -> Batch:
        """Some samples as one batch, in the order given.

        Args:
            numbers: Of the samples; not empty.
        """
        parts = [self._one(number) for number in numbers]
        joined = parts[0] if len(parts) == 1 else _joined(parts)
        return self._load(numbers) if joined is None else joined

    def _one(self, number: int) -> Batch:
        kept = self._kept.get(number)
        if kept is not None:
            return kept
        read = self._load((number,))
        size = sum(value.nbytes for value in _values(read) if isinstance(value, Tensor))
        if size <= self._room:
            self._room -= size
            self._kept[number] = read
        return read


def _values(batch: Batch) -> list[Any]:
    return [*batch.args, *batch.kwargs.values(), batch.mask, batch.labels]


def _joined(parts: Sequence[Batch]) -> Batch | None:
    """One batch of several; None where their shapes differ, or what they have in common."""
    first = parts[0]
    names = tuple(first.kwargs)
    columns = list(zip(*map(_values, parts), strict=False))
    if any(tuple(part.kwargs) != names or len(part.args) != len(first.args) for part in parts):
        return None
    made: list[Any] = []
    for values in columns:
        alike = {(value.shape, value.dtype) if isinstance(value, Tensor) else None for value in values}
        if len(alike) > 1:
            return None
        if isinstance(values[0], Tensor) and values[0].dim() > 0:
            made.append(torch.cat(list(values)))
        elif all(_same(value, values[0]) for value in values):
            made.append(values[0])
        else:
            return None
    count = len(first.args)
    return Batch(
        args=tuple(made[:count]),
        kwargs=dict(zip(names, made[count:-2], strict=True)),
        mask=made[-2],
        labels=made[-1],
    )


def _same(value: Any, other: Any) -> bool:
    return bool(torch.equal(value, other)) if isinstance(value, Tensor) else value is other or value == other
