"""Which samples are trained on and which are held out: drawn by seed, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alphasmith.objectives.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Numbers of samples, as the data have them; no sample is in both. Source: claim A-13.

    Attributes:
        trained: Trained on, in ascending order.
        held_out: Held out, likewise.
    """

    trained: tuple[int, ...]
    held_out: tuple[int, ...]

    def halved(self, classes: Sequence[int] | None, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The held-out samples in two halves, class by class.

        Args:
            classes: Class of every sample of the data; None: there are none.
            seed: Draws them.
        """
        own = None if classes is None else [classes[number] for number in self.held_out]
        places = _stratified(own, len(self.held_out), len(self.held_out) // 2, np.random.default_rng([seed, 1]))
        first = {self.held_out[place] for place in places}
        return tuple(sorted(first)), tuple(number for number in self.held_out if number not in first)


def draw(classes: Sequence[int] | None, count: int, *, fraction: float, held_out: float, seed: int) -> Draw:
    """Draw a share of samples to train on and another one to hold out.

    Every class gets its part of both, by largest remainder; which of its samples, the seed says.

    Args:
        classes: (count,) class of every sample; None: there are none.
        count: Samples.
        fraction: Share to train on, in (0, 1).
        held_out: Share to hold out, in (0, 1); both together at most 1.
        seed: Draws them.

    Raises:
        InputError: Field ``data.fraction`` or ``data.held_out``: fewer than one sample to train on, or two held out.
    """
    trained, kept = round(fraction * count), min(round(held_out * count), count - round(fraction * count))
    if trained < 1:
        remedy = f"raise --fraction to {min(1.0, 1 / max(count, 1)):.2g} or more, or give more data"
        raise InputError("data.fraction", f"{fraction:g} of {count} samples is no sample", remedy)
    if kept < 2:
        remedy = f"raise --held-out to {min(1.0, 2 / max(count, 1)):.2g} or more, or give more data"
        raise InputError("data.held_out", f"{held_out:g} of {count} samples is {kept}, fewer than two", remedy)
    generator = np.random.default_rng(seed)
    both = _stratified(classes, count, trained + kept, generator)
    own = None if classes is None else [classes[number] for number in both]
    first = {both[place] for place in _stratified(own, len(both), trained, generator)}
    return Draw(
        trained=tuple(number for number in both if number in first),
        held_out=tuple(number for number in both if number not in first),
    )


def _stratified(
    classes: Sequence[int] | None, count: int, wanted: int, generator: np.random.Generator
) -> tuple[int, ...]:
    """``wanted`` of ``count`` places, every class in proportion, in ascending order."""
    labels = np.zeros(count, dtype=np.int64) if classes is None else np.asarray(classes)
    found, sizes = np.unique(labels, return_counts=True)
    share = sizes * (wanted / count)
    quota = np.floor(share).astype(int)
    # Classes with equal remainders take turns by the draw, not by their numbers.
    order = sorted(generator.permutation(len(found)), key=lambda place: quota[place] - share[place])
    quota[order[: wanted - int(quota.sum())]] += 1
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(found, quota, strict=True)
    ]
    return tuple(int(place) for place in np.sort(np.concatenate(chosen)))
