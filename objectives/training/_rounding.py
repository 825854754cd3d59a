"""Quantizers that gradients pass: straight-through estimator (formula fA12) and learned step sizes (formula fA13).

torch's own fused fake quantization was tried first: on CPUs its kernel is not vectorized, and eight times slower than the
four passes over memory written here (``benchmarks/training.py`` measures the whole step). What is computed forward is what
the integer operators compute, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alphasmith.objectives.quantization.quantizers import code_grid, code_scale, round_codes_
from alphasmith.objectives.quantization.scheme import QMAX, ActivationFormat, WeightFormat

#: Share of fp8's largest value at which its range ends, so that this value lies within it.
_END = 1 + 2.0**-20


def rounded(
    x: Tensor,
    scale: Tensor,
    fmt: WeightFormat | ActivationFormat,
    *,
    zero: Tensor | None = None,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
) -> Tensor:
    """Code times scale of ``(x - shift) / smooth``, with gradients to ``x`` (straight through, none beyond the range) and ``scale`` (LSQ).

    Args:
        x: Any shape, float32 or float64; codes are those of float32.
        scale: Positive, broadcastable to ``x``.
        fmt: Number format, not ``none``.
        zero: () code that stands for 0, for uint8 and no other format; not trained: a learned scale moves both ends of its range.
        shift: Subtracted first, broadcastable to ``x``, or None; not trained.
        smooth: Divided by then, likewise.
    """
    result: Tensor = _Rounded.apply(x, scale, fmt, zero, shift, smooth)  # type: ignore[no-untyped-call]  # torch leaves it untyped
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
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        fmt: WeightFormat | ActivationFormat,
        zero: Tensor | None,
        shift: Tensor | None,
        smooth: Tensor | None,
    ) -> Tensor:
        # Smoothing belongs to the rounding: as operators of their own its two steps cost a recurrent layer more than they compute.
        moved = x if shift is None else x - shift
        if smooth is not None:
            moved = moved / smooth if shift is None else moved.div_(smooth)
        single = moved.to(torch.float32)
        zero = None if zero is None else zero.to(torch.float32)
        out = round_codes_(single / scale, fmt, zero).mul_(scale)
        ctx.fmt, ctx.bounds = fmt, _bounds(fmt, zero)
        ctx.save_for_backward(single, scale, out if ctx.needs_input_grad[1] else None, smooth)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, scale, out, smooth = ctx.saved_tensors
        grad = grads[0].to(torch.float32)
        low, high = ctx.bounds
        # LSQ: the gradient of one step size is the sum of as many as share it.
        share = (x.numel() / max(scale.numel(), 1) * QMAX[ctx.fmt]) ** 0.5
        change = None
        if scale.dim() == 0 and scale.device.type == "cpu":
            # One pass each instead of four: a hard tanh has the gradient of a clipped identity.
            step = float(scale)
            passed = torch.ops.aten.hardtanh_backward(grad, x, low * step, high * step)
            if out is not None:
                # sum dL/dy (y - x inside): as two products no temporary is needed, at the price of a few of its last digits.
                # Divided as a tensor: the scale of a training that diverges may be 0, and its gradient is then no number.
                change = _product(grad, out).sub_(_product(passed, x)).div_(step * share)
        else:
            passed = torch.ops.aten.hardtanh_backward(grad, x / scale, low, high)
            if out is not None:
                each = torch.mul(grad, out).addcmul_(passed, x, value=-1)
                change = each.sum_to_size(scale.shape).div_(scale).div_(share)
        return passed if smooth is None else passed.div_(smooth), change, None, None, None, None


class _RoundedByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], fmt: ActivationFormat) -> Tensor:
        if fmt == "uint8":
            low, high = (x.amin(dims, keepdim=True), x.amax(dims, keepdim=True))
            scale, zero = code_grid(low.to(torch.float32), high.to(torch.float32), fmt)
            return round_codes_(x / scale, fmt, zero).mul_(scale)
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


def _bounds(fmt: WeightFormat | ActivationFormat, zero: Tensor | None) -> tuple[float, float]:
    """What is rounded to a code of the range, in codes; values at the bounds themselves do not belong to it."""
    qmax = QMAX[fmt]
    if zero is not None:
        return -float(zero) - 0.5, qmax - float(zero) + 0.5
    # The largest value of a block stands at the end of fp8's range, or a last digit beyond it.
    return (-qmax * _END, qmax * _END) if fmt == "fp8" else (-qmax - 1.5, qmax + 0.5)
