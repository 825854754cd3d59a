"""The whole model under every candidate that matters: loss at the output on held-out data, and the task metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.model_objective import ModelObjective
from alphasmith.objectives.quantized import CandidateModel
from alphasmith.search.progress import Progress
from alphasmith.search.task import Metric

Variant = Literal["identity", "alpha_0.5", "best_single", "ours"]
VARIANTS: tuple[Variant, ...] = ("identity", "alpha_0.5", "best_single", "ours")


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Figures of the whole model; None where a variant broke down or there is no metric.

    Attributes:
        losses: Variant -> loss at the output on held-out batches (relative MSE).
        metrics: Variant -> task metric; ``float`` is the model before quantization.
    """

    losses: Mapping[Variant, float | None]
    metrics: Mapping[str, float | None]


def score_variants(
    candidate: CandidateModel,
    reserve: ModelObjective,
    scales: Mapping[Variant, Mapping[str, Tensor]],
    metric: Metric | None,
    progress: Progress,
) -> ModelScores:
    """Quantize the model once per variant and score it.

    Args:
        candidate: The working copy; holds the last variant afterwards.
        reserve: Held-out output loss on ``candidate``.
        scales: Variant -> site -> (C,).
        metric: Task metric, or None.
        progress: Told after each variant.
    """
    losses: dict[Variant, float | None] = {}
    metrics: dict[str, float | None] = {}
    progress.stage("whole model", len(scales) + (metric is not None))
    if metric is not None:
        metrics["float"] = metric.score(candidate.reset())
        progress.advance()
    for variant, of_sites in scales.items():
        try:
            losses[variant] = reserve.loss(of_sites)
            if metric is not None:
                candidate.apply(of_sites)
                metrics[variant] = metric.score(candidate.model)
        except NonFiniteError:
            losses.setdefault(variant, None)
            metrics[variant] = None
        progress.advance()
    return ModelScores(losses=losses, metrics=metrics)


def best_variant(scores: ModelScores, order: Sequence[Variant] = VARIANTS) -> Variant:
    """The variant with the lowest held-out output loss; ``ours`` wins a tie, then the order decides."""
    known = {v: loss for v in order if (loss := scores.losses.get(v)) is not None}
    return min(known, key=lambda v: (known[v], v != "ours", order.index(v)))
