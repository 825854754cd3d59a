"""The manifest's nested values as short labelled lines, with units, for people."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from alphasmith.dashboards.numbers import number
from alphasmith.storage.urls import mask

Facts = list[tuple[str, str]]

_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|\+00:00)")


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
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = _MOMENT.sub(r"\1 \2 UTC", text)
    return mask(text) if "://" in text else text


def size_text(count: float) -> str:
    """Bytes in binary units, e.g. ``8 GiB``."""
    if not math.isfinite(count):
        return "n/a"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def duration(seconds: float) -> str:
    """Seconds as people read them, e.g. ``8.4 s``, ``14 min`` or ``3.2 h``."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _record(item: Any, place: str) -> Facts:
    """One entry of a list: a record is named by what it is about, not by its place."""
    if not isinstance(item, Mapping):
        return [(place, value_text(item))]
    about = next((key for key in ("path", "site", "name") if item.get(key)), None)
    rest = [f"{_label(key)} {value_text(value, _unit(str(key)))}" for key, value in item.items() if key != about]
    return [(str(item[about]) if about else place, "; ".join(rest))]


def _label(key: Any) -> str:
    return str(key).replace("_", " ").strip()


def _unit(key: str) -> str:
    if key == "bandwidth":
        return "bytes/s"
    if key in {"memory", "bytes"} or key.endswith("_bytes"):
        return "bytes"
    if key.endswith("seconds"):
        return "seconds"
    return "count" if key in {"parameter_count", "threads", "channels", "rows", "tokens"} else ""
