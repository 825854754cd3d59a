"""Gradients of random projections of a model's output at the outputs of its operators. Formula fA9."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.capture import evaluating
from alphasmith.objectives.judge.losses import squared_sum
from alphasmith.objectives.media.batch import CALL_ERRORS, Batch, call

Operators = Mapping[str, Mapping[str, nn.Module]]
"""Site -> operator -> its quantized form, as ``CandidateModel.alone`` makes them."""
Handler = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]
"""What is done at an operator's call: site, quantized operator, arguments, keyword arguments, output -> output."""


@contextmanager
def hooked(model: nn.Module, operators: Operators, handler: Handler) -> Iterator[None]:
    """Let ``handler`` see, and exchange, the output of every call of these operators of the float model."""

    def hook_of(site: str, quantized: nn.Module) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            return handler(site, quantized, args, kwargs, output) if isinstance(output, Tensor) else None

        return hook

    with ExitStack() as stack:
        for site, of_site in operators.items():
            for name, quantized in of_site.items():
                module = model.get_submodule(name)
                handle = module.register_forward_hook(hook_of(site, quantized), with_kwargs=True)
                stack.callback(handle.remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient of any parameter: neither computed nor are the inputs kept that it would need."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def watched(output: Tensor) -> Tensor:
    """A tensor of the same values that gradients reach, whether or not they reach ``output``, and that may be written to."""
    return reachable(output).clone()


def reachable(output: Tensor) -> Tensor:
    """``output`` itself where gradients reach it, else a tensor that shares its memory and that they reach."""
    return output if output.requires_grad else output.detach().requires_grad_()


def error_of(quantized: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """What quantizing an operator changes at a call, at least in float32.

    Args:
        quantized: Its quantized form.
        args: Of the call.
        kwargs: Of the call.
        output: Of the float operator.
    """
    with torch.no_grad():
        dtype = torch.promote_types(output.dtype, torch.float32)
        error: Tensor = quantized(*args, **kwargs).to(dtype) - output.detach().to(dtype)
    return error


def direction(rows: Tensor, loss: Literal["mse", "kl"], generator: torch.Generator) -> Tensor:
    """One random direction r of the output, such that ``E (r . d)^2`` is what a small difference d adds to the loss's sum.

    Args:
        rows: (..., O) float output, real positions only.
        loss: ``mse``: sum of d^2; ``kl``: ``1/2 d^T (diag p - p p^T) d`` with p = softmax(rows).
        generator: On the CPU.
    """
    signs = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8).to(rows.device)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    x = signs.to(dtype).mul_(2).sub_(1)
    if loss == "mse":
        return x.to(rows.dtype)
    p = rows.to(dtype).softmax(-1)
    root = p.sqrt()
    return ((root * x - p * (root * x).sum(-1, keepdim=True)) / math.sqrt(2)).to(rows.dtype)


def weight_of(rows: Tensor, loss: Literal["mse", "kl"]) -> float:
    """What these rows add to the divisor of the loss: their energy (``mse``) or their number (``kl``)."""
    return squared_sum(rows) if loss == "mse" else rows.numel() / max(1, rows.shape[-1] if rows.dim() else 1)


def single_samples(model: nn.Module, batches: Sequence[Batch], most: int) -> list[Batch]:
    """The first samples one by one, those without a real position left out; whole batches where the model takes no single one."""
    first = batches[0]
    if first.size > 1:
        try:
            with torch.no_grad(), evaluating(model):
                call(model, first.narrow(0, 1))
        except CALL_ERRORS:
            return list(batches[: max(1, most // first.size)])
    found: list[Batch] = []
    for batch in batches:
        for index in range(min(batch.size, most - len(found))):
            sample = batch.narrow(index, index + 1)
            if sample.mask is None or bool(sample.mask.any()):
                found.append(sample)
    return found
