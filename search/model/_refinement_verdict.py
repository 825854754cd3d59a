"""The held-out judge of a refinement: nothing changes unless held-out data say so beyond their own scatter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.losses import relative_loss
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.model._refinement_space import Change, RefinementSpace
from alphasmith.search.study.trial import Trial, best_trial


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """A candidate on held-out batches: (N,) contributions of the samples, and the loss they add up to."""

    errors: Tensor
    loss: float


def held_out_score(reserve: ModelObjective, smoothings: Mapping[str, Smoothing]) -> HeldOutScore | None:
    """Score of a candidate on held-out batches; None where the output, or a loss relative to it, is not finite."""
    try:
        errors = reserve.sample_errors(smoothings)
        return HeldOutScore(errors=errors, loss=relative_loss(float(errors.sum()), reserve.weight))
    except NonFiniteError:
        return None


@dataclass(frozen=True, kw_only=True)
class RefinementVerdict:
    """What the held-out batches say of the best trial. Losses are of the output there; None where it is not finite.

    Attributes:
        accepted: Whether anything changed.
        reason: Why it was accepted or not, in one sentence.
        before: Loss of the sites' winners.
        after: Loss of what is kept; ``before`` unless accepted.
        difference: ``before`` minus the loss of the best trial, positive where that is better; None where no trial was
            better on the search batches, or one of the two losses is not finite.
        standard_error: Paired standard error of ``difference`` over the held-out samples; None with it, or for one sample.
        change: What is kept, relative to the winners.
    """

    accepted: bool
    reason: str
    before: float | None
    after: float | None
    difference: float | None = None
    standard_error: float | None = None
    change: Change = field(default_factory=Change)


def judge_held_out(
    results: Sequence[Trial[Change]], space: RefinementSpace, reserve: ModelObjective, before: HeldOutScore | None
) -> RefinementVerdict:
    """Accept the best trial where its held-out loss is lower than ``before``, the winners', by more than its standard error."""
    loss = None if before is None else before.loss
    refused = RefinementVerdict(accepted=False, reason="every trial failed", before=loss, after=loss)
    if all(r.loss is None for r in results):
        return refused
    best = best_trial(results)
    if best.number == 0 or not space.changed(best.candidate):
        return replace(refused, reason="nothing tried has a lower output loss than the sites' winners")
    found = held_out_score(reserve, space.smoothings(best.candidate))
    if found is None:
        return replace(refused, reason="the output of the best trial is not finite on held-out data")
    accepted = replace(refused, accepted=True, after=found.loss, change=best.candidate)
    if before is None:
        return replace(accepted, reason="the output with the sites' winners is not finite on held-out data")
    difference, standard_error = paired_difference(before.errors, found.errors, reserve.weight)
    if math.isinf(standard_error):
        return replace(refused, reason="one held-out sample has no standard error", difference=difference)
    scatter = f"{abs(difference):.3g} against a standard error of {standard_error:.3g}"
    if difference > standard_error:
        reason = f"held-out output loss falls by {scatter}"
    elif difference > 0:
        reason = f"the fall of the held-out output loss is within its standard error ({scatter})"
    else:
        reason = f"the best trial does not lower the held-out output loss (it changes by {-difference:.3g})"
    verdict = accepted if difference > standard_error else refused
    return replace(verdict, reason=reason, difference=difference, standard_error=standard_error)
