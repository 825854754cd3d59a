"""Results as short sentences and labelled lines, the same in the report, in a study's note and in a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from alphasmith.objectives.text import duration, number, size_text, with_times
from alphasmith.storage.database.urls import mask

Facts: TypeAlias = list[tuple[str, str]]

#: Alphas this close to the end of a range are inside: they went through decimal text.
_SAME = 1e-6

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
    return ", ".join(f"{label} {number(site.get(column))}" for label, column in parts)


def choices_of_site(site: Row) -> str:
    """What was chosen at a site beside its alphas, e.g. ``K 4 (kmeans, absmax), shift, range x0.93 (percentile)``.

    Where all groups have the same alpha, that is said in place of their number.

    Args:
        site: A row of the site frame. The columns ``groups``, ``coefficients``, ``grouping``, ``statistic``, ``shift``, ``range_statistic``
            and ``range_factor`` are optional; what is missing or the plain rule is left out.
    """
    parts = []
    made_by = ", ".join(str(site[key]) for key in ("grouping", "statistic") if site.get(key))
    if not _missing(site.get("groups")) and int(site["groups"]):
        grouped = f"K {int(site['groups'])}" + (f" ({made_by})" if made_by else "")
        used = site["coefficients"] if not _missing(site.get("coefficients")) else int(site["groups"])
        parts.append({0: "no smoothing", 1: "one alpha"}.get(int(used), grouped))
    if site.get("shift") is True or str(site.get("shift")) == "True":
        parts.append("shift")
    factor = number(float(site.get("range_factor") or 1.0))
    if site.get("range_statistic") not in (None, "", "absmax") and factor != number(1.0):
        parts.append(f"range x{factor} ({site['range_statistic']})")
    return ", ".join(parts)


def verdict_of_refinement(refinement: Mapping[str, Any]) -> str:
    """What the refinement at the model's output did, in one sentence.

    Args:
        refinement: The manifest's entry, see ``output.entries.RefinementEntry``.

    Returns:
        E.g. ``accepted: output loss 1.23e-3 -> 1.10e-3 (difference 1.30e-4 +- 2.00e-5)``, that a simpler choice is no worse, or why
        nothing was changed.
    """
    if not refinement.get("accepted"):
        loss = refinement.get("before")
        kept = "" if _missing(loss) else f"; the output loss stays {number(loss)}"
        return f"not accepted: {refinement.get('reason') or 'no reason given'}{kept}"
    before, after = (number(refinement.get(key)) for key in ("before", "after"))
    found = [refinement.get(key) for key in ("difference", "standard_error")]
    # Only a simpler choice is taken without a fall beyond the scatter.
    simpler = not any(map(_missing, found)) and float(found[0] or 0.0) <= float(found[1] or 0.0)
    why = ", being simpler and no worse beyond the noise" if simpler else ""
    return f"accepted{why}: output loss {before} -> {after}{_difference(refinement)}"


def _difference(refinement: Mapping[str, Any]) -> str:
    if _missing(refinement.get("difference")):
        return ""
    error = refinement.get("standard_error")
    scatter = "" if _missing(error) else f" +- {number(error)}"
    return f" (difference {number(refinement['difference'])}{scatter})"


def is_outside(alpha: Any, low: Any, high: Any) -> Any:
    """Whether a chosen alpha lies outside the range that its group was given; of numbers, or of columns of a frame."""
    return (alpha < low - _SAME) | (alpha > high + _SAME)


def offset_text(offset: float) -> str:
    """A group's own factor from its logarithm, e.g. ``x1.22``; empty for none."""
    return "" if _missing(offset) or offset == 0 else f"x{number(math.exp(offset))}"


def facts_of(value: Any, trail: str = "", *, unit: str = "") -> Facts:
    """A nested value as (label, text) lines; None and empty lists are left out.

    Args:
        value: Mappings, lists and scalars, as parsed from JSON.
        trail: Label so far.
        unit: Unit of every number inside, when the keys do not tell: ``bytes``.
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [
            fact
            for key, item in value.items()
            for fact in facts_of(
                item, f"{trail} · {_label(key)}" if trail else _label(key), unit=unit or _unit(str(key))
            )
        ]
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, (Mapping, list, tuple)) for item in value):
            return [fact for index, item in enumerate(value) for fact in _record(item, f"{trail} {index + 1}".strip())]
        return [(trail, ", ".join(value_text(item, unit) for item in value))] if value else []
    return [(trail, value_text(value, unit))]


def value_text(value: Any, unit: str = "") -> str:
    """One value with its unit; passwords in addresses are masked.

    Args:
        value: A scalar, or something nested that is shown as JSON.
        unit: ``bytes``, ``bytes/s``, ``seconds``, ``count`` or nothing.
    """
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if unit in {"bytes", "bytes/s"}:
            return size_text(float(value)) + unit.removeprefix("bytes")
        if unit == "seconds":
            return duration(float(value))
        if isinstance(value, int):
            return f"{value:,}" if unit == "count" else str(value)
        return f"{value:.6g}" if 1e-2 <= abs(value) < 1e6 or value == 0 else number(value)
    text = with_times(value if isinstance(value, str) else json.dumps(value, default=str))
    return mask(text) if "://" in text else text


def _record(item: Any, place: str) -> Facts:
    """One entry of a list: a record is named by what it is about, not by its place."""
    if not isinstance(item, Mapping):
        return [(place, value_text(item))]
    about = next((key for key in ("path", "site", "name") if item.get(key)), None)
    rest = [f"{_label(key)} {value_text(value, _unit(str(key)))}" for key, value in item.items() if key != about]
    return [(str(item[about]) if about else place, "; ".join(rest))]


def _label(key: Any) -> str:
    name = str(key)
    return (
        name if "." in name else name.replace("_", " ").strip()
    )  # with a dot: a module of the model, which keeps its name


def _unit(key: str) -> str:
    if key == "bandwidth":
        return "bytes/s"
    if key in {"memory", "bytes"} or key.endswith("_bytes"):
        return "bytes"
    if key.endswith("seconds"):
        return "seconds"
    return "count" if key in {"parameter_count", "threads", "channels", "rows", "tokens"} else ""


def _missing(value: Any) -> bool:
    return value is None or math.isnan(float(value))
