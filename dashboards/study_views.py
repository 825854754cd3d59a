"""Our figures and a note inside the Optuna dashboard.

The dashboard cuts figures into study attributes of 2 kB and reads all of them at every poll of the study list, so a study
gets two figures and one note under fixed names, refreshed in place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
import plotly.graph_objects as go
from optuna_dashboard import save_note, save_plotly_graph_object

from alphasmith.dashboards.checked_frames import checked_sites, geometric_mean, ratio
from alphasmith.dashboards.compression_report import compression_sentence, front_grid
from alphasmith.dashboards.figures.compression import size_against
from alphasmith.dashboards.figures.formats import loss_against_cost
from alphasmith.dashboards.figures.sites import losses_by_site, trial_history
from alphasmith.dashboards.figures.training import training_curve
from alphasmith.dashboards.text import Facts, Row, choices_of_site, facts_of, verdict_of_site
from alphasmith.dashboards.verdict import format_grid, formats_verdict
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import counted, number, one_line

if TYPE_CHECKING:  # it knows packed models, and so torch
    from alphasmith.storage.output.compression_manifest import CompressionManifest

LOSSES_ID = "alphasmith-losses"
HISTORY_ID = "alphasmith-history"
#: Largest figure or note [characters]; figures.py aggregates to stay below it.
MOST_CHARACTERS = 100_000
#: The dashboard's cards are half a page wide and this high [pixels], toolbar included; what is longer is cut off.
_CARD_HEIGHT = 450
#: Most named rows that fit into a card beside legend and axis.
_ROWS = 12
#: Most sites listed in a note; the report lists all.
_LISTED = 20
#: Most trials in the figure of a compression.
_POINTS = 100


def annotate_study(study: optuna.Study, *, sites: pd.DataFrame, trials: pd.DataFrame, note: str) -> None:
    """Put the losses by site, the search history and a note into a study, replacing what was there under the same names.

    Safe to repeat at any time of a search; the trials themselves are not touched.

    Args:
        study: Any study whose storage takes attributes.
        sites: Site frame, of one site or of all.
        trials: Trial frame.
        note: Markdown, e.g. from :func:`study_note`.

    Raises:
        InputError: A frame lacks a column, or the note or a figure is above 100 000 characters. Nothing is written then.
        NonFiniteError: A frame holds an infinite loss.
    """
    figures = {
        LOSSES_ID: _card(losses_by_site(sites, named_sites=_ROWS)),
        HISTORY_ID: _card(trial_history(trials)),
    }
    lengths = {"note": len(note)} | {name: len(figure.to_json()) for name, figure in figures.items()}
    for name, length in lengths.items():
        if length > MOST_CHARACTERS:
            raise InputError(
                name, f"has {length} characters, more than {MOST_CHARACTERS}", "put the details into the report"
            )
    for name, figure in figures.items():
        save_plotly_graph_object(study, figure, graph_object_id=name)
    save_note(study, note)


def annotate_training(study: optuna.Study, entry: Mapping[str, Any]) -> None:
    """Put the curve and a note into the study that chose the settings of a training, and name what its trials are judged by.

    Args:
        study: The study.
        entry: The manifest's section ``training`` as JSON values.
    """
    chosen = entry["study"]["chosen"]
    facts = facts_of(
        {"run": entry["parent"], "training": entry["id"], "kept": entry["kept"], "reason": entry["reason"]}
    )
    facts += facts_of({"chosen": chosen})
    lines = ["## Settings of a training", "", "| asked | |", "|---|---|"]
    lines += [f"| {_cell(label)} | {_cell(value)} |" for label, value in facts]
    save_plotly_graph_object(study, _card(training_curve(entry)), graph_object_id=HISTORY_ID)
    save_note(study, "\n".join([*lines, ""]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["held-out loss against the labels"])  # the axis label


def annotate_compression(
    study: optuna.Study, manifest: CompressionManifest, trials: Sequence[Mapping[str, Any]]
) -> None:
    """Put size against the first metric and a note with the front into the study of a compression.

    Args:
        study: The study.
        manifest: Of the result.
        trials: Trials that were measured, see :func:`~alphasmith.dashboards.figures.compression.size_against`.
    """
    columns, rows = front_grid(manifest)
    lines = ["## Joint compression", "", _cell(compression_sentence(manifest)), ""]
    lines += [f"| {' | '.join(map(_cell, columns))} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows[:_LISTED]]
    metric = manifest.metrics[0]
    # The dashboard keeps few characters: the front, and as many others as fit.
    shown = [trial for trial in trials if trial["on_front"]] + [trial for trial in trials if not trial["on_front"]]
    figure = size_against(metric.name, metric.unit, shown[:_POINTS], limit=None)
    save_plotly_graph_object(study, _card(figure), graph_object_id=HISTORY_ID)
    save_note(study, "\n".join([*lines, ""]))
    timed = any(entry.milliseconds is not None for entry in manifest.front)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["stored bytes", "latency [s]"] if timed else ["stored bytes"])


def annotate_formats(study: optuna.Study, manifest: Mapping[str, Any]) -> None:
    """Put output loss against cost and a note with the front into the study of the formats of sites.

    Args:
        study: The study.
        manifest: Of the run, as JSON values; its section ``formats`` is shown.
    """
    columns, rows = format_grid(manifest["formats"])
    lines = ["## Formats of sites", "", _cell(formats_verdict(manifest)), ""]
    lines += [f"| {' | '.join(map(_cell, columns))} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows[:_LISTED]]
    save_plotly_graph_object(study, _card(loss_against_cost(manifest["formats"])), graph_object_id=HISTORY_ID)
    save_note(study, "\n".join([*lines, ""]))


def study_note(title: str, sites: pd.DataFrame, facts: Mapping[str, Any] | None = None) -> str:
    """The note of a study: what was asked, the result in numbers, the sites that gained most.

    Args:
        title: Heading, usually the name of the run or of the site.
        sites: Site frame.
        facts: What was asked, as labels and values (nested mappings are flattened, passwords masked).

    Returns:
        Markdown without HTML; names and values cannot break out of their table cells.

    Raises:
        InputError: A column is missing or not numeric.
        NonFiniteError: A loss is infinite.
    """
    frame = checked_sites(sites)
    frame = frame.assign(gain=ratio(frame["ours"], frame["best_single"]).where(frame["mode"] != "left"))
    done = frame[(frame["mode"] != "left") & (frame["ours"] > 0)]
    lines = [f"## {_cell(title)}", ""]
    asked: Facts = facts_of(facts or {})
    if asked:
        lines += ["| asked | |", "|---|---|", *(f"| {_cell(label)} | {_cell(value)} |" for label, value in asked), ""]
    if done.empty:
        return "\n".join([*lines, "No site has been searched yet.", ""])
    means = {
        label: geometric_mean(ratio(done["ours"], done[column]))
        for column, label in (
            ("identity", "no smoothing"),
            ("alpha_half", "alpha 0.5"),
            ("best_single", "best single alpha"),
        )
    }
    compared = ", ".join(f"**{100 * mean:.3g} %** of {label}" for label, mean in means.items() if math.isfinite(mean))
    lines += [
        f"Held-out loss of the {counted(len(done), 'searched site')}: {compared or 'no baseline'}.",
        "",
    ]
    best = done.sort_values("gain", kind="stable", na_position="last").head(_LISTED)
    if len(done) > _LISTED:
        lines += [f"The {_LISTED} sites that gained most:", ""]
    lines += [
        "| site | no smoothing | alpha 0.5 | best single | searched | limit | gain | chosen |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    shown = ["identity", "alpha_half", "best_single", "ours", "limit", "gain"]
    rows = best.to_dict("records")
    for row in rows:
        numbers = " | ".join(number(row[column]) for column in shown)
        lines.append(f"| {_cell(row['site'])} | {numbers} | {_cell(choices_of_site(row))} |")
    lines += ["", *(f"- {_cell(row['site'])}: {verdict_of_site(row)}{_stopped(row)}" for row in rows)]
    return "\n".join([*lines, ""])


def _stopped(row: Row) -> str:
    why = row.get("stopped")
    return f" (stopped: {_cell(why)})" if isinstance(why, str) and why else ""


def _card(figure: go.Figure) -> go.Figure:
    """The figure for a card: the legend wraps there, and above the plot it would run into title and toolbar."""
    figure.update_layout(
        height=_CARD_HEIGHT,
        title={"font": {"size": 14}, "xref": "container", "x": 0.03},
        legend={"y": -0.2, "yanchor": "top", "font": {"size": 11}},
        margin={"t": 60},
    )
    return figure


def _cell(value: object) -> str:
    """Text that Markdown shows as it is."""
    text = one_line(value)
    for mark in "\\`*_[]|$<>":
        text = text.replace(mark, f"\\{mark}")
    return text
