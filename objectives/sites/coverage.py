"""How much of a model is quantized: every weight with its share, its status and the true reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from alphasmith.objectives.literals import WeightStatus
from alphasmith.objectives.text import listed

if TYPE_CHECKING:  # `show` tells what is quantized, and must not wait for torch
    from alphasmith.objectives.sites.types import Site, Weight

#: Reasons that the one-line account names.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class CoveredWeight:
    """One parameter of two or more dimensions, and what becomes of it.

    Attributes:
        name: Full name of the parameter.
        aliases: Its other names, where it is tied.
        shape: Its shape.
        share: Its part of all parameters of the model, 0 to 1; tied parameters count once.
        status: ``quantized``, or ``float``: it stays as it is.
        reason: Why it stays float; empty where it is quantized.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    share: float
    status: WeightStatus
    reason: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose weight it is, or the parameter itself where it is not called so."""
        return layers_of(self.name, *self.aliases)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Every weight of a model.

    Attributes:
        weights: In the model's order.
    """

    weights: tuple[CoveredWeight, ...]

    @property
    def left(self) -> tuple[CoveredWeight, ...]:
        """Those that stay float."""
        return tuple(weight for weight in self.weights if weight.status == "float")

    @property
    def quantized(self) -> float:
        """Quantized part of all weights, 0 to 1."""
        total = sum(weight.share for weight in self.weights)
        return sum(weight.share for weight in self.weights if weight.status == "quantized") / total if total else 0.0

    def reasons(self) -> list[tuple[str, float, tuple[str, ...]]]:
        """(reason, its part of all weights, first name of every layer) of what stays float, the largest part first."""
        total = sum(weight.share for weight in self.weights) or 1.0
        alike: dict[str, list[CoveredWeight]] = {}
        for weight in self.left:
            alike.setdefault(weight.reason, []).append(weight)
        found = [(r, sum(w.share for w in of) / total, tuple(w.layers[0] for w in of)) for r, of in alike.items()]
        return sorted(found, key=lambda entry: -entry[1])

    def account(self) -> str:
        """One line, e.g. ``62 % of the weights are quantized; 38 % stay float: 30 % table (an embedding: ...); 8 % ...``."""
        reasons = self.reasons()
        if not reasons:
            return "100 % of the weights are quantized"
        told = [f"{percent(share)} {listed(layers, 1)} ({reason})" for reason, share, layers in reasons[:_NAMED]]
        more = f"; and {len(reasons) - _NAMED} more reasons" if len(reasons) > _NAMED else ""
        rest = percent(sum(share for _, share, _ in reasons))
        return f"{percent(self.quantized)} of the weights are quantized; {rest} stay float: {'; '.join(told)}{more}"


def coverage(
    weights: Sequence[Weight], sites: Sequence[Site], floats: Mapping[str, str], names: Mapping[str, str] | None = None
) -> Coverage:
    """What becomes of every weight.

    Args:
        weights: All of the model, as discovery found them.
        sites: All sites.
        floats: Operator -> why it is not quantized although it could be.
        names: Parameter name -> that of the user's parameter that it is or is rows of, where the model was rewritten; None:
            nowhere.
    """
    names = names or {}
    kept = {o.weight: floats[o.name] for site in sites for o in site.operators if o.name in floats}
    found: dict[tuple[str, str], CoveredWeight] = {}
    for weight in weights:
        reason = weight.reason or kept.get(weight.name, "")
        name = names.get(weight.name, weight.name)
        covered = CoveredWeight(
            name=name,
            aliases=tuple(names.get(alias, alias) for alias in weight.aliases),
            shape=weight.shape,
            share=weight.share,
            status="float" if reason else "quantized",
            reason=reason,
        )
        part = found.get((name, reason))  # rows of one weight that were split into several operators
        found[name, reason] = covered if part is None else _stacked(part, covered)
    return Coverage(weights=tuple(found.values()))


def _stacked(one: CoveredWeight, other: CoveredWeight) -> CoveredWeight:
    rows = (one.shape[0] + other.shape[0], *one.shape[1:])
    return replace(one, shape=rows, share=one.share + other.share)


def layers_of(*names: str) -> tuple[str, ...]:
    """What people call the owners of parameters: ``fc`` of ``fc.weight``, the parameter itself where it is called otherwise."""
    return tuple(name.partition(".parametrizations.")[0].removesuffix(".weight") for name in names)


def percent(share: float) -> str:
    """A share in percent, e.g. ``62 %``; never 0 or 100 where it is not exactly that."""
    rounded = round(100 * share)
    if rounded == 0 and share > 0:
        return "below 1 %"
    if rounded == 100 and share < 1:
        return "above 99 %"
    return f"{rounded} %"
