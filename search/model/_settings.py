"""What sites may be set to at the model's output, for kinds of sites or site by site, and the Optuna parameters it becomes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json

from alphasmith.objectives.literals import Variant
from alphasmith.objectives.quantization.plan import same_smoothing
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.text import number

ChangeKind = Literal["identity", "alpha_0.5", "one_alpha", "best_single", "ours", "proposal"]

#: What every site has before anything is changed: its own winner.
OURS: Variant = "ours"
#: From the simplest to the richest.
CHOICES: tuple[Variant, ...] = ("identity", "alpha_0.5", "one_alpha", "best_single", "ours")
#: Factors on the range that are tried lie between these; it clips below 1.
RANGE_MIN, RANGE_MAX = 0.25, 2.0
#: Kinds with settings of their own; beyond that the smaller kinds share one.
KINDS_MAX = 6
#: The kind of the sites beyond ``KINDS_MAX``.
OTHER_KINDS = "other sites"


@dataclass(frozen=True)
class Setting:
    """What a site, or every site of a kind, is set to.

    Attributes:
        choice: What it starts from.
        shift: Added to every alpha of that; alphas stay within [0, 1].
        range: Factor on the static range of the activation (dimensionless); below 1 it clips.
    """

    choice: Variant = OURS
    shift: float = 0.0
    range: float = 1.0

    def __str__(self) -> str:
        words: list[str] = [self.choice]
        words += [f"alphas {self.shift:+.3f}"] if self.shift else []
        words += [f"range x{number(self.range)}"] if self.range != 1 else []
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class SearchedSite:
    """A site with its winner and what may take its place.

    Attributes:
        name: Site name.
        operators: Names of the operators that read it.
        choices: Choice -> its smoothing with every alpha moved by a shift; shift 0 is the choice itself. ``ours``, and the others as
            far as they are known.
        loss: Relative error of the winner at the site. Says which sites are looked at first where their shares of the output's error
            are not known.
    """

    name: str
    operators: tuple[str, ...]
    choices: Mapping[Variant, Callable[[float], Smoothing]]
    loss: float = 0.0

    def smoothing(self, setting: Setting) -> Smoothing:
        """What a setting does to the site."""
        chosen = self.choices[setting.choice](setting.shift)
        return chosen if setting.range == 1 else replace(chosen, range_factor=chosen.range_factor * setting.range)

    def without_margin(self, choice: Variant) -> Setting:
        """A choice whose static range is the largest calibrated magnitude, where it is wider."""
        factor = self.choices[choice](0.0).range_factor
        return (
            Setting(choice=choice, range=round(max(RANGE_MIN, 1 / factor), 6)) if factor > 1 else Setting(choice=choice)
        )


@dataclass(frozen=True, kw_only=True)
class Change:
    """A candidate: a setting for every unit, a kind of sites or one site.

    Attributes:
        kind: Where it comes from.
        settings: Unit -> setting; missing units keep theirs.
    """

    kind: ChangeKind = "proposal"
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def moved(self, unit: str, setting: Setting) -> Change:
        """The same with another setting of one unit."""
        return Change(settings={**self.settings, unit: setting})


class SettingSpace:
    """What a step may change, as Optuna parameters, and the smoothings they stand for.

    Args:
        sites: All of them, in forward order.
        units: Unit -> its sites; sites of no unit keep what they have.
        start: Site -> what it has before.
        among: Choices that units may move to.
    """

    def __init__(
        self,
        sites: Sequence[SearchedSite],
        units: Mapping[str, tuple[str, ...]],
        start: Mapping[str, Setting],
        *,
        among: Sequence[Variant] = CHOICES,
    ) -> None:
        self._sites = {site.name: site for site in sites}
        self._unit_of = {name: unit for unit, names in units.items() for name in names}
        self._start = dict(start)
        self.units = dict(units)
        #: Unit -> choices of ``among`` that all its sites have, the richest first, those that equal a richer one at every site left out.
        self.choices = {unit: tuple(c for c in self._distinct(names) if c in among) for unit, names in units.items()}

    def plain(self) -> list[Change]:
        """One change for every choice that all sites have: the same everywhere."""
        common = [c for c in CHOICES if all(c in site.choices for site in self._sites.values())]
        return [Change(kind=c, settings=dict.fromkeys(self.units, Setting(choice=c))) for c in reversed(common)]

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Nothing is left out of the sampler's choice."""
        return {}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distributions by parameter name."""
        space: dict[str, BaseDistribution] = {}
        for unit in self.units:
            known = [c for c in CHOICES if all(c in self._sites[name].choices for name in self.units[unit])]
            space[f"choice {unit}"] = CategoricalDistribution(tuple(known))
            space[f"shift {unit}"] = FloatDistribution(-1.0, 1.0)
            space[f"range {unit}"] = FloatDistribution(RANGE_MIN, RANGE_MAX)
        return space

    def holding(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """The same: every change lies in the space."""
        return self.distributions()

    def canonical(self) -> str:
        """Canonical JSON of the space."""
        return json.dumps({n: distribution_to_json(d) for n, d in self.distributions().items()}, sort_keys=True)

    def params(self, change: Change) -> dict[str, Any]:
        """Parameters of a change."""
        values: dict[str, Any] = {}
        for unit, names in self.units.items():
            setting = change.settings.get(unit, self._start[names[0]])
            values |= {
                f"choice {unit}": setting.choice,
                f"shift {unit}": setting.shift,
                f"range {unit}": setting.range,
            }
        return values

    def candidate(self, kind: str, params: Mapping[str, Any]) -> Change:
        """The change that parameters stand for."""
        settings = {
            unit: Setting(str(params[f"choice {unit}"]), float(params[f"shift {unit}"]), float(params[f"range {unit}"]))  # type: ignore[arg-type]  # one of CHOICES
            for unit in self.units
        }
        return Change(kind=cast(ChangeKind, kind), settings=settings)

    def settings(self, change: Change) -> dict[str, Setting]:
        """Setting of every site under a change."""
        return {
            name: change.settings.get(self._unit_of[name], start) if name in self._unit_of else start
            for name, start in self._start.items()
        }

    def smoothings(self, change: Change) -> dict[str, Smoothing]:
        """Smoothing of every site under a change."""
        return smoothings_of(self._sites.values(), self.settings(change))

    def same(self, one: Change, other: Change) -> bool:
        """Whether two changes do the same to every site."""
        first, second = self.smoothings(one), self.smoothings(other)
        return all(same_smoothing(first[name], second[name]) for name in self._sites)

    def _distinct(self, names: Sequence[str]) -> tuple[Variant, ...]:
        sites = [self._sites[name] for name in names]
        kept: list[Variant] = []
        for choice in reversed(CHOICES):
            if not all(choice in site.choices for site in sites):
                continue
            if not any(all(_equal(site, choice, other) for site in sites) for other in kept):
                kept.append(choice)
        return tuple(kept)


def smoothings_of(sites: Iterable[SearchedSite], settings: Mapping[str, Setting]) -> dict[str, Smoothing]:
    """Smoothing of every site under its setting."""
    return {site.name: site.smoothing(settings[site.name]) for site in sites}


def _equal(site: SearchedSite, one: Variant, other: Variant) -> bool:
    return same_smoothing(site.choices[one](0.0), site.choices[other](0.0))


def site_kinds(sites: Sequence[SearchedSite]) -> dict[str, tuple[str, ...]]:
    """Sites by what their operators are: kind -> names of its sites.

    Operators are the same when their module paths are, numbers in the path left out. A kind is called by the last parts of
    those paths, as many as tell the kinds apart: ``q_proj,k_proj,v_proj``, or ``attention.output.dense`` beside
    ``output.dense``. The ``KINDS_MAX - 1`` kinds with most sites, then with the largest site losses, stay alone where there
    are more than ``KINDS_MAX``.

    Args:
        sites: In forward order.
    """
    paths = {site.name: _unnumbered_paths(site.operators) for site in sites}
    distinct = list(dict.fromkeys(paths.values()))
    deepest = max(len(path) for kind in distinct for path in kind)
    labels = {kind: _label(kind, deepest) for kind in distinct}
    for depth in range(1, deepest):
        shorter = {kind: _label(kind, depth) for kind in distinct}
        if len(set(shorter.values())) == len(distinct):
            labels = shorter
            break
    of_site = {name: labels[path] for name, path in paths.items()}
    count = Counter(of_site.values())
    if len(count) > KINDS_MAX:
        worst = {kind: max(s.loss for s in sites if of_site[s.name] == kind) for kind in count}
        alone = set(sorted(count, key=lambda kind: (-count[kind], -worst[kind]))[: KINDS_MAX - 1])
        of_site = {name: kind if kind in alone else OTHER_KINDS for name, kind in of_site.items()}
    return {kind: tuple(n for n, k in of_site.items() if k == kind) for kind in dict.fromkeys(of_site.values())}


def _unnumbered_paths(operators: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Distinct module paths without numbers: ``layers.0.fc1`` -> (layers, fc1); ``layer1.0.conv2`` -> (layer, conv2)."""

    def stripped(operator: str) -> tuple[str, ...]:
        *parents, last = [part for part in operator.split(".") if not part.isdigit()] or [operator]
        return (*(part.rstrip("0123456789") for part in parents), last)

    return tuple(dict.fromkeys(stripped(operator) for operator in operators))


def _label(kind: tuple[tuple[str, ...], ...], depth: int) -> str:
    return ",".join(dict.fromkeys(".".join(path[-depth:]) for path in kind))
