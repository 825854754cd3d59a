"""Figure of the sites that make the largest part of the error at the model's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from alphasmith.dashboards.checked_frames import checked_sites
from alphasmith.dashboards.figures._parts import end_labels, name_axis, nothing, rows_height
from alphasmith.dashboards.figures._theme import INK, OURS, SPAN, styled
from alphasmith.objectives.text import counted

#: Most sites with a bar of their own; the others share one.
LARGEST_SITES = 20


def shares_of_output(sites: pd.DataFrame) -> go.Figure:
    """Parts of the model's output error that the sites make, the largest first.

    Args:
        sites: Site frame; optional columns ``share`` and ``share_measured`` (0 to 1, NaN where unknown).

    Returns:
        A bar for each of the largest sites, predicted where it was, else measured; an open diamond where it was measured
        beside the prediction; one bar for all other sites together.

    Raises:
        InputError: A column is missing or not numeric.
        NonFiniteError: A number is infinite.
    """
    frame = checked_sites(sites)
    title = "Where the output's error comes from"
    frame = frame.assign(part=frame["share"].fillna(frame["share_measured"]))
    frame = frame[frame["part"].notna()].sort_values("part", ascending=False, kind="stable")
    if frame.empty:
        return nothing(title, "no share of the output's error is known yet")
    others = frame.iloc[LARGEST_SITES:]
    shown = frame.iloc[:LARGEST_SITES][["site", "part", "share", "share_measured"]].reset_index(drop=True)
    rows = name_axis(shown)
    parts, measured = shown["part"].tolist(), shown["share_measured"].where(shown["share"].notna())
    if len(others):
        parts.append(float(others["part"].sum()))
        rows["tickvals"] = list(range(len(parts)))
        rows["ticktext"] = [*rows["ticktext"], counted(len(others), "other site")]
        rows["range"] = [len(parts) - 0.4, -0.6]
    longest = max([*parts, *measured[measured.notna()].tolist(), 0.01])
    axis: dict[str, Any] = {
        "title": {"text": "share of the predicted loss at the model's output"},
        "range": [0, round(1.16 * longest, 4)],
        "tickformat": ".0%",
    }
    figure = styled(title, height=rows_height(len(parts), legend=True), x=axis, y=rows)
    figure.update_yaxes(showgrid=False)
    figure.add_trace(
        go.Bar(
            x=[round(part, 5) for part in parts],
            y=list(range(len(parts))),
            orientation="h",
            name="share",
            marker={"color": [*[OURS] * len(shown), *[SPAN] * (len(parts) - len(shown))], "line": {"width": 0}},
            width=0.62,
            hovertemplate="%{y}: %{x:.2%}<extra></extra>",
            showlegend=False,
        )
    )
    # A number stands at the end of its bar, or beyond the diamond where that would lie under it.
    marks = np.array([*measured, *[np.nan] * (len(parts) - len(shown))], dtype=float)
    under = (marks > np.array(parts) - 0.01 * longest) & (marks < np.array(parts) + 0.1 * longest)
    ends = np.where(under, np.fmax(parts, marks + 0.012 * longest), parts).tolist()
    figure.add_trace(
        end_labels(
            [round(end, 5) for end in ends],
            [float(row) for row in range(len(parts))],
            [f"{100 * part:.1f} %" for part in parts],
        )
    )
    if bool(np.isfinite(measured).any()):
        figure.add_trace(
            go.Scatter(
                x=[None if pd.isna(value) else round(float(value), 5) for value in measured],
                y=list(range(len(shown))),
                mode="markers",
                name="measured with only this site quantized",
                showlegend=True,
                marker={"color": INK, "symbol": "diamond-open", "size": 9, "line": {"width": 1.5, "color": INK}},
                hovertemplate="measured: %{x:.2%}<extra></extra>",
            )
        )
    return figure
