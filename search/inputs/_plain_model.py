"""The model that is searched: plain operators in place of what hides its products."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.model_objective import real_rows
from alphasmith.objectives.media.batch import Batch, call, data_errors, main_output, unfused_attention
from alphasmith.objectives.model.plain_operators import Rewriting, needs_rewriting, rewrite
from alphasmith.objectives.model.private_copy import private_copy
from alphasmith.objectives.quantization.stack import Stack, standing_in
from alphasmith.objectives.sites.types import Discovery
from alphasmith.objectives.text import listed

#: Relative difference of the outputs of a model and of the same one rewritten, above which they are not the same.
_TOLERANCE = 1e-4


def plain_model(model: nn.Module, example: Batch, device: torch.device) -> tuple[nn.Module, Rewriting, tuple[str, ...]]:
    """The model as plain operators, on the device.

    Args:
        model: The task's, in evaluation mode.
        example: One sample, on the device.
        device: Where to run.

    Returns:
        The model itself, or a copy where something had to be rewritten; how its tensors relate to those that came in; and what
        people should know.

    Raises:
        InputError: The model cannot be called with the example, returns no floating tensor, or is a bare recurrent layer.
    """
    if not needs_rewriting(model):
        model.to(device)
        float_output(model, example)
        return model, Rewriting(), ()
    with unfused_attention():
        answer = float_output(model.to(device), example)
        model.to("cpu")
        notes: tuple[str, ...] = ()
        for attention in (True, False):
            copied = private_copy(model)  # what is saved keeps the architecture that came in
            rewriting = rewrite(copied, attention=attention)
            if not rewriting.pieces or _answers_alike(copied.to(device), example, answer):
                break
            notes = ("attention modules are left in float: the model reads more of them than their forward",)
    kinds = sorted({baked.kind for baked in rewriting.baked})
    if kinds:
        shown = listed([baked.name for baked in rewriting.baked])
        notes += (f"{listed(kinds)} is baked into plain weights: {shown}",)
    return copied.to(device), rewriting, notes


def with_stacks_that_answer(model: nn.Module, example: Batch, found: Discovery) -> Discovery:
    """What was found, with stacks of matrices taken for such only where the model runs as well on what stands for them.

    Args:
        model: The float model; unchanged afterwards.
        example: One sample, on the model's device.
        found: What discovery found in it.
    """
    names = [o.weight for site in found.sites for o in site.operators if o.stacked]
    if not names:
        return found
    answer = float_output(model, example)
    with standing_in(model, {name: Stack(model.get_parameter(name)) for name in names}):
        alike = _answers_alike(model, example, answer)
    if alike:
        return found
    reason = "several matrices in one tensor, of which the model reads more than products"
    return Discovery(
        sites=tuple(
            replace(site, operators=tuple(replace(o, stacked=0) for o in site.operators)) for site in found.sites
        ),
        weights=tuple(replace(w, reason=reason) if w.name in names else w for w in found.weights),
    )


def _answers_alike(model: nn.Module, example: Batch, answer: Tensor) -> bool:
    """Whether a rewritten model can be called and gives the same answer."""
    try:
        found = float_output(model, example)
    except InputError:
        return False
    error = (found.double() - answer.double()).norm()
    return found.shape == answer.shape and bool(error <= _TOLERANCE * answer.double().norm())


def float_output(model: nn.Module, batch: Batch) -> Tensor:
    """The model's main output on real positions.

    Args:
        model: The float model.
        batch: On the model's device.

    Raises:
        InputError: The model cannot be called with the batch, or returns no floating tensor.
    """
    with torch.no_grad(), data_errors():
        return real_rows(main_output(call(model, batch)), batch)
