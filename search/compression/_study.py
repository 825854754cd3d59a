"""The study of a joint compression: trials asked and told one by one, drops as constraints, the front of what keeps within them.

Every proposal depends on the trials before it alone: a study that was cut off proposes again what it was working on, and ends as if
nothing had happened.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.joint.ports import Measured
from alphasmith.objectives.text import error_line
from alphasmith.search.compression._space import Choice, Space, costly
from alphasmith.search.interruption import Interrupted, leave
from alphasmith.search.progress import Progress

#: Attributes of a trial: what people read in the dashboard, and what the result is chosen by.
BYTES, RATIO, LATENCY, ROUNDS, NOTES = "stored bytes", "compression", "latency [ms]", "rounds", "notes"
#: Why a trial was given up, and why it failed. One that failed without a reason was cut off, and does not count.
DROPPED, REASON = "dropped", "reason"
#: Before the name of a metric: its value on the study split, how much worse that is, how far beyond the limit.
VALUE, DROP, CONSTRAINT = "study.", "drop.", "constraint."
#: Attribute of the study: number of a trial, or ``ORIGINAL`` -> metrics on the test split.
TESTED, ORIGINAL = "tested", "original"
_START_UP = 8


class DroppedError(AlphasmithError):
    """No round of a trial kept within the limits: it is not worth going on with."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a trial's model came to.

    Attributes:
        stored: Its bytes.
        ratio: Those of the original over these.
        latency: Time of a forward call [s]; None: not asked for.
        measured: Metrics on the study split.
        drops: Metric -> how much worse than the original's.
        constraints: Limit -> how far beyond it [the metric's unit]; kept at 0 and below.
        rounds: What the rounds came to, in a line; empty where there were none.
        notes: What people should know.
    """

    stored: int
    ratio: float
    latency: float | None
    measured: Measured
    drops: Mapping[str, float]
    constraints: Mapping[str, float]
    rounds: str = ""
    notes: tuple[str, ...] = ()


class Stages(Protocol):
    """Makes the model of a choice."""

    def point(self, choice: Choice) -> Point:
        """Go through all stages and measure.

        Args:
            choice: What to do.

        Raises:
            DroppedError: No round kept within the limits.
            Interrupted: Somebody asked to stop.
            AlphasmithError: Something is not finite, or cannot be done with this model.
        """
        ...


def directions(latency: bool) -> list[Literal["minimize", "maximize"]]:
    """Optuna's directions: stored bytes, then latency.

    Args:
        latency: Whether that is asked for.
    """
    return ["minimize"] * (1 + latency)


def run_study(
    study: optuna.Study,
    space: Space,
    stages: Stages,
    *,
    progress: Progress,
    stop: Callable[[], bool],
    clock: Callable[[], float] = perf_counter,
) -> list[FrozenTrial]:
    """Try until there are as many trials as asked for; those on record count.

    Args:
        study: On record, perhaps with trials; nobody else works on it.
        space: What is chosen from.
        stages: Makes and measures models.
        progress: Receives stages.
        stop: Polled between trials.
        clock: Seconds, monotonic.

    Returns:
        All trials that count, by number.

    Raises:
        Interrupted: ``stop`` said so; the trial that was going on is tried again next time.
    """
    config = space.config
    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(left.number, state=TrialState.PRUNED if DROPPED in left.user_attrs else TrialState.FAIL)
    progress.stage("trials", config.study.trials)
    done = counted(study)
    for _ in done:
        progress.advance()
    while len(done) < config.study.trials:
        leave(stop)
        study.sampler = _sampler(config.study.seed, done, space)
        trial = study.ask()
        choice = space.suggest(trial)
        began = clock()
        try:
            point = stages.point(choice)
        except DroppedError as error:
            _told(trial, {DROPPED: str(error)}, began, clock)
            study.tell(trial, state=TrialState.PRUNED)
        except Interrupted:
            study.tell(trial, state=TrialState.FAIL)
            raise
        except AlphasmithError as error:
            _told(trial, {REASON: error_line(error)}, began, clock)
            study.tell(trial, state=TrialState.FAIL)
        else:
            _told(trial, _attributes(point), began, clock)
            for name, value in point.constraints.items():
                trial.set_constraint(name, value)
            study.tell(trial, [point.stored] if point.latency is None else [point.stored, point.latency])
        done = counted(study)
        progress.advance(str(choice))
    return done


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ended by themselves, by number.

    Args:
        study: Any.
    """
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and (trial.state != TrialState.FAIL or REASON in trial.user_attrs)
    ]


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial's model keeps within every limit.

    Args:
        trial: Any.
    """
    limits = [value for name, value in trial.user_attrs.items() if name.startswith(CONSTRAINT)]
    return trial.state == TrialState.COMPLETE and all(value <= 0 for value in limits)


def front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Feasible trials that no other one is as good as in everything and better than in something, smallest first.

    Compared are stored bytes, latency where it was asked for, and how much worse every metric became.

    Args:
        trials: Any.
    """
    usable = [trial for trial in trials if feasible(trial)]
    if not usable:
        return []
    costs = np.array([_costs(trial) for trial in usable])
    # Equal points: the first one stands for all.
    dominated = [
        any(
            bool((costs[other] <= mine).all()) and (bool((costs[other] < mine).any()) or other < place)
            for other in range(len(usable))
            if other != place
        )
        for place, mine in enumerate(costs)
    ]
    best = [trial for trial, beaten in zip(usable, dominated, strict=True) if not beaten]
    return sorted(best, key=lambda trial: (trial.user_attrs[BYTES], trial.number))


def _costs(trial: FrozenTrial) -> list[float]:
    drops = [value for name, value in sorted(trial.user_attrs.items()) if name.startswith(DROP)]
    return [*(float(value) for value in trial.values or ()), *drops]


def _sampler(seed: int, done: Sequence[FrozenTrial], space: Space) -> BaseSampler:
    """Proposes the next trial: a plain one, one with the costly choices of the last, or a new one."""
    number = len(done)
    drawn = np.random.SeedSequence([seed, number]).generate_state(1)[0]
    plain = space.plain()
    fixed: dict[str, Any] = {}
    if number < len(plain):
        fixed = plain[number]
    elif later := (number - len(plain)) % space.config.study.inner:
        leader = done[number - later]
        fixed = costly(leader.params) if leader.state == TrialState.COMPLETE else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        inner = TPESampler(seed=int(drawn), n_startup_trials=_START_UP, multivariate=True, group=True)
        return PartialFixedSampler(fixed, inner) if fixed else inner


def _attributes(point: Point) -> dict[str, Any]:
    found: dict[str, Any] = {BYTES: point.stored, RATIO: point.ratio}
    if point.latency is not None:
        found[LATENCY] = 1e3 * point.latency
    found |= {VALUE + name: value for name, value in point.measured.values.items()}
    found |= {DROP + name: value for name, value in point.drops.items()}
    found |= {CONSTRAINT + name: value for name, value in point.constraints.items()}
    if point.rounds:
        found[ROUNDS] = point.rounds
    if notes := (*point.notes, *point.measured.notes):
        found[NOTES] = "; ".join(notes)
    return found


def _told(trial: optuna.Trial, attributes: Mapping[str, Any], began: float, clock: Callable[[], float]) -> None:
    for name, value in {**attributes, "seconds": clock() - began}.items():
        trial.set_user_attr(name, value)
