"""Samples with labels: of media that are read when asked for, whatever their lengths are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alphasmith.objectives.media import MediaBatches
from alphasmith.objectives.media.batch import Batch

#: Label of a position that has none.
_NO_LABEL = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSamples:
    """Some of the samples of a data set. See ``objectives.training.ports.Samples``.

    Attributes:
        media: All samples, by number.
        numbers: Those that are meant, in order.
        classes: Class of every sample of ``media``; None: the batches say it themselves, or there are none.
    """

    media: MediaBatches
    numbers: tuple[int, ...]
    classes: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some samples as one batch, in the order given; those of several lengths are filled up with zeros.

        Args:
            numbers: 0 to the number of samples, exclusive; not empty.
        """
        chosen = tuple(self.numbers[number] for number in numbers)
        alike = {self.media.alike[number] for number in chosen} if self.media.alike else set()
        made = self.media.load(chosen) if len(alike) < 2 else _filled([self.media.load((n,)) for n in chosen])
        if self.classes is None:
            return made
        return replace(made, labels=torch.tensor([self.classes[number] for number in chosen]))


def _filled(batches: Sequence[Batch]) -> Batch:
    """Samples of several lengths as one batch: what is missing at the end is 0, no position of the mask, and no label."""

    def join(values: Sequence[Any], fill: int = 0) -> Any:
        if not all(isinstance(value, Tensor) and value.dim() > 0 for value in values):
            return values[0]
        most = [max(value.shape[dim] for value in values) for dim in range(1, values[0].dim())]
        return torch.cat([_grown(value, most, fill) for value in values])

    first = batches[0]
    ids = next(iter((*first.args, *first.kwargs.values())), None)
    mask = None
    if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
        mask = join([_real(batch) for batch in batches])
    labels = [batch.labels for batch in batches]
    return Batch(
        args=tuple(join([batch.args[place] for batch in batches]) for place in range(len(first.args))),
        kwargs={name: join([batch.kwargs[name] for batch in batches]) for name in first.kwargs},
        mask=mask,
        labels=None if first.labels is None else join(labels, _NO_LABEL),
    )


def _real(batch: Batch) -> Tensor:
    """Which positions of a batch of token ids are real."""
    ids = next(iter((*batch.args, *batch.kwargs.values())))
    return torch.ones(ids.shape, dtype=torch.bool) if batch.mask is None else batch.mask


def _grown(value: Tensor, most: Sequence[int], fill: int) -> Tensor:
    """A tensor with ``fill`` behind it in every dimension but the first."""
    missing = [want - have for want, have in zip(most, value.shape[1:], strict=True)]
    return functional.pad(value, [part for extra in reversed(missing) for part in (0, extra)], value=fill)
