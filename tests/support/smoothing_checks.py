"""Smooth a model and measure whether its outputs changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from tests.support.architecture_records import DoubleArithmetic

#: Largest relative difference of outputs, all in float64. Rounding errors are about 1e-16 per operation; scales between
#: 0.05 and 20 on two sides of every operator raise them by at most 400, so 1e-10 leaves room for depth and nothing else.
TOLERANCE = 1e-10


def floating(output: Any) -> tuple[torch.Tensor, ...]:
    """All floating tensors of a model's output, in order; caches are state, not output."""
    if isinstance(output, torch.Tensor):
        return (output,) if output.is_floating_point() else ()
    if isinstance(output, Mapping):
        return floating(tuple(output.values()))
    if isinstance(output, (tuple, list)):
        return tuple(tensor for item in output for tensor in floating(item))
    return ()


def evaluate(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
    """The main output, then every floating output."""
    with torch.no_grad(), DoubleArithmetic():
        output = call(model, batch)
    return (main_output(output), *floating(output))


def difference(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Largest relative difference over outputs; infinite when one is not finite."""
    errors = [
        ((a - e).abs().max() / e.abs().max()).item() if a.isfinite().all() else math.inf
        for a, e in zip(actual, expected, strict=True)
    ]
    return max(errors)


def draw(site: Site, seed: int) -> Smoothing:
    """Scales, log-uniform in [0.05, 20], and a standard normal shift where it folds; one value per tie, float64."""
    generator = torch.Generator().manual_seed(seed)
    _, tie = torch.unique(site.ties, return_inverse=True)
    span = math.log(400.0)
    free = torch.rand(int(tie.max()) + 1, generator=generator, dtype=torch.float64)
    shift = torch.randn(int(tie.max()) + 1, generator=generator, dtype=torch.float64)
    scales = torch.exp(math.log(0.05) + span * free)
    return Smoothing(scales=scales[tie], shift=shift[tie] if site.shift_edits else None)


def multiply(model: nn.Module, site: Site, scales: torch.Tensor) -> None:
    """Divide the input of every operator of an explicit site by its scales, as a quantizer of that input does."""
    for operator in site.operators:
        module = model.get_submodule(operator.name)
        trailing = len(operator.kernel)
        divisor = scales.reshape(-1, *(1 for _ in range(trailing)))

        def divide(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], divisor: torch.Tensor = divisor
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (args[0] / divisor, *args[1:]), kwargs
            (name, value), *rest = kwargs.items()
            return (), {name: value / divisor, **dict(rest)}

        module.register_forward_pre_hook(divide, with_kwargs=True)


def apply(model: nn.Module, site: Site, smoothing: Smoothing) -> None:
    """Smooth one site of a private copy in whichever way its mode says."""
    fold(model, site, smoothing)
    if site.mode == "explicit":
        multiply(model, site, smoothing.scales)
