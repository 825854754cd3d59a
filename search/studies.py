"""One study: baselines first, then proposals, then the sampler; every candidate a real Optuna trial. Source: claim A-2."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from alphasmith.objectives.errors import AlphasmithError, NonFiniteError
from alphasmith.search.candidates import Candidate
from alphasmith.search.config import SearchConfig
from alphasmith.search.ranges import DEFAULT_ALPHA
from alphasmith.search.samplers import make_pruner, make_sampler
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.writer import Writer
from alphasmith.storage.optuna_trials import insert_trials

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
    return (min(grid, key=lambda point: point[1])[0] if grid else DEFAULT_ALPHA), grid


def baselines(k: int, best_single_alpha: float) -> list[Candidate]:
    """Trials 0, 1 and 2 of every study: identity, alpha 0.5 everywhere, the best single alpha everywhere."""
    return [
        Candidate("identity", None),
        Candidate("alpha_0.5", (DEFAULT_ALPHA,) * k),
        Candidate("best_single", (best_single_alpha,) * k),
    ]


class RecordedStudy:
    """An Optuna study whose sampler works in memory while one writer thread keeps every finished trial in the storage.

    Parameters are the price of a stored trial (ecosystem.md section 4): asking, suggesting and telling through the database
    costs many times what the search does. Here finished trials are inserted off the search's path, all that wait at a time
    together. A study that already holds trials goes on from them.

    Attributes:
        name: Name of the study.
        results: All trials so far, in order of their numbers.
        pruning: Whether an Optuna pruner decides, instead of the paired rule.

    Args:
        search: Sampler, pruner, seed.
        space: Frozen space of the sampler's proposals. Candidates may lie outside: ranges are defaults, not laws (T3).
        device: Where candidates are scored, recorded with the study.
        storage: Optuna storage, None for memory.
        name: Name of the study, None for a random one.
        writer: Writes the trials; None: written at once.
        on_trial: Called after each trial.
    """

    def __init__(
        self,
        search: SearchConfig,
        space: SearchSpace,
        *,
        device: str,
        storage: optuna.storages.BaseStorage | None = None,
        name: str | None = None,
        writer: Writer | None = None,
        on_trial: Callable[[TrialResult], None] | None = None,
    ) -> None:
        self._space = space
        self.pruning = search.pruner != "paired"
        self._memory = optuna.create_study(
            study_name=name if storage is None else None,
            sampler=make_sampler(search.sampler, seed=search.seed, space=space.distributions()),
            pruner=make_pruner(search.pruner),
        )
        self._kept = self._memory
        self._insert: Callable[[Sequence[FrozenTrial]], None] | None = None
        self._waiting: deque[FrozenTrial] = deque()
        self._writer = writer
        self._on_trial = on_trial
        self.results: list[TrialResult] = []
        if storage is not None:
            self._kept = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
            for trial in self._kept.trials:
                if trial.state.is_finished():
                    self._memory.add_trial(trial)
                    self.results.append(_result(trial))
        self.name = self._kept.study_name
        if storage is not None:
            self._insert = partial(insert_trials, storage, storage.get_study_id_from_name(self.name))
        space.freeze_in(self._kept)
        self._kept.set_user_attr("device", device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._kept.set_metric_names(["quantization loss"])  # the dashboard's axis label

    def note(self, name: str, value: Any) -> None:
        """Keep a fact with the study, as an attribute of its own name."""
        self._waiting = deque()  # trials found later must not be stored before the fact
        self._write(self._kept.set_user_attr, name, value)

    def add(self, candidate: Candidate, outcome: Outcome) -> TrialResult:
        """Record a candidate that the sampler did not propose."""
        frozen = _frozen(candidate, outcome, self._space)
        self._memory.add_trial(frozen)
        return self._record(candidate, outcome, frozen)

    def ask(self, count: int) -> list[tuple[optuna.Trial, Candidate]]:
        """The sampler's next proposals; answer each, in order, with :meth:`tell`."""
        asked = []
        for _ in range(count):
            trial = self._memory.ask()
            params = {name: trial.suggest_float(name, low, high) for name, low, high in self._space.floats}
            choices = {name: trial.suggest_categorical(name, values) for name, values in self._space.choices}
            asked.append((trial, Candidate.of("sampler", params | choices)))
        return asked

    def tell(self, trial: optuna.Trial, candidate: Candidate, outcome: Outcome) -> TrialResult:
        """Record how a proposal of the sampler fared."""
        state = TrialState[outcome.state]
        if not self.pruning:  # a pruner has been told already
            for step, loss in outcome.steps:
                trial.report(loss, step)
        self._memory.tell(trial, outcome.loss) if outcome.loss is not None else self._memory.tell(trial, state=state)
        return self._record(candidate, outcome, _frozen(candidate, outcome, self._space))

    def _record(self, candidate: Candidate, outcome: Outcome, frozen: FrozenTrial) -> TrialResult:
        result = TrialResult(
            number=len(self.results),
            candidate=candidate,
            state=outcome.state,
            loss=outcome.loss,
            seconds=outcome.seconds,
            reason=outcome.reason,
        )
        self.results.append(result)
        if self._insert is not None:
            self._waiting.append(frozen)
            self._write(_store, self._insert, self._waiting)
        if self._on_trial is not None:
            self._on_trial(result)
        return result

    def _write(self, job: Callable[..., object], *args: Any) -> None:
        if self._writer is None:
            job(*args)
        else:
            self._writer.submit(job, *args)


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
) -> str:
    """Try ``first`` together, then what the sampler proposes, until the study holds ``trials`` trials or may stop.

    A non-finite loss is a failed trial with its reason.

    Args:
        study: Fresh or partly finished; its finished trials count towards ``trials`` and are not repeated.
        scorer: Scores candidates.
        first: Baselines and proposals, as far as ``trials`` reach.
        protected: Baselines among them, at its head: never stopped early.
        trials: Total budget of the study.
        batch: Proposals asked for at a time; the sampler learns of their losses together.
        patience: Stop after this many sampler trials without improvement; None: never.
        enough: Best loss -> why the search may stop, empty to go on; asked after ``first`` and after every batch.
        follow_up: Further candidates, asked for once where ``first`` was not enough, before the sampler's.

    Returns:
        Why the study stopped, for people.

    Raises:
        AlphasmithError: Every trial failed.
    """
    waiting = list(first)[len(study.results) : trials]
    if waiting:
        shielded = max(0, protected - len(study.results))
        outcomes = scorer.score(waiting, protected=shielded, pruning=None)
        for candidate, outcome in zip(waiting, outcomes, strict=True):
            study.add(candidate, outcome)
    since = 0
    while True:
        best = min((r.loss for r in study.results if r.loss is not None), default=None)
        if best is not None and enough is not None and (why := enough(best)):
            return why
        left = trials - len(study.results)
        if left <= 0 or (patience is not None and since >= patience):
            break
        if best is not None and follow_up is not None:
            more, follow_up = list(follow_up())[:left], None
            for candidate, outcome in zip(more, scorer.score(more, protected=0, pruning=None), strict=True):
                study.add(candidate, outcome)
            if more:
                continue
        asked = study.ask(min(batch, left))
        for (trial, candidate), outcome in zip(asked, _score_asked(study, scorer, asked), strict=True):
            result = study.tell(trial, candidate, outcome)
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


def _score_asked(
    study: RecordedStudy, scorer: Scorer, asked: Sequence[tuple[optuna.Trial, Candidate]]
) -> list[Outcome]:
    def pruned(index: int, step: int, loss: float) -> bool:
        asked[index][0].report(loss, step)
        return asked[index][0].should_prune()

    return scorer.score([c for _, c in asked], protected=0, pruning=pruned if study.pruning else None)


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


def _store(insert: Callable[[Sequence[FrozenTrial]], None], waiting: deque[FrozenTrial]) -> None:
    """Insert all trials that wait by now; the jobs queued for the later ones of them then find nothing to do."""
    insert([waiting.popleft() for _ in range(len(waiting))])


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
