"""The per-site table of the report: what is shown and what it is sorted by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from alphasmith.dashboards.checked_frames import ratio
from alphasmith.dashboards.text import Row, choices_of_site, verdict_of_site
from alphasmith.objectives.text import number
from alphasmith.storage.database.urls import mask

#: Heading and kind of every column; losses are held-out relative squared errors.
SITE_TABLE = (
    ("#", "number"),
    ("site", "text"),
    ("treatment", "text"),
    ("channels", "number"),
    ("no smoothing", "number"),
    ("alpha 0.5", "number"),
    ("best single", "number"),
    ("its alpha", "number"),
    ("searched", "number"),
    ("limit", "number"),
    ("gain", "number"),
    ("share of output error", "number"),
    ("trials", "number"),
    ("seconds", "number"),
)
#: Winners that are baselines, as a reader expects them.
BASELINES = {
    "identity": "kept: no smoothing",
    "alpha_0.5": "kept: alpha 0.5",
    "best_single": "kept: best single alpha",
}
#: Winners that are told apart.
KEPT = BASELINES | {"refined": "refined at the model's output"}
_MODES = {"fold": "folded", "explicit": "explicit multiply", "left": "left alone"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell.

    Attributes:
        text: What is shown.
        key: What the column is sorted by; empty sorts last.
        notes: Further, smaller lines.
    """

    text: str
    key: str
    notes: tuple[str, ...] = ()


def site_rows(sites: pd.DataFrame) -> list[list[Cell]]:
    """Rows of the table, in network order, one cell per entry of ``SITE_TABLE``.

    Args:
        sites: A checked site frame; optional columns: ``kind`` (of its operators), ``reason`` (why it is not folded), ``winner`` (kind of
            the winning trial; a baseline is mentioned), ``stopped`` and what ``text.choices_of_site`` reads.
    """
    gains = ratio(sites["ours"], sites["best_single"]).where(sites["mode"] != "left")
    rows: list[list[Cell]] = []
    for index, (row, gain) in enumerate(zip(sites.to_dict("records"), gains, strict=True)):
        name, mode = str(row["site"]), str(row["mode"])
        reason = str(row.get("reason") or "")
        if not reason and mode != "left":
            reason = KEPT.get(str(row.get("winner")), "")
        treatment = _MODES.get(mode, mode)
        masked = mask(reason) if "://" in reason else reason
        rows.append(
            [
                Cell(text=str(index), key=str(index)),
                Cell(text=name, key=name, notes=_told(str(row.get("kind") or ""), verdict_of_site(row))),
                Cell(text=treatment, key=treatment, notes=_told(masked, choices_of_site(row), _stopped(row))),
                Cell(text=str(row["channels"]), key=str(row["channels"])),
                *(_number(row[key]) for key in ("identity", "alpha_half", "best_single", "best_single_alpha")),
                *(_number(value) for value in (row["ours"], row["limit"], gain)),
                _share(row),
                Cell(text=str(row["trials"]), key=str(row["trials"])),
                _number(row["seconds"], f"{row['seconds']:.1f}"),
            ]
        )
    return rows


def _told(*notes: str) -> tuple[str, ...]:
    return tuple(note for note in notes if note)


def _stopped(row: Row) -> str:
    why = row.get("stopped")
    return f"stopped: {why}" if isinstance(why, str) and why else ""


def _share(row: Row) -> Cell:
    """Its part of the output's error; the measured one in a line of its own, or alone where nothing was predicted."""
    predicted, measured = float(row["share"]), float(row["share_measured"])
    told = f"measured {100 * measured:.1f} %" if math.isfinite(measured) else ""
    if not math.isfinite(predicted):
        return Cell(text=told or number(predicted), key=repr(measured) if told else "")
    return Cell(text=f"{100 * predicted:.1f} %", key=repr(predicted), notes=_told(told))


def _number(value: float, text: str | None = None) -> Cell:
    finite = math.isfinite(value)
    return Cell(text=text if text and finite else number(value), key=repr(float(value)) if finite else "")
