"""Figures of the chosen alphas: against the magnitude of their groups, and over sites and groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from alphasmith.dashboards.checked_frames import checked_groups
from alphasmith.dashboards.figures._parts import (
    MOST_POINTS,
    NAMED_SITES,
    POSITION_TITLE,
    count_hidden,
    name_axis,
    nothing,
    rows_height,
    segments,
)
from alphasmith.dashboards.figures._theme import (
    BY_COLUMN,
    MUTED,
    OURS,
    SEQUENTIAL,
    log_axis,
    rounded,
    short_names,
    styled,
)
from alphasmith.dashboards.text import is_outside, offset_text

#: Up to this many groups have their factor printed beside the dot; beyond it the hover text has it.
_LABELLED = 12
#: How an alpha outside its range is drawn.
_OUTSIDE = {"color": BY_COLUMN["best_single"].color, "size": 9, "symbol": "diamond-open", "line": {"width": 2}}


def alphas_by_group(groups: pd.DataFrame) -> go.Figure:
    """The alpha chosen for every group inside the range it was given, against the group's magnitude.

    Source: claim A-3, formulas fA6 and fA7 (ranges grow with magnitude and with the scarcity of the hardware).

    Args:
        groups: Group frame; groups of magnitude 0 have no place on the axis and are counted in a note.

    Returns:
        Range bars with dots, open diamonds where an alpha lies outside its range, and the group's own factor where it has one; for more than 120 groups the typical range by
        magnitude as a band.

    Raises:
        InputError: A column is missing or not numeric.
        NonFiniteError: A number is infinite.
    """
    frame = checked_groups(groups)
    title = "Chosen alphas and their ranges"
    hidden = int((frame["magnitude"] <= 0).sum())
    frame = frame[frame["magnitude"] > 0].sort_values("magnitude", kind="stable").reset_index(drop=True)
    if frame.empty:
        return nothing(title, "no group has been chosen yet")
    axis = log_axis(frame["magnitude"].tolist(), "magnitude of the group (largest activation)")
    # A group has no alpha where no smoothing won.
    low = float(np.nanmin([frame["low"].min(), frame["alpha"].min(), 0.0]))
    high = float(np.nanmax([frame["high"].max(), frame["alpha"].max(), 1.0]))
    pad = 0.04 * (high - low)
    figure = styled(
        title, height=400, x=axis, y={"title": {"text": "alpha"}, "range": [round(low - pad, 3), round(high + pad, 3)]}
    )
    figure.update_xaxes(showgrid=False)
    if len(frame) <= 120:
        at = rounded(frame["magnitude"])
        bars = segments(at, rounded(frame["low"]), rounded(frame["high"]), upright=True, width=7)
        figure.add_trace(bars.update(name="range", showlegend=True, line={"color": "rgba(34,118,201,0.25)"}))
        labelled = len(frame) <= _LABELLED
        outside = is_outside(frame["alpha"], frame["low"], frame["high"])
        inside = {"color": OURS, "size": 8, "line": {"width": 1, "color": "#ffffff"}}
        figure.add_trace(_dots(frame[~outside], "chosen alpha", inside, labelled=labelled))
        if outside.any():
            figure.add_trace(_dots(frame[outside], _told(outside), _OUTSIDE, labelled=labelled))
    else:
        _add_alpha_band(figure, frame)
    return count_hidden(figure, hidden, "of magnitude 0", noun="group")


def alpha_heatmap(groups: pd.DataFrame) -> go.Figure:
    """Chosen alphas of all sites at a glance: one row per site, one column per group, in the order of the frame.

    Args:
        groups: Group frame.

    Returns:
        A heat map on a fixed scale from 0 to 1; more than 400 sites are averaged over stretches of the network.

    Raises:
        InputError: A column is missing or not numeric.
        NonFiniteError: An alpha is infinite.
    """
    frame = checked_groups(groups)
    title = "Alphas of every site and group"
    if frame.empty:
        return nothing(title, "no group has been chosen yet")
    frame["site"] = frame["site"].astype(str).replace("", "whole model")
    names = list(dict.fromkeys(frame["site"]))
    columns = sorted({int(group) for group in frame["group"]})
    row_of = {name: index for index, name in enumerate(names)}
    column_of = {group: index for index, group in enumerate(columns)}
    table = np.full((len(names), len(columns)), np.nan)
    factors = [[""] * len(columns) for _ in names]
    for name, group, alpha, offset in zip(frame["site"], frame["group"], frame["alpha"], frame["offset"], strict=True):
        table[row_of[name], column_of[int(group)]] = alpha
        factors[row_of[name]][column_of[int(group)]] = _factor(offset)
    named = len(names) <= NAMED_SITES
    rows = min(len(names), max(1, MOST_POINTS * 8 // max(len(columns), 8)))
    stretch = (np.arange(len(names)) * rows) // len(names)
    cells = pd.DataFrame(table).groupby(stretch).mean().to_numpy()
    firsts = [names[int(np.argmax(stretch == row))] for row in range(rows)]
    along = list(range(rows))
    figure = styled(
        title,
        height=rows_height(rows, legend=False) if named else 560,
        x={"title": {"text": "group, by rising magnitude"}, "showgrid": False, "tickvals": columns, "ticklen": 0},
        y=name_axis(pd.DataFrame({"site": firsts}))
        if named
        else {"title": {"text": POSITION_TITLE}, "autorange": "reversed", "showgrid": False},
    )
    figure.update_layout(margin={"t": 44})
    if len(columns) > 16:
        figure.update_xaxes(tickvals=None)
    written = {"texttemplate": "%{z:.2f}", "textfont": {"size": 12}} if named and len(columns) <= 10 else {}
    figure.add_trace(
        go.Heatmap(
            x=columns,
            y=along,
            z=[rounded(row, 3) for row in cells],
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            xgap=1,
            ygap=1 if named else 0,
            hoverongaps=False,
            # With every cell written no stretches are merged: a row is a site.
            customdata=[
                [name + factor for factor in row]
                for name, row in zip(short_names(firsts, width=60), factors, strict=True)
            ]
            if written
            else None,
            hovertemplate=("%{customdata}" if written else "site %{y}")
            + "<br>group %{x}<br>alpha %{z:.3f}<extra></extra>",
            colorbar={
                "title": {"text": "alpha"},
                "thickness": 12,
                "outlinewidth": 0,
                "lenmode": "pixels",
                "len": 160,
                "y": 1,
                "yanchor": "top",
                "tickvals": [0, 0.25, 0.5, 0.75, 1],
            },
            **written,
        )
    )
    return figure


def _add_alpha_band(figure: go.Figure, frame: pd.DataFrame) -> None:
    """Typical range and typical alpha by magnitude, with single groups as faint dots where they are not too many."""
    logs = np.log10(frame["magnitude"].to_numpy())
    # Ranks, not equal widths: every bin then holds equally many groups and no median rests on one of them.
    bins = (np.arange(len(frame)) * min(24, len(frame) // 20)) // len(frame)
    parts = frame.assign(at=logs).groupby(bins)
    at = rounded(10 ** parts["at"].median())
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=at, y=rounded(parts["low"].median()), showlegend=False, **edge))
    figure.add_trace(
        go.Scatter(
            x=at,
            y=rounded(parts["high"].median()),
            fill="tonexty",
            fillcolor="rgba(34,118,201,0.16)",
            name="range (median)",
            **edge,
        )
    )
    outside = is_outside(frame["alpha"], frame["low"], frame["high"])
    if len(frame) <= 1500:
        faint = {"color": OURS, "size": 4, "opacity": 0.45}
        figure.add_trace(_faint_dots(frame[~outside], "chosen alpha", faint))
    if outside.any():
        # With too many groups for dots, how many there are is told all the same.
        shown = frame[outside] if len(frame) <= 1500 else frame[outside].iloc[:0]
        figure.add_trace(_faint_dots(shown, _told(outside), _OUTSIDE | {"size": 5}))
    figure.add_trace(
        go.Scatter(
            x=at,
            y=rounded(parts["alpha"].median()),
            mode="lines",
            name="chosen alpha (median)",
            line={"color": BY_COLUMN["best_single"].color, "width": 2.5},
            hovertemplate="median alpha %{y:.3f} near magnitude %{x:.3~g}<extra></extra>",
        )
    )


def _told(outside: pd.Series) -> str:
    return f"outside its range ({int(outside.sum())} of {len(outside)})"


def _dots(frame: pd.DataFrame, name: str, marker: dict[str, Any], *, labelled: bool) -> go.Scatter:
    return go.Scatter(
        x=rounded(frame["magnitude"]),
        y=rounded(frame["alpha"]),
        mode="markers+text" if labelled else "markers",
        name=name,
        marker=marker,
        text=[offset_text(offset) for offset in frame["offset"]] if labelled else None,
        textposition="middle right",
        cliponaxis=False,
        textfont={"size": 11, "color": MUTED},
        customdata=_group_hover(frame),
        hovertemplate="%{customdata}<br>alpha %{y:.3f} at magnitude %{x:.3~g}<extra></extra>",
    )


def _faint_dots(frame: pd.DataFrame, name: str, marker: dict[str, Any]) -> go.Scatter:
    return go.Scatter(
        x=rounded(frame["magnitude"], 3),
        y=rounded(frame["alpha"], 3),
        mode="markers",
        name=name,
        marker=marker,
        hovertemplate="alpha %{y:.3f} at magnitude %{x:.3~g}<extra></extra>",
    )


def _group_hover(frame: pd.DataFrame) -> list[str]:
    names = short_names(frame["site"].astype(str).replace("", "whole model").tolist(), width=60)
    columns = zip(names, frame["group"], frame["size"], frame["offset"], strict=True)
    return [
        f"{site}, group {int(group)}<br>{int(size)} channels{_factor(offset)}" for site, group, size, offset in columns
    ]


def _factor(offset: float) -> str:
    told = offset_text(offset)
    return f"<br>own factor {told}" if told else ""
