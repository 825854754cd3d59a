"""One study: baselines first, then proposals, then the sampler; every candidate a real Optuna trial. Source: claim A-2."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from alphasmith.objectives.errors import AlphasmithError, NonFiniteError
from alphasmith.search.candidates import Candidate
from alphasmith.search.config import SearchConfig
from alphasmith.search.interruption import leave, never
from alphasmith.search.ranges import DEFAULT_ALPHA
from alphasmith.search.samplers import make_pruner, make_sampler
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.study_log import Began, Noted, StudyLog, Tried

State = Literal["COMPLETE", "PRUNED", "FAIL"]
#: (candidate's place in the batch, step, loss) -> whether a configured Optuna pruner stops it.
Pruning: TypeAlias = Callable[[int, int, float], bool]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How scoring one candidate ended.

    Attributes:
        state: ``COMPLETE``, ``PRUNED`` (stopped early: worse than the incumbent) or ``FAIL``.
        loss: Loss on all search data; None unless complete.
        seconds: Time spent on it [s].
        reason: Why it failed; empty otherwise.
        steps: (step, loss) on growing subsets of the data.
    """

    state: State
    loss: float | None
    seconds: float
    reason: str = ""
    steps: tuple[tuple[int, float], ...] = ()


class Scorer(Protocol):
    """What a study needs of a site or of a whole model."""

    def score(self, candidates: Sequence[Candidate], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        """Score candidates together on growing subsets of the data.

        Args:
            candidates: Any number.
            protected: The first so many are scored on all data whatever their losses are (baselines).
            pruning: Asked after every subset whether to stop a candidate that is not protected; None: candidates whose
                loss is above the incumbent's by more than three paired standard errors are stopped.
        """
        ...

    def recall(self, results: Sequence[TrialResult]) -> None:
        """Know the trials on record, so that what comes next is compared with the best of them.

        The best one is scored once more, since its errors row by row are not on record.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One finished trial.

    Attributes:
        number: Optuna trial number.
        candidate: What was tried.
        state: ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        loss: Loss on all search data; None unless complete.
        seconds: Time spent in the objective [s].
        reason: Why it failed; empty otherwise.
    """

    number: int
    candidate: Candidate
    state: State
    loss: float | None
    seconds: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Quantization losses on one split, dimensionless; a baseline that failed is None.

    Attributes:
        identity: No smoothing.
        alpha_half: Alpha 0.5 for every channel.
        best_single: The single alpha that is best on the search data.
        ours: The winner.
        limit: What scales chosen freely per channel reach, or None when it was not computed.
    """

    identity: float | None
    alpha_half: float | None
    best_single: float | None
    ours: float
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The winner after the guard.

    Attributes:
        winner: The trial that is kept.
        search: Losses on the search data.
        held_out: Losses on the held-out data.
        guarded: True when the best search trial lost to another one on held-out data.
    """

    winner: TrialResult
    search: Losses
    held_out: Losses
    guarded: bool


def guard(
    results: Sequence[TrialResult],
    held_out: Callable[[Sequence[Candidate]], Sequence[float | None]],
    *,
    also: Sequence[TrialResult] = (),
) -> Verdict:
    """Re-score the best trial and the baselines on held-out data; the best trial loses to one that is better there.

    Args:
        results: Trials of a study; 0, 1 and 2 are the baselines.
        held_out: Losses of candidates on held-out data, None for one that failed there.
        also: Further trials that may win on held-out data.

    Raises:
        NonFiniteError: No candidate has a finite held-out loss.
    """
    best = best_trial(results)
    baseline = [r for r in results if r.number < 3]
    contenders = {r.number: r for r in (*baseline, best, *also) if r.loss is not None}
    search = {n: r.loss for n, r in contenders.items() if r.loss is not None}
    scored = zip(contenders, held_out([r.candidate for r in contenders.values()]), strict=True)
    reserve = {n: loss for n, loss in scored if loss is not None}
    if not reserve:
        raise NonFiniteError("no candidate has a finite loss on held-out data")
    lowest = min(reserve, key=lambda n: (reserve[n], n))
    kept = best.number if reserve.get(best.number, math.inf) <= reserve[lowest] else lowest

    def losses(of: Mapping[int, float]) -> Losses:
        return Losses(identity=of.get(0), alpha_half=of.get(1), best_single=of.get(2), ours=of[kept])

    return Verdict(
        winner=contenders[kept], search=losses(search), held_out=losses(reserve), guarded=kept != best.number
    )


def best_single_alpha(loss: Callable[[float], float], points: int) -> tuple[float, list[list[float]]]:
    """The alpha of an even grid over [0, 1] with the lowest loss (first on ties), and the grid of [alpha, loss].

    Args:
        loss: Loss of one alpha for every channel; NonFiniteError leaves a point out.
        points: Grid points.
    """
    grid: list[list[float]] = []
    for k in range(points):
        alpha = k / (points - 1)
        try:
            grid.append([round(alpha, 9), loss(alpha)])
        except NonFiniteError:
            continue
    return lowest_of(grid), grid


def lowest_of(grid: Sequence[Sequence[float]]) -> float:
    """The alpha of the lowest loss in a grid of [alpha, loss], first on ties; the default where the grid is empty."""
    return min(grid, key=lambda point: point[1])[0] if grid else DEFAULT_ALPHA


def baselines(k: int, best_single_alpha: float) -> list[Candidate]:
    """Trials 0, 1 and 2 of every study: identity, alpha 0.5 everywhere, the best single alpha everywhere."""
    return [
        Candidate("identity", None),
        Candidate("alpha_0.5", (DEFAULT_ALPHA,) * k),
        Candidate("best_single", (best_single_alpha,) * k),
    ]


class RecordedStudy:
    """An Optuna study whose sampler works in memory while a log keeps every batch of finished trials.

    Parameters are the price of a stored trial (ecosystem.md section 4): asking, suggesting and telling through the database
    costs many times what the search does. Here finished trials are recorded off the search's path, all of a batch together.

    A study of which trials are recorded already is played again from its beginning: the sampler is asked as it was then and
    told what is on record, so its state is what it was, and nothing that finished is scored a second time. Where the
    replayed candidates differ from the recorded ones (another library, another machine), the rest of the record is taken as
    it is, as history, and counts like any other trial.

    Attributes:
        name: Name of the study.
        results: All trials so far, in order of their numbers.
        pruning: Whether an Optuna pruner decides, instead of the paired rule.

    Args:
        search: Sampler, pruner, seed.
        space: Frozen space of the sampler's proposals. Candidates may lie outside: ranges are defaults, not laws (T3).
        device: Where candidates are scored, recorded with the study.
        log: Keeps trials and facts, and knows those recorded before; None: nothing is kept.
        name: Name of the study, None for a random one.
        on_trial: Called after each trial.

    Raises:
        InputError: What is recorded was found in another space.
    """

    def __init__(
        self,
        search: SearchConfig,
        space: SearchSpace,
        *,
        device: str,
        log: StudyLog | None = None,
        name: str | None = None,
        on_trial: Callable[[TrialResult], None] | None = None,
    ) -> None:
        self._space = space
        self.pruning = search.pruner != "paired"
        self._memory = optuna.create_study(
            study_name=name,
            sampler=make_sampler(search.sampler, seed=search.seed, space=space.distributions()),
            pruner=make_pruner(search.pruner),
        )
        self.name = self._memory.study_name
        self._log = log
        self._on_trial = on_trial
        self.results: list[TrialResult] = []
        self._past: deque[FrozenTrial] = deque(() if log is None else log.past.trials)
        #: Whether trials on record were taken over that the scorer does not know of.
        self._unknown_to_scorer = False
        if log is not None:
            space.check(log.past.notes, self.name)
            log.tell(Began(space=space.canonical(), space_digest=space.digest(), device=device))

    def note(self, name: str, value: Any) -> None:
        """Keep a fact with the study, as an attribute of its own name."""
        if self._log is not None and self._log.past.notes.get(name) != value:
            self._log.tell(Noted(name=name, value=value))

    def attempt(
        self, scorer: Scorer, candidates: Sequence[Candidate], *, protected: int = 0, most: int | None = None
    ) -> list[TrialResult]:
        """Score and record candidates that the sampler did not propose; those recorded already are not scored again.

        Args:
            scorer: Scores candidates.
            candidates: What to try, together.
            protected: The first so many are never stopped early.
            most: Trials the study may hold; None: any number.
        """
        known = self._known(candidates)
        added = self._replay(candidates, known, add=True)
        fresh = candidates[len(known) :]
        if fresh:
            self._end_replay(scorer)
            fresh = fresh[: None if most is None else max(0, most - len(self.results))]
        if fresh:
            outcomes = scorer.score(fresh, protected=max(0, protected - len(known)), pruning=None)
            added += self._keep(fresh, outcomes, add=True)
        return added

    def sample(self, scorer: Scorer, count: int, *, most: int) -> list[TrialResult]:
        """Ask the sampler for ``count`` candidates, score them together and tell it how they fared.

        Args:
            scorer: Scores candidates.
            count: Proposals asked for before the sampler learns anything new.
            most: Trials the study may hold.
        """
        asked = [self._ask() for _ in range(min(count, most - len(self.results)))]
        known = self._known([c for _, c in asked])
        added = self._replay([c for _, c in asked], known, add=False)
        for (trial, _), outcome in zip(asked, known, strict=False):
            self._answer(trial, outcome, reported=False)
        fresh = asked[len(known) :]
        if fresh:
            self._end_replay(scorer)
            left = max(0, most - len(self.results))
            for trial, _ in fresh[left:]:  # history has filled the study meanwhile
                self._memory.tell(trial, state=TrialState.FAIL)
            fresh = fresh[:left]

        def pruned(index: int, step: int, loss: float) -> bool:
            trial = fresh[index][0]
            trial.report(loss, step)
            return trial.should_prune()

        if fresh:
            candidates = [c for _, c in fresh]
            outcomes = scorer.score(candidates, protected=0, pruning=pruned if self.pruning else None)
            for (trial, _), outcome in zip(fresh, outcomes, strict=True):
                self._answer(trial, outcome, reported=self.pruning)
            added += self._keep(candidates, outcomes, add=False)
        return added

    def _ask(self) -> tuple[optuna.Trial, Candidate]:
        trial = self._memory.ask()
        params = {name: trial.suggest_float(name, low, high) for name, low, high in self._space.floats}
        choices = {name: trial.suggest_categorical(name, values) for name, values in self._space.choices}
        return trial, Candidate.of("sampler", params | choices)

    def _answer(self, trial: optuna.Trial, outcome: Outcome, *, reported: bool) -> None:
        """Tell the sampler how its proposal fared; a pruner was told of the steps while they were made."""
        if not reported:
            for step, loss in outcome.steps:
                trial.report(loss, step)
        if outcome.loss is not None:
            self._memory.tell(trial, outcome.loss)
        else:
            self._memory.tell(trial, state=TrialState[outcome.state])

    def _known(self, candidates: Sequence[Candidate]) -> list[Outcome]:
        """Outcomes of those of ``candidates``, from the first on, that are on record as the next trials of the study."""
        found = []
        for candidate, trial in zip(candidates, self._past, strict=False):
            if (trial.user_attrs["candidate"], trial.params) != (
                candidate.kind,
                self._space.recordable(candidate.params()),
            ):
                break
            found.append(_outcome(trial))
        return found

    def _end_replay(self, scorer: Scorer) -> None:
        """Something new is to be scored: what is left on record counts as it is, and the scorer learns of all of it."""
        for trial in self._past:
            self._memory.add_trial(trial)
            self.results.append(_result(trial))
        self._unknown_to_scorer |= bool(self._past)
        self._past.clear()
        if self._unknown_to_scorer:
            self._unknown_to_scorer = False
            scorer.recall(self.results)

    def _replay(self, candidates: Sequence[Candidate], known: Sequence[Outcome], *, add: bool) -> list[TrialResult]:
        """Take over trials that are on record: the first ``len(known)`` of ``candidates``."""
        for _ in known:
            trial = self._past.popleft()
            if add:
                self._memory.add_trial(trial)
        self._unknown_to_scorer |= bool(known)
        return self._number(candidates[: len(known)], known)

    def _keep(self, candidates: Sequence[Candidate], outcomes: Sequence[Outcome], *, add: bool) -> list[TrialResult]:
        """Record trials that were scored together."""
        trials = tuple(_frozen(c, o, self._space) for c, o in zip(candidates, outcomes, strict=True))
        if add:
            for trial in trials:
                self._memory.add_trial(trial)
        first = len(self.results)
        added = self._number(candidates, outcomes)
        if self._log is not None:
            self._log.tell(Tried(first=first, trials=trials))
        return added

    def _number(self, candidates: Sequence[Candidate], outcomes: Sequence[Outcome]) -> list[TrialResult]:
        added = [
            TrialResult(
                number=len(self.results) + i,
                candidate=candidate,
                state=outcome.state,
                loss=outcome.loss,
                seconds=outcome.seconds,
                reason=outcome.reason,
            )
            for i, (candidate, outcome) in enumerate(zip(candidates, outcomes, strict=True))
        ]
        self.results += added
        if self._on_trial is not None:
            for result in added:
                self._on_trial(result)
        return added


def play(
    study: RecordedStudy,
    scorer: Scorer,
    *,
    first: Sequence[Candidate],
    protected: int,
    trials: int,
    batch: int = 1,
    patience: int | None = None,
    enough: Callable[[float], str] | None = None,
    follow_up: Callable[[], Sequence[Candidate]] | None = None,
    stop: Callable[[], bool] = never,
) -> str:
    """Try ``first`` together, then what the sampler proposes, until the study holds ``trials`` trials or may stop.

    A non-finite loss is a failed trial with its reason.

    Args:
        study: Fresh, or with trials on record: these count towards ``trials`` and are not repeated.
        scorer: Scores candidates.
        first: Baselines and proposals, as far as ``trials`` reach.
        protected: Baselines among them, at its head: never stopped early.
        trials: Total budget of the study.
        batch: Proposals asked for at a time; the sampler learns of their losses together.
        patience: Stop after this many sampler trials without improvement; None: never.
        enough: Best loss -> why the search may stop, empty to go on; asked after ``first`` and after every batch.
        follow_up: Further candidates, asked for once where ``first`` was not enough, before the sampler's.
        stop: Asked before every batch whether to leave; what was found by then is on record.

    Returns:
        Why the study stopped, for people.

    Raises:
        AlphasmithError: Every trial failed.
        Interrupted: ``stop`` said so.
    """
    leave(stop)
    study.attempt(scorer, list(first)[:trials], protected=protected, most=trials)
    since = 0
    while True:
        best = min((r.loss for r in study.results if r.loss is not None), default=None)
        if best is not None and enough is not None and (why := enough(best)):
            return why
        left = trials - len(study.results)
        if left <= 0 or (patience is not None and since >= patience):
            break
        leave(stop)
        if best is not None and follow_up is not None:
            more, follow_up = list(follow_up())[:left], None
            if more:
                study.attempt(scorer, more, most=trials)
                continue
        for result in study.sample(scorer, batch, most=trials):
            improved = result.loss is not None and (best is None or result.loss < best)
            since = 0 if improved else since + 1
    if best is None:
        reasons = {r.reason for r in study.results if r.reason}
        raise AlphasmithError(f"study {study.name}: every trial failed ({'; '.join(sorted(reasons))})")
    return f"all {trials} trials were made" if left <= 0 else f"no improvement in {since} sampler trials"


def best_trial(results: Sequence[TrialResult]) -> TrialResult:
    """Lowest loss; a tie goes to the lowest trial number (claim A-2)."""
    complete = [r for r in results if r.loss is not None]
    return min(complete, key=lambda r: (r.loss, r.number))


def _frozen(candidate: Candidate, outcome: Outcome, space: SearchSpace) -> FrozenTrial:
    """The finished Optuna trial of a candidate."""
    params = space.recordable(candidate.params())
    attributes: dict[str, Any] = {"candidate": candidate.kind, "seconds": outcome.seconds}
    if outcome.state == "FAIL":
        attributes["reason"] = outcome.reason
    trial = optuna.trial.create_trial(
        state=TrialState[outcome.state],
        value=outcome.loss,
        params=params,
        distributions=space.holding(params),
        user_attrs=attributes,
        intermediate_values=dict(outcome.steps),
    )
    if trial.datetime_complete is not None:
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=outcome.seconds)
    return trial


def _result(trial: FrozenTrial) -> TrialResult:
    """A stored trial as it was when it was recorded."""
    attributes = trial.user_attrs
    return TrialResult(
        number=trial.number,
        candidate=Candidate.of(attributes["candidate"], trial.params),
        state=trial.state.name,  # type: ignore[arg-type]  # finished trials have one of the three
        loss=trial.value if trial.state == TrialState.COMPLETE else None,
        seconds=attributes.get("seconds", 0.0),
        reason=attributes.get("reason", ""),
    )


def _outcome(trial: FrozenTrial) -> Outcome:
    """How a stored trial ended."""
    known = _result(trial)
    steps = tuple(sorted(trial.intermediate_values.items()))
    return Outcome(state=known.state, loss=known.loss, seconds=known.seconds, reason=known.reason, steps=steps)
