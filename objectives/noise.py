"""The rounding-noise model: a site's loss under given scales, without a GEMM, differentiable in the scales.

Rounding is modelled as independent uniform noise of variance step^2 / 12 on the entries it can disturb:

    loss(s) * ||X W^T||^2 ~ sum_j s_j^2 ||W_:j||^2 * c(sum_t dx_t^2/12, ||X_:j||^2 / s_j^2)
                          + sum_j ||X_:j||^2 / s_j^2 * c(sum_o dw_o^2/12, s_j^2 ||W_:j||^2)
    dx_t = max_j |X_tj|/s_j / qmax (or one dx for the tensor),  dw_o = max_j |W_oj| s_j / qmax (or per operator, per group)

Three corrections bring it from tens of percent to a few (measured on synthetic outlier layers, int8 and int4): exact zeros and
the entry that sets its own row's step round without error, and ``c(n, e) = n e / sqrt(n^2 + e^2)`` caps the noise of a channel
by its energy, because a channel well below one step rounds to zero. fp8 adds noise in proportion to the value, which no scale
can change; its uniform noise is that of its subnormal numbers.

The model proposes; :class:`~alphasmith.objectives.site_objective.SiteObjective` judges. Source: claim A-2, formulas fA1 to fA5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.rounding import measure
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.site_data import SiteData
from alphasmith.objectives.site_objective import check_site_data, subset_rows
from alphasmith.objectives.smoothing import SCALE_MAX, SCALE_MIN, expand_alphas, smoothing_scales, tie_index


class NoiseModel:
    """Predicts the exact loss of a site to a few percent, with gradients.

    Memory and time per call are bounded by ``max_rows`` rows of X and of W, whatever their size.

    Args:
        data: Rows, weights and statistics of the site.
        scheme: Number formats and granularities.
        max_rows: Rows of the largest part, and output rows, that steps are taken from.

    Raises:
        InputError: Shapes within ``data`` contradict each other, or ``max_rows`` is below 1.
        NonFiniteError: ``data`` or its float output holds NaN or infinity.
    """

    def __init__(self, data: SiteData, scheme: Scheme, *, max_rows: int = 512) -> None:
        check_site_data(data)
        if max_rows < 1:
            raise InputError("max_rows", f"{max_rows} is below 1", "use 512")
        self.data = data
        self.scheme = scheme
        total = max(part.x.shape[0] for part in data.parts)
        size = min(total, max_rows)
        rows = [subset_rows(size, total, part.x.shape[0]) for part in data.parts]
        with torch.no_grad():
            measured = [
                measure(part, scheme, data.activation_absmax, count, max_rows)
                for part, count in zip(data.parts, rows, strict=True)
            ]
        self._roundings = [rounding for part in measured for rounding in part[0]]
        self._energy = sum(part[1] for part in measured)
        if not math.isfinite(self._energy):
            raise NonFiniteError(f"site {data.name}: the float output has energy {self._energy}")

    def loss(self, scales: Tensor) -> Tensor:
        """Predicted relative squared error, () float64; differentiable in ``scales``.

        Args:
            scales: (C,) positive scales.

        Raises:
            InputError: ``scales`` is not (C,) and positive.
            NonFiniteError: A scale or the prediction is NaN or infinite.
        """
        channels = self.data.activation_absmax.shape[0]
        if tuple(scales.shape) != (channels,) or bool((scales.detach() <= 0).any()):
            raise InputError(
                "scales", f"{tuple(scales.shape)} are not {channels} positive numbers", "use smoothing_scales"
            )
        return _finite(self._loss(scales.to(self.data.activation_absmax.device, torch.float64)))

    def optimise_alphas(self, labels: Tensor, low: Tensor, high: Tensor, start: Tensor, steps: int = 100) -> Tensor:
        """Alphas within their ranges that minimise the model: projected Adam on log loss, best iterate kept.

        Args:
            labels: (C,) int64 group of each channel.
            low: (K,) smallest alphas.
            high: (K,) largest alphas, not below ``low``.
            start: (K,) first alphas, clamped into the ranges.
            steps: Gradient steps, at least 1.

        Returns:
            (K,) float64 alphas; their predicted loss is at most that of the start.

        Raises:
            InputError: Shapes differ, a range is empty, or ``steps`` is below 1.
            NonFiniteError: A value is NaN or infinite.
        """
        device = self.data.activation_absmax.device
        lowest, highest, first = (bound.detach().to(device, torch.float64) for bound in (low, high, start))
        if first.dim() != 1 or not first.shape == lowest.shape == highest.shape:
            raise InputError("start", "has another shape than its bounds", "give low, high and start of shape (K,)")
        if not bool(torch.isfinite(torch.cat((lowest, highest, first))).all()):
            raise NonFiniteError("an alpha or its range holds NaN or infinity")
        if bool((lowest > highest).any()):
            raise InputError("low", "exceeds high", "give each group a range with low <= high")

        def loss(alphas: Tensor) -> Tensor:
            strength = expand_alphas(alphas, labels)
            statistics = (self.data.activation_statistic, self.data.weight_absmax)
            return self._loss(smoothing_scales(*statistics, strength, self.data.ties).to(torch.float64))

        def project(alphas: Tensor) -> Tensor:
            return torch.minimum(torch.maximum(alphas, lowest), highest)

        return _descend(loss, project, project(first), steps, rate=0.05)

    def limit_scales(self, start_scales: Tensor, steps: int = 200) -> Tensor:
        """Scales free of any alpha that minimise the model: the per-channel limit of a site.

        Adam on log loss over the logarithm of every scale, best iterate kept.

        Args:
            start_scales: (C,) positive scales; of tied channels the geometric mean is taken.
            steps: Gradient steps, at least 1.

        Returns:
            (C,) float32 scales, equal within ties; their predicted loss is at most that of the (tied) start.

        Raises:
            InputError: ``start_scales`` is not (C,) and positive, or ``steps`` is below 1.
            NonFiniteError: A scale is NaN or infinite.
        """
        self.loss(start_scales)
        index = tie_index(self.data.ties, start_scales.shape[0])
        members = torch.bincount(index).to(torch.float64)
        logs = start_scales.detach().to(index.device, torch.float64).log()
        start = torch.zeros_like(members).index_add_(0, index, logs) / members

        def loss(log_scales: Tensor) -> Tensor:
            return self._loss(log_scales[index].exp())

        def project(log_scales: Tensor) -> Tensor:
            return log_scales.clamp(math.log(SCALE_MIN), math.log(SCALE_MAX))

        best = _descend(loss, project, project(start), steps, rate=0.1)
        return best[index].exp().to(torch.float32)

    def _loss(self, scales: Tensor) -> Tensor:
        noise = scales.new_zeros(())
        for rounding in self._roundings:
            noise = noise + rounding.variance(scales if rounding.grows else 1.0 / scales)
        # Without output there is nothing to be relative to; a dead site then has loss 0, as the exact objective says.
        return noise / (self._energy or 1.0)


def _descend(
    loss: Callable[[Tensor], Tensor], project: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float
) -> Tensor:
    """Projected Adam on log loss with a cosine rate; the iterate of least loss, the start included."""
    if steps < 1:
        raise InputError("steps", f"{steps} is below 1", "use 100 or more")
    point = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=rate)
    best, least = start, math.inf
    for step in range(steps + 1):
        with torch.enable_grad():
            value = _finite(loss(point))
        if float(value.detach()) < least:
            best, least = point.detach().clone(), float(value.detach())
        if step == steps or least == 0.0:
            break
        # The logarithm makes the rate independent of how far the loss has fallen.
        (point.grad,) = torch.autograd.grad(value.log(), [point])
        for group in optimiser.param_groups:
            group["lr"] = rate * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        optimiser.step()
        with torch.no_grad():
            point.copy_(project(point))
    return best


def _finite(loss: Tensor) -> Tensor:
    if not bool(torch.isfinite(loss.detach())):
        raise NonFiniteError(f"the predicted loss is {float(loss.detach())}")
    return loss
