"""The whole model under every candidate that matters: loss at the output on held-out data, and the task metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from alphasmith.objectives.batch import Batch
from alphasmith.objectives.candidate_model import CandidateModel
from alphasmith.objectives.errors import AlphasmithError, InputError, NonFiniteError
from alphasmith.objectives.model_objective import ModelObjective
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.progress import Progress
from alphasmith.search.task import Metric

Variant = Literal["identity", "alpha_0.5", "best_single", "ours"]
Baseline = Literal["identity", "alpha_0.5", "best_single"]
VARIANTS: tuple[Variant, ...] = ("identity", "alpha_0.5", "best_single", "ours")


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Figures of the whole model; None where a variant broke down or there is no metric.

    Attributes:
        loss: Which loss ``losses`` are: ``mse`` (relative), ``kl`` or ``task``.
        losses: Variant -> loss at the output on held-out batches.
        metrics: Variant -> task metric; ``float`` is the model before quantization.
    """

    loss: Literal["mse", "kl", "task"]
    losses: Mapping[Variant, float | None]
    metrics: Mapping[str, float | None]


def score_float(model: nn.Module, metric: Metric | None, progress: Progress) -> float | None:
    """The task metric before quantization: asked for first, so that a metric that does not work stops the run early.

    Raises:
        InputError: The metric fails, or is not finite for the float model.
    """
    if metric is None:
        return None
    progress.stage("metric of the float model", 1)
    try:
        value = metric.score(model)
    except NonFiniteError as error:
        raise InputError(
            "data.metric", f"{error}, before any quantization", "return a finite number for the float model"
        ) from error
    progress.advance()
    return value


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
    loss: Literal["mse", "kl", "task"],
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
        progress: Told after each variant.
    """
    losses: dict[Variant, float | None] = {}
    metrics: dict[str, float | None] = {} if metric is None else {"float": float_metric}
    progress.stage("whole model", len(smoothings))
    for variant, of_sites in smoothings.items():
        try:
            losses[variant] = reserve.loss(of_sites)
            if metric is not None:
                candidate.apply(of_sites)
                metrics[variant] = metric.score(candidate.model)
        except NonFiniteError:
            losses.setdefault(variant, None)
            metrics[variant] = None
        except Exception as error:  # a metric may raise anything; the other variants still count
            if isinstance(error, AlphasmithError) and error.__cause__ is None:
                raise
            progress.note(f"warning: {variant} cannot be scored ({type(error).__name__}: {error})")
            losses.setdefault(variant, None)
            metrics[variant] = None
        progress.advance()
    candidate.reset()
    return ModelScores(loss=loss, losses=losses, metrics=metrics)


def best_variant(scores: ModelScores, order: Sequence[Variant] = VARIANTS) -> Variant:
    """The variant with the lowest held-out output loss; ``ours`` wins a tie, then the order decides.

    ``ours`` as well where every variant breaks down: there is nothing better to fall back to.
    """
    known = {v: loss for v in order if (loss := scores.losses.get(v)) is not None}
    if not known:
        return "ours"
    return min(known, key=lambda v: (known[v], v != "ours", order.index(v)))
