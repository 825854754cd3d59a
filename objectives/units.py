"""Sizes for people."""

from __future__ import annotations


def readable(size: int) -> str:
    """A size in the largest unit that leaves at least 1, e.g. ``1.5 GiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
