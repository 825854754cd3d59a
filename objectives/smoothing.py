"""Smoothing scales from channel statistics and alphas: formula fA1, its one home.

``s_j = a_j^alpha / w_j^(1 - alpha)``; activations become ``X / s`` (fA2), weights ``W * s`` (fA3), and the product stays.
Larger alpha means larger s only where ``a_j * w_j > 1`` (trap T1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphasmith.objectives.dead_channels import NeutralScales
from alphasmith.objectives.errors import InputError, NonFiniteError

#: Bounds of a scale s_j, which every stored type holds as a normal number, float16 included; recorded in every manifest, because
#: an alpha means nothing without them. a_j and w_j have none.
SCALE_MIN = 2.0**-14
SCALE_MAX = 2.0**15

#: Factors between two powers of two that are tried where scales are rounded to powers.
_PHASES = 16

#: What happens to channels that the formula is undefined for or says too little of (trap T7), as the manifest states it.
DEAD_CHANNEL_RULE = (
    "geometric mean of the live channels' scales where the activation or the weight statistic is 0; limited there and where "
    "the activation is far below what the producer's row could make, so that no producer row, activation or column becomes "
    "the largest by it; 1 where no channel is live"
)


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """Calibrated range of every input channel of a site.

    Attributes:
        low: (C,) smallest value over all calibration data, float32; at most 0 where a convolution pads with zeros.
        high: (C,) largest value.
    """

    low: Tensor
    high: Tensor

    def peaks(self, shift: Tensor | None = None) -> Tensor:
        """(C,) largest magnitude of every channel after ``shift`` (C,) is subtracted; None: no shift."""
        if shift is None:
            return torch.maximum(self.high, -self.low).clamp_min(0)
        shift = shift.to(self.low.device)
        return torch.maximum(self.high - shift, shift - self.low).clamp_min(0)

    def edges(
        self, scales: Tensor | None = None, shift: Tensor | None = None, factor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """() smallest and () largest value of the whole activation after shift and division, times ``factor``; 0 lies between them.

        Args:
            scales: (C,) what the channels are divided by; None: 1.
            shift: (C,) what is subtracted before that; None: nothing.
            factor: Range relative to the calibrated one.
        """
        low, high = self.low, self.high
        if shift is not None:
            shift = shift.to(low.device)
            low, high = low - shift, high - shift
        if scales is not None:
            scales = scales.to(low.device)
            low, high = low / scales, high / scales
        return low.min().clamp_max(0) * factor, high.max().clamp_min(0) * factor

    def middle(self, ties: Tensor) -> Tensor:
        """(C,) shift ``z_j = (max + min) / 2`` that centres every channel, one value within a tie (arXiv 2304.09145)."""
        index = tie_index(ties, self.low.shape[0])
        return (tied_extreme(self.low, index, "amin") + tied_extreme(self.high, index, "amax")) / 2

    def to(self, device: torch.device | str) -> ChannelRange:
        """The same range on ``device``."""
        return ChannelRange(self.low.to(device), self.high.to(device))


@dataclass(frozen=True, eq=False, kw_only=True)
class Smoothing:
    """What a candidate does to the input of a site before it is rounded: ``(X - shift) / scales``, in its own range.

    The consumers' weights become ``W * scales`` and their biases grow by ``W @ shift``, so the float product stays.

    Attributes:
        scales: (C,) float32, positive, equal within ties.
        shift: (C,) float32, equal within ties, subtracted before the division; None: no shift.
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


def smoothing_scales(
    activation: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    ties: Tensor | None = None,
    *,
    producer: Tensor | None = None,
) -> Tensor:
    """Scale of every channel; differentiable in ``alpha``. Source: claims A-5, A-11, formula fA1, traps T1 and T7.

    Computed in float64 logarithms, then clamped to ``[SCALE_MIN, SCALE_MAX]``. Dead and near-dead channels follow
    ``DEAD_CHANNEL_RULE``.

    Args:
        activation: (C,) a_j >= 0, the magnitude of each activation channel.
        weight: (C,) w_j >= 0, the abs-max of each weight column over all consumers.
        alpha: Migration strength, one for all channels or (C,); normally in [0, 1].
        ties: (C,) int64; channels with the same value get the same scale: their statistics are replaced by the largest
            in the tie. None: all free.
        producer: (C,) p_j >= 0, the abs-max of the producers' rows that the scale divides. None: no weight that is quantized.

    Returns:
        (C,) float32 scales.

    Raises:
        InputError: Shapes differ, a statistic is negative, or ``alpha`` differs within a tie.
        NonFiniteError: A statistic or an alpha is NaN or infinite.
    """
    statistics = _Statistics.of(activation, weight, producer, ties)
    strength = torch.as_tensor(alpha, device=activation.device).to(torch.float64)
    if strength.dim() and strength.shape != activation.shape:
        raise InputError(
            "alpha", f"has shape {tuple(strength.shape)}", f"give one number or {activation.shape[0]} alphas"
        )
    if not bool(torch.isfinite(strength).all()):
        raise NonFiniteError("alpha holds NaN or infinity")
    if ties is not None and strength.dim():
        _refuse_differing("alpha", strength.detach(), tie_index(ties, activation.shape[0]))
    logs = strength * statistics.log_activation - (1.0 - strength) * statistics.log_weight
    return _bounded(logs, statistics.neutral).exp().to(torch.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class LogScales:
    """Scales of a site as a function of a candidate's numbers, linear in the logarithm.

    ``log s_j = constant_j + sum_f features[f, j] * theta[f * K + labels[j]]`` for live channels, so the noise model, which is
    convex in log s, is convex in alphas, betas and offsets as well. Dead channels take the mean of the live ones.

    Attributes:
        labels: (C,) int64 group of each channel, 0..K-1.
        features: (F, C) float64; 0 for dead channels.
        constant: (C,) float64; 0 for dead channels.
        groups: K.
        neutral: Where dead and near-dead channels are put; None: every channel follows the formula.
    """

    labels: Tensor
    features: Tensor
    constant: Tensor
    groups: int
    neutral: NeutralScales | None = None

    @property
    def parameters(self) -> int:
        """F * K, the length of theta."""
        return self.features.shape[0] * self.groups

    def logs(self, theta: Tensor) -> Tensor:
        """log s (..., C) float64 of theta (..., F * K), clamped to ``[SCALE_MIN, SCALE_MAX]``; differentiable."""
        spread = theta.unflatten(-1, (-1, self.groups))[..., self.labels]
        logs: Tensor = self.constant + (self.features * spread).sum(dim=-2)
        return _bounded(logs, self.neutral)

    def scales(self, theta: Tensor) -> Tensor:
        """s (..., C) float32 of theta (..., F * K)."""
        return self.logs(theta).exp().to(torch.float32)

    def to(self, device: torch.device | str) -> LogScales:
        """The same on ``device``."""
        return replace(
            self,
            labels=self.labels.to(device),
            features=self.features.to(device),
            constant=self.constant.to(device),
            neutral=None if self.neutral is None else self.neutral.to(device),
        )


def coefficient_map(
    activation: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ties: Tensor | None = None,
    betas: bool = False,
    offsets: bool = False,
    producer: Tensor | None = None,
) -> LogScales:
    """Formula fA1 with its two extensions, as a linear map: ``s_j = exp(offset_k) u (a_j / u)^alpha_k / (w_j u)^beta_k``.

    Without ``betas``, beta_k = 1 - alpha_k (fA1 itself). The unit u = sqrt(a / w), geometric means over the live channels, cancels
    then; elsewhere it makes scales follow the unit of the activations. theta holds K alphas, then K betas if asked for, then
    K offsets if asked for. Dead and near-dead channels follow ``DEAD_CHANNEL_RULE``.

    Args:
        activation: (C,) a_j >= 0.
        weight: (C,) w_j >= 0.
        labels: (C,) int64 group of each channel.
        ties: See :func:`smoothing_scales`; tied channels must be in one group.
        betas: Whether beta is a number apart from alpha.
        offsets: Whether every group has its own factor, as a natural logarithm.
        producer: See :func:`smoothing_scales`.

    Raises:
        InputError: Shapes differ, a statistic is negative, or a tie reaches over two groups.
        NonFiniteError: A statistic is NaN or infinite.
    """
    statistics = _Statistics.of(activation, weight, producer, ties)
    labels = labels.to(activation.device, torch.int64)
    if labels.shape != activation.shape or int(labels.min()) < 0:
        raise InputError("labels", f"has shape {tuple(labels.shape)}", "give the group of every channel")
    if ties is not None:
        _refuse_differing("labels", labels, tie_index(ties, activation.shape[0]))
    neutral, log_a, log_w = statistics.neutral, statistics.log_activation, statistics.log_weight
    alive = (~neutral.dead).to(torch.float64)
    unit = alive * ((log_a - log_w)[neutral.live].mean() / 2 if bool(neutral.live.any()) else 0.0)
    features = [log_a - unit, -(log_w + unit)] if betas else [log_a + log_w]
    if offsets:
        features.append(alive)
    return LogScales(
        labels=labels,
        features=torch.stack(features),
        constant=unit if betas else -log_w,
        groups=int(labels.max()) + 1,
        neutral=neutral,
    )


def power_of_two_scales(scales: Tensor) -> Tensor:
    """Powers of two near scales: multiplying a float by one, or dividing, is exact, so that folding them is undone to the bit.

    What a site loses hardly depends on a factor that all of its scales share, so the factor is chosen under which they lie nearest to
    powers of two, by the squares of the logarithms.

    Args:
        scales: (C,) positive.

    Returns:
        (C,) float32, equal where the scales are, within ``[SCALE_MIN, SCALE_MAX]``; scales that are powers of two stay.
    """
    logs = scales.to(torch.float64).log2() + torch.arange(_PHASES, device=scales.device).view(-1, 1) / _PHASES
    rounded = logs.round()
    best = rounded[(logs - rounded).square().sum(dim=1).argmin()]
    return torch.exp2(best.clamp(math.log2(SCALE_MIN), math.log2(SCALE_MAX))).to(torch.float32)


def group_scales(
    activation: Tensor,
    weight: Tensor,
    alphas: Sequence[float] | None,
    labels: Tensor,
    *,
    ties: Tensor | None = None,
    producer: Tensor | None = None,
) -> Tensor:
    """Scales (C,) of one candidate: its alpha of every group through formula fA1, or all ones for identity.

    Args:
        activation: (C,) a_j.
        weight: (C,) w_j.
        alphas: (K,) one per group; None is identity, which no alpha reaches.
        labels: (C,) int64 group of each channel.
        ties: See :func:`smoothing_scales`.
        producer: Likewise.

    Raises:
        InputError: As :func:`smoothing_scales` and :func:`expand_alphas`.
    """
    if alphas is None:
        return torch.ones_like(activation)
    labels = labels.to(activation.device)
    per_channel = expand_alphas(torch.tensor(alphas, device=labels.device), labels)
    return smoothing_scales(activation, weight, per_channel, ties=ties, producer=producer)


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


@dataclass(frozen=True, eq=False, kw_only=True)
class _Statistics:
    """(C,) float64 logarithms of what formula fA1 is made of, ties at their largest; 0 for dead channels."""

    log_activation: Tensor
    log_weight: Tensor
    neutral: NeutralScales

    @classmethod
    def of(cls, activation: Tensor, weight: Tensor, producer: Tensor | None, ties: Tensor | None) -> _Statistics:
        _check_statistic("activation", activation, activation.shape)
        _check_statistic("weight", weight, activation.shape)
        if producer is not None:
            _check_statistic("producer", producer, activation.shape)
        if ties is not None:
            index = tie_index(ties, activation.shape[0])
            activation, weight = (tied_extreme(v, index, "amax") for v in (activation, weight))
            producer = None if producer is None else tied_extreme(producer, index.to(producer.device), "amax")
        neutral = NeutralScales.of(activation, weight, producer)
        logs = (torch.where(neutral.dead, 1.0, v).to(torch.float64).log() for v in (activation, weight))
        return cls(**dict(zip(("log_activation", "log_weight"), logs, strict=True)), neutral=neutral)


def _bounded(logs: Tensor, neutral: NeutralScales | None) -> Tensor:
    """Log scales within the bounds, dead and near-dead channels placed among those that are live."""
    low, high = math.log(SCALE_MIN), math.log(SCALE_MAX)
    bounded = logs.clamp(low, high)
    return bounded if neutral is None or neutral.idle else neutral.place(bounded).clamp(low, high)


def _refuse_differing(field: str, values: Tensor, index: Tensor) -> None:
    low, high = (tied_extreme(values, index, extreme) for extreme in ("amin", "amax"))
    if not torch.equal(low, high):
        raise InputError(field, "differs among tied channels", "put tied channels into one group")


def _check_statistic(field: str, values: Tensor, shape: torch.Size) -> None:
    if values.dim() != 1 or values.numel() == 0 or values.shape != shape:
        raise InputError(field, f"has shape {tuple(values.shape)}", "give one magnitude per channel for all statistics")
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"the {field} statistic holds NaN or infinity")
    if bool((values < 0).any()):
        raise InputError(field, "holds negative magnitudes", "give abs-max, percentile or RMS of each channel")
