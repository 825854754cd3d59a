"""What a trial of a joint compression chooses: strengths, role, energies or rank and alpha, clusters; costly choices apart from cheap ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import optuna

from alphasmith.objectives.literals import ResidualForm
from alphasmith.search.compression.config import CompressConfig, Role

#: Entries of every table of the plainest start.
_PLAIN = 256
#: Optuna parameters of codebooks begin so; all others decide costly stages.
_INNER = "k."


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a trial does.

    Attributes:
        encoder: lambda of the first sparsity term (fB1).
        recurrent: lambda of the second (fB2).
        role: What becomes of the weights beside their codebooks.
        drops: Class of layer -> share of energy lost in the first round; empty unless ``role`` is ``truncate``.
        rank: Of branches; 0 unless ``role`` is ``branch``.
        alpha: Smoothing coefficient of branches, likewise.
        residual: Form of what branches leave; None likewise.
        clusters: Class of layer -> entries of its tables.
    """

    encoder: float
    recurrent: float
    role: Role
    drops: Mapping[str, float]
    rank: int = 0
    alpha: float = 0.0
    residual: ResidualForm | None = None
    clusters: Mapping[str, int]

    def __str__(self) -> str:
        """In a line."""
        told = [] if self.encoder == self.recurrent == 0 else [f"lambda {self.encoder:g}/{self.recurrent:g}"]
        if self.role == "truncate":
            told += ["energy lost " + "/".join(f"{drop:.2g}" for drop in self.drops.values())]
        if self.role == "branch":
            told += [f"rank {self.rank} + {self.residual} at alpha {self.alpha:.2f}"]
        return ", ".join([*told, "K " + "/".join(str(k) for k in self.clusters.values())])


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a study chooses from.

    Attributes:
        config: The configuration.
        terms: Which sparsity terms the model has normalizations for: of ``encoder``, ``recurrent``.
        decomposed: Classes of layers that can be decomposed.
        clustered: Classes of layers that can be clustered.
    """

    config: CompressConfig
    terms: tuple[Literal["encoder", "recurrent"], ...]
    decomposed: tuple[str, ...]
    clustered: tuple[str, ...]

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles to choose from; where no layer can be decomposed, none but ``off``."""
        return self.config.study.roles if self.decomposed else ("off",)

    def suggest(self, trial: optuna.Trial) -> Choice:
        """Ask the sampler, costly choices first.

        Args:
            trial: A trial that has just begun.
        """
        config = self.config
        trained = config.train.steps > 0
        strengths: dict[str, Any] = {
            term: trial.suggest_categorical(f"lambda.{term}", getattr(config.train, term))
            if term in self.terms and trained
            else 0.0
            for term in ("encoder", "recurrent")
        }
        role = cast("Role", trial.suggest_categorical("role", self.roles))
        drops: dict[str, float] = {}
        branch: dict[str, Any] = {"rank": 0, "alpha": 0.0, "residual": None}
        if role == "truncate":
            low, high = config.rounds.log_drop
            drops = {name: 10 ** trial.suggest_float(f"log_drop.{name}", low, high) for name in self.decomposed}
        if role == "branch":
            branch = {
                "rank": trial.suggest_categorical("rank", config.branch.ranks),
                "alpha": trial.suggest_float("alpha", *config.branch.alpha),
                "residual": trial.suggest_categorical("residual", config.branch.residuals),
            }
        clusters = {name: trial.suggest_categorical(f"{_INNER}{name}", config.clusters.k) for name in self.clustered}
        return Choice(**strengths, role=role, drops=drops, clusters=clusters, **branch)

    def plain(self) -> list[dict[str, Any]]:
        """Parameters of the trials that every study begins with: codebooks alone, many entries and few; then each other role."""
        config = self.config
        some = sorted(config.clusters.k)
        most, few = (min(some, key=lambda k: abs(k - wanted)) for wanted in (_PLAIN, 16))
        without = {f"lambda.{term}": getattr(config.train, term)[0] for term in self.terms if config.train.steps > 0}
        low, high = config.rounds.log_drop
        roles: dict[Role, dict[str, Any]] = {
            "off": {},
            "truncate": {f"log_drop.{name}": (low + high) / 2 for name in self.decomposed},
            "branch": {
                "rank": config.branch.middle_rank,
                "alpha": config.branch.middle_alpha,
                "residual": config.branch.residuals[0],
            },
        }
        found = []
        for role in self.roles:
            for entries in dict.fromkeys((most, few) if role == "off" else (most,)):
                clusters = {f"{_INNER}{name}": entries for name in self.clustered}
                found.append({**without, "role": role, **roles[role], **clusters})
        return found


def costly(params: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trial's parameters that decide training, rounds and branch.

    Args:
        params: Optuna parameters.
    """
    return {name: value for name, value in params.items() if not name.startswith(_INNER)}
