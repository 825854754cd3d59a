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
        if scale.dim() == 0 and scale.device.type == "cpu":
            # One pass each instead of four: a hard tanh has the gradient of a clipped identity.
            step = float(scale)
            edges = (low * step, high * step)
            passed = torch.ops.aten.hardtanh_backward(grad, x, *edges)
            inner = None if out is None else torch.ops.aten.hardtanh_backward(x, x, *edges)
        else:
            inside = (x >= low * scale) & (x <= high * scale)
            passed = grad * inside
            inner = None if out is None else x * inside
        if out is None or inner is None:
            return passed, None, None
        if scale.dim() == 0:
            change = torch.dot(grad.reshape(-1), torch.sub(out, inner).reshape(-1))
        else:
            change = torch.sub(out, inner).mul_(grad).sum_to_size(scale.shape)
        # LSQ: the gradient of one step size is the sum of as many as share it.
        shared = x.numel() // max(scale.numel(), 1)
        return passed, change / scale / (shared * QMAX[ctx.fmt]) ** 0.5, None


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


def _bounds(fmt: WeightFormat | ActivationFormat) -> tuple[float, float]:
    """What is rounded to a code of the range, in codes."""
    qmax = QMAX[fmt]
    return (-qmax, qmax) if fmt == "fp8" else (-qmax - 1.5, qmax + 0.5)
