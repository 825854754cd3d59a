"""The study of the choices of formats: a trial for every plan that was measured, on record as it is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from alphasmith.objectives.literals import SiteFormat
from alphasmith.search.formats._plans import plan_key
from alphasmith.storage.database.optuna_private import insert_trials
from alphasmith.storage.database.retries import retry_lost

#: What follows the id of a run in the name of this study.
FORMATS = "formats"
#: Attributes of a trial, which people read in the dashboard.
PLAN, TOLD, SHARE, PREDICTED, SECONDS, REASON = (
    "formats",
    "what",
    "share of multiply-adds",
    "predicted output loss",
    "seconds",
    "reason",
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A plan as it was measured.

    Attributes:
        number: Of its trial.
        changed: Site -> format, of those that are not in the scheme's own.
        cost: In the unit of the budget.
        share_of_macs: Part of the multiply-adds in dearer formats.
        predicted: Output loss as predicted; None: not predicted.
        loss: As measured; None: not finite.
        reason: Why it has none.
    """

    number: int
    changed: Mapping[str, SiteFormat]
    cost: float
    share_of_macs: float
    predicted: float | None
    loss: float | None
    reason: str = ""


class PlanRecord(Protocol):
    """Keeps trials, and knows those that were kept before.

    Attributes:
        study: Name of the study; None: nothing is kept.
    """

    study: str | None

    def known(self) -> Mapping[str, tuple[float | None, str]]:
        """Plan -> loss and why there is none, of the trials on record."""
        ...

    def add(self, measured: Measured, *, told: str, choices: tuple[SiteFormat, ...], seconds: float) -> None:
        """Keep a trial; one of that number may be there already.

        Args:
            measured: Its plan and figures.
            told: The plan in words.
            choices: Formats of a site.
            seconds: Time it took [s].
        """
        ...


class NoRecord:
    """Keeps nothing."""

    study: str | None = None

    def known(self) -> Mapping[str, tuple[float | None, str]]:
        """Nothing."""
        return {}

    def add(self, measured: Measured, *, told: str, choices: tuple[SiteFormat, ...], seconds: float) -> None:
        """Not kept."""


class StoredPlans:
    """Trials of a multi-objective study in the run's own storage: cost, then output loss, both to be low.

    Args:
        storage: Optuna storage.
        name: Name of the study; made by the first trial.
        fence: Called inside every transaction that adds a trial; raises where another process has taken over.
    """

    def __init__(self, storage: BaseStorage, name: str, fence: Callable[[Any], None] | None = None) -> None:
        self.study: str | None = name
        self._name = name
        self._storage = storage
        self._fence = fence
        self._past = retry_lost(self._read)

    def known(self) -> Mapping[str, tuple[float | None, str]]:
        """Plan -> loss and why there is none, of the trials on record."""
        return {
            str(trial.user_attrs[PLAN]): (
                trial.values[1] if trial.state == TrialState.COMPLETE else None,
                str(trial.user_attrs.get(REASON, "")),
            )
            for trial in self._past
        }

    def add(self, measured: Measured, *, told: str, choices: tuple[SiteFormat, ...], seconds: float) -> None:
        """Keep a trial, unless one of its number is on record."""
        if measured.number < len(self._past):
            return
        study = optuna.create_study(
            study_name=self._name, storage=self._storage, directions=["minimize", "minimize"], load_if_exists=True
        )
        if not self._past:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(["cost", "output loss"])
        trial = _trial(measured, told, choices, seconds)
        identity = self._storage.get_study_id_from_name(self._name)
        insert_trials(self._storage, identity, [trial], first=measured.number, fence=self._fence)
        self._past.append(trial)

    def _read(self) -> list[FrozenTrial]:
        try:
            identity = self._storage.get_study_id_from_name(self._name)
        except KeyError:
            return []
        found = self._storage.get_all_trials(identity)
        return [trial for trial in found if trial.state.is_finished() and PLAN in trial.user_attrs]


def _trial(measured: Measured, told: str, choices: tuple[SiteFormat, ...], seconds: float) -> FrozenTrial:
    attributes: dict[str, Any] = {
        TOLD: told,
        PLAN: plan_key(measured.changed),
        SHARE: measured.share_of_macs,
        PREDICTED: measured.predicted,
        SECONDS: seconds,
    }
    if measured.reason:
        attributes[REASON] = measured.reason
    trial = optuna.trial.create_trial(
        state=TrialState.FAIL if measured.loss is None else TrialState.COMPLETE,
        values=None if measured.loss is None else [measured.cost, measured.loss],
        params=dict(measured.changed),
        distributions={site: CategoricalDistribution(choices) for site in measured.changed},
        user_attrs=attributes,
    )
    if trial.datetime_complete is not None:
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=seconds)
    return trial
