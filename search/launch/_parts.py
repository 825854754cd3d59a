"""What is known of one part of a model that is read block by block, and all parts put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from alphasmith.objectives.calibration.calibrate import Calibration
from alphasmith.objectives.calibration.tensor_state import StateFormat
from alphasmith.objectives.judge.memory import MemoryPlan
from alphasmith.objectives.model.plain_operators import Rewriting
from alphasmith.objectives.quantization.plan import QuantizationSummary
from alphasmith.objectives.sites.coverage import Coverage, CoveredWeight
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing
from alphasmith.search.inputs.preparation import PreparedModel, Survey
from alphasmith.search.launch._outcome import Products, Proof
from alphasmith.search.progress import Progress


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """A part whose sites are searched, without its weights and rows.

    Attributes:
        sites: All its sites; those without data are ``left``.
        order: Names of those that can be smoothed.
        ranges: Site -> calibrated range of every channel.
        skip: Patterns of operators that stay in float.
        weights: What becomes of its weights, as parts of the whole model.
        alpha_half: Site -> its smoothing under alpha 0.5.
        plan: Predicted memory.
        notes: What a reader should know.
    """

    sites: tuple[Site, ...]
    order: tuple[str, ...]
    ranges: Mapping[str, ChannelRange]
    skip: tuple[str, ...]
    weights: tuple[CoveredWeight, ...]
    alpha_half: Mapping[str, Smoothing]
    plan: MemoryPlan
    notes: tuple[str, ...]

    def prepared(self, survey: Survey, statistics: Calibration) -> PreparedModel:
        """The part as its models are made from it: without rows.

        Args:
            survey: Its model.
            statistics: Of no site.
        """
        return PreparedModel(
            survey=replace(survey, sites=self.sites),
            plan=self.plan,
            calibration=statistics,
            held_out=statistics,
            sites=self.sites,
            order=self.order,
            coverage=Coverage(weights=self.weights),
            skip=self.skip,
        )


#: How it is kept in a file.
PART_FORMAT = StateFormat(PartRecord, version=1, what="part of a model", remedy="start the run again")


def joined(
    records: Sequence[PartRecord], model: nn.Module, survey: Survey, plan: MemoryPlan, calibration: Calibration
) -> PreparedModel:
    """The whole model of its parts.

    Args:
        records: In order.
        model: The whole model, whose parameters may be on the device ``meta``.
        survey: Of one part; its hardware is that of the whole.
        plan: Predicted memory of the run.
        calibration: Of no site.
    """
    sites = tuple(site for record in records for site in record.sites)
    place = {name: index for index, name in enumerate(dict(model.named_parameters()))}
    weights = sorted((w for record in records for w in record.weights), key=lambda w: place.get(w.name, len(place)))
    notes = tuple(dict.fromkeys(note for record in records for note in record.notes))
    return PreparedModel(
        survey=replace(survey, model=model, rewriting=Rewriting(), sites=sites, notes=notes),
        plan=plan,
        calibration=calibration,
        held_out=calibration,
        sites=sites,
        order=tuple(name for record in records for name in record.order),
        coverage=Coverage(weights=tuple(weights)),
    )


def joined_products(parts: Sequence[Products], model: nn.Module, peak: int) -> Products:
    """What all parts were made into; the tensors themselves are written.

    Args:
        parts: In order, with at least one.
        model: The whole model.
        peak: Measured peak memory [bytes].
    """
    errors = [part.proof.error for part in parts if part.proof.error is not None]
    foldings = [part.proof.folding for part in parts if part.proof.folding is not None]
    kinds = sorted({part.proof.dtype for part in parts if part.proof.dtype})
    outputs = dict.fromkeys(name for part in parts for name in part.proof.outputs)
    summaries = [part.summary for part in parts]
    return Products(
        folded=model,
        tensors={},
        structure=joined_structure([part.structure for part in parts]),
        summary=QuantizationSummary(
            operators=tuple(record for summary in summaries for record in summary.operators),
            skipped=tuple(pair for summary in summaries for pair in summary.skipped),
            bias_bytes=sum(summary.bias_bytes for summary in summaries),
            norm_bytes=sum(summary.norm_bytes for summary in summaries),
            skipped_bytes=sum(summary.skipped_bytes for summary in summaries),
            other_bytes=sum(summary.other_bytes for summary in summaries),
        ),
        proof=Proof(
            tolerance=max(part.proof.tolerance for part in parts),
            error=max(errors, default=None),
            folding=max(foldings, default=None),
            batches=max(part.proof.batches for part in parts),
            dtype=", ".join(kinds) or None,
            outputs=tuple(outputs),
        ),
        types={name: kind for part in parts for name, kind in part.types.items()},
        peak=peak,
        blocks=len(parts) - 1,
    )


def joined_structure(structures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One description of quantized tensors of several."""
    return {
        **structures[0],
        "operators": [entry for one in structures for entry in one["operators"]],
        "stacks": [entry for one in structures for entry in one["stacks"]],
        "aliases": {name: other for one in structures for name, other in one["aliases"].items()},
    }


class PartProgress:
    """Progress of one part: stages carry its name, and no note is told twice.

    Args:
        progress: Receives them.
        told: Notes told so far; added to.
    """

    def __init__(self, progress: Progress, told: set[str]) -> None:
        self._progress = progress
        self._told = told
        self._part = ""

    def of(self, part: str) -> PartProgress:
        """From now on of this part."""
        self._part = part
        return self

    def stage(self, name: str, total: int | None = None) -> None:
        """See :class:`search.progress.Progress`."""
        self._progress.stage(f"{self._part}: {name}" if self._part else name, total)

    def expect(self, costs: Sequence[float]) -> None:
        """See :class:`search.progress.Progress`."""
        self._progress.expect(costs)

    def advance(self, detail: str = "") -> None:
        """See :class:`search.progress.Progress`."""
        self._progress.advance(detail)

    def note(self, text: str) -> None:
        """See :class:`search.progress.Progress`; a part's memory was told before all of them."""
        if text not in self._told and not text.startswith("memory: "):
            self._told.add(text)
            self._progress.note(text)
