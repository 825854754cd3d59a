"""Whether one model is better than another on the same samples, beyond their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A paired comparison.

    Attributes:
        gain: Mean improvement; above 0: better.
        standard_error: Of the gain.
    """

    gain: float
    standard_error: float

    @property
    def better(self) -> bool:
        """Whether the gain exceeds its standard error."""
        return self.gain > self.standard_error


def paired(before: Tensor, after: Tensor, weights: Tensor) -> Verdict:
    """Compare sums of losses sample by sample, as a ratio estimate of their weighted mean. Source: formula fA16.

    Args:
        before: (N,) totals of the one model.
        after: (N,) totals of the other; smaller is better.
        weights: (N,) what totals are divided by; not negative, some above 0. At least two samples.
    """
    fallen = (before - after).double()
    weight = weights.double()
    gain = float(fallen.sum() / weight.sum())
    count = len(fallen)
    spread = (fallen - gain * weight).square().sum() * (count / (count - 1))
    return Verdict(gain=gain, standard_error=math.sqrt(float(spread)) / float(weight.sum()))
