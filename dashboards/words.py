"""Results as short sentences, the same in the report, in a study's note and in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from alphasmith.dashboards.numbers import number

#: A row of a site frame, or of a table as JSON.
Row: TypeAlias = Mapping[Any, Any]


def verdict_of_site(site: Row) -> str:
    """What the search reached at a site, e.g. ``best single alpha 2.50e-4, ours 2.30e-4, limit 2.20e-4``.

    Args:
        site: A row of the site frame: ``mode``, ``best_single``, ``ours``, ``limit`` (held-out losses, dimensionless).

    Returns:
        Empty where nothing was searched; losses that were not measured are ``n/a``.
    """
    if site.get("mode") == "left" or _missing(site.get("ours")):
        return ""
    parts = (("best single alpha", "best_single"), ("ours", "ours"), ("limit", "limit"))
    return ", ".join(f"{label} {_number(site.get(column))}" for label, column in parts)


def choices_of_site(site: Row) -> str:
    """What was chosen at a site beside its alphas, e.g. ``K 4 (kmeans, absmax), shift, range x0.93 (percentile)``.

    Args:
        site: A row of the site frame. The columns ``groups``, ``grouping``, ``statistic``, ``shift``, ``range_statistic``
            and ``range_factor`` are optional; what is missing or the plain rule is left out.
    """
    parts = []
    made_by = ", ".join(str(site[key]) for key in ("grouping", "statistic") if site.get(key))
    if not _missing(site.get("groups")) and int(site["groups"]):
        parts.append(f"K {int(site['groups'])}" + (f" ({made_by})" if made_by else ""))
    if site.get("shift") is True or str(site.get("shift")) == "True":
        parts.append("shift")
    if site.get("range_statistic") not in (None, "", "absmax"):
        parts.append(f"range x{number(float(site.get('range_factor', 1.0)))} ({site['range_statistic']})")
    return ", ".join(parts)


def verdict_of_refinement(refinement: Mapping[str, Any]) -> str:
    """What the refinement at the model's output did, in one sentence.

    Args:
        refinement: The manifest's entry, see ``manifest_parts.RefinementEntry``.

    Returns:
        E.g. ``accepted: output loss 1.23e-3 -> 1.10e-3 (difference 1.30e-4 +- 2.00e-5)``, or why nothing was changed.
    """
    if not refinement.get("accepted"):
        loss = refinement.get("before")
        kept = "" if _missing(loss) else f"; the output loss stays {_number(loss)}"
        return f"not accepted: {refinement.get('reason') or 'no reason given'}{kept}"
    before, after = (_number(refinement.get(key)) for key in ("before", "after"))
    return f"accepted: output loss {before} -> {after}{_difference(refinement)}"


def _difference(refinement: Mapping[str, Any]) -> str:
    if _missing(refinement.get("difference")):
        return ""
    error = refinement.get("standard_error")
    scatter = "" if _missing(error) else f" +- {_number(error)}"
    return f" (difference {_number(refinement['difference'])}{scatter})"


def offset_text(offset: float) -> str:
    """A group's own factor from its logarithm, e.g. ``x1.22``; empty for none."""
    return "" if _missing(offset) or offset == 0 else f"x{number(math.exp(offset))}"


def _missing(value: Any) -> bool:
    return value is None or math.isnan(float(value))


def _number(value: Any) -> str:
    return "n/a" if _missing(value) else number(float(value))
