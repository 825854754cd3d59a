"""Smoothing scales from channel statistics and alphas: formula fA1, its one home.

``s_j = a_j^alpha / w_j^(1 - alpha)``; activations become ``X / s`` (fA2), weights ``W * s`` (fA3), and the product stays.
Larger alpha means larger s only where ``a_j * w_j > 1`` (trap T1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError

#: Bounds of a scale; recorded in every manifest, because an alpha means nothing without them.
SCALE_MIN = 1e-5
SCALE_MAX = 1e5
CLAMP = (SCALE_MIN, SCALE_MAX)

#: What happens to channels the formula is undefined for (trap T7), in words for the manifest.
DEAD_CHANNEL_RULE = "scale 1 where the activation or the weight statistic is 0"


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """Calibrated range of every input channel of a site.

    Attributes:
        low: (C,) smallest value over all calibration data, float32; at most 0 where a convolution pads with zeros.
        high: (C,) largest value.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def symmetric(cls, absmax: Tensor) -> ChannelRange:
        """The range ``[-absmax, absmax]`` of (C,) magnitudes, where no more is known."""
        return cls(-absmax, absmax)

    def peaks(self, shift: Tensor | None = None) -> Tensor:
        """(C,) largest magnitude of every channel after ``shift`` (C,) is subtracted; None: no shift."""
        if shift is None:
            return torch.maximum(self.high, -self.low).clamp_min(0)
        shift = shift.to(self.low.device)
        return torch.maximum(self.high - shift, shift - self.low).clamp_min(0)

    def middle(self, ties: Tensor) -> Tensor:
        """(C,) shift ``z_j = (max + min) / 2`` that centres every channel, one value within a tie (OS+, peerbench.md)."""
        index = tie_index(ties, self.low.shape[0])
        return (tied_extreme(self.low, index, "amin") + tied_extreme(self.high, index, "amax")) / 2

    def to(self, device: torch.device | str) -> ChannelRange:
        """The same range on ``device``."""
        return ChannelRange(self.low.to(device), self.high.to(device))


@dataclass(frozen=True, eq=False, kw_only=True)
class Smoothing:
    """What a candidate does to the input of a site before it is rounded: ``(X - shift) / scales``, in a range of its own.

    The consumers' weights become ``W * scales`` and their biases grow by ``W @ shift``, so the float product stays.

    Attributes:
        scales: (C,) float32, positive, equal within ties.
        shift: (C,) float32, equal within ties, subtracted before the division; None: no shift (claims.md; OS+ in peerbench.md).
        range_factor: Static range of the activation, relative to the largest calibrated magnitude after shift and scaling:
            1 is abs-max, above 1 a margin for data that calibration never showed, below 1 clips (percentile). Without effect
            on ranges taken per token.
    """

    scales: Tensor
    shift: Tensor | None = None
    range_factor: float = 1.0

    def to(self, device: torch.device | str) -> Smoothing:
        """The same on ``device``."""
        shift = None if self.shift is None else self.shift.to(device)
        return Smoothing(scales=self.scales.to(device), shift=shift, range_factor=self.range_factor)


def smoothing_scales(activation: Tensor, weight: Tensor, alpha: float | Tensor, ties: Tensor | None = None) -> Tensor:
    """Scale of every channel; differentiable in ``alpha``. Source: claims A-5, A-11, formula fA1, traps T1 and T7.

    Computed in float64 logarithms, then clamped to ``CLAMP``. Channels whose statistic is 0 follow ``DEAD_CHANNEL_RULE``.

    Args:
        activation: (C,) a_j >= 0, the magnitude of each activation channel.
        weight: (C,) w_j >= 0, the abs-max of each weight column over all consumers.
        alpha: Migration strength, one for all channels or (C,); normally in [0, 1].
        ties: (C,) int64; channels with the same value get the same scale: their statistics are replaced by the largest
            in the tie. None: all free.

    Returns:
        (C,) float32 scales.

    Raises:
        InputError: Shapes differ, a statistic is negative, or ``alpha`` differs within a tie.
        NonFiniteError: A statistic or an alpha is NaN or infinite.
    """
    _check_statistic("activation", activation, activation.shape)
    _check_statistic("weight", weight, activation.shape)
    strength = torch.as_tensor(alpha, device=activation.device).to(torch.float64)
    if strength.dim() and strength.shape != activation.shape:
        raise InputError(
            "alpha", f"has shape {tuple(strength.shape)}", f"give one number or {activation.shape[0]} alphas"
        )
    if not bool(torch.isfinite(strength).all()):
        raise NonFiniteError("alpha holds NaN or infinity")
    if ties is None:
        return _scales(activation, weight, strength)
    index = tie_index(ties, activation.shape[0])
    if strength.dim():
        low, high = (tied_extreme(strength.detach(), index, extreme) for extreme in ("amin", "amax"))
        if not torch.equal(low, high):
            raise InputError("alpha", "differs among tied channels", "put tied channels into one group")
    return _scales(tied_extreme(activation, index, "amax"), tied_extreme(weight, index, "amax"), strength)


@dataclass(frozen=True, eq=False, kw_only=True)
class LogScales:
    """Scales of a site as a function of a candidate's numbers, linear in the logarithm.

    ``log s_j = constant_j + sum_f features[f, j] * theta[f * K + labels[j]]``, so the noise model, which is convex in log s, is
    convex in alphas, betas and offsets as well.

    Attributes:
        labels: (C,) int64 group of each channel, 0..K-1.
        features: (F, C) float64; 0 for dead channels.
        constant: (C,) float64; 0 for dead channels.
        groups: K.
    """

    labels: Tensor
    features: Tensor
    constant: Tensor
    groups: int

    @property
    def parameters(self) -> int:
        """F * K, the length of theta."""
        return self.features.shape[0] * self.groups

    def logs(self, theta: Tensor) -> Tensor:
        """log s (..., C) float64 of theta (..., F * K), clamped to ``CLAMP``; differentiable."""
        spread = theta.unflatten(-1, (-1, self.groups))[..., self.labels]
        logs: Tensor = self.constant + (self.features * spread).sum(dim=-2)
        return logs.clamp(math.log(SCALE_MIN), math.log(SCALE_MAX))

    def scales(self, theta: Tensor) -> Tensor:
        """s (..., C) float32 of theta (..., F * K)."""
        return self.logs(theta).exp().to(torch.float32)


def coefficient_map(
    activation: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ties: Tensor | None = None,
    betas: bool = False,
    offsets: bool = False,
) -> LogScales:
    """Formula fA1 with its two extensions, as a linear map: ``s_j = exp(offset_k) a_j^alpha_k / w_j^beta_k``.

    Without ``betas``, beta_k = 1 - alpha_k (fA1 itself). theta holds K alphas, then K betas if asked for, then K offsets if
    asked for. Dead channels follow ``DEAD_CHANNEL_RULE`` whatever theta is.

    Args:
        activation: (C,) a_j >= 0.
        weight: (C,) w_j >= 0.
        labels: (C,) int64 group of each channel.
        ties: See :func:`smoothing_scales`; tied channels must be in one group.
        betas: Whether beta is a number of its own.
        offsets: Whether every group has a factor of its own, as a natural logarithm.

    Raises:
        InputError: Shapes differ, a statistic is negative, or a tie reaches over two groups.
        NonFiniteError: A statistic is NaN or infinite.
    """
    _check_statistic("activation", activation, activation.shape)
    _check_statistic("weight", weight, activation.shape)
    labels = labels.to(activation.device, torch.int64)
    if labels.shape != activation.shape or int(labels.min()) < 0:
        raise InputError("labels", f"has shape {tuple(labels.shape)}", "give the group of every channel")
    if ties is not None:
        index = tie_index(ties, activation.shape[0])
        low, high = (tied_extreme(labels, index, extreme) for extreme in ("amin", "amax"))
        if not torch.equal(low, high):
            raise InputError("labels", "differ among tied channels", "put tied channels into one group")
        activation, weight = (tied_extreme(v, index, "amax") for v in (activation, weight))
    dead = (activation == 0) | (weight == 0)
    log_a, log_w = (torch.where(dead, 1.0, v).to(torch.float64).log() for v in (activation, weight))
    zero = torch.zeros_like(log_a)
    features = [log_a, -log_w] if betas else [log_a + log_w]
    if offsets:
        features.append(torch.where(dead, zero, zero + 1))
    return LogScales(
        labels=labels,
        features=torch.stack(features),
        constant=zero if betas else -log_w,
        groups=int(labels.max()) + 1,
    )


def group_scales(
    activation: Tensor, weight: Tensor, alphas: Sequence[float] | None, labels: Tensor, *, ties: Tensor | None = None
) -> Tensor:
    """Scales (C,) of one candidate: its alpha of every group through formula fA1, or all ones for identity.

    Args:
        activation: (C,) a_j.
        weight: (C,) w_j.
        alphas: (K,) one per group; None is identity, which no alpha reaches.
        labels: (C,) int64 group of each channel.
        ties: See :func:`smoothing_scales`.

    Raises:
        InputError: As :func:`smoothing_scales` and :func:`expand_alphas`.
    """
    if alphas is None:
        return torch.ones_like(activation)
    labels = labels.to(activation.device)
    per_channel = expand_alphas(torch.tensor(alphas, device=labels.device), labels)
    return smoothing_scales(activation, weight, per_channel, ties=ties)


def expand_alphas(alphas: Tensor, labels: Tensor) -> Tensor:
    """One alpha per channel from one per group.

    Args:
        alphas: (K,) alphas.
        labels: (C,) int64 group of each channel, 0..K-1.

    Returns:
        (C,) alphas, differentiable in ``alphas``.

    Raises:
        InputError: A label has no alpha, or the shapes are not (K,) and (C,).
    """
    if alphas.dim() != 1 or labels.dim() != 1:
        raise InputError(
            "alphas", f"{tuple(alphas.shape)} and labels {tuple(labels.shape)} are not vectors", "flatten them"
        )
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= alphas.shape[0]):
        raise InputError("labels", f"names a group beyond the {alphas.shape[0]} alphas", "give one alpha per group")
    return alphas[labels.to(torch.int64)]


def tie_index(ties: Tensor, channels: int) -> Tensor:
    """Consecutive tie numbers (C,) int64 from arbitrary tie values.

    Raises:
        InputError: ``ties`` is not (C,).
    """
    if tuple(ties.shape) != (channels,):
        raise InputError(
            "ties", f"has shape {tuple(ties.shape)}", f"give one tie value for each of {channels} channels"
        )
    index: Tensor = torch.unique(ties, return_inverse=True)[1]
    return index


def tied_extreme(values: Tensor, index: Tensor, extreme: str) -> Tensor:
    """Replace every value by the largest (``amax``) or smallest (``amin``) of its tie; ``index`` is from :func:`tie_index`."""
    largest = torch.zeros(int(index.max()) + 1, dtype=values.dtype, device=values.device)
    return largest.scatter_reduce(0, index, values, reduce=extreme, include_self=False)[index]


def _scales(activation: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
    dead = (activation == 0) | (weight == 0)
    log_a = torch.where(dead, 1.0, activation).to(torch.float64).log()
    log_w = torch.where(dead, 1.0, weight).to(torch.float64).log()
    scales = (alpha * log_a - (1.0 - alpha) * log_w).exp().clamp(SCALE_MIN, SCALE_MAX).to(torch.float32)
    return torch.where(dead, 1.0, scales)


def _check_statistic(field: str, values: Tensor, shape: torch.Size) -> None:
    if values.dim() != 1 or values.numel() == 0 or values.shape != shape:
        raise InputError(
            field, f"has shape {tuple(values.shape)}", "give one magnitude per channel for both statistics"
        )
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"the {field} statistic holds NaN or infinity")
    if bool((values < 0).any()):
        raise InputError(field, "holds negative magnitudes", "give abs-max, percentile or RMS of each channel")
