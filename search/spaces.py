"""The frozen search space of a study: K alphas inside their ranges, hashed, never changed once a trial exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from alphasmith.objectives.errors import InputError
from alphasmith.search.ranges import AlphaRange

_SPACE = "alphasmith:space"
_DIGEST = "alphasmith:space_sha256"


@dataclass(frozen=True)
class SearchSpace:
    """K alphas, one per group (claim A-3).

    Attributes:
        low: (K,) smallest alphas.
        high: (K,) largest alphas.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, ranges: Sequence[AlphaRange]) -> SearchSpace:
        """The space of given ranges, rounded to 1e-9 so that its hash does not depend on the last bit."""
        return cls(tuple(round(r.low, 9) for r in ranges), tuple(round(r.high, 9) for r in ranges))

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names ``alpha_0`` .. ``alpha_{K-1}``."""
        return tuple(f"alpha_{k}" for k in range(len(self.low)))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distributions by parameter name."""
        return {n: FloatDistribution(a, b) for n, a, b in zip(self.names, self.low, self.high, strict=True)}

    def digest(self) -> str:
        """sha256 of the canonical JSON of the space."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def freeze_in(self, study: optuna.Study) -> None:
        """Record the space in ``study``, or check that the study already holds the same one.

        Optuna accepts changed bounds silently and then samples such parameters independently; so refuse.

        Raises:
            InputError: The study was made for another space.
        """
        known = study.user_attrs.get(_DIGEST)
        if known is None:
            study.set_user_attr(_SPACE, self._json())
            study.set_user_attr(_DIGEST, self.digest())
        elif known != self.digest():
            raise InputError(
                "search space",
                f"study {study.study_name!r} was made for {study.user_attrs.get(_SPACE)}, not {self._json()}",
                "start a new run, or restore the configuration of the old one",
            )

    def _json(self) -> str:
        return json.dumps({"low": list(self.low), "high": list(self.high)}, sort_keys=True)
