"""Figures of a run, from data frames: where each site stands, which alphas were chosen, how the search got there.

Every function takes plain frames (columns in ``checked_frames``) and returns a Plotly figure whose JSON stays below 100 kB,
because the Optuna dashboard keeps figures in database rows and reads all of them at every poll. Long frames are therefore
aggregated before drawing, never thinned at random. Losses are relative squared errors on held-out data (dimensionless).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from alphasmith.dashboards.checked_frames import (
    LOSS_COLUMNS,
    checked_sites,
    ratio,
    thinned_sites,
)
from alphasmith.dashboards.figures._alphas import alpha_heatmap, alphas_by_group
from alphasmith.dashboards.figures._history import trial_history
from alphasmith.dashboards.figures._parts import (
    MOST_POINTS,
    NAMED_SITES,
    POSITION_TITLE,
    count_hidden,
    end_labels,
    name_axis,
    nothing,
    rows_height,
    segments,
)
from alphasmith.dashboards.figures._shares import shares_of_output
from alphasmith.dashboards.figures._theme import (
    BY_COLUMN,
    MUTED,
    OURS,
    SERIES,
    WORSE,
    log_axis,
    rounded,
    short_names,
    styled,
)

__all__ = ["alpha_heatmap", "alphas_by_group", "gain_by_site", "losses_by_site", "shares_of_output", "trial_history"]

LOSS_TITLE = "loss (relative squared error, held-out)"


def losses_by_site(sites: pd.DataFrame, *, named_sites: int = NAMED_SITES) -> go.Figure:
    """Loss of every site without smoothing, at alpha 0.5, at its best single alpha, as found, and its limit.

    A grey line per site spans its losses, so that its length is what smoothing is worth there.

    Args:
        sites: Site frame.
        named_sites: Up to this many sites have a named row each.

    Returns:
        A dot plot on a logarithmic axis: named rows for few sites, positions in the network for many.

    Raises:
        InputError: A column is missing or not numeric.
        NonFiniteError: A loss is infinite.
    """
    frame = checked_sites(sites)
    title = "Quantization loss of every site"
    if frame.empty:
        return nothing(title, "no site has been searched yet")
    if frame[list(LOSS_COLUMNS)].isna().all(axis=None):
        return nothing(title, "no loss was measured at single sites")
    named = len(frame) <= named_sites
    # A site that was left alone has a loss, but nothing was searched there.
    tried = [column for column in LOSS_COLUMNS if column != "identity"]
    frame[tried] = frame[tried].where(frame["mode"] != "left")
    frame = thinned_sites(frame, MOST_POINTS)
    losses = frame[list(LOSS_COLUMNS)].where(frame[list(LOSS_COLUMNS)] > 0)
    axis = log_axis(losses.to_numpy().ravel().tolist(), LOSS_TITLE)
    spans = (losses.min(axis=1), losses.max(axis=1))
    along = _along(frame, named)
    if named:
        figure = styled(title, height=rows_height(len(frame), legend=True), x=axis, y=name_axis(frame))
        figure.update_yaxes(showgrid=False)
    else:
        figure = styled(title, height=460, x={"title": {"text": POSITION_TITLE}, "showgrid": False}, y=axis)
    figure.add_trace(segments(along, rounded(spans[0]), rounded(spans[1]), upright=not named, width=3 if named else 1))
    hover = _hover_names(frame)
    for series in SERIES:
        values = rounded(losses[series.column])
        if all(value is None for value in values):
            continue
        size = {"ours": 10, "limit": 13, "identity": 9}.get(series.column, 8)
        marker: dict[str, Any] = {
            "color": series.color,
            "symbol": series.symbol,
            "size": size if named else max(4, size // 2),
            "line": {"width": 2 if named else 1, "color": series.color},
        }
        if series.column == "limit" and not named:
            marker["symbol"] = "line-ew-open"
        figure.add_trace(
            go.Scatter(
                x=values if named else along,
                y=along if named else values,
                mode="markers",
                name=series.label,
                marker=marker,
                # Five copies of hundreds of names would fill the size limit; crowded figures name the site once.
                text=hover if named or series.column == "ours" else None,
                hovertemplate=("%{text}<br>" if named or series.column == "ours" else "site %{x}<br>")
                + f"{series.label}: %{{{'x' if named else 'y'}:.3~g}}<extra></extra>",
            )
        )
    return count_hidden(figure, int((frame[list(LOSS_COLUMNS)] <= 0).any(axis=1).sum()), "with a loss of exactly 0")


def gain_by_site(sites: pd.DataFrame) -> go.Figure:
    """Loss as found, relative to the best single alpha of the same site: below 1 the groups pay off.

    Args:
        sites: Site frame.

    Returns:
        Bars that start at 1, with the per-channel limit as a mark: what no choice of alphas can beat by much.

    Raises:
        InputError: A column is missing or not numeric.
        NonFiniteError: A loss is infinite.
    """
    frame = checked_sites(sites)
    title = "Gain over the best single alpha"
    axis_title = "loss / loss at the best single alpha"
    searched = (frame["mode"] != "left") & (frame["ours"] > 0) & (frame["best_single"] > 0)
    frame = frame[searched].reset_index(drop=True)
    if frame.empty:
        return nothing(title, "no site has both losses yet")
    named = len(frame) <= NAMED_SITES
    frame = thinned_sites(frame, MOST_POINTS)
    gains = ratio(frame["ours"], frame["best_single"])
    limits = ratio(frame["limit"], frame["best_single"])
    visible = [*gains.tolist(), *limits[np.isfinite(limits)].tolist(), 1.0]
    span = max(max(visible) - min(visible), 0.02)
    # Room for the number printed to the right of a named bar.
    low, high = min(visible) - 0.05 * span, max(visible) + (0.16 if named else 0.04) * span
    axis = {"title": {"text": axis_title}, "range": [round(low, 4), round(high, 4)]}
    along = _along(frame, named)
    if named:
        figure = styled(title, height=rows_height(len(frame), legend=False), x=axis, y=name_axis(frame))
        figure.update_yaxes(showgrid=False)
    else:
        figure = styled(title, height=380, x={"title": {"text": POSITION_TITLE}, "showgrid": False}, y=axis)
    bars = {
        "base": 1,
        "name": BY_COLUMN["ours"].label,
        "marker": {"color": [WORSE if gain > 1 else OURS for gain in gains], "line": {"width": 0}},
        "hovertext": _hover_names(frame),
        "customdata": rounded(gains),
        "hovertemplate": "%{hovertext}<br>%{customdata:.4~g} of the best single alpha<extra></extra>",
        "showlegend": False,
    }
    lengths = rounded(gains - 1)
    if named:
        figure.add_trace(go.Bar(x=lengths, y=along, orientation="h", width=0.62, **bars))
        ends = np.fmax(np.fmax(gains, limits), 1).round(4).tolist()
        figure.add_trace(end_labels(ends, along, [f"{gain:.3f}" for gain in gains]))
    else:
        figure.add_trace(go.Bar(x=along, y=lengths, **bars))
    if bool(np.isfinite(limits).any()):
        limit = BY_COLUMN["limit"]
        marker = {
            "color": limit.color,
            "symbol": "line-ns-open",
            "size": 14,
            "line": {"width": 2, "color": limit.color},
        }
        if not named:
            marker |= {"symbol": "line-ew-open", "size": 5, "line": {"width": 1.5, "color": limit.color}}
        marks = rounded(limits)
        figure.add_trace(
            go.Scatter(
                x=marks if named else along,
                y=along if named else marks,
                mode="markers",
                name=limit.label,
                showlegend=True,
                marker=marker,
                hoverinfo="skip",
            )
        )
    line = {"line": {"color": MUTED, "width": 1.5}, "layer": "below"}
    if named:
        figure.add_vline(x=1, **line)
    else:
        figure.add_hline(y=1, **line)
    return figure


def _along(frame: pd.DataFrame, named: bool) -> list[float | None]:
    """Coordinates of the sites on the axis that is not the loss: row numbers, or positions in the network."""
    return [float(index) for index in range(len(frame))] if named else rounded(frame["position"])


def _hover_names(frame: pd.DataFrame) -> list[str]:
    names = short_names(frame["site"].astype(str).tolist(), width=60)
    return [
        name if count == 1 else f"{name} and {count - 1} more"
        for name, count in zip(names, frame["merged"], strict=True)
    ]
