"""Records as pandas frames, for figures, tables and notebooks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import pandas as pd

from alphasmith.storage.record_types import GroupRecord, Losses, SiteRecord, TrialDigest
from alphasmith.storage.records import RunStore

#: What trials of the refinement at the model's output name in place of a site.
REFINEMENT = "refinement"

_LOSSES = tuple(item.name for item in fields(Losses))
_CHOICES = ("shift", "range_statistic", "range_factor", "grouping", "statistic")
_SITE = (
    "position",
    "mode",
    "reason",
    "channels",
    "study_name",
    "winner",
    "trials",
    "exact_evaluations",
    "seconds",
    *_CHOICES,
)


def sites_frame(sites: Iterable[SiteRecord]) -> pd.DataFrame:
    """One row per site.

    Columns: site, position, mode, reason, channels, the held-out losses (identity, alpha_half, best_single,
    best_single_alpha, ours, limit; NaN where not measured), the same on calibration rows with the prefix ``search_``,
    winner, trials, exact_evaluations, seconds, study_name, groups (K; 0 in scope ``model`` and for sites left alone), shift,
    range_statistic, range_factor, grouping, statistic, stopped (why the search ended; empty where nothing was searched).
    """
    columns = ["site", "position", "mode", "reason", "channels", *_LOSSES, *(f"search_{name}" for name in _LOSSES)]
    columns += ["winner", "trials", "exact_evaluations", "seconds", "study_name", "groups", *_CHOICES, "stopped"]
    rows = [
        {
            "site": site.name,
            **{name: getattr(site, name) for name in _SITE},
            **{name: _value(site.held_out, name) for name in _LOSSES},
            **{f"search_{name}": _value(site.search, name) for name in _LOSSES},
            "groups": len(site.groups),
            "stopped": str((site.facts or {}).get("stopped", "")),
        }
        for site in sites
    ]
    frame = pd.DataFrame(rows, columns=columns)
    losses = [*_LOSSES, *(f"search_{name}" for name in _LOSSES), "seconds", "range_factor"]
    counts = ["position", "channels", "trials", "exact_evaluations", "groups"]
    return frame.astype(dict.fromkeys(losses, "float64") | dict.fromkeys(counts, "int64") | {"shift": "bool"})


def groups_frame(sites: Iterable[SiteRecord], model_groups: Iterable[GroupRecord] = ()) -> pd.DataFrame:
    """One row per group.

    Columns: site (empty for groups of the whole model), group, size, low, high, alpha, magnitude, explanation, beta (NaN: 1 -
    alpha), offset (natural logarithm of the group's own factor; NaN: none).
    """
    columns = ["site", "group", "size", "low", "high", "alpha", "magnitude", "explanation", "beta", "offset"]
    owned = [("", group) for group in model_groups] + [(site.name, group) for site in sites for group in site.groups]
    rows = [
        {"site": site, "group": group.index, **{name: getattr(group, name) for name in columns[2:]}}
        for site, group in owned
    ]
    numbers = ["low", "high", "alpha", "magnitude", "beta", "offset"]
    kinds = dict.fromkeys(numbers, "float64") | dict.fromkeys(["group", "size"], "int64")
    return pd.DataFrame(rows, columns=columns).astype(kinds)


def trials_frame(trials: Iterable[TrialDigest]) -> pd.DataFrame:
    """One row per trial: study_name, number, kind, state, loss (NaN when none), seconds, reason, then one column per parameter."""
    columns = ["study_name", "number", "kind", "state", "loss", "seconds", "reason"]
    listed = list(trials)
    names = sorted({name for trial in listed for name in trial.params})
    rows = [
        {
            **trial.params,
            "number": trial.trial_number,
            **{name: getattr(trial, name) for name in columns if name != "number"},
        }
        for trial in listed
    ]
    frame = pd.DataFrame(rows, columns=[*columns, *(name for name in names if name not in columns)])
    return frame.astype({"number": "int64", "loss": "float64", "seconds": "float64"})


def run_frames(store: RunStore, run_id: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Sites, groups and trials of a run as stored; trials name their site (``model`` for the whole model)."""
    sites = store.sites(run_id)
    trials = trials_frame(store.trials(run_id))
    trials["site"] = [str(name).removeprefix(f"{run_id}/") for name in trials["study_name"]]
    return sites_frame(sites), groups_frame(sites, store.groups(run_id)), trials


def frame_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame as plain JSON values; NaN becomes None."""
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=15))
    return rows


def _value(losses: Losses | None, name: str) -> float | None:
    value: float | None = None if losses is None else getattr(losses, name)
    return value
