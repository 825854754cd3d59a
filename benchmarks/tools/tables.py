"""Rows of the comparison with other tools: output loss against ours, task metrics, seconds, and why a row is empty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from alphasmith.objectives.judge.candidate_batch import paired_difference
from benchmarks.real_judges import Judged, Measure
from benchmarks.timing import table

OURS = "Alphasmith"


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One contestant on one model.

    Attributes:
        name: As it is shown.
        judged: On unseen data; None where there are no scales.
        wall: Wall time of its own work [s]; None where it has none.
        cpu: CPU time likewise [s].
        change: Relative squared difference that smoothing made to its float outputs; None where that was not its work.
        note: Why there are no scales, or how they were applied.
    """

    name: str
    judged: Judged | None = None
    wall: float | None = None
    cpu: float | None = None
    change: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """All contestants on one model under one scheme.

    Attributes:
        model: Its name.
        scheme: Its name.
        loss: What the output loss is.
        measures: Task metrics.
        float_model: The float model as judged.
        rows: The contestants; one of them is ours.
        versions: Package -> version, of the tools that have scales.
        where: The machine.
    """

    model: str
    scheme: str
    loss: str
    measures: tuple[Measure, ...]
    float_model: Judged
    rows: tuple[Row, ...]
    versions: Mapping[str, str]
    where: str

    @property
    def ours(self) -> Judged | None:
        """Our quantized model as judged; None where no run was made."""
        return next((row.judged for row in self.rows if row.name == OURS), None)

    def excess(self, row: Row) -> tuple[float, float] | None:
        """By how much the loss of a contestant is above ours, relative to ours, and the paired standard error; None without either."""
        ours = self.ours
        if row.judged is None or ours is None or row.name == OURS:
            return None
        change, error = paired_difference(row.judged.errors, ours.errors, ours.energy)
        return change / ours.loss, error / ours.loss

    def better(self) -> Iterator[Row]:
        """Contestants whose output loss is below ours by more than the paired standard error."""
        for row in self.rows:
            difference = self.excess(row)
            if difference is not None and difference[0] < -difference[1]:
                yield row


def text(comparisons: Sequence[Comparison], left_out: Sequence[str]) -> str:
    """Every table, with the machine and the versions.

    Args:
        comparisons: In the order in which they are shown.
        left_out: Sentences on what was not run.
    """
    versions = {name: version for comparison in comparisons for name, version in comparison.versions.items()}
    parts = [*dict.fromkeys(comparison.where for comparison in comparisons)]
    if versions:
        parts.append("Tools: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".")
    for comparison in comparisons:
        parts.append(f"{comparison.model}, {comparison.scheme}; output loss: {comparison.loss}.")
        parts.append(table(header(comparison), [cells(comparison, row) for row in comparison.rows]))
        parts.append(verdict(comparison))
    if left_out:
        parts.append("Not run: " + "; ".join(left_out) + ".")
    return "\n\n".join(parts)


def header(comparison: Comparison) -> tuple[str, ...]:
    """Column names."""
    metrics = (f"{m.name} (float {_figure(v)})" for m, v in _float_values(comparison))
    return ("tool", "output loss", "above Alphasmith", *metrics, "CPU [s]", "wall [s]", "change of the float model", "")


def cells(comparison: Comparison, row: Row) -> tuple[str, ...]:
    """One line."""
    if row.judged is None:
        empty = ("-",) * (len(header(comparison)) - 2)
        return (row.name, *empty, row.note)
    difference = comparison.excess(row)
    above = "" if difference is None else f"{difference[0]:+.0%} ± {difference[1]:.0%}"
    metrics = (_figure(m.value(v)) for m, v in zip(comparison.measures, row.judged.values, strict=True))
    seconds = ("-" if s is None else f"{s:.1f}" for s in (row.cpu, row.wall))
    change = "-" if row.change is None else f"{row.change:.1g}"
    return (row.name, f"{row.judged.loss:.5f}", above, *metrics, *seconds, change, row.note)


def verdict(comparison: Comparison) -> str:
    """Whether our model is at or below every contestant, in one sentence."""
    better = [row.name for row in comparison.better()]
    if comparison.ours is None:
        return f"No run of Alphasmith was made for this table of {comparison.model}."
    judged = sum(row.judged is not None for row in comparison.rows) - 1
    if not better:
        return f"At {comparison.model} none of the {judged} is below Alphasmith by more than the paired standard error."
    return f"At {comparison.model} below Alphasmith by more than the paired standard error: {', '.join(better)}."


def _float_values(comparison: Comparison) -> Iterator[tuple[Measure, float]]:
    for measure, values in zip(comparison.measures, comparison.float_model.values, strict=True):
        yield measure, measure.value(values)


def _figure(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.4f}"
