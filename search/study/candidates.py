"""What can be tried at a site or at the whole model, its Optuna parameters, and the baselines of every study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.literals import CandidateKind, RangeStatistic, ShiftStatistic
from alphasmith.search.study.alpha_ranges import DEFAULT_ALPHA
from alphasmith.search.study.trial import Trial

#: Trials 0, 1 and 2 of every study.
BASELINES: tuple[CandidateKind, ...] = ("identity", "alpha_0.5", "best_single")


@dataclass(frozen=True)
class Candidate:
    """One set of coefficients to try: ``s = exp(offset_k) a^alpha_k / w^beta_k`` after a shift or without one.

    Attributes:
        kind: Where it comes from.
        alphas: (K,) one per group, or None for identity, which no alpha reaches.
        betas: (K,); empty: beta = 1 - alpha (formula fA1).
        offsets: (K,) natural logarithms of a factor per group; empty: none.
        shift: What is subtracted from every channel before it is scaled.
        range: How the static range of the activation is set.
        grouping: Grouping method; empty: the only one configured.
        statistic: Channel statistic a_j; empty: the only one configured.
    """

    kind: CandidateKind
    alphas: tuple[float, ...] | None
    betas: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()
    shift: ShiftStatistic = "none"
    range: RangeStatistic = "absmax"
    grouping: str = ""
    statistic: str = ""

    def params(self) -> dict[str, Any]:
        """Optuna parameters: ``alpha_k``, ``beta_k``, ``offset_k``, and the choices; identity has none."""
        if self.alphas is None:
            return {}
        values: dict[str, Any] = {}
        for name, numbers in (("alpha", self.alphas), ("beta", self.betas), ("offset", self.offsets)):
            values |= {f"{name}_{k}": number for k, number in enumerate(numbers)}
        choices = {"shift": self.shift, "range": self.range, "grouping": self.grouping, "statistic": self.statistic}
        return values | {name: value for name, value in choices.items() if value != ""}

    @classmethod
    def of(cls, kind: CandidateKind, params: Mapping[str, Any]) -> Self:
        """The candidate with these Optuna parameters."""

        def numbers(name: str) -> tuple[float, ...]:
            return tuple(params[f"{name}_{k}"] for k in range(sum(n.startswith(f"{name}_") for n in params)))

        return cls(
            kind,
            numbers("alpha") or None,
            numbers("beta"),
            numbers("offset"),
            shift=params.get("shift", "none"),
            range=params.get("range", "absmax"),
            grouping=params.get("grouping", ""),
            statistic=params.get("statistic", ""),
        )


#: A finished trial of a site or of the whole model.
TrialResult: TypeAlias = Trial[Candidate]


def best_single_alpha(loss: Callable[[float], float], points: int) -> tuple[float, list[list[float]]]:
    """The alpha of an even grid over [0, 1] with the lowest loss (first on ties), and the grid of [alpha, loss].

    Args:
        loss: Loss of one alpha for every channel; NonFiniteError leaves a point out.
        points: Grid points.
    """
    grid: list[list[float]] = []
    for k in range(points):
        alpha = k / (points - 1)
        try:
            grid.append([round(alpha, 9), loss(alpha)])
        except NonFiniteError:
            continue
    return lowest_of(grid), grid


def lowest_of(grid: Sequence[Sequence[float]]) -> float:
    """The alpha of the lowest loss in a grid of [alpha, loss], first on ties; the default where the grid is empty."""
    return min(grid, key=lambda point: point[1])[0] if grid else DEFAULT_ALPHA


def baselines(k: int, best_single_alpha: float) -> list[Candidate]:
    """Trials 0, 1 and 2 of every study: identity, alpha 0.5 everywhere, the best single alpha everywhere."""
    return [
        Candidate("identity", None),
        Candidate("alpha_0.5", (DEFAULT_ALPHA,) * k),
        Candidate("best_single", (best_single_alpha,) * k),
    ]
