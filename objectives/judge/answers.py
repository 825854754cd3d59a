"""What a model answers: every floating tensor of its output on real positions, how far two answers are apart, what they carry.

Losses and metrics see the main output only; a proof of equivalence has to see all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.losses import squared_sum
from alphasmith.objectives.judge.model_objective import real_rows
from alphasmith.objectives.media.batch import Batch, call, data_errors, floating_outputs, main_name
from alphasmith.objectives.media.batches import data_digest

#: Dimensions of logits of tokens: samples, places, vocabulary.
_TOKEN_LOGITS = 3


def answer(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Every floating tensor that the model returns, by name, without padded positions.

    Args:
        model: In eval mode.
        batch: On the model's device.
    """
    with torch.no_grad():
        return {name: real_rows(tensor, batch) for name, tensor in floating_outputs(call(model, batch))}


def loss_of_answers(model: nn.Module, batch: Batch) -> Literal["mse", "kl"]:
    """The loss at the output that ranks candidates as a task does: ``kl`` of logits for every token, ``mse`` of anything else.

    What is added to the logits of all tokens of a vocabulary alike changes no probability, and is most of their squared error
    (docs/design.md).

    Args:
        model: In eval mode.
        batch: On the model's device.
    """
    with torch.no_grad():
        outputs = dict(floating_outputs(call(model, batch)))
    name = main_name(outputs)
    return "kl" if name == "logits" and outputs[name].dim() >= _TOKEN_LOGITS else "mse"


def distance(output: Tensor, reference: Tensor) -> float:
    """``||y' - y|| / ||y||``: infinite where the shapes differ, or where ``y`` is zero and ``y'`` is not.

    Elements that are not finite in ``y`` (a mask of minus infinity, say) must be the same in ``y'``, and those that are
    must be finite there.
    """
    if output.shape != reference.shape:
        return math.inf
    finite = torch.isfinite(reference)
    if not bool(finite.all()):
        if not torch.equal(output[~finite].nan_to_num(), reference[~finite].nan_to_num()):
            return math.inf
        output, reference = output[finite], reference[finite]
    if not bool(torch.isfinite(output).all()):
        return math.inf
    error = squared_sum(output.to(torch.float64) - reference.to(torch.float64))
    energy = squared_sum(reference)
    if error == 0.0:
        return 0.0
    return math.sqrt(error / energy) if energy > 0.0 else math.inf


def farthest(answers: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest :func:`distance` over all tensors of two answers, and the name of the tensor."""
    if answers.keys() != references.keys():
        return math.inf, next(iter(answers.keys() ^ references.keys()))
    distances = {name: distance(answers[name], reference) for name, reference in references.items()}
    name = max(distances, key=lambda n: distances[n])
    return distances[name], name


def check_repeatable(model: nn.Module, batches: Sequence[Batch], tolerance: float) -> None:
    """Refuse a model that answers otherwise when it is asked the same twice: nothing could be proven or compared.

    Args:
        model: In eval mode.
        batches: On the model's device; each is run twice.
        tolerance: Largest relative difference that counts as the same, for kernels whose order of additions varies.

    Raises:
        InputError: It does, or it cannot be called with a batch.
    """
    for batch in batches:
        with data_errors():
            first = {name: tensor.clone() for name, tensor in answer(model, batch).items()}
            difference, name = farthest(answer(model, batch), first)
        if difference > tolerance:
            by = (
                f"by {difference:.2g}, relative"
                if math.isfinite(difference)
                else "in shape or by more than can be measured"
            )
            raise InputError(
                "model",
                f"gives two answers to one batch in eval mode ({name} differs {by}), so it can be compared with nothing",
                "look for dropout without training=self.training, sampling, or state that one call leaves for the next",
            )


def silent_outputs(model: nn.Module, batches: Sequence[Batch]) -> tuple[str, ...]:
    """What a reader should know of outputs that carry nothing of the single samples: one note each.

    Args:
        model: In eval mode.
        batches: Batches of different data, on the model's device.

    Raises:
        InputError: The output that losses are computed from is the same whatever the data: every candidate's loss would be 0.
    """
    answers = [answer(model, batch) for batch in batches]
    outputs = answers[0]
    constant = {name for name in outputs if _is_constant([a[name] for a in answers if name in a])}
    main = main_name(outputs)
    if main in constant and len({data_digest([batch]) for batch in batches}) > 1:
        others = sorted((n for n in outputs if n not in constant), key=lambda n: outputs[n].dim() == 0)
        remedy = f"return {others[0]} first, or name it logits" if others else "return what depends on the input"
        raise InputError(
            "model", f"answers all batches alike in {main}, the output that losses are computed from", remedy
        )
    notes = [f"the output {name} is a constant: it carries nothing" for name in outputs if name in constant - {main}]
    for name, tensor in outputs.items():
        if tensor.dim() == 0 and name not in constant:
            which = "and no loss sees it" if name != main else "so losses are computed from one number a batch"
            notes.append(f"the output {name} is a single number, which says nothing of single samples, {which}")
    return tuple(notes)


def _is_constant(values: Sequence[Tensor]) -> bool:
    """Whether a tensor is the same on all batches, whatever their sizes, in every row."""
    rows = [value.reshape(value.shape[0], -1) if value.dim() else value.reshape(1, 1) for value in values]
    first = rows[0][:1]
    return all(row.shape[1:] == first.shape[1:] and bool((row == first).all()) for row in rows)
