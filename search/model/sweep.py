"""One alpha for the whole model, swept at the output as people do by hand: a baseline, and where the refinement may start."""

from __future__ import annotations

from dataclasses import dataclass

from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.config import SearchConfig
from alphasmith.search.interruption import leave
from alphasmith.search.model._output_scorer import OutputScorer
from alphasmith.search.model.search import ModelScales
from alphasmith.search.study.alpha_ranges import AlphaRange
from alphasmith.search.study.candidates import Candidate, TrialResult
from alphasmith.search.study.fault_isolation import Racer
from alphasmith.search.study.space import SearchSpace
from alphasmith.search.study.study import RecordedStudy
from alphasmith.search.study.trial import best_trial
from alphasmith.search.study.types import StudyContext

#: Alphas of the sweep; two more lie between the best of them and its neighbours.
GRID = (0.3, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 1.0)
#: Candidate models that a sweep scores.
SWEEP_TRIALS = len(GRID) + 2


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the sweep found.

    Attributes:
        alpha: The alpha with the lowest loss.
        loss: That loss, at the output on the search batches.
        results: All trials.
        study_name: Name of the Optuna study.
        seconds: Wall time [s].
    """

    alpha: float
    loss: float
    results: tuple[TrialResult, ...]
    study_name: str
    seconds: float


def sweep_alpha(
    scales: ModelScales,
    judge: ModelObjective,
    search: SearchConfig,
    context: StudyContext,
    racer: Racer | None = None,
) -> Sweep | None:
    """Try :data:`GRID` for all sites at once, then the middles between the best alpha and its neighbours.

    Args:
        scales: Alpha -> smoothing of every site.
        judge: Loss at the output on the search batches.
        search: Its seed and sampler name the study's, which is never asked.
        context: Where the study is recorded, who hears of its trials, and when it is left.
        racer: Scores several candidates against each other, in other processes say; None: ``judge``.

    Returns:
        The best; None where every alpha breaks the model.

    Raises:
        Interrupted: ``context.stop`` said so.
    """
    start = context.clock()
    space = SearchSpace.of((AlphaRange(position=0.0, low=0.0, high=1.0, explanation="one alpha for the whole model"),))
    study = RecordedStudy(search, space, context)

    def smoothings(candidate: Candidate) -> dict[str, Smoothing]:
        return scales.single(_alpha_of(candidate))

    scorer = OutputScorer[Candidate](judge, smoothings, clock=context.clock, racer=racer)
    leave(context.stop)
    study.attempt(scorer, [_one(alpha) for alpha in GRID])
    if all(trial.loss is None for trial in study.results):
        return None
    leave(context.stop)
    study.attempt(scorer, [_one(alpha) for alpha in _middles(best_trial(study.results))])
    best = best_trial(study.results)
    return Sweep(
        alpha=_alpha_of(best.candidate),
        loss=float(best.loss or 0.0),
        results=tuple(study.results),
        study_name=study.name,
        seconds=context.clock() - start,
    )


def _one(alpha: float) -> Candidate:
    return Candidate("one_alpha", (alpha,))


def _alpha_of(candidate: Candidate) -> float:
    """The one alpha of a candidate of the sweep."""
    (alpha,) = candidate.alphas or ()
    return alpha


def _middles(best: TrialResult) -> list[float]:
    """The middles between the best alpha of the grid and its neighbours; two finer steps inwards at an end of it."""
    alpha = _alpha_of(best.candidate)
    place = GRID.index(alpha)
    if place == 0:
        return [alpha - 0.1, (GRID[0] + GRID[1]) / 2]
    if place == len(GRID) - 1:
        return [(GRID[-2] + GRID[-1]) / 2, (GRID[-2] + 3 * GRID[-1]) / 4]
    return [round((GRID[place - 1] + alpha) / 2, 6), round((alpha + GRID[place + 1]) / 2, 6)]
