"""A study over the settings of a training: learning rate, loss, distillation and steps, each judged on samples that decide nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from alphasmith.objectives.errors import AlphasmithError, InputError, NonFiniteError
from alphasmith.objectives.media.batch import call, device_of, main_output
from alphasmith.objectives.text import number, one_line
from alphasmith.objectives.training.fake_quantized import FakeQuantized
from alphasmith.objectives.training.loop import TrainingData, train
from alphasmith.objectives.training.losses import Objective, SampleLosses, Task, answers, task_of
from alphasmith.objectives.training.settings import TrainingSettings
from alphasmith.search.config import SearchConfig
from alphasmith.search.interruption import Interrupted
from alphasmith.search.progress import Progress
from alphasmith.search.study.study import RecordedStudy, play
from alphasmith.search.study.study_record import StoredLog
from alphasmith.search.study.trial import Outcome, Pruning, Trial, best_trial
from alphasmith.search.study.types import StudyContext
from alphasmith.search.training._checkpoints import CheckpointFolder
from alphasmith.storage.database.connection import Database, optuna_storage
from alphasmith.storage.output.training_entry import SettingsStudyEntry

#: How far the learning rate may be from the one given, either way.
_RATES = 10.0
#: Steps that are tried, as shares of those given.
_STEPS = (0.5, 2.0)
#: What a study is called after the id of its training.
_NAME = "settings"


class TrainingDivergedError(InputError):
    """A training found nothing better before its numbers ran away."""


@dataclass(frozen=True, kw_only=True)
class SettingsChoice:
    """Settings to try.

    Attributes:
        kind: ``given`` or ``sampler``.
        learning_rate: See ``TrainingSettings``.
        loss: Likewise.
        distill: Likewise.
        steps: Likewise.
    """

    kind: str
    learning_rate: float
    loss: str
    distill: float
    steps: int

    def params(self) -> dict[str, Any]:
        """Optuna parameters."""
        return {name: value for name, value in asdict(self).items() if name != "kind"}


@dataclass(frozen=True, kw_only=True)
class SettingsSpace:
    """What a study chooses from, around settings that were given.

    Attributes:
        given: These.
        losses: Losses that fit the task.
        distilled: Whether there is a float model to distil from.
        steps: Steps given.
    """

    given: TrainingSettings
    losses: tuple[str, ...]
    distilled: bool
    steps: int

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distributions by parameter name."""
        rate, (few, many) = self.given.learning_rate, (max(1, round(self.steps * share)) for share in _STEPS)
        found: dict[str, BaseDistribution] = {
            "learning_rate": FloatDistribution(rate / _RATES, rate * _RATES, log=True),
            "steps": IntDistribution(few, max(few, many), log=True),
        }
        if len(self.losses) > 1:
            found["loss"] = CategoricalDistribution(self.losses)
        if self.distilled:
            found["distill"] = FloatDistribution(0.0, 0.9)
        return found

    def first(self) -> SettingsChoice:
        """The settings given."""
        given = self.given
        return SettingsChoice(
            kind="given",
            learning_rate=given.learning_rate,
            loss=given.loss,
            distill=given.distill if self.distilled else 0.0,
            steps=self.steps,
        )

    def candidate(self, kind: str, params: Mapping[str, Any]) -> SettingsChoice:
        """The settings with these parameters; what is not among them is as given."""
        return replace(self.first(), kind=kind, **params)

    def params(self, candidate: SettingsChoice) -> dict[str, Any]:
        """The parameters that are recorded with a trial: those that are chosen."""
        chosen = self.distributions()
        return {name: value for name, value in candidate.params().items() if name in chosen}

    def holding(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """Distributions of recorded parameters, wide enough to hold them."""
        known = self.distributions()
        held: dict[str, BaseDistribution] = {}
        for name, value in params.items():
            one = known[name]
            if isinstance(one, FloatDistribution):
                one = FloatDistribution(min(one.low, value), max(one.high, value), log=one.log)
            elif isinstance(one, IntDistribution):
                one = IntDistribution(min(one.low, value), max(one.high, value), log=one.log)
            held[name] = one
        return held

    def canonical(self) -> str:
        """Canonical JSON."""
        told = {name: optuna.distributions.distribution_to_json(one) for name, one in self.distributions().items()}
        return json.dumps(told, sort_keys=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyPlan:
    """What a study works on.

    Attributes:
        settings: As they were given.
        data: Its held-out samples judge the trials.
        trials: How many.
        work: Folder for checkpoints of the trial that is going on.
        model: The compressed model.
    """

    settings: TrainingSettings
    data: TrainingData
    trials: int
    work: Path
    model: nn.Module


def choose_settings(
    plan: StudyPlan, database: Database, training_id: str, *, progress: Progress, stop: Callable[[], bool]
) -> tuple[TrainingSettings, SettingsStudyEntry]:
    """Try settings one after the other, those given first; trials on record are not repeated, one that was cut off goes on.

    Args:
        plan: What it works on.
        database: Where the study is recorded.
        training_id: By which it is named.
        progress: Receives stages.
        stop: Polled between updates.

    Returns:
        The settings with the lowest loss against the labels on held-out samples, and what is recorded of the study.

    Raises:
        Interrupted: ``stop`` said so; what was found is on record.
        TrainingDivergedError: Every training diverged.
    """
    scorer = _Scorer(plan, progress, stop)
    name = f"{training_id}/{_NAME}"
    context = StudyContext(name=name, log=StoredLog(optuna_storage(database), name), stop=stop)
    study = RecordedStudy[SettingsChoice](SearchConfig(seed=plan.settings.seed), scorer.space, context)
    try:
        play(study, scorer, first=[scorer.space.first()], protected=1, trials=plan.trials, stop=stop)
    except Interrupted:
        raise
    except AlphasmithError as error:
        if not study.results or any(trial.loss is not None for trial in study.results):
            raise
        remedy = f"lower --learning-rate (it is {plan.settings.learning_rate:g})"
        raise TrainingDivergedError("training", one_line(error, 400), remedy) from error
    best = best_trial(study.results)
    settings = scorer.settings(best.candidate)
    entry = SettingsStudyEntry(
        study=name,
        trials=len(study.results),
        best_trial=best.number,
        loss=float(best.loss or 0.0),
        chosen=best.candidate.params(),
    )
    progress.note(f"of {len(study.results)} settings trial {best.number} is the best: {_told(best.candidate)}")
    return settings, entry


class _Scorer:
    """Trains with some settings and scores what comes out against the labels, whatever loss was lowered."""

    def __init__(self, plan: StudyPlan, progress: Progress, stop: Callable[[], bool]) -> None:
        self._plan, self._progress, self._stop = plan, progress, stop
        first = plan.data.held_out.batch([0]).to(device_of(plan.model))
        with torch.no_grad():
            task = task_of(main_output(call(plan.model.eval(), first)), first)
        self._task: Task = task
        losses: dict[Task, tuple[str, ...]] = {
            "classes": ("cross_entropy", "mse", "hinge"),
            "tokens": ("cross_entropy", "mse"),
            "values": ("mse",),
        }
        self.space = SettingsSpace(
            given=plan.settings,
            losses=losses[task],
            distilled=plan.data.teacher is not None,
            steps=plan.settings.updates(len(plan.data.samples)),
        )
        measured = "mse" if task == "values" else "cross_entropy"
        self._objective = Objective(
            settings=replace(plan.settings, loss=measured, distill=0.0),  # type: ignore[arg-type]  # of LossName
            task=task,
            probabilities=plan.data.probabilities,
        )
        self._number = 0

    def settings(self, choice: SettingsChoice) -> TrainingSettings:
        """The settings of a choice."""
        return replace(self._plan.settings, **choice.params())

    def recall(self, results: Sequence[Trial[SettingsChoice]]) -> None:
        """Know how many trials there are: checkpoints are of the one that follows."""
        self._number = len(results)

    def score(self, candidates: Sequence[SettingsChoice], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        """See ``study.types.Scorer``."""
        return [self._score(candidate) for candidate in candidates]

    def _score(self, choice: SettingsChoice) -> Outcome:
        plan, settings = self._plan, self.settings(choice)
        began = perf_counter()
        folder = plan.work / f"trial-{self._number}"
        model = FakeQuantized(
            plan.model,
            learn_steps=settings.learn_steps,
            learn_ranges=settings.learn_ranges,
            freeze_norm_statistics=settings.freeze_norm_statistics,
        )
        self._progress.stage(f"trial {self._number}: {_told(choice)}", settings.updates(len(plan.data.samples)))
        found = train(model, plan.data, settings, checkpoints=CheckpointFolder(folder), stop=self._polled)
        if found.ending == "interrupted":
            raise Interrupted(found.reason)
        shutil.rmtree(folder, ignore_errors=True)
        self._number += 1
        seconds = perf_counter() - began
        if found.ending == "diverged" and not found.kept:
            return Outcome(state="FAIL", loss=None, seconds=seconds, reason=found.reason)
        loss = self._loss(model)
        return Outcome(state="COMPLETE", loss=loss, seconds=seconds)

    def _polled(self) -> bool:
        self._progress.advance()
        return self._stop()

    def _loss(self, model: nn.Module) -> float:
        """Mean loss of the held-out samples against their labels."""
        held_out, size = self._plan.data.held_out, self._plan.settings.batch_size
        parts = []
        for start in range(0, len(held_out), size):
            batch = held_out.batch(range(start, min(start + size, len(held_out)))).to(device_of(model))
            with torch.no_grad():
                output = main_output(call(model.eval(), batch))
            parts.append(self._objective.losses(answers(output, batch, self._task), None))
        loss = float(SampleLosses.joined(parts).mean)
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss against the labels is {loss}")
        return loss


def _told(choice: SettingsChoice) -> str:
    told = f"learning rate {number(choice.learning_rate)}, {choice.loss}, {choice.steps} steps"
    return told + (f", distillation {number(choice.distill)}" if choice.distill else "")
