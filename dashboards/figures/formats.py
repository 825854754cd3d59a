"""Output loss against cost: the choices of formats of sites that were measured, and their front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from alphasmith.dashboards.figures._theme import BY_COLUMN, MUTED, OURS, log_axis, rounded, styled, text
from alphasmith.objectives.quantization.formats import told
from alphasmith.objectives.text import number, shortened


def loss_against_cost(entry: Mapping[str, Any]) -> go.Figure:
    """Every choice that was measured, the front as a line, what was predicted of it, and what was picked.

    Args:
        entry: The manifest's section ``formats`` as JSON values.
    """
    points: Sequence[Mapping[str, Any]] = [point for point in entry["points"] if point["loss"]]
    losses = [value for point in points for value in (point["loss"], point["predicted"]) if value]
    figure = styled(
        "Output loss against cost of the formats",
        height=420,
        x={"title": {"text": text(entry["cost_unit"])}, "rangemode": "tozero"},
        y=log_axis(losses, "loss at the model's output"),
    )
    front = sorted((point for point in points if point["on_front"]), key=lambda point: (point["cost"], point["number"]))
    others = [point for point in points if not point["on_front"]]
    picked = [point for point in points if point["number"] == entry["picked"]]
    figure.add_trace(_marks(entry, others, "measured", {"color": MUTED, "symbol": "circle-open", "size": 8}))
    line = _marks(entry, front, "front", {"color": OURS, "symbol": "circle", "size": 9})
    # The cheapest that is as good or better: losses do not fall between two points.
    line.update(mode="lines+markers", line={"color": OURS, "shape": "hv"})
    figure.add_trace(line)
    figure.add_trace(
        go.Scatter(
            x=rounded(point["cost"] for point in front if point["predicted"]),
            y=rounded(point["predicted"] for point in front if point["predicted"]),
            mode="markers",
            name="predicted",
            marker={"color": MUTED, "symbol": "x-thin-open", "size": 8, "line": {"width": 2}},
            hovertemplate="predicted %{y}<extra></extra>",
        )
    )
    mark = {
        "symbol": "diamond-open",
        "size": 16,
        "color": BY_COLUMN["best_single"].color,
        "line": {"width": 2},
    }
    figure.add_trace(_marks(entry, picked, "picked", mark))
    figure.update_traces(cliponaxis=False)  # a choice at no cost lies on the axis
    return figure


def _marks(
    entry: Mapping[str, Any], points: Sequence[Mapping[str, Any]], name: str, marker: Mapping[str, Any]
) -> go.Scatter:
    told_of = [shortened(told(point["formats"], entry["sites"], entry["own"]), 90) for point in points]
    labels = [f"point {point['number']}: {what}" for point, what in zip(points, told_of, strict=True)]
    return go.Scatter(
        x=rounded(point["cost"] for point in points),
        y=rounded(point["loss"] for point in points),
        mode="markers",
        name=name,
        marker=dict(marker),
        text=[text(label) for label in labels],
        customdata=[number(point["loss"]) for point in points],
        hovertemplate="%{text}<br>cost %{x}, output loss %{customdata}<extra></extra>",
    )
