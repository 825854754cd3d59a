"""Losses and ratios for people."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A loss or ratio with three significant digits, e.g. ``3.31e-4`` or ``0.912``; ``n/a`` when there is none."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"
