"""Quantizers that gradients pass: straight-through estimator (formula fA12) and learned step sizes (formula fA13).

torch's own fused fake quantization was tried first: on CPUs its kernel is not vectorized, and eight times slower than the
four passes over memory written here (``benchmarks/training.py`` measures the whole step). What is computed forward is what
the integer operators compute, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alphasmith.objectives.quantization.quantizers import code_scale, round_codes_
from alphasmith.objectives.quantization.scheme import QMAX, ActivationFormat, WeightFormat


def rounded(x: Tensor, scale: Tensor, fmt: WeightFormat | ActivationFormat) -> Tensor:
    """Code times scale, with gradients to ``x`` (straight through, none beyond the range) and to ``scale`` (LSQ).

    Args:
        x: Any shape, float32 or float64.
        scale: Positive, broadcastable to ``x``.
        fmt: Number format, not ``none``.
    """
    result: Tensor = _Rounded.apply(x, scale, fmt)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def rounded_by_row(x: Tensor, dims: tuple[int, ...], fmt: ActivationFormat) -> Tensor:
    """Code times scale with a scale of its own for every row; gradients pass as they are, since nothing is clipped.

    Args:
        x: Any shape, float32 or float64.
        dims: Dimensions that share a scale.
        fmt: Number format, not ``none``.
    """
    result: Tensor = _RoundedByRow.apply(x, dims, fmt)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fmt: WeightFormat | ActivationFormat) -> Tensor:
        out = round_codes_(x / scale, fmt).mul_(scale)
        ctx.fmt = fmt
        ctx.save_for_backward(x, scale, out if ctx.needs_input_grad[1] else None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, scale, out = ctx.saved_tensors
        low, high = _bounds(ctx.fmt)
        # LSQ: the gradient of one step size is the sum of as many as share it.
        share = (x.numel() / max(scale.numel(), 1) * QMAX[ctx.fmt]) ** 0.5
        if scale.dim() == 0 and scale.device.type == "cpu":
            # One pass each instead of four: a hard tanh has the gradient of a clipped identity.
            step = float(scale)
            passed = torch.ops.aten.hardtanh_backward(grad, x, low * step, high * step)
            if out is None:
                return passed, None, None
            # sum dL/dy (y - x inside): as two products no temporary is needed, at the price of a few of its last digits.
            change = _product(grad, out) - _product(passed, x)
            return passed, change.div_(step * share), None
        inside = (x >= low * scale) & (x <= high * scale)
        passed = grad * inside
        if out is None:
            return passed, None, None
        change = torch.sub(out, x * inside).mul_(grad).sum_to_size(scale.shape)
        return passed, change.div_(scale).div_(share), None


class _RoundedByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], fmt: ActivationFormat) -> Tensor:
        # the infinity norm is the largest magnitude without a temporary as large as x
        peak = torch.linalg.vector_norm(x, ord=float("inf"), dim=dims, keepdim=True)
        scale = code_scale(peak.to(torch.float32), fmt)
        return round_codes_(x / scale, fmt).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """() sum of products; convolutions leave tensors with channels last, of which a plain flattening would be a slow copy."""
    if left.is_contiguous() and right.is_contiguous():
        return torch.dot(left.view(-1), right.view(-1))
    order = sorted(range(right.dim()), key=right.stride, reverse=True)
    return torch.dot(left.permute(order).reshape(-1), right.permute(order).reshape(-1))


def _bounds(fmt: WeightFormat | ActivationFormat) -> tuple[float, float]:
    """What is rounded to a code of the range, in codes."""
    qmax = QMAX[fmt]
    return (-qmax, qmax) if fmt == "fp8" else (-qmax - 1.5, qmax + 0.5)
