"""The whole model under every candidate that matters: loss at the output on held-out data, and the task metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from scipy.stats import t as student
from torch import Tensor, nn

from alphasmith.objectives.errors import AlphasmithError, InputError, NonFiniteError
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.losses import relative_loss
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.literals import Baseline, OutputLoss, Variant
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.text import counted, error_line, number
from alphasmith.search.inputs.task import Metric
from alphasmith.search.progress import Progress

#: With fewer held-out samples than these a judgement within its noise goes to the simpler variant.
FEW_SAMPLES = 8

#: Probability that a normal number is below its mean plus one standard deviation.
_ONE_SIGMA = 0.8413447460685429

_NAMES = {
    "identity": "without smoothing",
    "alpha_0.5": "with alpha 0.5",
    "one_alpha": "with one alpha for the whole model",
    "best_single": "with the best single alpha",
    "ours": "with the winners of the search",
}

#: From the simplest to the richest.
VARIANTS: tuple[Variant, ...] = ("identity", "alpha_0.5", "one_alpha", "best_single", "ours")


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Figures of the whole model; None where a variant broke down or there is no metric.

    Attributes:
        loss: Which loss ``losses`` are: ``mse`` (relative), ``kl`` or ``task``.
        losses: Variant -> loss at the output on held-out batches.
        metrics: Variant -> task metric; ``float`` is the model before quantization.
        errors: Variant -> (N,) contributions of the held-out samples to its loss; empty for a task metric.
        weight: What the sum of those is divided by.
    """

    loss: OutputLoss
    losses: Mapping[Variant, float | None]
    metrics: Mapping[str, float | None]
    errors: Mapping[Variant, Tensor] = field(default_factory=dict)
    weight: float = 1.0


def task_loss(metric: Metric, float_metric: float) -> Callable[[nn.Module, Sequence[Batch]], float]:
    """The task metric as a positive loss that ranks candidates as the metric does.

    With d how much worse a candidate is than the float model, as a share of the float model's metric: 1 + d where it is
    worse, exp(d) where it is better. So 1 is as good as the float model, whatever the metric's direction and sign.

    Args:
        metric: The metric.
        float_metric: Its value for the float model.
    """
    scale = abs(float_metric) or 1.0
    sign = -1.0 if metric.higher_is_better else 1.0

    def score(model: nn.Module) -> float:
        # It did score the float model, so what it raises now is this candidate's failure and not the run's.
        try:
            return metric.score(model)
        except InputError as error:
            raise error.__cause__ or error from None

    def loss(model: nn.Module, _: Sequence[Batch]) -> float:
        worse = sign * (score(model) - float_metric) / scale
        return 1.0 + worse if worse > 0 else math.exp(worse)

    return loss


def score_variants(
    candidate: CandidateModel,
    reserve: ModelObjective,
    loss: OutputLoss,
    smoothings: Mapping[Variant, Mapping[str, Smoothing]],
    metric: Metric | None,
    float_metric: float | None,
    progress: Progress,
) -> ModelScores:
    """Quantize the model once per variant and score it.

    Args:
        candidate: The model; the float one again afterwards.
        reserve: Held-out output loss on ``candidate``.
        loss: Which loss that is.
        smoothings: Variant -> site -> smoothing.
        metric: Task metric, or None.
        float_metric: Its value for the float model.
        progress: Called after each variant.
    """
    losses: dict[Variant, float | None] = {}
    errors: dict[Variant, Tensor] = {}
    metrics: dict[str, float | None] = {} if metric is None else {"float": float_metric}
    progress.stage("whole model", len(smoothings))
    for variant, of_sites in smoothings.items():
        try:
            with candidate.applied(of_sites) as model:
                if loss == "task":
                    losses[variant] = reserve.loss(of_sites)
                else:
                    errors[variant] = reserve.sample_errors(of_sites)
                    losses[variant] = relative_loss(float(errors[variant].sum()), reserve.weight)
                if metric is not None:
                    metrics[variant] = metric.score(model)
        except NonFiniteError:
            losses.setdefault(variant, None)
            metrics[variant] = None
        except Exception as error:  # a metric may raise anything; the other variants still count
            if isinstance(error, AlphasmithError) and error.__cause__ is None:
                raise
            progress.note(f"warning: {variant} cannot be scored ({error_line(error)})")
            losses.setdefault(variant, None)
            metrics[variant] = None
        progress.advance()
    return ModelScores(loss=loss, losses=losses, metrics=metrics, errors=errors, weight=reserve.weight)


def best_variant(scores: ModelScores) -> Variant:
    """The variant with the lowest held-out output loss; ``ours`` wins a tie, then the order of ``VARIANTS``.

    ``ours`` as well where every variant breaks down: there is nothing better to fall back to.
    """
    known = {v: loss for v in VARIANTS if (loss := scores.losses.get(v)) is not None}
    if not known:
        return "ours"
    return min(known, key=lambda v: (known[v], v != "ours", VARIANTS.index(v)))


def kept_variant(scores: ModelScores, guard: Literal["site", "output"]) -> Variant:
    """The variant that a run keeps.

    Under ``output`` the winners, unless the loss without smoothing is below theirs, or that of another variant by more than the
    paired standard error over the samples (by anything where these are not known): then the variant of the lowest loss. Within
    that error the samples that chose the winners decide, which are as many. Under ``site`` the winners of the sites, with two
    exceptions: where they break the whole model, again that of the lowest loss; where they raise its loss above that without
    smoothing, ``identity``.

    Args:
        scores: Figures of all variants.
        guard: ``search.guard``.
    """
    ours, identity = scores.losses.get("ours"), scores.losses.get("identity")
    if guard == "output" or ours is None:
        better = ours is None or any(_better(scores, variant, ours) for variant in VARIANTS if variant != "ours")
        return best_variant(scores) if better else "ours"
    return "identity" if identity is not None and ours > identity else "ours"


def _better(scores: ModelScores, variant: Variant, ours: float) -> bool:
    """Whether a variant is to be kept rather than the winners: no smoothing if its loss is lower, another beyond its noise."""
    loss = scores.losses.get(variant)
    if loss is None or loss >= ours:
        return False
    if variant == "identity" or variant not in scores.errors or "ours" not in scores.errors:
        return True
    difference, standard_error = paired_difference(scores.errors["ours"], scores.errors[variant], scores.weight)
    return difference > standard_error


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """Held-out samples that cannot tell a simpler variant from the one that would be kept.

    Attributes:
        simpler: The simplest such variant.
        decides: Whether it is kept: with few samples nothing else speaks for the richer one.
        reason: One sentence with the numbers.
    """

    simpler: Baseline
    decides: bool
    reason: str


def within_noise(scores: ModelScores, chosen: Variant) -> Doubt | None:
    """The simplest variant that the held-out samples cannot tell from the chosen one; None where they tell all of them.

    The difference of two variants has to be above its paired standard error over the samples, widened for few of them by the
    quantile of Student's distribution that one standard error is of the normal one. With ``FEW_SAMPLES`` or more the winners
    of the sites may stay, which rows of all these samples chose; with fewer the simpler variant is kept.

    Args:
        scores: Figures of all variants.
        chosen: What would be kept.
    """
    for simpler in VARIANTS[: VARIANTS.index(chosen)]:
        if simpler == "ours" or simpler not in scores.errors or chosen not in scores.errors:
            continue
        count = scores.errors[chosen].numel()
        difference, standard_error = paired_difference(scores.errors[simpler], scores.errors[chosen], scores.weight)
        noise = standard_error * _few(count)
        if difference == 0 or abs(difference) > noise:  # the same model, or another one
            continue
        told = "whose scatter is unknown" if math.isinf(noise) else f"which is within their noise of {number(noise)}"
        few = count < FEW_SAMPLES
        reason = (
            f"{counted(count, 'held-out sample')} cannot tell the model {_NAMES[chosen]} from the one {_NAMES[simpler]}: their "
            f"output losses differ by {number(abs(difference))}, {told}"
        )
        remedy = "so the simpler is kept; give more data" if few else "so the gain is not certain"
        return Doubt(simpler=simpler, decides=few, reason=f"{reason}, {remedy}")
    return None


def _few(count: int) -> float:
    """How much wider the noise of a mean over few samples is than its standard error."""
    return float(student.ppf(_ONE_SIGMA, count - 1)) if count > 1 else 1.0
