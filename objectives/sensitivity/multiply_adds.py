"""Multiply-adds of every site: what a forward call of the model does in its operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.capture import evaluating
from alphasmith.objectives.media.batch import Batch, call
from alphasmith.objectives.sites.types import Operator, Site


def multiply_adds(model: nn.Module, sites: Sequence[Site], batch: Batch) -> dict[str, int]:
    """Multiply-adds that each site's operators do in one forward call, padding included. The model runs once.

    Args:
        model: The float model.
        sites: Its sites; operators without a module of their own count for nothing.
        batch: What it is called with.

    Returns:
        Site -> multiply-adds; 0 where the call does not reach it.
    """
    found = {site.name: 0 for site in sites}

    def counting(site: str, operator: Operator) -> Callable[..., None]:
        weights = operator.in_channels * operator.out_channels * math.prod(operator.kernel) // max(operator.groups, 1)

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # A transposed convolution meets its whole weight at every input position, all others at every output position.
            spread = operator.kind == "conv" and operator.transposed
            met = args[0] if spread and args else output
            if isinstance(met, Tensor):
                found[site] += weights * (met.numel() // (operator.in_channels if spread else operator.out_channels))

        return hook

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for site in sites:
            for operator in site.operators:
                if not operator.raw:
                    handle = model.get_submodule(operator.name).register_forward_hook(counting(site.name, operator))
                    stack.callback(handle.remove)
        call(model, batch)
    return found


def shares_of(work: Mapping[str, int]) -> dict[str, float]:
    """Every site's part of all multiply-adds, 0 to 1.

    Args:
        work: Site -> multiply-adds.
    """
    whole = sum(work.values()) or 1
    return {name: count / whole for name, count in work.items()}
