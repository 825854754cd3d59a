"""What the smaller commands answer, as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alphasmith.objectives.text import counted, one_line, size_text, with_times
from alphasmith.search.cli._layout import table

if TYPE_CHECKING:
    from alphasmith.search.launch.worker import WorkSummary

#: Longest name or reason in the table of runs: a longer one would squeeze the ids [characters].
_LONGEST_CELL = 100


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``alphasmith list``."""
    if not rows:
        return "no runs yet; `alphasmith run` makes one"
    columns = ("id", "name", "status", "scheme", "scope", "created", "reason")
    return table(columns, ([_state(row) if c == "status" else _cell(row[c]) for c in columns] for row in rows))


def worker_text(done: WorkSummary) -> str:
    """``alphasmith worker RUN``: what it did and where the run stands."""
    searched = f"{counted(done.searched, 'site')} of {done.run} searched here; {done.note}"
    if done.finished:
        return f"{searched}\nresults in {done.folder}"
    return f"{searched}\nits result is, or will be, in {done.folder}"


def verify_text(answer: Mapping[str, Any]) -> str:
    """``alphasmith verify DIR``."""
    first = f"{answer['artifacts']} files have the digests of the manifest"
    if "skipped" in answer:
        return f"{first}\nequivalence not checked: {answer['skipped']}"
    return (
        f"{first}\nsmoothed and original model agree on {answer['samples']} samples: relative output error "
        f"{answer['error']:.2g} (tolerance {answer['tolerance']:.0e})\nthe quantized model loads"
    )


def hardware_text(answer: Mapping[str, Any]) -> str:
    """``alphasmith hardware``."""
    rows = [
        [name, *_budget_cells(answer[key])]
        for name, key in (("this machine", "detected"), ("target, as given", "given"), ("model requires", "required"))
        if key in answer
    ]
    ranges = [
        [f"{r['position']:.2f}", f"{r['low']:.3f}", f"{r['high']:.3f}", r["explanation"]] for r in answer["ranges"]
    ]
    return "\n".join(
        [
            table(("budget", "memory", "threads", "bandwidth"), rows),
            answer["explanation"],
            table(("group at", "alpha from", "to", "because"), ranges, title="alpha ranges"),
            "0 is the group of smallest, 1 that of largest magnitude; a run places its groups by what it measures",
        ]
    )


def _cell(value: Any) -> str:
    return one_line(with_times(str(value or "")), _LONGEST_CELL)


def _budget_cells(budget: Mapping[str, Any]) -> list[str]:
    memory, threads, bandwidth = budget["memory"], budget["gpu_threads"], budget["bandwidth"]
    return [
        "" if memory is None else size_text(memory),
        "" if threads is None else str(threads),
        "" if bandwidth is None else f"{size_text(bandwidth)}/s",
    ]


def _state(row: Mapping[str, Any]) -> str:
    """Status of a run, and whether it only seems to run."""
    return "running (no live driver)" if row["status"] == "running" and row.get("driver") is None else row["status"]
