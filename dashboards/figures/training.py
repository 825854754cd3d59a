"""The curve of a training: losses by updates, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from alphasmith.dashboards.figures._theme import BY_COLUMN, MUTED, OURS, log_axis, rounded, styled, text


def training_curve(entry: Mapping[str, Any]) -> go.Figure:
    """Losses on trained and held-out samples by updates, the point that was best marked.

    Args:
        entry: The manifest's section ``training`` as JSON values.
    """
    points: Sequence[Mapping[str, Any]] = entry["curve"]
    values = [point[name] for point in points for name in ("train_loss", "held_out_loss") if point[name] is not None]
    plain = min(values, default=0.0) <= 0  # a hinge may be 0, which no logarithm shows
    axis = (
        {"title": {"text": "loss"}, "rangemode": "tozero"}
        if plain
        else log_axis(values, "loss, on a logarithmic scale")
    )
    figure = styled("Training", height=380, x={"title": {"text": "updates"}, "rangemode": "tozero"}, y=axis)
    names = {"train_loss": "trained on (mean since the last look)", "held_out_loss": "held out"}
    colors = {"train_loss": MUTED, "held_out_loss": OURS}
    for name, label in names.items():
        shown = [point for point in points if point[name] is not None and (plain or point[name] > 0)]
        metric = entry.get("metric_name")
        hover = [f"{text(metric)} {point['metric']:.4g}" if point["metric"] is not None else "" for point in shown]
        figure.add_trace(
            go.Scatter(
                x=[point["step"] for point in shown],
                y=rounded(point[name] for point in shown),
                mode="lines+markers",
                cliponaxis=False,  # the untrained model lies on the axis
                name=label,
                line={"color": colors[name], "dash": "dot" if name == "train_loss" else "solid"},
                marker={"symbol": "square-open" if name == "train_loss" else "circle", "size": 7},
                text=hover if name == "held_out_loss" else None,
                hovertemplate="%{x} updates: %{y}"
                + (" %{text}" if name == "held_out_loss" else "")
                + "<extra></extra>",
            )
        )
    best = next((point for point in points if point["step"] == entry["best_step"]), points[0])
    if plain or best["held_out_loss"] > 0:
        figure.add_trace(
            go.Scatter(
                x=[best["step"]],
                y=rounded([best["held_out_loss"]]),
                mode="markers",
                cliponaxis=False,
                name="kept" if entry["kept"] else "the best, not kept" if entry["best_step"] else "untrained, kept",
                marker={"symbol": "diamond-open", "size": 14, "color": BY_COLUMN["best_single"].color},
                hovertemplate="the best: %{x} updates, %{y}<extra></extra>",
            )
        )
    return figure
