"""Size against what was lost: the trials of a joint compression and the front of those within the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from alphasmith.dashboards.figures._theme import BY_COLUMN, MUTED, OURS, WORSE, log_axis, rounded, styled, text
from alphasmith.objectives.text import shortened


def size_against(metric: str, unit: str, trials: Sequence[Mapping[str, Any]], *, limit: float | None) -> go.Figure:
    """Stored bytes of every trial against how much worse a metric became.

    Args:
        metric: Its name.
        unit: Its unit; empty: none.
        trials: As in the manifest: ``number``, ``stored_bytes``, ``drops``, ``within``, ``on_front``, ``written``, ``told``.
        limit: Largest drop that is tolerated; None: it has no limit.
    """
    known = [trial for trial in trials if trial["drops"].get(metric) is not None]
    sizes = [trial["stored_bytes"] for trial in known]
    lost = f"{text(metric)} lost" + (f" [{text(unit)}]" if unit else "")
    figure = styled(
        f"Size against {text(metric)}",
        height=420,
        x=log_axis(sizes, "stored bytes"),
        y={"title": {"text": lost}, "zeroline": True},
    )
    groups = (
        ("beyond the limits", WORSE, "x-thin-open", False, False),
        ("within the limits", MUTED, "circle-open", True, False),
        ("front", OURS, "circle", True, True),
    )
    for name, color, symbol, within, best in groups:
        shown = [trial for trial in known if (trial["within"], trial["on_front"]) == (within, best)]
        figure.add_trace(
            go.Scatter(
                x=[trial["stored_bytes"] for trial in shown],
                y=rounded(trial["drops"][metric] for trial in shown),
                mode="markers",
                name=name,
                marker={"color": color, "symbol": symbol, "size": 9, "line": {"width": 2, "color": color}},
                text=[text(f"trial {trial['number']}: {shortened(str(trial['told']), 90)}") for trial in shown],
                hovertemplate="%{text}<br>%{x:,} bytes, %{y}<extra></extra>",
            )
        )
    written = [trial for trial in known if trial["written"]]
    figure.add_trace(
        go.Scatter(
            x=[trial["stored_bytes"] for trial in written],
            y=rounded(trial["drops"][metric] for trial in written),
            mode="markers",
            name="written",
            marker={
                "symbol": "diamond-open",
                "size": 16,
                "color": BY_COLUMN["best_single"].color,
                "line": {"width": 2},
            },
            hoverinfo="skip",
        )
    )
    if limit is not None:
        figure.add_hline(y=limit, line={"color": WORSE, "dash": "dot", "width": 1}, annotation_text="limit")
    return figure
