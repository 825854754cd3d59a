"""What a run decided and made, between the search and the records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn

from alphasmith.objectives.quantized import QuantizationSummary
from alphasmith.search.compare import Baseline, ModelScores, Variant
from alphasmith.search.model_search import ModelResult
from alphasmith.search.ranges import DEFAULT_ALPHA
from alphasmith.search.site_search import SiteResult

R = TypeVar("R", SiteResult, ModelResult)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search decided, before anything is written.

    Attributes:
        sites: Results per site (scope ``site``), in search order.
        whole: Result over the whole model (scope ``model``), else None.
        scales: Variant -> site -> (C,), for every site that is smoothed.
        fallback: The variant the output guard fell back to, or None.
        scores: Whole-model figures of all variants.
        notes: What people should know of the search, e.g. that there are fewer groups than asked for.
    """

    sites: Mapping[str, SiteResult]
    whole: ModelResult | None
    scales: Mapping[Variant, Mapping[str, Tensor]]
    fallback: Baseline | None
    scores: ModelScores
    notes: tuple[str, ...] = ()

    def kept(self, result: R) -> R:
        """The result of a site or of the model as it was kept: after a fallback, with the baseline in the winner's place."""
        if self.fallback is None:
            return result
        k = len(result.ranges)
        alphas = {"identity": None, "alpha_0.5": (DEFAULT_ALPHA,) * k, "best_single": (result.best_single_alpha,) * k}
        field = {"identity": "identity", "alpha_0.5": "alpha_half", "best_single": "best_single"}[self.fallback]
        search, held_out = (
            replace(losses, ours=losses.ours if (value := getattr(losses, field)) is None else value)
            for losses in (result.search, result.held_out)
        )
        return replace(
            result, winner=self.fallback, alphas=alphas[self.fallback], search=search, held_out=held_out, guarded=True
        )

    @property
    def final(self) -> Mapping[str, Tensor]:
        """The scales that are kept."""
        return self.scales[self.fallback or "ours"]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Float equivalence of the folded model.

    Attributes:
        tolerance: Largest relative output error allowed.
        error: Largest one measured; None when nothing was folded.
        batches: Proof batches.
    """

    tolerance: float
    error: float | None
    batches: int


@dataclass(frozen=True, kw_only=True)
class Products:
    """The two models of a run.

    Attributes:
        folded: Float model with the scales folded in.
        quantized: Quantized model.
        summary: Sizes of the quantized model.
        proof: Equivalence of ``folded``.
        peak: Measured peak memory beyond the start of the run [bytes].
    """

    folded: nn.Module
    quantized: nn.Module
    summary: QuantizationSummary
    proof: Proof
    peak: int
