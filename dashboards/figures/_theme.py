"""One look for every figure: palette, fonts, axes, and the words for the series.

Colours stay above a contrast of 3:1 on white and on the report's dark background, differ for the common kinds of colour
blindness, and are never the only mark: every series has its own symbol as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from alphasmith.objectives.text import shortened

INK = "#24292f"
MUTED = "#767c85"
GRID = "#e4e7eb"
PAPER = "#ffffff"


@dataclass(frozen=True, kw_only=True)
class Series:
    """How one column of the site frame is drawn.

    Attributes:
        column: Column of the site frame.
        label: What people read.
        color: Hex colour.
        symbol: Plotly marker symbol.
    """

    column: str
    label: str
    color: str
    symbol: str


#: In drawing order: the searched alphas last, so that they lie on top.
SERIES = (
    Series(column="identity", label="no smoothing", color="#7d848e", symbol="x-thin-open"),
    Series(column="alpha_half", label="alpha 0.5", color="#a05fb0", symbol="square-open"),
    Series(column="best_single", label="best single alpha", color="#c4720a", symbol="diamond"),
    Series(column="limit", label="per-channel limit", color="#00875f", symbol="line-ns-open"),
    Series(column="ours", label="searched alphas", color="#2276c9", symbol="circle"),
)
BY_COLUMN = {series.column: series for series in SERIES}
OURS = BY_COLUMN["ours"].color
WORSE = "#d6453d"
#: Half-transparent, so that it recedes on white and on dark alike.
SPAN = "rgba(128,136,148,0.4)"
#: Light to dark in one hue, so that numbers printed on the cells stay readable.
SEQUENTIAL = ((0.0, "#edf3fa"), (0.35, "#a9cbec"), (0.7, "#2f7fce"), (1.0, "#0b2f5c"))

_AXIS: dict[str, Any] = {
    "automargin": True,
    "gridcolor": GRID,
    "linecolor": "#b9bec6",
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": "#b9bec6",
    "zeroline": False,
    "title": {"standoff": 10},
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK},
        "title": {
            "font": {"size": 16},
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 14},
        },
        "colorway": [series.color for series in SERIES],
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "margin": {"l": 12, "r": 16, "t": 72, "b": 12},
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "yref": "paper", "xref": "paper"},
        "hoverlabel": {"align": "left"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


def styled(title: str, *, height: int, x: dict[str, Any] | None = None, y: dict[str, Any] | None = None) -> go.Figure:
    """An empty figure in the house style.

    Args:
        title: What the figure answers, in one line.
        height: Height [pixels]; the width follows the page.
        x: Settings of the x axis on top of the template.
        y: Settings of the y axis on top of the template.

    Returns:
        The figure, without traces.
    """
    figure = go.Figure()
    figure.update_layout(template=TEMPLATE, title={"text": title}, height=height, xaxis=x or {}, yaxis=y or {})
    return figure


def short_names(names: Sequence[str], width: int = 34) -> list[str]:
    """Site names without the dotted prefix they all share, cut in the middle, safe as Plotly text.

    Args:
        names: Full site names.
        width: Longest result [characters], before escaping.

    Returns:
        One label per name, in order. Not necessarily unique: use positions, never labels, as coordinates.
    """
    parts = [name.split(".") for name in names]
    shared = 0
    if len(set(names)) > 1:
        # The last component always stays: it says which operator the site is named after.
        while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
            shared += 1
    return [text(shortened(".".join(part[shared:]), width)) for part in parts]


def text(value: object) -> str:
    """A value as Plotly text: Plotly reads a subset of HTML in labels, so markup characters are escaped."""
    return escape(str(value), quote=False)


def rounded(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """Values as a JSON list with few digits (figures are stored in database rows of 2 kB); NaN becomes None."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in map(float, values)]


def log_axis(values: Iterable[float], title: str) -> dict[str, Any]:
    """A logarithmic axis that always shows at least two readable ticks.

    Args:
        values: Everything that must be visible; non-positive and non-finite values are ignored.
        title: Axis title with its unit.

    Returns:
        Axis settings for :func:`styled`: decades, 1-3 or 1-2-5 steps where the values span at least a factor 5, else
        evenly spaced round numbers.
    """
    logs = [math.log10(value) for value in values if math.isfinite(value) and value > 0]
    low, high = (min(logs), max(logs)) if logs else (-1.0, 0.0)
    pad = max(0.04 * (high - low), 0.02)
    low, high = low - pad, high + pad
    ticks = _log_ticks(low, high)
    return {
        "type": "log",
        "range": [round(low, 4), round(high, 4)],
        "tickvals": [float(f"{tick:.4g}") for tick in ticks],
        "ticktext": [_tick(tick) for tick in ticks],
        "title": {"text": title},
    }


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions for labels that keep the order of the values and a least distance between neighbours.

    Args:
        values: Wanted positions.
        gap: Least distance, in the same unit.

    Returns:
        One position per value, as near to the wanted ones as a single pass from the middle of each clump allows.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    clumps: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        clumps.append([index])
        centres.append(values[index])
        # Merge while the two last clumps overlap; a merged clump is centred on the mean of what it holds.
        while len(clumps) > 1:
            need = gap * (len(clumps[-1]) + len(clumps[-2])) / 2
            if centres[-1] - centres[-2] >= need - 1e-12:
                break
            last, before = clumps.pop(), clumps.pop()
            centres.pop()
            centres.pop()
            merged = before + last
            clumps.append(merged)
            centres.append(sum(values[i] for i in merged) / len(merged))
    result = [0.0] * len(values)
    for clump, centre in zip(clumps, centres, strict=True):
        for rank, index in enumerate(clump):
            result[index] = centre + gap * (rank - (len(clump) - 1) / 2)
    return result


def _log_ticks(low: float, high: float) -> list[float]:
    """Three to nine round numbers between 10**low and 10**high."""
    if high - low < 0.7:
        start, stop = 10**low, 10**high
        rough = (stop - start) / 6
        decade = 10.0 ** math.floor(math.log10(rough))
        step = next(size * decade for size in (1, 2, 5, 10) if size * decade >= rough)
        return [index * step for index in range(math.ceil(start / step), math.floor(stop / step) + 1)]
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= math.log10(s) + d <= high]
        if len(ticks) <= 7:
            break
    return ticks[:: math.ceil(len(ticks) / 9)]


def _tick(value: float) -> str:
    if 1e-2 <= value < 1e4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
