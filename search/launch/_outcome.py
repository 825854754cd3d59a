"""What a run decided and made, between the search and the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.equivalence import Equivalence, fold_and_prove
from alphasmith.objectives.judge.memory import measured_peak
from alphasmith.objectives.literals import Baseline, Variant
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.plan import QuantizationSummary
from alphasmith.objectives.sensitivity.output_shares import MEASURED_SAMPLES, SAMPLES, OutputShares, output_shares
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.stored_types import rounding_limit, told
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.formats.advice import Advice
from alphasmith.search.formats.stage import FormatResult, forms_of_front
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.inputs.task import Task
from alphasmith.search.interruption import leave
from alphasmith.search.launch.site_searches import fewer_groups
from alphasmith.search.model.refinement import RefinementResult
from alphasmith.search.model.search import ModelResult
from alphasmith.search.model.sweep import Sweep
from alphasmith.search.model.variants import Doubt, ModelScores, best_variant, kept_variant, within_noise
from alphasmith.search.progress import Progress
from alphasmith.search.site.result import SiteResult
from alphasmith.search.study.alpha_ranges import DEFAULT_ALPHA
from alphasmith.search.study.candidates import Candidate
from alphasmith.storage.output.entries import RoundingEntry

R = TypeVar("R", SiteResult, ModelResult)


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """What the search decided, before anything is written.

    Attributes:
        sites: Results per site (scope ``site``), in search order.
        whole: Result over the whole model (scope ``model``), else None.
        smoothings: Variant -> site -> smoothing, for every site that is smoothed.
        fallback: The variant the output guard fell back to, or None.
        scores: Whole-model figures of all variants.
        refinement: What the refinement at the output decided; None where it was off. Its changes are in ``sites`` and
            ``smoothings`` already.
        sweep: The sweep of one alpha for the whole model (scope ``site``); None where there was none.
        swept: Results of the sites under that alpha, where it is what the output guard fell back to.
        doubt: A simpler variant that the held-out samples cannot tell from what would be kept; None where they can.
        shares: What every site adds to the error of the model's output, with what is kept; None: not known.
        formats: What was chosen among formats of sites; None: every site has the scheme's own.
        format_metric: Task metric under that choice; None: not measured.
        format_advice: What other formats at a few sites would bring; None: not looked at, or the error comes from many sites.
        rounding: Scales of folded sites that were rounded, and what that cost; None: they are as they were found.
        notes: What people should know of the search, e.g. that there are fewer groups than asked for.
    """

    sites: Mapping[str, SiteResult]
    whole: ModelResult | None
    smoothings: Mapping[Variant, Mapping[str, Smoothing]]
    fallback: Baseline | None
    scores: ModelScores
    refinement: RefinementResult | None = None
    notes: tuple[str, ...] = ()
    doubt: Doubt | None = None
    shares: OutputShares | None = None
    sweep: Sweep | None = None
    swept: Mapping[str, SiteResult] = field(default_factory=dict)
    formats: FormatResult | None = None
    format_metric: float | None = None
    format_advice: Advice | None = None
    rounding: RoundingEntry | None = None

    def kept(self, result: R) -> R:
        """The result of a site or of the model as it was kept: after a fallback, with the baseline in the winner's place."""
        if self.fallback is None:
            return result
        if self.fallback == "one_alpha":  # only sites have it: over the whole model the best single alpha is the same
            return self.swept[result.name] if isinstance(result, SiteResult) else result
        k = len(result.ranges)
        alphas = {"identity": None, "alpha_0.5": (DEFAULT_ALPHA,) * k, "best_single": (result.best_single_alpha,) * k}
        field = {"identity": "identity", "alpha_0.5": "alpha_half", "best_single": "best_single"}[self.fallback]
        search, held_out = (
            losses.model_copy(update={"ours": losses.ours if (value := getattr(losses, field)) is None else value})
            for losses in (result.search, result.held_out)
        )
        candidate = Candidate(self.fallback, alphas[self.fallback])
        if isinstance(result, SiteResult):
            smoothing = result.plain[self.fallback]
            return replace(result, candidate=candidate, smoothing=smoothing, search=search, held_out=held_out)
        return replace(result, winner=self.fallback, alphas=candidate.alphas, search=search, held_out=held_out)

    @property
    def final(self) -> Mapping[str, Smoothing]:
        """The smoothings that are kept."""
        return self.smoothings[self.fallback or "ours"]


def decide(
    config: RunConfig,
    scores: ModelScores,
    smoothings: Mapping[Variant, Mapping[str, Smoothing]],
    progress: Progress,
    *,
    sites: Mapping[str, SiteResult],
    whole: ModelResult | None = None,
    refinement: RefinementResult | None = None,
    sweep: Sweep | None = None,
    swept: Callable[[Sweep], Mapping[str, SiteResult]] = lambda _: {},
) -> SearchOutcome:
    """What is kept, by the loss of every variant at the model's output.

    Args:
        config: The run's configuration.
        scores: Figures of all variants.
        smoothings: Variant -> site -> smoothing.
        progress: Receives notes.
        sites: Results per site (scope ``site``).
        whole: Result over the whole model (scope ``model``).
        refinement: What the refinement at the output decided.
        sweep: The sweep of one alpha.
        swept: Makes the results of the sites under that alpha, where it is what is kept.
    """
    best, kept = best_variant(scores), kept_variant(scores, config.search.guard)
    doubt = within_noise(scores, kept)
    ours = scores.losses["ours"]
    if best != kept and config.search.guard == "site":
        progress.note(
            f"note: at the model's output {best} has the lowest held-out loss "
            f"({scores.losses[best]:.3g}, the winners {ours:.3g}); search.guard='output' would keep it"
        )
    notes = fewer_groups(config.groups.k, {"the model": whole} if whole else sites)
    if kept == "identity" and ours is not None:
        losses = f"{ours:.3g} on held-out data, without smoothing {scores.losses['identity']:.3g}"
        notes += (f"no site is smoothed: with the winners of the search the loss at the model's output is {losses}",)
    if doubt is not None:
        kept = doubt.simpler if doubt.decides else kept
        notes += (doubt.reason,)
    for note in notes:
        progress.note(f"warning: {note}")
    return SearchOutcome(
        sites=sites,
        whole=whole,
        smoothings=smoothings,
        fallback=None if kept == "ours" else kept,
        doubt=doubt,
        scores=scores,
        refinement=refinement,
        notes=notes,
        sweep=sweep,
        swept=swept(sweep) if kept == "one_alpha" and sweep is not None else {},
    )


def with_shares(
    found: SearchOutcome,
    config: RunConfig,
    task: Task,
    prepared: PreparedModel,
    candidate: CandidateModel,
    progress: Progress,
    stop: Callable[[], bool],
) -> SearchOutcome:
    """The outcome with what every site adds to the error of the model's output, on calibration samples.

    Args:
        found: What the search decided.
        config: The run's configuration.
        task: Its data.
        prepared: Sites, and the memory plan of the run, which is kept to.
        candidate: The model.
        progress: Receives stages and notes.
        stop: Polled; returns True to stop.

    Raises:
        Interrupted: ``stop`` said so.
    """
    count = min(SAMPLES, sum(batch.size for batch in task.calibration))
    progress.stage("shares of the output error", count + min(count, MEASURED_SAMPLES))
    device, plan = search_device(config), prepared.plan

    def step() -> None:
        leave(stop)
        progress.advance()

    shares = output_shares(
        candidate,
        found.final,
        [batch.to(device) for batch in task.calibration],
        loss="kl" if found.scores.loss == "kl" else "mse",
        seed=config.search.seed,
        memory=plan.beside_model(config.hardware.search_memory),
        step=step,
    )
    for note in shares.notes:
        progress.note(f"warning: {note}")
    return replace(found, shares=shares, notes=(*found.notes, *shares.notes))


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Float equivalence of the folded model.

    Attributes:
        tolerance: Largest relative output error allowed of what is stored.
        error: Largest one measured; None when nothing was folded.
        folding: The same before what is stored was rounded to its type; None: it was not rounded.
        batches: Proof batches.
        dtype: What the models were run in; None when nothing was folded.
        outputs: Names of the floating tensors of the output that were compared: all of them.
    """

    tolerance: float
    error: float | None
    batches: int
    folding: float | None = None
    dtype: str | None = None
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Products:
    """The two models of a run.

    Attributes:
        folded: Float model with the smoothings folded in: the run's own model, there is no other left.
        tensors: Stored tensors of the quantized model, see ``quantization.payload``.
        structure: Its description.
        summary: Sizes of the quantized model.
        proof: Equivalence of ``folded``.
        types: Name of a tensor of the user's model -> type that it is stored in; the others in float32.
        peak: Measured peak memory beyond the libraries, the model included [bytes].
        forms: Operators in the formats of other points of the front, see ``quantization.stored_forms``; None: there was no choice.
        blocks: Blocks of which one was in memory at a time; 0: all of the model was.
    """

    folded: nn.Module
    tensors: Mapping[str, Tensor]
    structure: Mapping[str, Any]
    summary: QuantizationSummary
    proof: Proof
    types: Mapping[str, torch.dtype]
    peak: int
    forms: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None
    blocks: int = 0


def produce(
    config: RunConfig,
    task: Task,
    prepared: PreparedModel,
    candidate: CandidateModel,
    found: SearchOutcome,
    baseline: int,
    progress: Progress,
) -> Products:
    """Quantize, then fold and prove on the same model; EquivalenceError leaves nothing behind.

    The quantized weights are kept while the model they came from is folded, so there is never a second float model.

    Args:
        config: The run's configuration.
        task: Its proof data.
        prepared: Sites.
        candidate: The model they are in; folded afterwards.
        found: What the search decided.
        baseline: Memory of the libraries, the model left out [bytes].
        progress: Receives stages and notes.

    Raises:
        EquivalenceError: Folding changes what the float model computes.
        InputError: Field ``dtype``: rounding to the model's own type does.
    """
    progress.stage("quantizing", 1)
    forms = None if found.formats is None else forms_of_front(candidate, found.final, found.formats)
    written = candidate.schemes if found.formats is None else found.formats.schemes()
    with candidate.using(written), candidate.applied(found.final) as model:
        summary = candidate.summary()
        tensors, structure = candidate.payload()
    candidate.check_pristine()
    progress.advance()
    progress.stage("proving equivalence", 1)
    foldable = [s for s in prepared.sites if s.mode == "fold" and s.name in found.final]
    proven: Equivalence | None = None
    types = {} if config.dtype == "float32" or prepared.survey.rewriting.baked else dict(task.loaded.types)
    names = prepared.survey.rewriting.names
    inside = {name: types[names.get(name, name)] for name in model.state_dict() if names.get(name, name) in types}
    if foldable:
        device = search_device(config)
        proven = fold_and_prove(
            model,
            foldable,
            found.final,
            [b.to(device) for b in task.proof],
            tolerance=config.proof.tolerance,
            float64_bytes=prepared.plan.float64,
            stored=inside,
        )
        types = _stored_as(types, proven, progress)
    progress.advance()
    return Products(
        folded=model,
        tensors=tensors,
        structure=structure,
        summary=summary,
        proof=Proof(
            tolerance=max(config.proof.tolerance, rounding_limit(types)),
            error=None if proven is None else proven.error if proven.stored is None else proven.stored,
            folding=None if proven is None or proven.stored is None else proven.error,
            batches=len(task.proof),
            dtype=proven.dtype if proven else None,
            outputs=proven.outputs if proven else (),
        ),
        types=types,
        peak=measured_peak(baseline),
        forms=forms,
    )


def _stored_as(types: dict[str, torch.dtype], proven: Equivalence, progress: Progress) -> dict[str, torch.dtype]:
    """What the folded model is stored in, after it was rounded, or could not be."""
    if proven.misfit:
        progress.note(
            f"smoothed/ is kept in float32: {told(types, types)} does not hold {proven.misfit} with its scales"
        )
        return {}
    limit = rounding_limit(types)
    if proven.stored is not None and not proven.stored <= limit:
        raise InputError(
            "dtype",
            f"rounded to {told(types, types)} the folded model differs by {proven.stored:.3g} (relative), more than {limit:.3g}",
            "keep it in float32 with --dtype float32; nothing is searched again",
        )
    return types
