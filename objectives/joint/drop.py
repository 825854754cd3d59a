"""The performance-drop condition: how much of its metrics a model may lose while it is made smaller. Source: claims B-2, B-3, formula fB7."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.ports import JointMetric, Measured
from alphasmith.objectives.literals import DropRule
from alphasmith.objectives.text import number

#: Excess of a metric that was not measured: finite, so that it can be stored as a constraint, and above any real one.
UNMEASURED = 1e9
#: Differences below this share of their terms are float rounding: 0.9 - 0.895 is more than 0.005.
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What a metric may lose; exactly one of the three limits is given.

    Attributes:
        metric: Its name.
        drop: Largest drop, in the unit of the metric, 0 or more.
        relative: Largest drop as a share of the size of the baseline's value, 0 or more: 0.02 for 2 %.
        floor: Worst value of the metric itself, in its unit: the smallest where larger is better, else the largest.
    """

    metric: str
    drop: float | None = None
    relative: float | None = None
    floor: float | None = None

    def __post_init__(self) -> None:
        field = f"tolerances.{self.metric}"
        limits = {"drop": self.drop, "relative": self.relative, "floor": self.floor}
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            told = " and ".join(given) or "no limit"
            raise InputError(field, f"has {told}", "give one of drop, relative and floor")
        ((name, value),) = given.items()
        if not math.isfinite(value) or (name != "floor" and value < 0):
            raise InputError(f"{field}.{name}", f"is {value}", "give a number, 0 or more for a drop")

    def __str__(self) -> str:
        """In words, without the metric and its unit, e.g. ``0.6``, ``2 % of its value`` or ``until 0.9``."""
        if self.drop is not None:
            return number(self.drop)
        if self.relative is not None:
            return f"{number(100 * self.relative)} % of its value"
        return f"until {number(float(self.floor or 0.0))}"


@dataclass(frozen=True, kw_only=True)
class MetricDrop:
    """One metric of a model beside that of the baseline.

    Attributes:
        metric: Which.
        baseline: Value of the baseline.
        current: Value of the model; None: not measured.
        drop: What was lost, in the unit of the metric; below 0: gained. None: not measured.
        excess: g, the drop (or what is missing to the floor) less its tolerance, in the unit of the metric: above 0 violates it. None where
            there is no tolerance; :data:`UNMEASURED` where the metric was not measured.
        unit: That of the metric; empty: none.
    """

    metric: JointMetric
    baseline: float | None
    current: float | None
    drop: float | None
    excess: float | None
    unit: str = ""

    @property
    def violated(self) -> bool:
        """Whether the metric is out of its tolerance."""
        return self.excess is not None and self.excess > 0

    def __str__(self) -> str:
        """In words, e.g. ``si_sdr fell by 0.9 dB to 7.1 dB, 0.3 dB more than tolerated``."""
        name, unit = self.metric.name, f" {self.unit}" if self.unit else ""
        if self.current is None or self.drop is None:
            return f"{name} was not measured" + (", which violates its tolerance" if self.violated else "")
        lost = self.drop if self.metric.goal == "max" else -self.drop
        moved = f"fell by {number(lost)}{unit}" if lost > 0 else f"rose by {number(-lost)}{unit}"
        told = f"{name} {moved if lost else 'stayed'} {'to' if lost else 'at'} {number(self.current)}{unit}"
        if self.excess is None:
            return told
        return told + (f", {number(self.excess)}{unit} more than tolerated" if self.violated else ", tolerated")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the condition says of one model.

    Attributes:
        drops: One a metric, in the order of the task.
        rule: That of the condition.
    """

    drops: tuple[MetricDrop, ...]
    rule: DropRule

    @property
    def limited(self) -> tuple[MetricDrop, ...]:
        """The metrics that have a tolerance."""
        return tuple(drop for drop in self.drops if drop.excess is not None)

    @property
    def violated(self) -> bool:
        """Whether the performance-drop condition holds, that is the model lost too much."""
        found = [drop.violated for drop in self.limited]
        return any(found) if self.rule == "any" else bool(found) and all(found)

    @property
    def constraints(self) -> dict[str, float]:
        """Name -> g of a constrained study, feasible where none is above 0.

        One a metric under the rule ``any``. Under ``all`` one is enough to be feasible, so there is the smallest alone.
        """
        found = {drop.metric.name: drop.excess for drop in self.limited if drop.excess is not None}
        if self.rule == "any" or not found:
            return found
        return {" and ".join(found): min(found.values())}

    def __str__(self) -> str:
        """Every metric in words."""
        return "; ".join(map(str, self.drops))


@dataclass(frozen=True, kw_only=True)
class DropCondition:
    """Tolerances of metrics, and how many of them must be exceeded.

    Attributes:
        tolerances: One a metric; none: nothing is ever violated.
        rule: ``any``: a model that exceeds one tolerance lost too much. ``all``: only one that exceeds every one.
    """

    tolerances: tuple[Tolerance, ...]
    rule: DropRule = "any"

    def __post_init__(self) -> None:
        if self.rule not in get_args(DropRule):
            raise InputError("tolerances.rule", f"{self.rule!r} is unknown", f"use {', '.join(get_args(DropRule))}")
        names = [tolerance.metric for tolerance in self.tolerances]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError("tolerances", f"{twice[0]} has two", "give one a metric")

    def check(self, baseline: Measured, metrics: Sequence[JointMetric]) -> None:
        """Refuse a condition that cannot be judged, or that the baseline itself violates.

        Args:
            baseline: Metrics of the model that nothing was taken from.
            metrics: Those of the task.

        Raises:
            InputError: A tolerance names no metric of the task, the baseline's value was not measured, or it is beyond its floor.
            NonFiniteError: A value of the baseline is NaN or infinite.
        """
        known = {metric.name for metric in metrics}
        for tolerance in self.tolerances:
            field = f"tolerances.{tolerance.metric}"
            if tolerance.metric not in known:
                raise InputError(field, "is no metric of the task", f"use some of {', '.join(sorted(known))}")
            if baseline.values.get(tolerance.metric) is None:
                why = f" ({baseline.notes[0]})" if baseline.notes else ""
                raise InputError(field, f"the metric was not measured{why}", "measure it, or leave its tolerance out")
        for drop in self.verdict(baseline, baseline, metrics).limited:
            if drop.violated:
                problem = f"the model is at {number(drop.current or 0.0)} before anything is taken from it"
                raise InputError(f"tolerances.{drop.metric.name}.floor", problem, "set a floor that it meets")

    def verdict(self, baseline: Measured, current: Measured, metrics: Sequence[JointMetric]) -> Verdict:
        """Judge a model. Source: formula fB7.

        Args:
            baseline: Metrics of the model that nothing was taken from.
            current: Those of the model.
            metrics: Those of the task.

        Raises:
            InputError: A tolerance names no metric of the task, or the baseline's value was not measured.
            NonFiniteError: A value is NaN or infinite.
        """
        limits = {tolerance.metric: tolerance for tolerance in self.tolerances}
        if unknown := sorted(set(limits) - {metric.name for metric in metrics}):
            raise InputError(f"tolerances.{unknown[0]}", "is no metric of the task", "name one that is")
        drops = [_drop(metric, baseline.values, current.values, limits.get(metric.name)) for metric in metrics]
        return Verdict(drops=tuple(drops), rule=self.rule)


def _drop(
    metric: JointMetric,
    baseline: Mapping[str, float | None],
    current: Mapping[str, float | None],
    limit: Tolerance | None,
) -> MetricDrop:
    before, now = baseline.get(metric.name), current.get(metric.name)
    for whose, value in (("the baseline", before), ("the model", now)):
        if value is not None and not math.isfinite(value):
            raise NonFiniteError(f"{metric.name} of {whose} is {value}")
    if limit is not None and before is None:
        field = f"tolerances.{metric.name}"
        raise InputError(field, "the baseline's was not measured", "measure it, or leave its tolerance out")
    if before is None or now is None:
        excess = None if limit is None else UNMEASURED
        return MetricDrop(metric=metric, baseline=before, current=now, drop=None, excess=excess, unit=metric.unit)
    sign = 1 if metric.goal == "max" else -1
    drop = sign * _difference(before, now)
    excess = None
    if limit is not None and limit.floor is not None:
        excess = sign * _difference(limit.floor, now)
    elif limit is not None:
        tolerated = limit.drop if limit.drop is not None else (limit.relative or 0.0) * abs(before)
        excess = _difference(drop, tolerated, max(abs(before), abs(now)))
    return MetricDrop(metric=metric, baseline=before, current=now, drop=drop, excess=excess, unit=metric.unit)


def _difference(a: float, b: float, size: float = 0.0) -> float:
    """a - b, 0 where that is within the rounding of terms of some size."""
    found = a - b
    return 0.0 if abs(found) <= _ROUNDING * max(abs(a), abs(b), size) else found
