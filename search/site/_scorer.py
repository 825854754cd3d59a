"""Exact losses of a site's candidates: on growing subsets of its search rows, with a paired stopping rule; on held-out rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from alphasmith.objectives.judge.candidate_batch import CandidateBatch, is_behind, paired_difference
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.study.candidates import Candidate, TrialResult
from alphasmith.search.study.fault_isolation import survive
from alphasmith.search.study.trial import Outcome, Pruning, State

#: Shares of the rows after which losing candidates are stopped, and the fewest rows that say anything about a loss.
_RUNGS = (0.125, 0.5)
_FEWEST_ROWS = 64


class SiteScorer:
    """Losses of a site's candidates on the search rows.

    Attributes:
        rungs: Rows after which candidates are compared, ascending; the last one is all rows.
        trace: (seconds since ``start``, loss) at every new incumbent: when the search knew what.

    Args:
        judge: Exact judge on the search rows.
        smoothing: Candidate -> what it does to the site.
        start: When the search began, by ``time.perf_counter``.
    """

    def __init__(self, judge: SiteObjective, smoothing: Callable[[Candidate], Smoothing], *, start: float) -> None:
        self._judge = judge
        self._smoothing = smoothing
        self._start = start
        rows = judge.rows
        early = {max(_FEWEST_ROWS, int(rows * share)) for share in _RUNGS}
        self.rungs = (*sorted(r for r in early if r < rows), rows)
        self.trace: list[tuple[float, float]] = []
        self._known: dict[Candidate, Outcome] = {}
        #: Squared errors per row of the best candidate so far, at every rung, and its loss.
        self._incumbent: dict[int, torch.Tensor] = {}
        self._best: float | None = None

    def score(self, candidates: Sequence[Candidate], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        """See :class:`alphasmith.search.study.types.Scorer`; a candidate scored on all rows before is not scored again."""
        new = [c for c in candidates if c not in self._known]
        known = [i for i, c in enumerate(candidates) if c in self._known]
        shielded = protected - sum(i < protected for i in known)
        fresh = survive(self._score, new, protected=shielded, pruning=pruning) if new else []
        found = dict(zip(new, fresh, strict=True))
        self._known |= {c: o for c, o in found.items() if o.state == "COMPLETE"}
        return [found.get(c) or self._known[c] for c in candidates]

    def recall(self, results: Sequence[TrialResult]) -> None:
        """See :class:`alphasmith.search.study.types.Scorer`."""
        complete = [r for r in results if r.loss is not None]
        best = min(complete, key=lambda r: (r.loss, r.number), default=None)
        if best is not None and best.candidate not in self._known:
            self._score([best.candidate], 1, None)
        for r in complete:
            steps = ((self._judge.rows, float(r.loss or 0.0)),)
            self._known[r.candidate] = Outcome(state="COMPLETE", loss=r.loss, seconds=r.seconds, steps=steps)

    def _score(self, candidates: Sequence[Candidate], protected: int, pruning: Pruning | None) -> list[Outcome]:
        began = time.perf_counter()
        batch = self._judge.batch([self._smoothing(c) for c in candidates])
        steps: list[list[tuple[int, float]]] = [[] for _ in candidates]
        errors: list[dict[int, torch.Tensor]] = [{} for _ in candidates]
        work = [0] * len(candidates)
        running = list(range(len(candidates)))
        for rung in self.rungs:
            # Baselines are scored to the end after the others: they are needed for the record, not for the decision.
            order = (running,) if rung < self._judge.rows else ([i for i in running if i >= protected], running)
            for which in order:
                batch.advance(rung, which)
                for i in which:
                    if not batch.failure(i) and rung not in errors[i]:
                        steps[i].append((rung, float(batch.loss(i) or 0.0)))
                        errors[i][rung] = batch.row_errors(i)
                        work[i] = rung
                        if rung == self._judge.rows:
                            self._promote(steps[i][-1][1], errors[i])
            running = [i for i in running if not batch.failure(i)]
            if rung < self._judge.rows:
                running = self._survivors(running, protected, errors, steps, rung, pruning)
        seconds, total = time.perf_counter() - began, sum(work) or 1
        return [
            _outcome(batch, i, steps[i], seconds * work[i] / total, done=work[i] == self._judge.rows)
            for i in range(len(candidates))
        ]

    def _survivors(
        self,
        running: Sequence[int],
        protected: int,
        errors: Sequence[dict[int, torch.Tensor]],
        steps: Sequence[Sequence[tuple[int, float]]],
        rung: int,
        pruning: Pruning | None,
    ) -> list[int]:
        if pruning is not None:
            return [i for i in running if i < protected or not pruning(i, rung, steps[i][-1][1])]
        rivals = [errors[i][rung] for i in running] + ([self._incumbent[rung]] if self._incumbent else [])
        if not rivals:
            return []
        best = min(rivals, key=lambda e: float(e.sum()))
        return [i for i in running if i < protected or not is_behind(errors[i][rung], best)]

    def _promote(self, loss: float, errors: dict[int, torch.Tensor]) -> None:
        if self._best is None or loss < self._best:
            self._best, self._incumbent = loss, errors
            self.trace.append((time.perf_counter() - self._start, loss))


class HeldOutScorer:
    """Losses of a site's candidates on the held-out rows, where each is scored once.

    Attributes:
        judge: The judge of these rows.

    Args:
        judge: Exact judge on the held-out rows.
        smoothing: Candidate -> what it does to the site.
    """

    def __init__(self, judge: SiteObjective, smoothing: Callable[[Candidate], Smoothing]) -> None:
        self.judge = judge
        self._smoothing = smoothing
        #: Loss and squared errors per row; None where a candidate failed.
        self._scores: dict[Candidate, tuple[float, torch.Tensor] | None] = {}

    def losses(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Loss of every candidate on all rows, None where it failed."""
        new = [c for c in candidates if c not in self._scores]
        batch = self.judge.batch([self._smoothing(c) for c in new])
        batch.advance(self.judge.rows)
        for i, candidate in enumerate(new):
            loss = batch.loss(i)
            self._scores[candidate] = None if loss is None else (loss, batch.row_errors(i))
        return [None if (score := self._scores[c]) is None else score[0] for c in candidates]

    def is_better(self, candidate: Candidate, other: Candidate, *, confidence: float) -> bool:
        """Whether a loss is below another by more than ``confidence`` paired standard errors; both were asked for before."""
        mine, its = self._scores[candidate], self._scores[other]
        if mine is None or its is None:
            return False
        mean, deviation = paired_difference(its[1], mine[1], 1.0)
        return mean > confidence * deviation


def _outcome(
    batch: CandidateBatch, index: int, steps: Sequence[tuple[int, float]], seconds: float, *, done: bool
) -> Outcome:
    reason = batch.failure(index)
    state: State = "FAIL" if reason else "COMPLETE" if done else "PRUNED"
    loss = steps[-1][1] if state == "COMPLETE" else None
    return Outcome(state=state, loss=loss, seconds=seconds, reason=reason, steps=tuple(steps))
