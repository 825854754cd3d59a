"""One study: baselines first, then proposals, then the sampler; every candidate a real Optuna trial. Source: claim A-2."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import optuna
from optuna.trial import TrialState

from alphasmith.objectives.errors import AlphasmithError, NonFiniteError
from alphasmith.search.config import SearchConfig
from alphasmith.search.ranges import DEFAULT_ALPHA
from alphasmith.search.samplers import make_pruner, make_sampler
from alphasmith.search.spaces import SearchSpace

CandidateKind = Literal["identity", "alpha_0.5", "best_single", "noise_model", "sampler"]


@dataclass(frozen=True)
class Candidate:
    """One set of K alphas to try.

    Attributes:
        kind: Where it comes from.
        alphas: (K,) or None for identity, which no alpha reaches.
    """

    kind: CandidateKind
    alphas: tuple[float, ...] | None


class CandidateObjective(Protocol):
    """What a study needs of a site or of a whole model."""

    def losses(self, candidate: Candidate) -> Iterator[tuple[int, float]]:
        """Yield (step, loss) on growing subsets of the data; the last one is the candidate's loss.

        Raises:
            NonFiniteError: The loss is NaN or infinite.
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
    state: Literal["COMPLETE", "PRUNED", "FAIL"]
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
        guarded: True when the best search trial lost to a baseline on held-out data.
    """

    winner: TrialResult
    search: Losses
    held_out: Losses
    guarded: bool


def guard(results: Sequence[TrialResult], held_out: Callable[[Candidate], float]) -> Verdict:
    """Re-score the best trial and the baselines on held-out data; the best trial loses to a baseline that is better there.

    Args:
        results: Trials of a study; 0, 1 and 2 are the baselines.
        held_out: Loss of a candidate on held-out data.
    """
    best = best_trial(results)
    contenders = {r.number: r for r in (*results[:3], best) if r.loss is not None}
    search = {n: r.loss for n, r in contenders.items() if r.loss is not None}
    reserve = {n: held_out(r.candidate) for n, r in contenders.items()}
    lowest = min(reserve, key=lambda n: (reserve[n], n))
    kept = best.number if reserve[best.number] <= reserve[lowest] else lowest

    def losses(of: dict[int, float]) -> Losses:
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


def open_study(
    search: SearchConfig,
    space: SearchSpace,
    grid: list[list[float]],
    *,
    storage: optuna.storages.BaseStorage | None,
    name: str | None,
) -> optuna.Study:
    """The study of this name, made if it is not there, with the configured sampler and pruner.

    Args:
        search: Sampler, pruner and seed.
        space: What the sampler draws from.
        grid: The single-alpha grid, kept with the study.
        storage: Optuna storage, None for memory.
        name: Name of the study, None for a random one.
    """
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=make_sampler(search.sampler, seed=search.seed, space=space.distributions()),
        pruner=make_pruner(search.pruner),
        load_if_exists=True,
    )
    study.set_user_attr("single_alpha_grid", grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["quantization loss"])  # the dashboard's axis label
    return study


def baselines(k: int, best_single_alpha: float) -> list[Candidate]:
    """Trials 0, 1 and 2 of every study: identity, alpha 0.5 everywhere, the best single alpha everywhere."""
    return [
        Candidate("identity", None),
        Candidate("alpha_0.5", (DEFAULT_ALPHA,) * k),
        Candidate("best_single", (best_single_alpha,) * k),
    ]


def run_study(
    study: optuna.Study,
    space: SearchSpace,
    objective: CandidateObjective,
    *,
    candidates: Sequence[Candidate],
    trials: int,
    device: str,
    clock: Callable[[], float],
    on_trial: Callable[[TrialResult], None] | None = None,
) -> list[TrialResult]:
    """Try ``candidates`` in order, then what the sampler proposes, until the study holds ``trials`` trials.

    A non-finite loss is a failed trial with its reason. Baselines are never pruned.

    Args:
        study: Fresh or partly finished study; its finished trials count towards ``trials``.
        space: Frozen space of the sampler's proposals. Candidates may lie outside: ranges are defaults, not laws (T3).
        objective: Scores a candidate.
        candidates: Enqueued first, in this order, as far as ``trials`` reach.
        trials: Total budget of the study.
        device: Recorded once with the study.
        clock: Seconds, monotonic.
        on_trial: Called after each trial.

    Returns:
        Results in trial order.

    Raises:
        AlphasmithError: Every trial failed.
    """
    space.freeze_in(study)
    study.set_user_attr("device", device)
    results: list[TrialResult] = []
    for number in range(len(study.trials), trials):
        candidate = candidates[number] if number < len(candidates) else None
        results.append(_one_trial(study, space, objective, candidate, clock))
        if on_trial is not None:
            on_trial(results[-1])
    if not any(r.state == "COMPLETE" for r in results):
        reasons = {r.reason for r in results if r.reason}
        raise AlphasmithError(f"study {study.study_name}: every trial failed ({'; '.join(sorted(reasons))})")
    return results


def best_trial(results: Sequence[TrialResult]) -> TrialResult:
    """Lowest loss; a tie goes to the lowest trial number (claim A-2)."""
    complete = [r for r in results if r.loss is not None]
    return min(complete, key=lambda r: (r.loss, r.number))


def _one_trial(
    study: optuna.Study,
    space: SearchSpace,
    objective: CandidateObjective,
    candidate: Candidate | None,
    clock: Callable[[], float],
) -> TrialResult:
    if candidate is not None and candidate.alphas is not None:
        study.enqueue_trial(dict(zip(space.names, candidate.alphas, strict=True)))
    trial = study.ask()
    if candidate is None:
        alphas = tuple(trial.suggest_float(n, a, b) for n, a, b in _bounds(space))
        candidate = Candidate("sampler", alphas)
    elif candidate.alphas is not None:
        with warnings.catch_warnings():
            # A baseline outside the ranges is meant to be recorded as it is.
            warnings.filterwarnings("ignore", message="Fixed parameter", category=UserWarning)
            for name, low, high in _bounds(space):
                trial.suggest_float(name, low, high)
    trial.set_user_attr("candidate", candidate.kind)
    start = clock()
    state, loss, reason = _score(trial, objective, candidate, may_prune=candidate.kind in ("sampler", "noise_model"))
    seconds = clock() - start
    trial.set_user_attr("seconds", seconds)
    if state == "FAIL":
        # Set before tell: a finished trial refuses attributes.
        trial.set_user_attr("reason", reason)
    study.tell(trial, loss, TrialState[state]) if state == "COMPLETE" else study.tell(trial, state=TrialState[state])
    return TrialResult(number=trial.number, candidate=candidate, state=state, loss=loss, seconds=seconds, reason=reason)


def _score(
    trial: optuna.Trial, objective: CandidateObjective, candidate: Candidate, *, may_prune: bool
) -> tuple[Literal["COMPLETE", "PRUNED", "FAIL"], float | None, str]:
    loss: float | None = None
    try:
        for step, loss in objective.losses(candidate):
            if not math.isfinite(loss):
                raise NonFiniteError(f"loss {loss} at step {step}")
            trial.report(loss, step)
            if may_prune and trial.should_prune():
                return "PRUNED", None, ""
    except NonFiniteError as error:
        return "FAIL", None, str(error)
    if loss is None:
        return "FAIL", None, "the objective gave no loss"
    return "COMPLETE", loss, ""


def _bounds(space: SearchSpace) -> Iterator[tuple[str, float, float]]:
    return zip(space.names, space.low, space.high, strict=True)
