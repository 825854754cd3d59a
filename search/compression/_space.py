"""What a trial of a joint compression chooses: strengths, role, energies or rank and alpha, clusters; costly choices apart from cheap ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import optuna

from alphasmith.objectives.literals import FlatForm, ResidualForm
from alphasmith.search.compression.config import CompressConfig, Role

#: Entries of every table of the plainest starts, and of those of other roles.
_PLAIN, _OTHER = (256, 8), (16,)
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
        flat: What becomes of layers with a flat spectrum; None unless ``role`` is ``truncate``.
        rank: Of branches; 0 where there are none, that is unless ``role`` or ``flat`` is ``branch``.
        alpha: Smoothing coefficient of branches, likewise.
        residual: Form of what branches leave; None likewise.
        clusters: Class of layer -> entries of its tables.
    """

    encoder: float
    recurrent: float
    role: Role
    drops: Mapping[str, float]
    flat: FlatForm | None = None
    rank: int = 0
    alpha: float = 0.0
    residual: ResidualForm | None = None
    clusters: Mapping[str, int]

    def __str__(self) -> str:
        """In a line."""
        told = [] if self.encoder == self.recurrent == 0 else [f"lambda {self.encoder:g}/{self.recurrent:g}"]
        if self.role == "truncate":
            told += ["energy lost " + "/".join(f"{drop:.2g}" for drop in self.drops.values())]
        if self.branched:
            told += [f"rank {self.rank} + {self.residual} at alpha {self.alpha:.2f}"]
        return ", ".join([*told, "K " + "/".join(str(k) for k in self.clusters.values())])

    @property
    def branched(self) -> bool:
        """Whether there may be branches: all layers, or those with a flat spectrum."""
        return "branch" in (self.role, self.flat)


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
        flat: FlatForm | None = None
        branch: dict[str, Any] = {}
        if role == "truncate":
            low, high = config.rounds.log_drop
            drops = {name: 10 ** trial.suggest_float(f"log_drop.{name}", low, high) for name in self.decomposed}
            flat = cast("FlatForm", trial.suggest_categorical("flat", config.rounds.flat))
        if "branch" in (role, flat):
            branch = {
                "rank": trial.suggest_categorical("rank", config.branch.ranks),
                "alpha": trial.suggest_float("alpha", *config.branch.alpha),
                "residual": trial.suggest_categorical("residual", config.branch.residuals),
            }
        clusters = {name: trial.suggest_categorical(f"{_INNER}{name}", config.clusters.k) for name in self.clustered}
        return Choice(**strengths, role=role, drops=drops, flat=flat, clusters=clusters, **branch)

    def plain(self) -> list[dict[str, Any]]:
        """Parameters of the trials that every study begins with: codebooks alone, of many entries to few; then each other role."""
        config = self.config
        some = sorted(config.clusters.k)
        without = {f"lambda.{term}": getattr(config.train, term)[0] for term in self.terms if config.train.steps > 0}
        low, high = config.rounds.log_drop
        flat = config.rounds.flat[0]
        branch = {
            "rank": config.branch.middle_rank,
            "alpha": config.branch.middle_alpha,
            "residual": config.branch.residuals[0],
        }
        middle = {f"log_drop.{name}": (low + high) / 2 for name in self.decomposed}
        roles: dict[Role, dict[str, Any]] = {
            "off": {},
            "truncate": {**middle, "flat": flat, **(branch if flat == "branch" else {})},
            "branch": branch,
        }
        found = []
        for role in self.roles:
            wanted = _PLAIN if role == "off" else _OTHER
            for entries in dict.fromkeys(min(some, key=lambda k: abs(k - near)) for near in wanted):
                clusters = {f"{_INNER}{name}": entries for name in self.clustered}
                found.append({**without, "role": role, **roles[role], **clusters})
        return found


def costly(params: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trial's parameters that decide training, rounds and branch.

    Args:
        params: Optuna parameters.
    """
    return {name: value for name, value in params.items() if not name.startswith(_INNER)}
