"""What a run decided and made, between the search and the records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from alphasmith.objectives.quantized import QuantizationSummary
from alphasmith.search.compare import ModelScores, Variant
from alphasmith.search.model_search import ModelResult
from alphasmith.search.site_search import SiteResult


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search decided, before anything is written.

    Attributes:
        sites: Results per site (scope ``site``), in search order.
        whole: Result over the whole model (scope ``model``), else None.
        scales: Variant -> site -> (C,), for every site that is smoothed.
        fallback: The variant the output guard fell back to, or None.
        scores: Whole-model figures of all variants.
    """

    sites: Mapping[str, SiteResult]
    whole: ModelResult | None
    scales: Mapping[Variant, Mapping[str, Tensor]]
    fallback: Variant | None
    scores: ModelScores

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
