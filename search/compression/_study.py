"""The study of a joint compression: trials asked and told one by one, drops as constraints, the front of what keeps within them.

Every trial has a place in the order of its study, and what is proposed for it depends on the place and on the trials on record alone: a
study that was cut off proposes again what it was working on, and with one worker ends as if nothing had happened. Several workers take
places that are free; a trial whose worker died leaves its place to others.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.trial import FixedTrial, FrozenTrial, TrialState

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
#: Attribute of a trial: its place in the order of the study, from 0.
PLACE = "place"
_START_UP = 8
#: Seconds between two looks at trials of others.
_LOOK = 0.5


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


class Claims(Protocol):
    """Which trials of a study are this process's; see :class:`~alphasmith.storage.queue.trial_claims.TrialClaims`."""

    def begin(self, trial: FrozenTrial, *, first: int) -> optuna.Trial | None:
        """Add a running trial as number ``first``; None: another process has added one meanwhile."""
        ...

    def end(self) -> None:
        """This process works on no trial any more."""
        ...

    def abandoned(self) -> Mapping[int, Mapping[str, Any]]:
        """Running trials that nobody works on: number -> attributes."""
        ...


def run_study(
    study: optuna.Study,
    space: Space,
    stages: Stages,
    *,
    claims: Claims,
    progress: Progress,
    stop: Callable[[], bool],
    clock: Callable[[], float] = perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[FrozenTrial]:
    """Try until there are as many trials as asked for, whoever tries them; those on record count.

    Args:
        study: On record, perhaps with trials; other processes may work on it.
        space: What is chosen from.
        stages: Makes and measures models.
        claims: This process's.
        progress: Receives stages.
        stop: Polled between trials.
        clock: Seconds, monotonic.
        sleep: Waits a number of seconds, while all that is left to do is done by others.

    Returns:
        All trials that count, by number.

    Raises:
        Interrupted: ``stop`` said so; the trial that was going on is tried again next time.
    """
    total = space.config.study.trials
    progress.stage("trials", total)
    shown = 0
    while True:
        give_up(study, claims.abandoned())
        trials = study.get_trials(deepcopy=False)
        done = ended(trials)
        for _ in range(shown, len(done)):
            progress.advance()
        shown = len(done)
        if len(done) >= total:
            return done
        leave(stop)
        places = placed(trials)
        place = next_place(places, space)
        if place is None:
            sleep(_LOOK)
            continue
        proposed = _proposed(study, trials, places, place, space)
        trial = claims.begin(proposed, first=len(trials))
        if trial is None:
            continue
        choice = space.suggest(fixed(proposed))
        try:
            _tried(study, trial, choice, stages, clock)
        except optuna.exceptions.UpdateFinishedTrialError:
            continue  # this process was silent for a lease, and the trial was given to another one
        finally:
            claims.end()
        shown += 1
        progress.advance(str(choice))


def give_up(study: optuna.Study, left: Mapping[int, Mapping[str, Any]]) -> None:
    """End trials that nobody works on any more; those that were not dropped are tried again.

    Args:
        study: Their study.
        left: Numbers and attributes of running trials.
    """
    for number, attributes in left.items():
        state = TrialState.PRUNED if DROPPED in attributes else TrialState.FAIL
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process was faster
            study.tell(number, state=state, skip_if_finished=True)


def placed(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Place in the order of the study -> the trial that counts there or is going on.

    Args:
        trials: All of a study, by number. Those that do not know their place take the first that is free.
    """
    taken = [trial for trial in trials if trial.state == TrialState.RUNNING or _counts(trial)]
    found = {int(trial.user_attrs[PLACE]): trial for trial in taken if PLACE in trial.user_attrs}
    free = (place for place in itertools.count() if place not in found)
    return found | dict(zip(free, [trial for trial in taken if PLACE not in trial.user_attrs], strict=False))


def next_place(places: Mapping[int, FrozenTrial], space: Space) -> int | None:
    """What to try next; None: there are, or will be, as many trials as asked for.

    Rather a place whose costly stages nobody is at: who waits for them would have nothing to do.

    Args:
        places: See :func:`placed`.
        space: What is chosen from.
    """
    total = space.config.study.trials
    if len(places) >= total:
        return None
    free = [place for place in range(total) if place not in places]
    return next((place for place in free if _is_ready(place, places, space)), free[0])


def _is_ready(place: int, places: Mapping[int, FrozenTrial], space: Space) -> bool:
    leader = place - _after_leader(place, space)
    return leader == place or (leader in places and places[leader].state != TrialState.RUNNING)


def _after_leader(place: int, space: Space) -> int:
    """How many places ago the costly stages of this one were chosen; 0: here."""
    return max(place - len(space.plain()), 0) % space.config.study.inner


def _proposed(
    study: optuna.Study,
    trials: Sequence[FrozenTrial],
    places: Mapping[int, FrozenTrial],
    place: int,
    space: Space,
) -> FrozenTrial:
    """The running trial for a place; decided by the trials on record and the seed alone."""
    seen = optuna.create_study(directions=study.directions, sampler=_sampler(place, places, space))
    seen.add_trials([trial for trial in trials if trial.state != TrialState.WAITING])
    asked = seen.ask()
    space.suggest(asked)
    proposed = seen.get_trials()[-1]
    proposed.user_attrs = {PLACE: place}
    return proposed


def fixed(trial: FrozenTrial) -> Any:
    """A trial that suggests what this one did.

    Args:
        trial: Any.
    """
    return FixedTrial(dict(trial.params), number=trial.number)


def _tried(
    study: optuna.Study, trial: optuna.Trial, choice: Choice, stages: Stages, clock: Callable[[], float]
) -> None:
    began = clock()
    try:
        point = stages.point(choice)
    except DroppedError as error:
        _told(trial, {DROPPED: str(error)}, began, clock)
        study.tell(trial, state=TrialState.PRUNED)
    except Interrupted:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise
    except AlphasmithError as error:
        _told(trial, {REASON: error_line(error)}, began, clock)
        study.tell(trial, state=TrialState.FAIL)
    except Exception:
        # For others to try: this process may live on.
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise
    else:
        _told(trial, _attributes(point), began, clock)
        for name, value in point.constraints.items():
            trial.set_constraint(name, value)
        study.tell(trial, [point.stored] if point.latency is None else [point.stored, point.latency])


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ended by themselves, by number.

    Args:
        study: Any.
    """
    return ended(study.get_trials(deepcopy=False))


def ended(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those of a study's trials that ended by themselves.

    Args:
        trials: Any.
    """
    return [trial for trial in trials if _counts(trial)]


def _counts(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and (trial.state != TrialState.FAIL or REASON in trial.user_attrs)


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


def _sampler(place: int, places: Mapping[int, FrozenTrial], space: Space) -> BaseSampler:
    """Proposes the trial of a place: a plain one, one with the costly choices of an earlier one, or a new one."""
    drawn = np.random.SeedSequence([space.config.study.seed, place]).generate_state(1)[0]
    plain = space.plain()
    fixed: dict[str, Any] = {}
    if place < len(plain):
        fixed = plain[place]
    elif later := _after_leader(place, space):
        leader = places.get(place - later)
        known = leader is not None and leader.state in (TrialState.COMPLETE, TrialState.RUNNING)
        fixed = costly(leader.params) if leader is not None and known else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Trials that are going on count as bad ones (constant liar, by default): what another worker is at is not proposed again.
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
