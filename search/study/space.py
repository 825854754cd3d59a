"""The frozen search space of a study: numbers inside their ranges and choices, hashed, never changed once a trial exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import CandidateKind
from alphasmith.search.study.alpha_ranges import AlphaRange
from alphasmith.search.study.candidates import Candidate

#: Attributes of a study that freeze its space.
SPACE = "alphasmith:space"
SPACE_DIGEST = "alphasmith:space_sha256"

#: How far a group's factor may move its scales, natural logarithm: a factor of 150 either way, which groups of channels that the
#: weights hardly read do need.
OFFSET_RANGE = (-5.0, 5.0)
#: Exponents of w, where they are searched.
BETA_RANGE = (0.0, 1.0)


@dataclass(frozen=True)
class SearchSpace:
    """K alphas, one per group (claim A-3), and what is searched beside them.

    Attributes:
        floats: (name, low, high) of every number.
        choices: (name, values) of every choice with more than one value.
        recorded: (name, values) of choices that are made elsewhere (on held-out rows) and only recorded with a trial.
    """

    floats: tuple[tuple[str, float, float], ...]
    choices: tuple[tuple[str, tuple[str, ...]], ...] = ()
    recorded: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def of(
        cls,
        ranges: Sequence[AlphaRange],
        *,
        betas: bool = False,
        offsets: bool = False,
        choices: Mapping[str, Sequence[str]] | None = None,
        recorded: Mapping[str, Sequence[str]] | None = None,
    ) -> SearchSpace:
        """The space of given alpha ranges, rounded to 1e-9 so that its hash does not depend on the last bit.

        Args:
            ranges: One per group.
            betas: Whether every group has its own beta, within ``BETA_RANGE``.
            offsets: Whether every group has its own offset, within ``OFFSET_RANGE``.
            choices: Values to choose from by name; a single value is no choice and left out.
            recorded: Likewise, for choices that the sampler does not make.
        """
        floats = [(f"alpha_{k}", round(r.low, 9), round(r.high, 9)) for k, r in enumerate(ranges)]
        floats += [(f"beta_{k}", *BETA_RANGE) for k in range(len(ranges)) if betas]
        floats += [(f"offset_{k}", *OFFSET_RANGE) for k in range(len(ranges)) if offsets]
        sampled, kept = (
            tuple((name, tuple(values)) for name, values in (given or {}).items() if len(values) > 1)
            for given in (choices, recorded)
        )
        return cls(tuple(floats), sampled, kept)

    @property
    def names(self) -> tuple[str, ...]:
        """All parameter names."""
        return (*(name for name, _, _ in self.floats), *(name for name, _ in self.choices))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distributions by parameter name."""
        floats: dict[str, BaseDistribution] = {n: FloatDistribution(a, b) for n, a, b in self.floats}
        return floats | {name: CategoricalDistribution(values) for name, values in self.choices}

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Nothing: the sampler chooses every parameter."""
        return {}

    def candidate(self, kind: str, params: Mapping[str, Any]) -> Candidate:
        """The candidate with these parameters."""
        return Candidate.of(cast(CandidateKind, kind), params)

    def params(self, candidate: Candidate) -> dict[str, Any]:
        """The parameters that are worth a row in the database: numbers, and choices with more than one value."""
        choices = {name for name, _ in (*self.choices, *self.recorded)}
        return {n: value for n, value in candidate.params().items() if n in choices or not isinstance(value, str)}

    def holding(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """Distributions of recorded ``params``, widened to hold them: baselines outside the ranges stay as they are (T3)."""
        bounds = {name: (low, high) for name, low, high in self.floats}
        choices = dict((*self.choices, *self.recorded))
        result: dict[str, BaseDistribution] = {}
        for name, value in params.items():
            if name in choices:
                result[name] = CategoricalDistribution(choices[name])
            else:
                low, high = bounds.get(name, (value, value))
                result[name] = FloatDistribution(min(low, value), max(high, value))
        return result

    def digest(self) -> str:
        """sha256 of the canonical JSON of the space."""
        return space_digest(self.canonical())

    def canonical(self) -> str:
        """Canonical JSON of the space."""
        return json.dumps({"floats": self.floats, "choices": (*self.choices, *self.recorded)}, sort_keys=True)


def space_digest(canonical: str) -> str:
    """sha256 of the canonical JSON of a space."""
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_space(noted: Mapping[str, Any], study_name: str, canonical: str) -> None:
    """Refuse a study that was made for another space, by what is noted of it.

    Optuna accepts changed bounds silently and then samples such parameters independently.

    Args:
        noted: Facts on record of the study.
        study_name: Its name.
        canonical: Canonical JSON of the space it is to go on in.

    Raises:
        InputError: The study was made for another space.
    """
    known = noted.get(SPACE_DIGEST)
    if known is not None and known != space_digest(canonical):
        raise InputError(
            "search space",
            f"study {study_name!r} was made for {noted.get(SPACE)}, not {canonical}",
            "start a new run, or restore the configuration of the old one",
        )
