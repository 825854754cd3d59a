"""The guard: the best trial of a study keeps its place only if no baseline beats it on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.literals import CandidateKind
from alphasmith.search.study.candidates import Candidate, TrialResult
from alphasmith.search.study.trial import best_trial
from alphasmith.storage.runs.entries import Losses


@dataclass(frozen=True, kw_only=True)
class Overruled:
    """A decision of the guard against the best trial of the search. Losses are of held-out data.

    Attributes:
        proposed: Number of the best trial of the search.
        proposed_kind: Where it came from.
        proposed_loss: Its loss; None where it has none.
        kept: Number of the trial that took its place.
        kept_kind: Where that came from.
        kept_loss: Its loss.
    """

    proposed: int
    proposed_kind: CandidateKind
    proposed_loss: float | None
    kept: int
    kept_kind: CandidateKind
    kept_loss: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The winner after the guard.

    Attributes:
        winner: The trial that is kept.
        search: Losses on the search data.
        held_out: Losses on the held-out data.
        overruled: Set when the best search trial lost to another one on held-out data.
    """

    winner: TrialResult
    search: Losses
    held_out: Losses
    overruled: Overruled | None


def guard(
    results: Sequence[TrialResult],
    held_out: Callable[[Sequence[Candidate]], Sequence[float | None]],
    *,
    best_single_alpha: float,
    also: Sequence[TrialResult] = (),
) -> Verdict:
    """Re-score the best trial and the baselines on held-out data; the best trial loses to one that is better there.

    Args:
        results: Trials of a study; 0, 1 and 2 are the baselines.
        held_out: Losses of candidates on held-out data, None for one that failed there.
        best_single_alpha: That of trial 2.
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
        return Losses(
            identity=of.get(0),
            alpha_half=of.get(1),
            best_single=of.get(2),
            best_single_alpha=best_single_alpha,
            ours=of[kept],
        )

    overruled = None
    if kept != best.number:
        overruled = Overruled(
            proposed=best.number,
            proposed_kind=best.candidate.kind,
            proposed_loss=reserve.get(best.number),
            kept=kept,
            kept_kind=contenders[kept].candidate.kind,
            kept_loss=reserve[kept],
        )
    return Verdict(winner=contenders[kept], search=losses(search), held_out=losses(reserve), overruled=overruled)
