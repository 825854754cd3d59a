"""Losses between two outputs on identical data: formula fA5 and its relative and divergence forms.

Sums are accumulated in float64. A loss is a finite number or an error, never a sentinel. Source: claims A-2, A-4, formula fA5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError

# Elements turned into float64 at a time: bounds the temporaries of vocabulary-sized logits to some tens of MiB.
_CHUNK = 1 << 20


def divergences(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """``KL(softmax(ref_logits) || softmax(logits))`` of every row in nats. Source: formula fA5, on probabilities.

    Args:
        logits: (..., V) of the quantized model.
        ref_logits: (..., V) of the float model.

    Returns:
        (...) float64; rounding can leave a few 1e-17 below zero.

    Raises:
        InputError: Shapes differ or are empty.
        NonFiniteError: A logit is NaN or plus infinity, or a divergence is infinite.
    """
    _check_pair(logits, ref_logits)
    if logits.dim() < 1:
        raise InputError("logits", "is a single number", "give logits (..., classes)")
    classes = logits.shape[-1]
    step = max(1, _CHUNK // classes)
    pairs = (torch.split(values.reshape(-1, classes), step) for values in (logits, ref_logits))
    rows = torch.cat([_divergence(part, reference) for part, reference in zip(*pairs, strict=True)])
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError("the divergence of a row is NaN or infinite")
    return rows.reshape(logits.shape[:-1])


def _divergence(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_q, log_p = (values.to(torch.float64).log_softmax(-1) for values in (logits, ref_logits))
    probability = log_p.exp()
    # p * (log p - log q) tends to 0 with p; written out, it would be 0 * NaN for forbidden classes.
    return torch.where(probability == 0, 0.0, probability * (log_p - log_q)).sum(-1)


def squared_sum(values: Tensor) -> float:
    """Sum of squares, accumulated in float64 without a float64 copy."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2 if values.numel() else 0.0


def relative_loss(error: float, energy: float) -> float:
    """``error / energy`` of two sums of squares; 0 when both are 0.

    Raises:
        NonFiniteError: A sum is not finite, or ``energy`` is 0 and ``error`` is not.
    """
    if _finite(error, "squared error") == 0.0:
        return 0.0
    if _finite(energy, "reference energy") == 0.0:
        raise NonFiniteError("the reference output is all zero, so a relative error against it is infinite")
    return _finite(error / energy, "relative error")


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise NonFiniteError(f"the {what} is {value}")
    return value


def _check_pair(out: Tensor, ref: Tensor) -> None:
    if out.shape != ref.shape or out.numel() == 0:
        raise InputError(
            "out", f"shape {tuple(out.shape)} against reference {tuple(ref.shape)}", "compare equal, non-empty shapes"
        )
