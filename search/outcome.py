"""What a run decided and made, between the search and the records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from alphasmith.objectives.quantized import QuantizationSummary
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.candidates import Candidate
from alphasmith.search.compare import Baseline, ModelScores, Variant
from alphasmith.search.model_search import ModelResult
from alphasmith.search.ranges import DEFAULT_ALPHA
from alphasmith.search.refinement import RefinementResult
from alphasmith.search.site_result import SiteResult

R = TypeVar("R", SiteResult, ModelResult)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search decided, before anything is written.

    Attributes:
        sites: Results per site (scope ``site``), in search order.
        whole: Result over the whole model (scope ``model``), else None.
        smoothings: Variant -> site -> smoothing, for every site that is smoothed.
        fallback: The variant the output guard fell back to, or None.
        scores: Whole-model figures of all variants.
        refinement: What the refinement at the output decided; None where it was off. Its changes are in ``sites`` and
            ``smoothings`` already.
        notes: What people should know of the search, e.g. that there are fewer groups than asked for.
    """

    sites: Mapping[str, SiteResult]
    whole: ModelResult | None
    smoothings: Mapping[Variant, Mapping[str, Smoothing]]
    fallback: Baseline | None
    scores: ModelScores
    refinement: RefinementResult | None = None
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
        candidate = Candidate(self.fallback, alphas[self.fallback])
        if isinstance(result, SiteResult):
            smoothing = result.plain[self.fallback]
            return replace(
                result, candidate=candidate, smoothing=smoothing, search=search, held_out=held_out, guarded=True
            )
        return replace(
            result, winner=self.fallback, alphas=candidate.alphas, search=search, held_out=held_out, guarded=True
        )

    @property
    def final(self) -> Mapping[str, Smoothing]:
        """The smoothings that are kept."""
        return self.smoothings[self.fallback or "ours"]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Float equivalence of the folded model.

    Attributes:
        tolerance: Largest relative output error allowed.
        error: Largest one measured; None when nothing was folded.
        batches: Proof batches.
        dtype: What the models were run in; None when nothing was folded.
    """

    tolerance: float
    error: float | None
    batches: int
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Products:
    """The two models of a run.

    Attributes:
        folded: Float model with the smoothings folded in: the run's own model, there is no other left.
        tensors: Stored tensors of the quantized model, see ``quantized_io.payload``.
        structure: Its description.
        summary: Sizes of the quantized model.
        proof: Equivalence of ``folded``.
        peak: Measured peak memory beyond the libraries, the model included [bytes].
    """

    folded: nn.Module
    tensors: Mapping[str, Tensor]
    structure: Mapping[str, Any]
    summary: QuantizationSummary
    proof: Proof
    peak: int
