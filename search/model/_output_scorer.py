"""Losses of candidate models at the output, for studies: whatever becomes smoothings of all sites can be scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.study.fault_isolation import Racer, race_all, survive
from alphasmith.search.study.trial import C, Outcome, Pruning, State, Trial, best_trial


class OutputScorer(Generic[C]):
    """Output losses of candidate models, batch by batch, against the best one so far.

    Attributes:
        judge: Loss at the model's output on the search batches.
        racer: Scores several candidates against each other.
        clock: Seconds, monotonic.
        best: Score of the best candidate so far; None: none is known.

    Args:
        judge: Loss at the model's output on the search batches.
        smoothings: Candidate -> what it does to every site.
        clock: Seconds, monotonic.
        racer: Scores several candidates against each other; None: the judge, in this process.
        best: Score of the candidate to beat at first, where one is known.
    """

    def __init__(
        self,
        judge: ModelObjective,
        smoothings: Callable[[C], Mapping[str, Smoothing]],
        *,
        clock: Callable[[], float],
        racer: Racer | None = None,
        best: ModelScore | None = None,
    ) -> None:
        self.judge = judge
        self.racer: Racer = racer or judge
        self._smoothings = smoothings
        self.clock = clock
        self.best: ModelScore | None = None
        self._learn(best)

    def score(self, candidates: Sequence[C], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        """See :class:`alphasmith.search.study.types.Scorer`; steps are batches, from 1."""
        return survive(self._score, candidates, protected=protected, pruning=pruning)

    def recall(self, results: Sequence[Trial[C]]) -> None:
        """See :class:`alphasmith.search.study.types.Scorer`; the best one is scored again unless a better one is known."""
        complete = [r for r in results if r.loss is not None]
        if complete and self._improves(best_trial(complete).loss):
            self.score([best_trial(complete).candidate], protected=1, pruning=None)

    def _score(self, candidates: Sequence[C], protected: int, pruning: Pruning | None) -> list[Outcome]:
        if pruning is not None:
            return [self._pruned(i, c, None if i < protected else pruning) for i, c in enumerate(candidates)]
        began = self.clock()
        scores = race_all(
            self.racer,
            [self._smoothings(c) for c in candidates],
            incumbent=None if self.best is None or not self.best.samples else self.best.errors,
            protected=protected,
        )
        # A candidate that broke down at once took about one batch, too.
        seconds, work = self.clock() - began, [len(score.losses) or 1 for score in scores]
        for score in scores:
            self._learn(score)
        return [outcome_of(s, seconds * batches / sum(work)) for s, batches in zip(scores, work, strict=True)]

    def _improves(self, loss: float | None) -> bool:
        known = None if self.best is None else self.best.loss
        return loss is not None and (known is None or loss < known)

    def _learn(self, score: ModelScore | None) -> None:
        if score is not None and self._improves(score.loss):
            self.best = score

    def _pruned(self, index: int, candidate: C, pruning: Pruning | None) -> Outcome:
        """One candidate, stopped where an Optuna pruner says so."""
        began = self.clock()
        steps: list[tuple[int, float]] = []
        state: State = "COMPLETE"
        reason = ""
        try:
            for step, loss in enumerate(self.judge.losses(self._smoothings(candidate)), start=1):
                steps.append((step, loss))
                if pruning is not None and pruning(index, step, loss):
                    state = "PRUNED"
                    break
        except NonFiniteError as error:
            state, reason = "FAIL", str(error)
        loss_found = steps[-1][1] if state == "COMPLETE" else None
        return Outcome(state=state, loss=loss_found, seconds=self.clock() - began, reason=reason, steps=tuple(steps))


def outcome_of(score: ModelScore, seconds: float) -> Outcome:
    """How a candidate of a race ended; steps are batches, from 1."""
    state: State = "FAIL" if score.failure else "PRUNED" if score.stopped else "COMPLETE"
    steps = tuple(enumerate(score.losses, start=1))
    return Outcome(state=state, loss=score.loss, seconds=seconds, reason=score.failure, steps=steps)
