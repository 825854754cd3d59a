"""Batches as a lazy sequence, batches from a script, the three splits, and a digest of what was used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, overload

import numpy as np
import torch

from alphasmith.objectives.batch import Batch
from alphasmith.objectives.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaBatches(Sequence[Batch]):
    """Batches that are read when asked for, and read again when asked for again; memory holds one at a time.

    Attributes:
        sizes: Samples in every batch.
        load: Reads batch i; deterministic.
        notes: What was assumed because the model did not say, for the report.
    """

    sizes: tuple[int, ...]
    load: Callable[[int], Batch]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> MediaBatches: ...

    def __getitem__(self, index: int | slice) -> Batch | MediaBatches:
        numbers = range(len(self.sizes))
        if isinstance(index, slice):
            chosen = numbers[index]
            load = self.load
            return replace(self, sizes=tuple(self.sizes[i] for i in chosen), load=lambda i: load(chosen[i]))
        return self.load(numbers[index])  # range() turns negative indices around and raises IndexError

    def __iter__(self) -> Iterator[Batch]:
        return (self.load(i) for i in range(len(self.sizes)))

    @property
    def samples(self) -> int:
        """Number of samples in all batches together."""
        return sum(self.sizes)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Three disjoint sets of samples.

    Attributes:
        calibration: Statistics, reservoirs and trials come from here.
        held_out: The guard scores the winner here; no trial sees it.
        proof: Used by the equivalence proof only.
    """

    calibration: MediaBatches
    held_out: MediaBatches
    proof: MediaBatches


def plan_batches(count: int, size: int) -> list[range]:
    """Consecutive ranges of at most ``size`` that cover ``count`` samples."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def in_memory(batches: Iterable[Any], *, limit: int | None = None) -> list[Batch]:
    """Take batches as a launch script has them.

    Args:
        batches: Tensors (the one positional argument), tuples or lists (positional arguments), mappings (keyword
            arguments; ``labels`` are kept apart, a two-dimensional ``attention_mask`` also becomes the mask), or
            ``Batch``. NumPy arrays stand for tensors. The first dimension of every tensor is the sample.
        limit: Stop once this many samples were taken [samples]; None: take all, so the iterable must end.

    Returns:
        One ``Batch`` for each.

    Raises:
        InputError: Nothing was given, an item is of no such type, holds no tensor, no sample, padding only, tensors
            that disagree about the number of samples, or a non-finite number.
    """
    taken: list[Batch] = []
    total = 0
    for number, item in enumerate(batches):
        if limit is not None and total >= limit:
            break
        batch = _as_batch(item, f"batches[{number}]")
        if limit is not None and total + batch.size > limit:
            batch = batch.narrow(0, limit - total)
        total += batch.size
        taken.append(batch)
    if not taken:
        raise InputError("batches", "there is none", "give at least three samples")
    return taken


def split_batches(batches: Sequence[Batch], held_out: float = 0.25, proof: float = 0.125, *, seed: int = 0) -> Splits:
    """Divide samples into calibration, held-out and proof, none in two of them.

    Whole batches are dealt out in an order drawn from ``seed``, so that data sorted by class lands in every split; only
    the batches at the two borders are cut, along samples drawn from ``seed``.

    Args:
        batches: What ``load_media`` or ``in_memory`` returned; read lazily where it is lazy.
        held_out: Samples for the guard: a share in (0, 1), or a whole number of samples.
        proof: Samples for the equivalence proof, likewise.
        seed: Draws the order.

    Returns:
        The splits, as lazy as ``batches``.

    Raises:
        InputError: A share is not positive, or no sample is left for one of the splits.
    """
    sizes = batches.sizes if isinstance(batches, MediaBatches) else tuple(batch.size for batch in batches)
    total = sum(sizes)
    wanted = {"held_out": _count(held_out, total, "held_out"), "proof": _count(proof, total, "proof")}
    calibration = total - sum(wanted.values())
    if calibration < 1:
        raise InputError(
            "data.samples",
            f"{total} samples are too few for calibration, {wanted['held_out']} held out and {wanted['proof']} for the "
            "proof",
            "give more data, smaller batches of it, or smaller splits",
        )
    generator = np.random.default_rng(seed)
    order = [int(i) for i in generator.permutation(len(sizes))]
    ends = list(accumulate((calibration, wanted["held_out"], wanted["proof"])))
    pieces: list[list[tuple[int, tuple[int, ...]]]] = [[], [], []]
    position = 0
    for index in order:
        rows = generator.permutation(sizes[index])
        for part, end in enumerate(ends):
            start = ends[part - 1] if part else 0
            cut = rows[max(start - position, 0) : max(end - position, 0)]
            if len(cut):
                pieces[part].append((index, tuple(int(r) for r in np.sort(cut))))
        position += sizes[index]
    notes = batches.notes if isinstance(batches, MediaBatches) else ()
    return Splits(
        calibration=_view(batches, sizes, pieces[0], notes),
        held_out=_view(batches, sizes, pieces[1], notes),
        proof=_view(batches, sizes, pieces[2], notes),
    )


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


def _view(
    batches: Sequence[Batch], sizes: tuple[int, ...], pieces: list[tuple[int, tuple[int, ...]]], notes: tuple[str, ...]
) -> MediaBatches:
    def load(number: int) -> Batch:
        index, rows = pieces[number]
        batch = batches[index]
        return batch if len(rows) == sizes[index] else _take(batch, rows)

    return MediaBatches(sizes=tuple(len(rows) for _, rows in pieces), load=load, notes=notes)


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


def _as_batch(item: Any, where: str) -> Batch:
    labels = mask = None
    if isinstance(item, Batch):
        batch = item
    else:
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(item, (torch.Tensor, np.ndarray)):
            args = (_tensor(item),)
        elif isinstance(item, Mapping):
            kwargs = {str(name): _tensor(value) for name, value in item.items()}
            labels = kwargs.pop("labels", None)
            mask = _mask(kwargs.get("attention_mask"))
        elif isinstance(item, (tuple, list)):
            args = tuple(_tensor(value) for value in item)
        else:
            raise InputError(
                where, f"is a {type(item).__name__}", "give a tensor, a tuple of arguments, a dict of them, or a Batch"
            )
        batch = Batch(args=args, kwargs=kwargs, mask=mask, labels=labels)
    _check(batch, where)
    return batch


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _mask(attention: Any) -> torch.Tensor | None:
    """An attention mask as ``Batch.mask``; None where nothing is padded, or where it has no (B, L) shape."""
    if not isinstance(attention, torch.Tensor) or attention.dim() != 2 or attention.is_floating_point():
        return None
    mask = attention.bool()
    return None if bool(mask.all()) else mask


def _check(batch: Batch, where: str) -> None:
    named = [(f"{where} argument {i}", v) for i, v in enumerate(batch.args)]
    named += [(f"{where}[{k!r}]", v) for k, v in batch.kwargs.items()]
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
