"""Records as pandas frames, for figures, tables and notebooks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from alphasmith.storage.record_types import GroupRecord, SiteRecord, TrialDigest
from alphasmith.storage.records import RunStore
from alphasmith.storage.rows import GROUP_COLUMNS, LOSSES, SITE_COLUMNS, group_rows, site_rows

#: What trials of the refinement at the model's output name in place of a site.
REFINEMENT = "refinement"


def sites_frame(sites: Iterable[SiteRecord]) -> pd.DataFrame:
    """One row per site, columns as :func:`alphasmith.storage.rows.site_rows`; NaN where a loss was not measured."""
    frame = pd.DataFrame(site_rows(sites), columns=SITE_COLUMNS)
    losses = [*LOSSES, *(f"search_{name}" for name in LOSSES), "seconds", "range_factor"]
    counts = ["position", "channels", "trials", "exact_evaluations", "groups"]
    return frame.astype(dict.fromkeys(losses, "float64") | dict.fromkeys(counts, "int64") | {"shift": "bool"})


def groups_frame(sites: Iterable[SiteRecord], model_groups: Iterable[GroupRecord] = ()) -> pd.DataFrame:
    """One row per group, columns as :func:`alphasmith.storage.rows.group_rows`; NaN for None."""
    numbers = ["low", "high", "alpha", "magnitude", "beta", "offset"]
    kinds = dict.fromkeys(numbers, "float64") | dict.fromkeys(["group", "size"], "int64")
    return pd.DataFrame(group_rows(sites, model_groups), columns=GROUP_COLUMNS).astype(kinds)


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
