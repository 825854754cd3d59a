"""Search history: losses by trial number, of one study or of many."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from alphasmith.dashboards.checked_frames import checked_trials
from alphasmith.dashboards.figures._theme import BY_COLUMN, MUTED, OURS, WORSE, log_axis, rounded, spread, styled
from alphasmith.objectives.text import number

#: Most trials drawn one by one; longer studies keep the best trial of every stretch.
MOST_TRIALS = 1000
#: Trial kinds that every search starts with, and the series they belong to.
BASELINES = {"identity": "identity", "alpha_0.5": "alpha_half", "best_single": "best_single"}
#: Optuna's name and our records' name of the same end.
_LOST = ("FAIL", "FAILED", "PRUNED")
_TITLE = "Search history"


def trial_history(trials: pd.DataFrame) -> go.Figure:
    """Loss by trial number, the best so far, and the baselines as labelled lines.

    With a ``site`` or ``study_name`` column that names several (one study per site), losses are divided by the best
    single alpha of their site, and the best so far is summarised over the sites.

    Args:
        trials: Trial frame: ``number``, ``kind`` (identity, alpha_0.5, best_single, noise_model, sampler, refined, reused),
            ``loss``, ``state`` (Optuna's names or those of our records, any case); optionally ``site`` or ``study_name``.

    Returns:
        The figure; failed and pruned trials are marks on its lower edge, never points with a made-up loss.

    Raises:
        InputError: A column is missing or not numeric.
        NonFiniteError: A loss is infinite.
    """
    frame = checked_trials(trials)
    state = frame["state"].astype(str).str.upper()
    done = frame[(state == "COMPLETE") & (frame["loss"] > 0)]
    if done.empty:
        figure = styled(_TITLE, height=180, x={"visible": False}, y={"visible": False})
        figure.add_annotation(
            text=f"{len(frame)} trials, none complete yet",
            x=0.5,
            y=0.5,
            xref="paper",
            yref="paper",
            showarrow=False,
            font={"color": MUTED},
        )
        return figure
    studies = next((column for column in ("site", "study_name") if column in frame.columns), None)
    if studies is not None and frame[studies].nunique() > 1:
        return _many(done.assign(site=done[studies]))
    return _one(done, frame[state.isin(_LOST)])


def _one(done: pd.DataFrame, lost: pd.DataFrame) -> go.Figure:
    # No smoothing is often 50 times worse than anything tried later: it gets a label on the edge, not the axis.
    tried_loss = done.loc[done["kind"] != "identity", "loss"]
    visible = tried_loss if not tried_loss.empty else done["loss"]
    axis = log_axis(visible.tolist(), "loss (relative squared error)")
    figure = styled(_TITLE, height=420, x={"title": {"text": "trial"}, "rangemode": "tozero"}, y=axis)
    figure.update_layout(margin={"r": 104})
    tried = done[~done["kind"].isin(list(BASELINES))]
    proposed = tried["kind"].isin(["noise_model", "model"])
    for kind, label, symbol in (("model", "proposed by the noise model", "diamond"), ("sampler", "sampled", "circle")):
        # An unknown kind is drawn with the sampled ones: a trial is never silently dropped.
        part = tried[proposed] if kind == "model" else tried[~proposed]
        part = _best_of_stretches(part)
        if part.empty:
            continue
        color = BY_COLUMN["limit"].color if kind == "model" else "#8db4dd"
        figure.add_trace(
            go.Scatter(
                x=[int(value) for value in part["number"]],
                y=rounded(part["loss"]),
                mode="markers",
                name=label,
                marker={"color": color, "symbol": symbol, "size": 9 if kind == "model" else 6},
                hovertemplate="trial %{x}<br>loss %{y:.4~g}<extra></extra>",
            )
        )
    best = done.assign(best=done["loss"].cummin())
    steps = best[best["best"].diff().fillna(-1.0) < 0]
    figure.add_trace(
        go.Scatter(
            x=[*(int(value) for value in steps["number"]), int(done["number"].max())],
            y=rounded([*steps["best"], best["best"].iloc[-1]]),
            mode="lines",
            name="best so far",
            line={"color": OURS, "width": 2.5, "shape": "hv"},
            hovertemplate="best so far %{y:.4~g}<extra></extra>",
        )
    )
    if not lost.empty:
        shown = lost.iloc[:: math.ceil(len(lost) / 150)]
        figure.add_trace(
            go.Scatter(
                x=[int(value) for value in shown["number"]],
                y=[float(f"{10 ** axis['range'][0]:.6g}")] * len(shown),
                mode="markers",
                name=f"failed or pruned ({len(lost)})",
                marker={"color": WORSE, "symbol": "x-thin-open", "size": 7, "line": {"width": 1.2}},
                cliponaxis=False,
                hovertemplate="trial %{x}: failed or pruned<extra></extra>",
            )
        )
    lines = [
        (series, float(done.loc[done["kind"] == kind, "loss"].iloc[0]))
        for kind, series in BASELINES.items()
        if bool((done["kind"] == kind).any())
    ]
    _add_baselines(figure, lines, (axis["range"][0], axis["range"][1]))
    return figure


def _add_baselines(figure: go.Figure, lines: list[tuple[str, float]], window: tuple[float, float]) -> None:
    """Dashed lines with their names beside the plot, moved apart where they would overlap."""
    labels = {"identity": "no smoothing", "alpha_half": "alpha 0.5", "best_single": "best single"}
    # About 290 of the 420 pixels are plot; a two-line label needs 32 of them.
    wanted = [min(math.log10(value), window[1]) for _, value in lines]
    positions = spread(wanted, (window[1] - window[0]) * 34 / 290)
    for (column, value), position in zip(lines, positions, strict=True):
        color = BY_COLUMN[column].color
        above = math.log10(value) > window[1]
        if not above:
            figure.add_hline(
                y=float(f"{value:.5g}"), line={"color": color, "width": 1.3, "dash": "dash"}, layer="below"
            )
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="left",
            xshift=6,
            y=round(position, 4),
            yref="y",
            yanchor="middle",
            align="left",
            showarrow=False,
            text=f"{labels[column]}<br>{number(value)}{' ↑' if above else ''}",
            font={"color": color, "size": 12},
        )


def _best_of_stretches(part: pd.DataFrame) -> pd.DataFrame:
    if len(part) <= MOST_TRIALS:
        return part
    stretch = (np.arange(len(part)) * MOST_TRIALS) // len(part)
    return part.loc[part.groupby(stretch)["loss"].idxmin()]


def _many(done: pd.DataFrame) -> go.Figure:
    """Best so far over the best single alpha, over all sites: median and the middle 80 % of the sites."""
    reference = done[done["kind"] == "best_single"].groupby("site")["loss"].first()
    frame = done[done["site"].isin(reference.index)].copy()
    relative = not frame.empty
    if not relative:
        frame, reference = done.copy(), done.groupby("site")["loss"].first()
    frame["best"] = frame.groupby("site")["loss"].cummin() / frame["site"].map(reference)
    table = frame.pivot_table(index="number", columns="site", values="best", aggfunc="min").sort_index().ffill()
    if len(table) > MOST_TRIALS:
        table = table.iloc[:: math.ceil(len(table) / MOST_TRIALS)]
    low, middle, high = (table.quantile(share, axis=1) for share in (0.1, 0.5, 0.9))
    unit = "best single alpha" if relative else "first trial"
    # The first trials are the baselines themselves, far above everything that follows; the line enters from the top.
    last = float(high.iloc[-1])
    values = [value for value in [*low, *high] if value <= 1.5 * max(last, 1.0)]
    axis = log_axis([*values, 1.0], f"best so far / {unit}")
    figure = styled(_TITLE, height=400, x={"title": {"text": "trial of every site"}, "rangemode": "tozero"}, y=axis)
    numbers = [int(value) for value in table.index]
    edge: dict[str, Any] = {"mode": "lines", "line": {"width": 0, "shape": "hv"}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=numbers, y=rounded(low), showlegend=False, **edge))
    band = {"fill": "tonexty", "fillcolor": "rgba(34,118,201,0.18)", "name": "middle 80 % of the sites"}
    figure.add_trace(go.Scatter(x=numbers, y=rounded(high), **edge, **band))
    figure.add_trace(
        go.Scatter(
            x=numbers,
            y=rounded(middle),
            mode="lines",
            name=f"median of {table.shape[1]} sites",
            line={"color": OURS, "width": 2.5, "shape": "hv"},
            hovertemplate="trial %{x}<br>median %{y:.4~g}<extra></extra>",
        )
    )
    figure.add_hline(y=1, line={"color": MUTED, "width": 1.3, "dash": "dash"}, layer="below")
    return figure
