"""Records of a run as rows of plain JSON values: what `show --json` prints and data frames are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from alphasmith.storage.record_types import GroupRecord, Losses, SiteRecord

#: Losses of a site, as they are named on record.
LOSSES = tuple(item.name for item in fields(Losses))
_CHOICES = ("shift", "range_statistic", "range_factor", "grouping", "statistic")
_COUNTS = ("winner", "trials", "exact_evaluations", "seconds", "study_name")

SITE_COLUMNS = [
    *("site", "position", "mode", "reason", "channels"),
    *LOSSES,
    *(f"search_{name}" for name in LOSSES),
    *_COUNTS,
    "groups",
    *_CHOICES,
    "stopped",
]
GROUP_COLUMNS = ["site", "group", "size", "low", "high", "alpha", "magnitude", "explanation", "beta", "offset"]


def site_rows(sites: Iterable[SiteRecord]) -> list[dict[str, Any]]:
    """One row per site.

    Columns: site, position, mode, reason, channels, the held-out losses (identity, alpha_half, best_single,
    best_single_alpha, ours, limit; None where not measured), the same on calibration rows with the prefix ``search_``,
    winner, trials, exact_evaluations, seconds, study_name, groups (K; 0 in scope ``model`` and for sites left alone), shift,
    range_statistic, range_factor, grouping, statistic, stopped (why the search ended; empty where nothing was searched).
    """
    return [
        {
            "site": site.name,
            **{name: getattr(site, name) for name in ("position", "mode", "reason", "channels")},
            **{name: _value(site.held_out, name) for name in LOSSES},
            **{f"search_{name}": _value(site.search, name) for name in LOSSES},
            **{name: getattr(site, name) for name in _COUNTS},
            "groups": len(site.groups),
            **{name: getattr(site, name) for name in _CHOICES},
            "stopped": str((site.facts or {}).get("stopped", "")),
        }
        for site in sites
    ]


def group_rows(sites: Iterable[SiteRecord], model_groups: Iterable[GroupRecord] = ()) -> list[dict[str, Any]]:
    """One row per group.

    Columns: site (empty for groups of the whole model), group, size, low, high, alpha, magnitude, explanation, beta (None: 1 -
    alpha), offset (natural logarithm of the group's own factor; None: none).
    """
    owned = [("", group) for group in model_groups] + [(site.name, group) for site in sites for group in site.groups]
    return [
        {"site": site, "group": group.index, **{name: getattr(group, name) for name in GROUP_COLUMNS[2:]}}
        for site, group in owned
    ]


def _value(losses: Losses | None, name: str) -> float | None:
    value: float | None = None if losses is None else getattr(losses, name)
    return value
