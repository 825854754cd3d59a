"""Sparsity terms on the scales of normalizations. Source: claim B-4, formulas fB1 to fB3."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.sparsity.targets import SparsityTargets
from alphasmith.objectives.literals import SparsityKind


@dataclass(frozen=True, kw_only=True)
class SparsitySettings:
    """How strongly scales are pushed to zero.

    Attributes:
        kind: ``l1``: sum of absolute values. ``hoyer``: of every normalization its sum over its root sum of squares, which sparse scales
            of any size make small. ``l2sq``: sum of squares, which makes scales small but not zero; for comparison.
        encoder: lambda of the first term, 0 or more; 0 leaves it out.
        recurrent: lambda of the second.
    """

    kind: SparsityKind = "l1"
    encoder: float = 1e-4
    recurrent: float = 1e-4


@dataclass(frozen=True, eq=False, kw_only=True)
class SparsityTerms:
    """Both terms, to be added to a loss (fB3).

    Attributes:
        first: (), of the encoder layers.
        second: (), of the recurrent layers.
    """

    first: Tensor
    second: Tensor

    @property
    def total(self) -> Tensor:
        """() sum of both."""
        return self.first + self.second


def sparsity_terms(model: nn.Module, targets: SparsityTargets, settings: SparsitySettings) -> SparsityTerms:
    """Both terms with gradients to the scales. Source: formulas fB1 to fB3.

    Args:
        model: The model that ``targets`` were found in, or a copy of it in any state of its training.
        targets: What the terms are put on.
        settings: Kind and strengths.

    Raises:
        InputError: A setting is out of range, or the model has no such parameter.
    """
    if settings.kind not in _KINDS:
        raise InputError("reg.kind", f"{settings.kind!r} is unknown", f"use one of {', '.join(get_args(SparsityKind))}")
    for field, value in (("reg.encoder", settings.encoder), ("reg.recurrent", settings.recurrent)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(field, f"{value} is no strength", "use 0 or a positive number such as 1e-4")
    first, second = (
        _sum(_scales(model, names), _KINDS[settings.kind], strength, model)
        for names, strength in ((targets.encoder, settings.encoder), (targets.recurrent, settings.recurrent))
    )
    return SparsityTerms(first=first, second=second)


def _scales(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in named:
            raise InputError(name, "is no parameter of the model", "find the targets of this model")
    return [named[name] for name in names]


def _sum(scales: Sequence[Tensor], kind: Callable[[Tensor], Tensor], strength: float, model: nn.Module) -> Tensor:
    if not scales:
        return torch.zeros((), device=next((p.device for p in model.parameters()), None))
    return strength * torch.stack([kind(gamma) for gamma in scales]).sum()


def _l1(gamma: Tensor) -> Tensor:
    return gamma.abs().sum()


def _hoyer(gamma: Tensor) -> Tensor:
    # Divided by the largest first: the squares of tiny scales would vanish, and scales of zeros have no ratio.
    unit = gamma / gamma.detach().abs().max().clamp_min(torch.finfo(gamma.dtype).tiny)
    return unit.abs().sum() / unit.square().sum().clamp_min(torch.finfo(gamma.dtype).tiny).sqrt()


def _squares(gamma: Tensor) -> Tensor:
    return gamma.square().sum()


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {"l1": _l1, "hoyer": _hoyer, "l2sq": _squares}
