"""Parts that several figures share: named rows, line segments, and figures that have nothing to show yet."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from alphasmith.dashboards.figures._theme import INK, MUTED, SPAN, short_names, styled
from alphasmith.objectives.text import counted

#: Up to this many sites have a named row each; beyond it they are placed by their position in the network.
NAMED_SITES = 48
#: Most sites, bars or cells drawn one by one.
MOST_POINTS = 400
POSITION_TITLE = "site, in network order"


def segments(
    along: list[float | None], low: list[float | None], high: list[float | None], *, upright: bool, width: int
) -> go.Scatter:
    """One grey trace of separate line segments; None lifts the pen."""
    across: list[float | None] = []
    ends: list[float | None] = []
    for at, start, end in zip(along, low, high, strict=True):
        if at is not None and start is not None and end is not None:
            across += [at, at, None]
            ends += [start, end, None]
    return go.Scatter(
        x=across if upright else ends,
        y=ends if upright else across,
        mode="lines",
        line={"color": SPAN, "width": width},
        hoverinfo="skip",
        showlegend=False,
    )


def name_axis(frame: pd.DataFrame) -> dict[str, Any]:
    """Rows from top to bottom in frame order, labelled by position so that equal short names stay separate."""
    return {
        "tickvals": list(range(len(frame))),
        "ticktext": short_names(frame["site"].astype(str).tolist()),
        "range": [len(frame) - 0.4, -0.6],
        # Invisible: they keep names apart from bars that begin at the axis.
        "ticks": "outside",
        "ticklen": 6,
        "tickcolor": "rgba(0, 0, 0, 0)",
    }


def end_labels(ends: list[float], rows: list[float | None], texts: list[str]) -> go.Scatter:
    """Numbers to the right of everything that a row shows, so that no mark crosses them.

    Args:
        ends: Largest value shown in each row.
        rows: Coordinates of the rows.
        texts: What stands there.
    """
    return go.Scatter(
        x=ends,
        y=rows,
        mode="text",
        text=[f" {text}" for text in texts],
        textposition="middle right",
        textfont={"color": INK},
        cliponaxis=False,
        hoverinfo="skip",
        showlegend=False,
    )


def rows_height(rows: int, *, legend: bool) -> int:
    """Height of a figure with named rows [pixels]."""
    return (150 if legend else 120) + rows * (26 if rows <= 20 else 21)


def nothing(title: str, reason: str) -> go.Figure:
    """A figure that says why it is empty: a live view opens before there is anything to see."""
    figure = styled(title, height=180, x={"visible": False}, y={"visible": False})
    figure.add_annotation(text=reason, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"color": MUTED})
    return figure


def count_hidden(figure: go.Figure, hidden: int, why: str, noun: str = "site") -> go.Figure:
    """Say in the title line how many values a logarithmic axis cannot show."""
    if hidden:
        figure.update_layout(title={"text": f"{figure.layout.title.text} ({counted(hidden, noun)} {why} not shown)"})
    return figure
