"""The search space of a whole-model refinement: kinds of sites, choices of sites, and the Optuna parameters they become."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json

from alphasmith.objectives.literals import Baseline
from alphasmith.objectives.quantization.plan import same_smoothing
from alphasmith.objectives.smoothing import Smoothing

ChangeKind = Literal["ours", "best_single", "alpha_0.5", "identity", "proposal", "sampler"]

#: What a site keeps unless something else is chosen for it.
OURS = "ours"
#: Baselines of the whole model: every site at this choice.
PLAIN: tuple[Baseline, ...] = ("best_single", "alpha_0.5", "identity")
#: Largest shift of the alphas of a kind.
DELTA_MAX = 0.3
#: Kinds with their own shift; beyond that the smaller kinds share one.
KINDS_MAX = 6
#: The kind of the sites beyond ``KINDS_MAX``.
OTHER_KINDS = "other sites"
_REST = "rest"


@dataclass(frozen=True, kw_only=True)
class RefinableSite:
    """A site with its winner and what may replace it.

    Attributes:
        name: Site name.
        operators: Names of the operators that read it.
        rescale: Smoothing of the winner with every alpha moved by a delta and clamped to [0, 1]; 0 is the winner itself. A
            winner without alphas (identity) comes back as it is.
        choices: ``ours`` (the winner), ``best_single``, ``alpha_0.5`` and ``identity``, as far as they are known.
        loss: Relative error of the winner at the site. Says which sites are looked at first where there are more than
            probes: relative errors of sites add up, to first order, to that of the output.
    """

    name: str
    operators: tuple[str, ...]
    rescale: Callable[[float], Smoothing]
    choices: Mapping[str, Smoothing]
    loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """A candidate of the refinement, relative to the winners of the sites.

    Attributes:
        kind: Where it comes from.
        deltas: Kind -> shift of the alphas of its sites; missing kinds 0. Sites with another choice than ``ours`` ignore it.
        choices: Re-opened site -> choice; missing sites ``rest``.
        rest: Choice of the sites that are not re-opened.
    """

    kind: ChangeKind = "proposal"
    deltas: Mapping[str, float] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    rest: str = OURS


def site_kinds(sites: Sequence[RefinableSite]) -> dict[str, tuple[str, ...]]:
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


class RefinementSpace:
    """What the study may change, as Optuna parameters, and the smoothings they stand for.

    Every trial has every parameter, the plain baselines too (``rest``), so that any sampler can use all of them.
    """

    def __init__(
        self, sites: Sequence[RefinableSite], kinds: Mapping[str, tuple[str, ...]], reopened: Sequence[str]
    ) -> None:
        self._sites = {site.name: site for site in sites}
        self._kinds = kinds
        self._kind_of = {name: kind for kind, names in kinds.items() for name in names}
        self.choices = {name: distinct_choices(self._sites[name]) for name in reopened}
        plain = [c for c in PLAIN if all(c in site.choices for site in sites)]
        self.plain = tuple(plain)
        self._rest = (OURS, *plain) if len(reopened) < len(sites) else (OURS,)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds."""
        return tuple(self._kinds)

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Parameters the sampler leaves alone: away from ``ours`` at most sites, shifts of alpha would change nothing."""
        return {_REST: OURS} if len(self._rest) > 1 else {}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distributions by parameter name."""
        space: dict[str, BaseDistribution] = {
            f"delta {kind}": FloatDistribution(-DELTA_MAX, DELTA_MAX) for kind in self._kinds
        }
        space |= {f"choice {name}": CategoricalDistribution(names) for name, names in self.choices.items()}
        if len(self._rest) > 1:
            space[_REST] = CategoricalDistribution(self._rest)
        return space

    def holding(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """The same: every change lies in the space."""
        return self.distributions()

    def canonical(self) -> str:
        """Canonical JSON of the space."""
        return json.dumps({n: distribution_to_json(d) for n, d in self.distributions().items()}, sort_keys=True)

    def params(self, change: Change) -> dict[str, Any]:
        """Parameters of a change; a choice equal to an earlier one of its site goes by that name."""
        values: dict[str, Any] = {f"delta {kind}": change.deltas.get(kind, 0.0) for kind in self._kinds}
        for name in self.choices:
            values[f"choice {name}"] = _known_choice(self._sites[name], change.choices.get(name, change.rest))
        if len(self._rest) > 1:
            values[_REST] = change.rest
        return values

    def candidate(self, kind: str, params: Mapping[str, Any]) -> Change:
        """The change that parameters stand for."""
        return Change(
            kind=cast(ChangeKind, kind),
            deltas={kind: float(params[f"delta {kind}"]) for kind in self._kinds},
            choices={name: str(params[f"choice {name}"]) for name in self.choices},
            rest=str(params.get(_REST, OURS)),
        )

    def whole(self, change: Change) -> Change:
        """The same change with a shift for every kind and a choice for every re-opened site, as it comes back from a record."""
        return self.candidate(change.kind, self.params(change))

    def smoothings(self, change: Change) -> dict[str, Smoothing]:
        """Smoothing of every site under a change."""
        return {name: self._smoothing(name, change) for name in self._sites}

    def changed(self, change: Change) -> dict[str, str]:
        """Site -> what a change does to it, for sites whose smoothing differs from the winner's."""
        words: dict[str, str] = {}
        for name, site in self._sites.items():
            if same_smoothing(self._smoothing(name, change), site.choices[OURS]):
                continue
            choice = change.choices.get(name, change.rest)
            words[name] = choice if choice != OURS else f"alphas {change.deltas[self._kind_of[name]]:+.3f}"
        return words

    def shifted_kinds(self, change: Change) -> dict[str, float]:
        """Kind -> shift, for the kinds of which a site keeps ``ours`` with other alphas than its winner's."""
        shifted = {name for name in self.changed(change) if change.choices.get(name, change.rest) == OURS}
        return {kind: change.deltas[kind] for kind, names in self._kinds.items() if not shifted.isdisjoint(names)}

    def _smoothing(self, name: str, change: Change) -> Smoothing:
        site, choice = self._sites[name], change.choices.get(name, change.rest)
        delta = change.deltas.get(self._kind_of[name], 0.0)
        return site.rescale(delta) if choice == OURS and delta != 0 else site.choices[choice]


def distinct_choices(site: RefinableSite) -> tuple[str, ...]:
    """Choices of a site, ``ours`` first, those equal to an earlier one left out."""
    kept: list[str] = [OURS]
    for name, smoothing in site.choices.items():
        if not any(same_smoothing(smoothing, site.choices[other]) for other in kept):
            kept.append(name)
    return tuple(kept)


def _known_choice(site: RefinableSite, choice: str) -> str:
    """The name among the distinct choices of a site that stands for ``choice``."""
    return next(name for name in distinct_choices(site) if same_smoothing(site.choices[name], site.choices[choice]))
