"""What can be tried at a site or at the whole model, and how it stands in Optuna's trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from alphasmith.search.config import RangeStatistic, ShiftStatistic

CandidateKind = Literal["identity", "alpha_0.5", "best_single", "noise_model", "sampler", "refined", "reused"]

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
