"""The held-out judge of whole models: two of them compared sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.losses import relative_loss
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.smoothing import Smoothing


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
class Judgement:
    """Two candidates on held-out batches. Losses are of the output there; None where it is not finite.

    Attributes:
        accepted: Whether the second takes the place of the first.
        reason: Why or why not, in one sentence.
        before: Loss of the first.
        after: Loss of the second.
        difference: ``before`` minus ``after``, positive where the second is better; None where one of the two is not finite.
        standard_error: Paired standard error of ``difference`` over the held-out samples; None with it, or for one sample.
    """

    accepted: bool
    reason: str
    before: float | None = None
    after: float | None = None
    difference: float | None = None
    standard_error: float | None = None


def judged(
    before: HeldOutScore | None, after: HeldOutScore | None, weight: float, *, simpler: bool = False
) -> Judgement:
    """Whether a candidate takes the place of another: its loss has to be lower by more than the paired standard error.

    Args:
        before: The candidate that is kept so far.
        after: The other.
        weight: What the sum of errors is divided by.
        simpler: The other is the simpler of the two: then it is enough that its loss is not higher by more than that.
    """
    losses = {"before": None if before is None else before.loss, "after": None if after is None else after.loss}
    if after is None:
        return Judgement(accepted=False, reason="the output is not finite on held-out data", **losses)
    if before is None:
        return Judgement(accepted=True, reason="the output was not finite on held-out data before", **losses)
    difference, standard_error = paired_difference(before.errors, after.errors, weight)
    if math.isinf(standard_error):
        return Judgement(
            accepted=False, reason="one held-out sample has no standard error", difference=difference, **losses
        )
    scatter = f"{abs(difference):.3g} against a standard error of {standard_error:.3g}"
    if difference > standard_error:
        reason = f"held-out output loss falls by {scatter}"
    elif simpler and difference >= -standard_error:
        reason = f"the simpler model is as good on held-out data within the standard error ({scatter})"
    elif difference > 0:
        reason = f"the fall of the held-out output loss is within its standard error ({scatter})"
    else:
        reason = f"held-out output loss does not fall (it rises by {scatter})"
    accepted = difference > standard_error or (simpler and difference >= -standard_error)
    return Judgement(accepted=accepted, reason=reason, difference=difference, standard_error=standard_error, **losses)
