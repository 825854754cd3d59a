"""Alpha ranges of groups from their magnitudes and from the hardware. Source: claim A-3, formulas fA6 and fA7."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from alphasmith.objectives.errors import InputError

#: The two points of formula fA6: the smallest group gets [0.1, 0.5], the largest [0.5, 0.9].
LOWEST, MIDDLE, HIGHEST = 0.1, 0.5, 0.9
#: Default alpha where nothing is searched.
DEFAULT_ALPHA = 0.5


@dataclass(frozen=True, kw_only=True)
class AlphaRange:
    """The interval an alpha is searched in.

    Attributes:
        low: Smallest alpha, dimensionless.
        high: Largest alpha.
        position: t in [0, 1]: where the group's magnitude lies between the smallest and the largest group.
        explanation: One sentence for the report.
    """

    low: float
    high: float
    position: float
    explanation: str

    def holding(self, alpha: float) -> AlphaRange:
        """The range widened, where needed, to hold ``alpha``; the explanation says so."""
        if self.low <= alpha <= self.high:
            return self
        low, high = min(self.low, alpha), max(self.high, alpha)
        why = f"{self.explanation}; widened to hold the best single alpha {alpha:.3g}: [{low:.3f}, {high:.3f}]"
        return replace(self, low=low, high=high, explanation=why)


def group_ranges(
    magnitudes: Sequence[float],
    *,
    rho: float = 0.0,
    scale: Literal["linear", "log"] = "linear",
    kind: Literal["magnitude", "wide"] = "magnitude",
) -> tuple[AlphaRange, ...]:
    """One range per group.

    ``low = 0.1 + 0.4 t``, ``high = 0.5 + 0.4 t`` (fA6), then ``low += rho * (high - low)`` (fA7).

    Args:
        magnitudes: (K,) representative magnitude of every group, >= 0.
        rho: Scarcity of the target hardware in [0, 1]; 0 reproduces fA6 exactly.
        scale: Whether t is the position of the magnitude or of its logarithm; log fits groups that span decades.
        kind: ``wide`` gives every group the overall range [0.1, 0.9], which a single group gets in any case.

    Returns:
        (K,) ranges in the order of ``magnitudes``.

    Raises:
        InputError: No group, a negative or non-finite magnitude, or rho outside [0, 1].
    """
    if not magnitudes or any(not math.isfinite(m) or m < 0 for m in magnitudes):
        raise InputError("magnitudes", f"{list(magnitudes)} are not finite and >= 0", "check the calibration data")
    if not 0.0 <= rho <= 1.0:
        raise InputError("rho", f"{rho} is outside [0, 1]", "give a scarcity between 0 and 1")
    wide = kind == "wide" or len(set(magnitudes)) == 1
    positions = _positions(magnitudes, scale)
    return tuple(_range(m, t, rho, wide) for m, t in zip(magnitudes, positions, strict=True))


def _positions(magnitudes: Sequence[float], scale: str) -> list[float]:
    values = list(magnitudes)
    if scale == "log":
        # A group of dead channels has magnitude 0: it takes the place of the smallest live group.
        floor = min((m for m in values if m > 0), default=1.0)
        values = [math.log(max(m, floor)) for m in values]
    low, high = min(values), max(values)
    return [0.0 if high == low else (v - low) / (high - low) for v in values]


def _range(magnitude: float, t: float, rho: float, wide: bool) -> AlphaRange:
    low, high = (LOWEST, HIGHEST) if wide else (LOWEST + 0.4 * t, MIDDLE + 0.4 * t)
    origin = "overall range" if wide else f"fA6 at position {t:.2f} of the group magnitudes"
    shifted = low + rho * (high - low)
    shift = (
        "rho = 0 leaves it so"
        if rho == 0
        else f"fA7 raises the low end by rho = {rho:.3f} of the width: [{shifted:.3f}, {high:.3f}]"
    )
    return AlphaRange(
        low=shifted,
        high=high,
        position=t,
        explanation=f"magnitude {magnitude:.4g}: {origin} gives [{low:.3f}, {high:.3f}]; {shift}",
    )
