"""Batches as a lazy sequence, the three splits, and a digest of what was used."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import Any, overload

import numpy as np
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.in_memory import in_memory

#: ``in_memory`` among them: launch scripts import it from here.
__all__ = [
    "FolderName",
    "Loader",
    "MediaBatches",
    "Splits",
    "as_media",
    "data_digest",
    "in_memory",
    "largest",
    "lengths_in_common",
    "plan_batches",
    "split_batches",
]

#: Loads samples, named by their numbers, as one batch; deterministic.
Loader = Callable[[tuple[int, ...]], Batch]


class FolderName(str):
    """A target that is the name of the folder a file lies in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaBatches(Sequence[Batch]):
    """Batches that are read when asked for, and read again when asked for again; memory holds one at a time.

    Attributes:
        plan: The numbers of the samples in every batch.
        load: Reads samples as one batch.
        alike: What the samples of one batch must have in common, by number of the sample; empty: nothing.
        origin: Reads samples as the data have them, where ``load`` adds what a model makes of them; None: it adds nothing.
        targets: What each sample stands for as the data say it, by number, None where they do not; empty: nothing was asked for.
        notes: What was assumed because the model did not say, for the report.
    """

    plan: tuple[tuple[int, ...], ...]
    load: Loader
    alike: tuple[Hashable, ...] = ()
    origin: Loader | None = None
    targets: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        count: int,
        size: int,
        load: Loader,
        *,
        alike: Sequence[Hashable] = (),
        targets: Sequence[Any] = (),
        notes: tuple[str, ...] = (),
    ) -> MediaBatches:
        """Samples 0 to ``count``, exclusive, in batches.

        Args:
            count: Number of samples.
            size: Samples in a batch at most.
            load: Reads samples as one batch.
            alike: As of the class.
            targets: As of the class.
            notes: As of the class.
        """
        plan = plan_batches(range(count), size, alike)
        return cls(plan=plan, load=load, alike=tuple(alike), targets=tuple(targets), notes=notes)

    def __len__(self) -> int:
        return len(self.plan)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> MediaBatches: ...

    def __getitem__(self, index: int | slice) -> Batch | MediaBatches:
        return replace(self, plan=self.plan[index]) if isinstance(index, slice) else self.load(self.plan[index])

    def __iter__(self) -> Iterator[Batch]:
        return (self.load(numbers) for numbers in self.plan)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples in every batch."""
        return tuple(map(len, self.plan))

    @property
    def samples(self) -> int:
        """Number of samples in all batches together."""
        return sum(self.sizes)

    def one_by_one(self) -> Iterator[Batch]:
        """Every sample as a batch of its own, by number, as the data have it: the same whatever the batches are."""
        load = self.origin or self.load
        return (load((number,)) for number in sorted(number for batch in self.plan for number in batch))

    def regrouped(self, numbers: Sequence[int], size: int) -> MediaBatches:
        """Some of the samples, in new batches.

        Args:
            numbers: Numbers of the samples, in their new order.
            size: Samples in a batch at most.
        """
        return replace(self, plan=plan_batches(numbers, size, self.alike))


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Four disjoint sets of samples.

    Attributes:
        calibration: Statistics, ranges and rows of sites come from here.
        tuning: Choices at the model's output are made here: on data whose extremes set no range. May be empty.
        held_out: The guard scores the winner here; no trial sees it.
        proof: Used by the equivalence proof only.
    """

    calibration: MediaBatches
    tuning: MediaBatches
    held_out: MediaBatches
    proof: MediaBatches


def plan_batches(numbers: Sequence[int], size: int, alike: Sequence[Hashable] = ()) -> tuple[tuple[int, ...], ...]:
    """Samples in batches of at most ``size``. The order of the samples does not depend on it.

    Args:
        numbers: Numbers of samples.
        size: Samples in a batch at most.
        alike: What the samples of a batch must have in common, by number; empty: nothing.
    """
    groups: dict[Hashable, list[int]] = {}
    for number in numbers:
        groups.setdefault(alike[number] if alike else None, []).append(number)
    return tuple(tuple(g[start : start + size]) for g in groups.values() for start in range(0, len(g), size))


def split_batches(
    batches: Sequence[Batch],
    held_out: float = 0.25,
    proof: float = 0.125,
    *,
    tuning: float = 0.0,
    size: int | None = None,
    seed: int = 0,
) -> Splits:
    """Divide samples into calibration, tuning, held-out and proof, none in two of them, then put them into batches.

    Samples are dealt out one by one in an order drawn from ``seed``, so that data sorted by class lands in every split, and
    the batches they came in, or go into, change nothing about it.

    Args:
        batches: What ``load_media`` or ``in_memory`` returned; read lazily where it is lazy.
        held_out: Samples for the guard: a share in (0, 1), or a whole number of samples.
        proof: Samples for the equivalence proof, likewise.
        tuning: Samples for choices at the model's output, likewise; none of them where a share is below half a sample, or 0.
        size: Samples in a batch at most; None: as many as in the largest of ``batches``.
        seed: Draws the order.

    Returns:
        The splits, as lazy as ``batches``.

    Raises:
        InputError: A share is not positive, or no sample is left for one of the splits.
    """
    given = as_media(batches)
    wanted = {"held_out": _count(held_out, given.samples, "held_out"), "proof": _count(proof, given.samples, "proof")}
    tuned = round(tuning * given.samples) if 0 < tuning < 1 else int(tuning)
    calibration = given.samples - sum(wanted.values()) - tuned
    if calibration < 1:
        raise InputError(
            "data.samples",
            f"{given.samples} samples are too few for calibration, {tuned} for tuning, {wanted['held_out']} held out and "
            f"{wanted['proof']} for the proof",
            "give more data, or smaller splits",
        )
    numbers = sorted(number for batch in given.plan for number in batch)
    order = [numbers[int(i)] for i in np.random.default_rng(seed).permutation(given.samples)]
    most = max(given.sizes) if size is None else size
    first, second = calibration + tuned, calibration + tuned + wanted["held_out"]
    return Splits(
        calibration=given.regrouped(order[:calibration], most),
        tuning=given.regrouped(order[calibration:first], most),
        held_out=given.regrouped(order[first:second], most),
        proof=given.regrouped(order[second:], most),
    )


def as_media(batches: Sequence[Batch]) -> MediaBatches:
    """Batches whose samples can be put into other batches; samples of different shapes stay apart."""
    if isinstance(batches, MediaBatches):
        return batches
    rows = [(batch, row) for batch in batches for row in range(batch.size)]
    alike = tuple(signature for batch in batches for signature in [_signature(batch)] * batch.size)
    ends = list(accumulate((batch.size for batch in batches), initial=0))
    plan = tuple(tuple(range(start, stop)) for start, stop in pairwise(ends))

    def load(numbers: tuple[int, ...]) -> Batch:
        chosen = [rows[number] for number in numbers]
        return _joined([_take(batch, tuple(row for _, row in group)) for batch, group in _runs(chosen)])

    return MediaBatches(plan=plan, load=load, alike=alike)


def lengths_in_common(lengths: Sequence[int], kinds: Sequence[Hashable] = ()) -> list[int]:
    """Every length cut to the shortest one within the same quarter of a doubling: a few lengths, each at least 0.84 of its own.

    Args:
        lengths: Above 0.
        kinds: What is compared with its like only; empty: all of one kind.
    """
    steps = [math.floor(4 * math.log2(length)) for length in lengths]
    keys = list(zip(steps, kinds or [None] * len(steps), strict=True))
    shortest: dict[Hashable, int] = {}
    for key, length in zip(keys, lengths, strict=True):
        shortest[key] = min(length, shortest.get(key, length))
    return [shortest[key] for key in keys]


def largest(batches: Sequence[Batch]) -> int:
    """Samples in the largest batch; nothing is read that is lazy."""
    return max(batches.sizes if isinstance(batches, MediaBatches) else (batch.size for batch in batches))


def data_digest(batches: Iterable[Batch]) -> str:
    """SHA-256 over everything the model is given: names, types, shapes and contents, in order.

    Args:
        batches: Read once, one at a time.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: A batch holds something that has no stable content, such as an object.
    """
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(b"batch")
        for value in (batch.args, dict(batch.kwargs), batch.mask, batch.labels):
            _digest_value(digest.update, value)
    return digest.hexdigest()


def _count(share: float, total: int, name: str) -> int:
    if not share > 0 or (share >= 1 and share != int(share)):
        raise InputError(f"data.{name}", f"{share} is no share of the data", "give a share in (0, 1) or a sample count")
    return max(1, round(share * total)) if share < 1 else int(share)


def _runs(rows: Sequence[tuple[Batch, int]]) -> Iterator[tuple[Batch, list[tuple[Batch, int]]]]:
    for _, group in groupby(rows, key=lambda row: id(row[0])):
        found = list(group)
        yield found[0][0], found


def _signature(batch: Batch) -> Hashable:
    """What batches must have in common to be joined: names, types and shapes of one sample, and all that is no tensor."""

    def of(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return (value.dtype, tuple(value.shape[1:])) if value.dim() else (value.dtype, value.item())
        return repr(value)

    named = tuple(sorted((name, of(value)) for name, value in batch.kwargs.items()))
    return (tuple(map(of, batch.args)), named, of(batch.labels))


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one signature as one; a mask that hides nothing is left out."""
    first = batches[0]

    def join(values: Sequence[Any]) -> Any:
        tensors = isinstance(values[0], torch.Tensor) and values[0].dim() > 0
        return torch.cat(list(values)) if tensors and len(values) > 1 else values[0]

    masks = [batch.mask for batch in batches]
    shaped = next((mask for mask in masks if mask is not None), None)
    mask = None
    if shaped is not None:
        whole = [torch.ones(b.size, *shaped.shape[1:], dtype=torch.bool) if b.mask is None else b.mask for b in batches]
        mask = torch.cat(whole)
    return Batch(
        args=tuple(join([batch.args[i] for batch in batches]) for i in range(len(first.args))),
        kwargs={name: join([batch.kwargs[name] for batch in batches]) for name in first.kwargs},
        mask=mask if mask is not None and not bool(mask.all()) else None,
        labels=join([batch.labels for batch in batches]),
    )


def _take(batch: Batch, rows: tuple[int, ...]) -> Batch:
    chosen = torch.tensor(rows)

    def pick(value: Any) -> Any:
        return value[chosen.to(value.device)] if isinstance(value, torch.Tensor) and value.dim() > 0 else value

    return replace(
        batch,
        args=tuple(pick(v) for v in batch.args),
        kwargs={k: pick(v) for k, v in batch.kwargs.items()},
        mask=pick(batch.mask),
        labels=pick(batch.labels),
    )


def _digest_value(update: Callable[[bytes], object], value: Any) -> None:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        update(f"tensor {data.dtype} {tuple(data.shape)};".encode())
        update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)};".encode())
        for name in sorted(value):
            update(f"{name!r};".encode())
            _digest_value(update, value[name])
    elif isinstance(value, (tuple, list)):
        update(f"sequence {len(value)};".encode())
        for item in value:
            _digest_value(update, item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise InputError(
            "batches", f"hold a {type(value).__name__}, which has no stable digest", "pass tensors and plain values"
        )
