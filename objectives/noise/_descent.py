"""Minimum of a smooth function in a box from several starts at once: projected L-BFGS, every start with its own steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Points (N, P) -> values (N,) and gradients (N, P).
ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

_MEMORY = 8
# Sufficient decrease (Armijo), and the shrinking of a step that failed it.
_DECREASE = 1e-4
_SHRINK = 0.25
# Pairs with less curvature than this share of their length would spoil the estimate.
_CURVATURE = 1e-10


def descend(
    function: ValueAndGradient, start: Tensor, low: Tensor, high: Tensor, *, steps: int, reach: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Follow projected quasi-Newton steps; one evaluation of all starts per step.

    Args:
        function: What to minimise; values must be finite at ``start``, elsewhere a non-finite value is a failed step.
        start: (N, P) points within the box.
        low: (P,) smallest coordinates.
        high: (P,) largest coordinates.
        steps: Evaluations at most, beside that of the start.
        reach: Largest change of a coordinate in the first step, while nothing is known of the curvature.
        tolerance: Stop when the last successful step of every start lowered its value by less than this.

    Returns:
        (N, P) points and (N,) their values, none above that of its start.
    """
    point = start
    value, gradient = function(point)
    pairs: list[_Pair] = []
    size = torch.zeros_like(gradient[:, :1])
    direction = _direction(point, gradient, low, high, pairs, size, reach)
    length = torch.ones_like(size)
    settled = torch.zeros_like(value, dtype=torch.bool)
    steep = settled
    for _ in range(steps):
        trial = torch.clamp(point + length * direction, low, high)
        trial_value, trial_gradient = function(trial)
        move, change = trial - point, trial_gradient - gradient
        expected = (gradient * move).sum(dim=1)
        fall = value - trial_value
        better = (fall >= -_DECREASE * expected) & ~settled
        # Cut off at the box, a quasi-Newton step may lead nowhere; only where the steepest leads nowhere either is a minimum.
        lost = ~better & (expected > -tolerance)
        settled = settled | (better & (fall < tolerance)) | (lost & steep)
        steep = torch.where(lost, True, steep & ~better)
        took = better.unsqueeze(1)
        point, gradient = torch.where(took, trial, point), torch.where(took, trial_gradient, gradient)
        value = torch.where(better, trial_value, value)
        if bool(settled.all()):
            break
        product = (move * change).sum(dim=1, keepdim=True)
        useful = took & (product > _CURVATURE * move.square().sum(dim=1, keepdim=True))
        change = torch.where(useful, change, 0.0)
        if bool(useful.any()):
            pairs.append(_Pair(move, change, torch.where(useful, 1.0 / product, 0.0)))
            del pairs[:-_MEMORY]
        size = torch.where(useful, product / change.square().sum(dim=1, keepdim=True), size)
        direction = torch.where(took, _direction(point, gradient, low, high, pairs, size, reach), direction)
        direction = torch.where(lost.unsqueeze(1), _steepest(point, gradient, low, high, reach), direction)
        length = torch.where(took | lost.unsqueeze(1), 1.0, length * _SHRINK)
    return point, value


@dataclass(frozen=True, eq=False)
class _Pair:
    """A step of every start: (N, P) change of point and gradient, (N, 1) inverse of their product; 0 where it tells nothing."""

    move: Tensor
    change: Tensor
    inverse: Tensor


def _direction(
    point: Tensor, gradient: Tensor, low: Tensor, high: Tensor, pairs: list[_Pair], size: Tensor, reach: float
) -> Tensor:
    """Descent directions (N, P) that leave coordinates alone which the gradient presses against their bound.

    ``size`` (N, 1) is the inverse curvature along the last useful pair; 0: there is none.
    """
    free = _free(point, gradient, low, high)
    steepest = gradient * free
    result, factors = steepest, []
    for pair in reversed(pairs):
        factor = pair.inverse * (pair.move * result).sum(dim=1, keepdim=True)
        factors.append(factor)
        result = result - factor * pair.change
    result = result * size
    for pair, factor in zip(pairs, reversed(factors), strict=True):
        result = result + (factor - pair.inverse * (pair.change * result).sum(dim=1, keepdim=True)) * pair.move
    result = result * free
    blind = (size == 0) | ((result * steepest).sum(dim=1, keepdim=True) <= 0)
    return torch.where(blind, _steepest(point, gradient, low, high, reach), -result)


def _steepest(point: Tensor, gradient: Tensor, low: Tensor, high: Tensor, reach: float) -> Tensor:
    """Down the gradient (N, P), the largest coordinate by ``reach``."""
    down = gradient * _free(point, gradient, low, high)
    return -down * (reach / down.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(down.dtype).tiny))


def _free(point: Tensor, gradient: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Coordinates (N, P) bool that the gradient does not press against their bound."""
    return ~(((point <= low) & (gradient > 0)) | ((point >= high) & (gradient < 0)))
