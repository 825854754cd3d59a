"""Scales of channels that say nothing, or hardly anything, of their own scale. Source: trap T7.

A channel without activation or without weight (*dead*) has no scale by formula fA1, and any scale leaves its consumer as it is.
Its producer's row is divided by it all the same, and row and column share quantization ranges with those of live channels. A
channel whose activation is far below what its producer's row could make (*near-dead*: a ReLU lets almost nothing through)
has one, so small that its divided row is the largest by far. Both get a scale in the units of the live channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: A channel is near-dead where its producer's row, relative to its activation, is this many times that of the median live channel.
NEAR_DEAD = 8.0


@dataclass(frozen=True, eq=False, kw_only=True)
class NeutralScales:
    """Where the scales of dead and near-dead channels are put, given those of the live ones.

    Attributes:
        dead: (C,) bool: no activation or no weight.
        live: (C,) bool: neither dead nor near-dead.
        activation: (C,) float64 log a_j, -inf where it is 0.
        weight: (C,) float64 log w_j, likewise.
        producer: (C,) float64 log of the abs-max of the producers' rows, likewise; None: no quantized operator is divided.
    """

    dead: Tensor
    live: Tensor
    activation: Tensor
    weight: Tensor
    producer: Tensor | None

    @classmethod
    def of(cls, activation: Tensor, weight: Tensor, producer: Tensor | None = None) -> NeutralScales:
        """Which channels are dead and near-dead.

        Args:
            activation: (C,) a_j >= 0, finite; equal within ties.
            weight: (C,) w_j >= 0, likewise.
            producer: (C,) abs-max of the rows that the scales divide, likewise; None: there are none.
        """
        log_a, log_w = (values.to(torch.float64).log() for values in (activation, weight))
        dead = (activation == 0) | (weight == 0)
        live = ~dead
        log_p = None if producer is None else producer.to(log_a.device, torch.float64).log()
        if log_p is not None:
            known = live & (log_p > -torch.inf)
            if not bool(known.any()):
                log_p = None  # rows of zeros do not mind their scale
            else:
                gain = log_p - log_a
                live = live & ~(gain > gain[known].median() + torch.log(torch.tensor(NEAR_DEAD, dtype=torch.float64)))
        return cls(dead=dead, live=live, activation=log_a, weight=log_w, producer=log_p)

    @property
    def idle(self) -> bool:
        """Whether every channel is live, so that :meth:`place` changes nothing."""
        return bool(self.live.all())

    def place(self, logs: Tensor) -> Tensor:
        """Log scales of all channels; those of live channels stay.

        A dead channel takes the geometric mean of the live channels' scales, a near-dead one that of the formula. Both are
        limited: no producer row ``p_j / s_j``, no smoothed activation ``a_j / s_j`` and no consumer column ``w_j s_j`` becomes
        the largest by them; where row and column cannot both stay below the largest live one, they exceed it equally. All
        of it follows a change of the activation's unit. Without a live channel every scale is 1.

        Args:
            logs: (..., C) log s by the formula; any finite number at dead channels.

        Returns:
            (..., C), differentiable in ``logs``.
        """
        if self.idle:
            return logs
        if not bool(self.live.any()):
            return 0.0 * logs
        known = logs[..., self.live]
        low = self.activation - self._largest(self.activation[self.live] - known)
        if self.producer is not None:
            low = torch.maximum(low, self.producer - self._largest(self.producer[self.live] - known))
        high = self._largest(self.weight[self.live] + known) - self.weight
        first = torch.where(self.dead, known.mean(dim=-1, keepdim=True), logs)
        between = torch.minimum(torch.maximum(first, low), high)
        return torch.where(self.live, logs, torch.where(low > high, (low + high) / 2, between))

    def follow(self, slopes: Tensor) -> Tensor:
        """Derivatives (C,) of log scales by something that moves them all: channels that are not live move as the live do on average."""
        if self.idle or not bool(self.live.any()):
            return slopes
        return torch.where(self.live, slopes, slopes[self.live].mean())

    def to(self, device: torch.device | str) -> NeutralScales:
        """The same on ``device``."""
        producer = None if self.producer is None else self.producer.to(device)
        return NeutralScales(
            dead=self.dead.to(device),
            live=self.live.to(device),
            activation=self.activation.to(device),
            weight=self.weight.to(device),
            producer=producer,
        )

    @staticmethod
    def _largest(values: Tensor) -> Tensor:
        return values.amax(dim=-1, keepdim=True)
