"""Coordinate search at the model's output: one unit after the other, each move kept only beyond its paired standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.interruption import leave
from alphasmith.search.model._output_scorer import OutputScorer, outcome_of
from alphasmith.search.model._settings import RANGE_MAX, RANGE_MIN, Change, Setting, SettingSpace
from alphasmith.search.study.fault_isolation import race_all, remembered
from alphasmith.search.study.study import RecordedStudy
from alphasmith.search.study.trial import Outcome, Pruning, Trial

#: Moves of alpha and factors on the range: coarse ones first, each repeated while it helps, then finer ones.
_SHIFTS, _FINE_SHIFTS = (0.1, -0.1), (0.05, -0.05)
_RANGES, _FINE_RANGES = (0.8, 1.15), (0.9, 1.07)
#: Factors whose effect is predicted before anything is tried: farther apart, as a prediction costs little.
_FORESEEN_RANGES = (0.75, 1.3)
#: Choices that are not tried for kinds where their loss for the whole model is so many times that of the best one.
_CRUDE, _FAR_BEHIND = ("identity", "alpha_0.5"), 2.0
#: Moves in a row that leave the loss as it is to the last bit: the output does not depend on the unit.
_IDLE = 3
#: A move that has to gain more than its standard error is given up once it is behind by that much, after few samples.
_FEWEST_STEPS, _GIVEN_UP = 1, 1.0


class MoveScorer(OutputScorer[Change]):
    """Scores moves against the best change so far, which is the one to beat.

    Args:
        judge: Loss at the output on the search batches; ``mse`` or ``kl``.
        space: What changes do to the sites.
        clock: Seconds, monotonic.
        errors: Paired standard errors by which a move has to lower the loss.
        remember: Whether what comes before the first changed site is kept of the change to beat: pays where units are single sites.
    """

    def __init__(
        self,
        judge: ModelObjective,
        space: SettingSpace,
        clock: Callable[[], float],
        *,
        errors: float = 1.0,
        remember: bool = False,
    ) -> None:
        super().__init__(judge, space.smoothings, clock=clock, racer=_Impatient(judge))
        self._space = space
        self._errors = errors
        self._remember = remember
        self._beaten: ModelScore | None = None
        #: The change to beat, and the one that is remembered.
        self._current: Change | None = None
        self._remembered: Change | None = None

    def score(self, candidates: Sequence[Change], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        """Plain changes are raced against each other; a move says whether it is better than the best change so far."""
        if self._remember and candidates[0].kind != "proposal":
            began = self.clock()
            score = self._know(candidates[0])
            return [replace(outcome_of(score, self.clock() - began), steps=())]
        if candidates[0].kind != "proposal":
            outcomes = super().score(candidates, protected=protected, pruning=None)
            self._beaten = self.best
            return [replace(outcome, steps=()) for outcome in outcomes]
        return [self._move(candidate) for candidate in candidates]

    def recall(self, results: Sequence[Trial[Change]]) -> None:
        """Score the change to beat once more: errors of samples are not on record."""
        found = to_beat(results)
        if found is not None:
            self._know(found)

    def _know(self, candidate: Change) -> ModelScore:
        """Score the change to beat on all samples."""
        smoothings = self._space.smoothings(candidate)
        if self._remember:
            score = remembered(self.judge, smoothings)
        else:
            score = race_all(self.judge, [smoothings], protected=1)[0]
        self._beaten = score
        self._current = self._remembered = candidate
        return score

    def _move(self, candidate: Change) -> Outcome:
        began = self.clock()
        if self._remember and self._current is not None and self._strays(candidate):
            self._know(self._current)
        # A change of many sites together is not the luckiest of many changes, and a prediction speaks for it: it is looked at to its end.
        leap = _distance(candidate, self._current) > 1
        errors = 0.0 if leap else self._errors
        incumbent = None if self._beaten is None or self._beaten.loss is None else self._beaten.errors
        score = race_all(self.racer, [self._space.smoothings(candidate)], incumbent=incumbent, protected=int(leap))[0]
        better = falls(self._beaten, score, self.judge.weight, errors)
        if better:
            self._beaten, self._current = score, candidate
        return replace(outcome_of(score, self.clock() - began), steps=(), better=better)

    def _strays(self, candidate: Change) -> bool:
        """Whether it differs from what is remembered at more than one unit, so that of the change to beat more would be known."""
        return self._remembered != self._current and _distance(candidate, self._remembered) > 1


class _Impatient:
    """Races in which a candidate is given up early: it has to be better than another, not just as good."""

    def __init__(self, judge: ModelObjective) -> None:
        self._judge = judge

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: torch.Tensor | None = None,
        protected: int = 0,
    ) -> list[ModelScore]:
        """See ``ModelObjective.race``."""
        if incumbent is None:  # plain changes: the lowest of them counts, so none of two close ones is given up
            return self._judge.race(candidates, protected=protected)
        return self._judge.race(
            candidates, incumbent=incumbent, protected=protected, fewest=_FEWEST_STEPS, confidence=_GIVEN_UP
        )


def _distance(one: Change, other: Change | None) -> int:
    """Units at which two changes differ."""
    known = {} if other is None else other.settings
    return sum(setting != known.get(unit) for unit, setting in one.settings.items())


def falls(before: ModelScore | None, after: ModelScore, weight: float, errors: float = 1.0) -> bool:
    """Whether a loss falls by more than ``errors`` paired standard errors; from no finite loss to one, it does."""
    if after.loss is None:
        return False
    if before is None or before.loss is None:
        return True
    difference, standard_error = paired_difference(before.errors, after.errors, weight)
    return difference > errors * standard_error and not math.isinf(standard_error)


def to_beat(results: Sequence[Trial[Change]]) -> Change | None:
    """The change that the next move has to beat: the last one that was better, else the best of the plain ones."""
    kept: Trial[Change] | None = None
    for trial in results:
        if trial.candidate.kind != "proposal":
            if trial.loss is not None and (kept is None or kept.loss is None or trial.loss < kept.loss):
                kept = trial
        elif trial.better:
            kept = trial
    return None if kept is None else kept.candidate


def descend(
    study: RecordedStudy[Change],
    scorer: MoveScorer,
    space: SettingSpace,
    first: Sequence[Change],
    *,
    trials: int,
    static: bool,
    stop: Callable[[], bool],
    fine: bool = True,
    patience: int | None = None,
    leaps: Sequence[Mapping[str, Setting]] = (),
) -> Change | None:
    """Score ``first``, then move unit after unit from the best of them until the study holds ``trials`` trials.

    For each unit: its other choices (no smoothing and alpha 0.5 unless they are far behind for the whole model), then the range (where it is
    static), then alpha; fine moves where coarse ones helped. A move that is better is kept and repeated. A unit that has no part in the
    loss is left at once.

    Args:
        study: Fresh, or with trials on record.
        scorer: Scores changes.
        space: Units, in the order in which they are moved.
        first: Whole settings, of kinds other than ``proposal``.
        trials: Trials of the study at most.
        static: Whether activations have static ranges.
        fine: Whether fine moves follow coarse ones that helped.
        patience: Units in a row without a better move after which the rest is left alone; None: none is.
        leaps: Moves of several units together, tried first, until one is better.
        stop: Polled before every trial.

    Returns:
        The best change; None where every one of ``first`` failed.
    """
    study.attempt(scorer, list(first)[:trials], protected=1, most=trials)
    current = to_beat(study.results)
    if current is None:
        return None
    for leap in leaps:
        proposal = Change(settings={**current.settings, **leap})
        if len(study.results) >= trials or space.same(proposal, current):
            continue
        leave(stop)
        (trial,) = study.attempt(scorer, [proposal], most=trials)
        if trial.better:
            current = proposal
            break
    since, hopeless = 0, _hopeless(study.results)
    for unit in space.units:
        if patience is not None and since >= patience:
            break
        found = _move_unit(study, scorer, space, unit, current, _moves(space, unit, static, hopeless), trials, stop)
        if fine and found != current:
            found = _move_unit(study, scorer, space, unit, found, _fine_moves(static), trials, stop)
        since = since + 1 if found == current else 0
        current = found
    return current


def _move_unit(
    study: RecordedStudy[Change],
    scorer: MoveScorer,
    space: SettingSpace,
    unit: str,
    current: Change,
    moves: Iterable[Callable[[Setting], Setting]],
    trials: int,
    stop: Callable[[], bool],
) -> Change:
    idle = 0
    loss = next((t.loss for t in reversed(study.results) if t.candidate.settings == current.settings), None)
    for move in moves:
        while True:
            changed = move(current.settings[unit])
            proposal = current.moved(unit, changed)
            if len(study.results) >= trials or changed == current.settings[unit] or space.same(proposal, current):
                break
            leave(stop)
            (trial,) = study.attempt(scorer, [proposal], most=trials)
            idle = idle + 1 if trial.loss is not None and trial.loss == loss else 0
            if idle == _IDLE:
                return current
            if not trial.better:
                break
            current, loss = proposal, trial.loss
    return current


def _hopeless(results: Sequence[Trial[Change]]) -> frozenset[str]:
    """Crude choices that for the whole model are far behind the best one: no kind of sites is likely to want them."""
    plain = {t.candidate.kind: t.loss for t in results if t.candidate.kind != "proposal"}
    best = min((loss for loss in plain.values() if loss is not None), default=math.inf)
    behind = (kind for kind in _CRUDE if kind in plain)
    return frozenset(kind for kind in behind if (loss := plain[kind]) is None or loss > _FAR_BEHIND * best)


def _moves(
    space: SettingSpace, unit: str, static: bool, hopeless: frozenset[str]
) -> Iterator[Callable[[Setting], Setting]]:
    """Coarse moves of a unit, in the order in which they are tried."""
    yield from (_chosen(choice) for choice in space.choices[unit] if choice not in hopeless)
    if static:
        yield from (_ranged(factor) for factor in _RANGES)
    yield from (_shifted(step) for step in _SHIFTS)


def _fine_moves(static: bool) -> Iterator[Callable[[Setting], Setting]]:
    """Smaller ones."""
    if static:
        yield from (_ranged(factor) for factor in _FINE_RANGES)
    yield from (_shifted(step) for step in _FINE_SHIFTS)


def site_moves(static: bool) -> list[Callable[[Setting], Setting]]:
    """Moves of a single site whose effects are predicted together, without a trial.

    Args:
        static: Whether activations have static ranges.
    """
    moves = [_chosen(choice) for choice in ("ours", "best_single", "one_alpha")]
    moves += [_shifted(step) for step in _SHIFTS]
    return moves + ([_ranged(factor) for factor in _FORESEEN_RANGES] if static else [])


def _chosen(choice: str) -> Callable[[Setting], Setting]:
    return lambda setting: setting if setting.choice == choice else Setting(choice=choice)  # type: ignore[arg-type]


def _ranged(factor: float) -> Callable[[Setting], Setting]:
    return lambda s: replace(s, range=round(min(RANGE_MAX, max(RANGE_MIN, s.range * factor)), 6))


def _shifted(step: float) -> Callable[[Setting], Setting]:
    return lambda s: replace(s, shift=round(min(1.0, max(-1.0, s.shift + step)), 6))
