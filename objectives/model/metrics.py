"""Task metrics that need nothing but a model and its batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.media.batch import Batch, call, device_of, main_output


def perplexity(model: nn.Module, batches: Sequence[Batch]) -> float:
    """exp of the mean next-token cross entropy [nats] over positions that are not padded; of a decoder, over its labels.

    Args:
        model: Returns logits (B, L, V).
        batches: Token ids (B, L) as ``input_ids`` or as the first argument; for an encoder-decoder ``decoder_input_ids`` and
            the tokens that follow as labels.

    Raises:
        InputError: No position has a next token.
        NonFiniteError: The loss is NaN or infinite.
    """
    total, count = 0.0, 0
    device = device_of(model)
    with torch.no_grad():
        for batch in batches:
            moved = batch.to(device)
            if is_written(moved):
                follows = torch.as_tensor(moved.labels).flatten()
                known = follows >= 0  # places that are filled up have negative labels
                logits = main_output(call(model, moved)).flatten(0, 1)
                total += float(F.cross_entropy(logits[known].double(), follows[known], reduction="sum"))
                count += int(known.sum())
                continue
            ids = moved.kwargs["input_ids"] if "input_ids" in moved.kwargs else moved.args[0]
            real = torch.ones_like(ids, dtype=torch.bool) if moved.mask is None else moved.mask.bool()
            keep = real[:, 1:] & real[:, :-1]
            logits = main_output(call(model, moved))[:, :-1][keep]
            total += float(F.cross_entropy(logits.double(), ids[:, 1:][keep], reduction="sum"))
            count += int(keep.sum())
    if count == 0:
        raise InputError("data", "no position has a next token", "give texts of at least two tokens")
    if not math.isfinite(total):
        raise NonFiniteError(f"the next-token loss is {total}")
    return math.exp(total / count)


def is_written(batch: Batch) -> bool:
    """Whether a decoder reads a text in a batch, whose labels are the tokens that follow."""
    read = batch.kwargs.get("decoder_input_ids")
    return read is not None and batch.labels is not None and batch.labels.shape == read.shape


def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Share of samples whose largest output is the label; a tie goes to the lowest index (claim A-14).

    Args:
        model: Returns class scores (B, classes).
        batches: Batches with ``labels`` (B,).

    Raises:
        InputError: A batch has no labels.
    """
    right, count = 0, 0
    device = device_of(model)
    with torch.no_grad():
        for batch in batches:
            moved = batch.to(device)
            if moved.labels is None:
                raise InputError("data", "a batch has no labels", "give labelled data")
            right += int(torch.eq(main_output(call(model, moved)).argmax(-1), moved.labels).sum())
            count += batch.size
    return right / max(count, 1)
