"""One trial: how scoring a candidate ended, the result on record, and how it stands in Optuna's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

State = Literal["COMPLETE", "PRUNED", "FAIL"]
#: (candidate's place in the batch, step, loss) -> whether a configured Optuna pruner stops it.
Pruning: TypeAlias = Callable[[int, int, float], bool]


class AnyCandidate(Protocol):
    """What a study can try: anything that says where it comes from."""

    @property
    def kind(self) -> str:
        """Where it comes from; recorded with its trial."""
        ...


C = TypeVar("C", bound=AnyCandidate)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How scoring one candidate ended.

    Attributes:
        state: ``COMPLETE``, ``PRUNED`` (stopped early: worse than the incumbent) or ``FAIL``.
        loss: Loss on all search data; None unless complete.
        seconds: Time spent on it [s].
        reason: Why it failed; empty otherwise.
        steps: (step, loss) on growing subsets of the data.
        better: Whether the loss falls below that of the candidate to beat by more than its paired standard error; None: not asked.
    """

    state: State
    loss: float | None
    seconds: float
    reason: str = ""
    steps: tuple[tuple[int, float], ...] = ()
    better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Trial(Generic[C]):
    """One finished trial.

    Attributes:
        number: Optuna trial number.
        candidate: What was tried.
        state: ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        loss: Loss on all search data; None unless complete.
        seconds: Time spent in the objective [s].
        reason: Why it failed; empty otherwise.
        better: As in :class:`Outcome`.
    """

    number: int
    candidate: C
    state: State
    loss: float | None
    seconds: float
    reason: str = ""
    better: bool | None = None

    @classmethod
    def of(cls, number: int, candidate: C, recorded: FrozenTrial) -> Trial[C]:
        """The trial with the outcome that is on record."""
        return cls(
            number=number,
            candidate=candidate,
            state=recorded.state.name,  # type: ignore[arg-type]  # finished trials have one of the three
            loss=recorded.value if recorded.state == TrialState.COMPLETE else None,
            seconds=recorded.user_attrs.get("seconds", 0.0),
            reason=recorded.user_attrs.get("reason", ""),
            better=recorded.user_attrs.get("better"),
        )


def best_trial(results: Sequence[Trial[C]]) -> Trial[C]:
    """Lowest loss; a tie goes to the lowest trial number (claim A-2)."""
    complete = [r for r in results if r.loss is not None]
    return min(complete, key=lambda r: (r.loss, r.number))


def recorded_trial(
    kind: str, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], outcome: Outcome
) -> FrozenTrial:
    """The finished Optuna trial of a candidate, given by its kind and parameters."""
    attributes: dict[str, Any] = {"candidate": kind, "seconds": outcome.seconds}
    if outcome.state == "FAIL":
        attributes["reason"] = outcome.reason
    if outcome.better is not None:
        attributes["better"] = outcome.better
    trial = optuna.trial.create_trial(
        state=TrialState[outcome.state],
        value=outcome.loss,
        params=dict(params),
        distributions=dict(distributions),
        user_attrs=attributes,
        intermediate_values=dict(outcome.steps),
    )
    if trial.datetime_complete is not None:
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=outcome.seconds)
    return trial
