"""What a study is given: a scorer, a search space, and the context in which it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.distributions import BaseDistribution

from alphasmith.search.interruption import never
from alphasmith.search.study.study_record import StudyLog
from alphasmith.search.study.trial import C, Outcome, Pruning, Trial


class Scorer(Protocol[C]):
    """What a study needs of a site or of a whole model."""

    def score(self, candidates: Sequence[C], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        """Score candidates together on growing subsets of the data.

        Args:
            candidates: Any number.
            protected: The first so many are scored on all data whatever their losses are (baselines).
            pruning: Asked after every subset whether to stop a candidate that is not protected; None: candidates whose
                loss is above the incumbent's by more than three paired standard errors are stopped.
        """
        ...

    def recall(self, results: Sequence[Trial[C]]) -> None:
        """Know the trials on record, so that what comes next is compared with the best of them.

        The best one is scored once more, since its errors row by row are not on record.
        """
        ...


class Space(Protocol[C]):
    """A frozen search space: what the sampler chooses, and how candidates become Optuna parameters and come back."""

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Parameters with the values that the sampler must leave alone."""
        ...

    def distributions(self) -> dict[str, BaseDistribution]:
        """What the sampler chooses from, by parameter name."""
        ...

    def candidate(self, kind: str, params: Mapping[str, Any]) -> C:
        """The candidate with these parameters."""
        ...

    def params(self, candidate: C) -> dict[str, Any]:
        """The parameters of a candidate that are recorded with its trial."""
        ...

    def holding(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """Distributions of recorded ``params``, wide enough to hold them."""
        ...

    def canonical(self) -> str:
        """Canonical JSON of the space."""
        ...


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """Where a study is recorded, who hears of its trials, and when it is left.

    Attributes:
        device: Where candidates are scored, recorded with the study.
        log: Keeps trials and facts, and knows those recorded before; None: nothing is kept.
        name: Name of the study, None for a random one.
        on_trial: Called after each trial.
        clock: Seconds, monotonic.
        stop: Polled before every batch of candidates; True ends the search. What was found by then is on record.
    """

    device: str = "cpu"
    log: StudyLog | None = None
    name: str | None = None
    on_trial: Callable[[Trial[Any]], None] | None = None
    clock: Callable[[], float] = time.perf_counter
    stop: Callable[[], bool] = never

    def noted(self, name: str) -> Any:
        """A fact that is on record of the study; None where it is not."""
        return None if self.log is None else self.log.past.notes.get(name)
