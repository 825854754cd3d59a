"""The manifest of a run, put together from what it decided. The schema lives in storage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from torch import Tensor, nn

from alphasmith.objectives.literals import CandidateKind
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import DEAD_CHANNEL_RULE, SCALE_MAX, SCALE_MIN, Smoothing
from alphasmith.objectives.stored_types import floating_names, told
from alphasmith.objectives.text import number
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.hardware import HardwareBudget
from alphasmith.search.inputs.preparation import PreparedModel, site_schemes
from alphasmith.search.inputs.task import Task
from alphasmith.search.launch._formats import advice_entry, formats_entry
from alphasmith.search.launch._outcome import Products, SearchOutcome
from alphasmith.search.model.refinement import RefinementResult, Step
from alphasmith.search.model.search import ModelResult
from alphasmith.search.model.sweep import Sweep
from alphasmith.search.study.guard import Overruled
from alphasmith.search.study.space import SearchSpace
from alphasmith.search.work.site_records import group_records, site_record
from alphasmith.storage.files.durable import ArtifactDigest
from alphasmith.storage.output.entries import (
    BakedEntry,
    Budget,
    ConventionsEntry,
    EditEntry,
    GuardEntry,
    HardwareEntry,
    MemoryEntry,
    MetricEntry,
    ModelEntry,
    OutputEntry,
    PayloadEntry,
    PieceEntry,
    ProofEntry,
    RefinementEntry,
    RunEntry,
    SchemeEntry,
    ShiftEditEntry,
    SiteEntry,
    SkippedEntry,
    StepEntry,
    SweepEntry,
    WeightEntry,
)
from alphasmith.storage.output.manifest import Manifest
from alphasmith.storage.runs.entries import Group
from alphasmith.storage.runs.records import RunRecord

#: Fields of the configuration that say where a result lies, not what it is.
_PLACES = {"out", "storage", "artifacts", "workers", "engine"}


def build_manifest(
    record: RunRecord,
    *,
    config: RunConfig,
    task: Task,
    prepared: PreparedModel,
    found: SearchOutcome,
    products: Products,
    artifacts: Sequence[ArtifactDigest],
    finished: datetime,
) -> Manifest:
    """Everything that explains the result.

    Args:
        record: The run as stored.
        config: Its configuration.
        task: Model and data.
        prepared: Sites and calibration.
        found: Decisions.
        products: Models made.
        artifacts: Files written so far.
        finished: When the result was complete.
    """
    search = config.search
    started = record.started or record.created
    whole = None if found.whole is None else found.kept(found.whole)
    return Manifest(
        run=RunEntry(
            id=record.id,
            name=record.name,
            created=record.created,
            started=started,
            finished=max(started, finished),  # a clock may have been set back meanwhile
        ),
        versions=dict(record.versions),
        config=config.model_dump(mode="json", exclude=_PLACES),
        seeds={"search": search.seed, "calibration": search.seed, "held_out": search.seed + 1},
        notes=(*task.notes, *prepared.notes, *found.notes),
        model=ModelEntry(
            kind=task.kind,
            name=task.name,
            digest=task.loaded.digest,
            parameter_count=task.loaded.parameter_count,
            stored=told(products.types, floating_names(task.loaded.model.state_dict())),
            pieces=tuple(PieceEntry(**asdict(piece)) for piece in prepared.survey.rewriting.pieces),
            baked=tuple(BakedEntry(**asdict(baked)) for baked in prepared.survey.rewriting.baked),
        ),
        data_digest=task.data_digest,
        scheme=SchemeEntry.of(
            site_schemes(config, prepared.sites) if found.formats is None else found.formats.schemes()
        ),
        conventions=ConventionsEntry(
            statistic=search.statistic[0],
            percentile=search.percentile if "percentile" in search.statistic else None,
            clamp=SCALE_MIN,
            clamp_max=SCALE_MAX,
            dead_channels=DEAD_CHANNEL_RULE,
        ),
        hardware=_hardware(prepared),
        scope=search.scope,
        space_hash=record.space_hash,
        study=None if whole is None else whole.study_name,
        groups=() if whole is None else model_groups(whole),
        sites=tuple(_site(s, i, prepared, found) for i, s in enumerate(prepared.sites)),
        skipped=tuple(SkippedEntry(name=n, reason=w.reason) for w in prepared.coverage.left for n in w.layers),
        weights=tuple(WeightEntry(**asdict(weight)) for weight in prepared.coverage.weights),
        output=_output(found, task),
        proof=None
        if products.proof.error is None
        else ProofEntry(
            tolerance=products.proof.tolerance,
            error=products.proof.error,
            folding=products.proof.folding,
            batches=products.proof.batches,
            dtype=products.proof.dtype,
            outputs=products.proof.outputs,
        ),
        payload=PayloadEntry(
            weights_float=products.summary.float_bytes,
            weights_quantized=products.summary.payload_bytes,
            other=products.summary.total_bytes - products.summary.payload_bytes,
            model_float=4 * sum(t.numel() for t in _tensors(prepared.survey.model)),
            model_given=sum(t.nbytes for t in _tensors(prepared.survey.model)),
        ),
        guard=_guard(found),
        refinement=None if found.refinement is None else refinement_entry(found.refinement),
        formats=None if found.formats is None else formats_entry(found.formats, found.format_metric),
        format_advice=advice_entry(found),
        rounding=found.rounding,
        memory=MemoryEntry(
            predicted=prepared.plan.total,
            measured=products.peak,
            mode="blockwise" if products.blocks else "resident",
            blocks=products.blocks,
        ),
    ).with_artifacts(artifacts)


def space_hash(spaces: Mapping[str, SearchSpace]) -> str:
    """One digest over the spaces of all studies."""
    text = "\n".join(f"{name} {space.digest()}" for name, space in sorted(spaces.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def scale_tensors(sites: Sequence[Site], smoothings: Mapping[str, Smoothing]) -> dict[str, Tensor]:
    """Scales, shifts and edits as tensors, so that they can be taken out of the model again without it.

    Args:
        sites: All sites.
        smoothings: Site -> what is done to its input, for smoothed sites.

    Returns:
        ``scale/SITE`` (C,); ``shift/SITE`` (C,) where there is one; for folded sites ``channel/SITE/I`` (channel of every
        element of an edited parameter) and, where the shift went into biases, ``shift_channel/SITE/I``.
    """
    tensors: dict[str, Tensor] = {}
    for site in sites:
        if site.name not in smoothings:
            continue
        smoothing = smoothings[site.name]
        tensors[f"scale/{site.name}"] = smoothing.scales.cpu()
        if smoothing.shift is not None:
            tensors[f"shift/{site.name}"] = smoothing.shift.cpu()
            tensors |= {_shift_channel(site, i): edit.channel for i, edit in enumerate(site.shift_edits)}
        if site.mode == "fold":
            tensors |= {_channel(site, i): edit.channel for i, edit in enumerate(site.edits)}
    return tensors


def refinement_entry(refinement: RefinementResult) -> RefinementEntry:
    """What the refinement at the output did, as manifest and storage keep it."""
    overall = refinement.overall
    return RefinementEntry(
        accepted=refinement.accepted,
        before=overall.before,
        after=overall.after,
        difference=overall.difference,
        standard_error=overall.standard_error,
        reason=refinement.reason,
        changed=dict(refinement.changed),
        steps=tuple(_step(step) for step in refinement.steps),
        trials=sum(len(step.results) for step in refinement.steps),
        seconds=refinement.seconds,
    )


def _step(step: Step) -> StepEntry:
    return StepEntry(
        accepted=step.accepted,
        before=step.before,
        after=step.after,
        difference=step.difference,
        standard_error=step.standard_error,
        reason=step.reason,
        name=step.name,
        units=dict(step.units),
        trials=len(step.results),
        seconds=step.seconds,
        study=step.study_name,
    )


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    return list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())


def _channel(site: Site, index: int) -> str:
    return f"channel/{site.name}/{index}"


def _shift_channel(site: Site, index: int) -> str:
    return f"shift_channel/{site.name}/{index}"


def _edits(site: Site, names: Mapping[str, str]) -> tuple[EditEntry, ...]:
    return tuple(
        EditEntry(
            parameter=names.get(edit.parameter, edit.parameter),
            power=edit.power,
            offset=edit.offset,
            channel=_channel(site, i),
        )
        for i, edit in enumerate(site.edits)
    )


def _shift_edits(site: Site, names: Mapping[str, str]) -> tuple[ShiftEditEntry, ...]:
    return tuple(
        ShiftEditEntry(
            parameter=names.get(edit.parameter, edit.parameter),
            channel=_shift_channel(site, i),
            weight=names.get(edit.weight, edit.weight),
            transposed=edit.transposed,
        )
        for i, edit in enumerate(site.shift_edits)
    )


def _hardware(prepared: PreparedModel) -> HardwareEntry:
    scarcity = prepared.survey.scarcity
    return HardwareEntry(
        budget=_budget(scarcity.available),
        required=_budget(scarcity.required),
        rho=scarcity.rho,
        explanation=scarcity.explanation,
    )


def _budget(budget: HardwareBudget) -> Budget:
    return Budget(memory=budget.memory, threads=budget.gpu_threads, bandwidth=budget.bandwidth)


def _site(site: Site, position: int, prepared: PreparedModel, found: SearchOutcome) -> SiteEntry:
    result = found.kept(found.sites[site.name]) if site.name in found.sites else None
    record = site_record(site, position, result, found.shares)
    entry: dict[str, Any] = {"producers": site.producers}
    smoothing = found.final.get(site.name)
    if smoothing is not None:
        entry["shift"] = smoothing.shift is not None
        if site.mode == "fold":
            entry["edits"] = _edits(site, prepared.survey.rewriting.renamed)
        if smoothing.shift is not None:
            entry["shift_edits"] = _shift_edits(site, prepared.survey.rewriting.renamed)
    searched = found.sites[site.name].labels if found.whole is None and site.name in found.sites else None
    labels = searched if found.whole is None else found.whole.labels.get(site.name)
    if labels is not None:
        entry["labels"] = tuple(labels.tolist())
    return SiteEntry(**dict(record) | entry)


def _output(found: SearchOutcome, task: Task) -> OutputEntry:
    metrics: tuple[MetricEntry, ...] = ()
    if task.metric is not None:
        values = found.scores.metrics
        metrics = (
            MetricEntry(
                name=task.metric.name,
                higher_is_better=task.metric.higher_is_better,
                float_model=values.get("float"),
                naive=values.get("identity"),
                alpha_half=values.get("alpha_0.5"),
                one_alpha=values.get("one_alpha"),
                best_single=values.get("best_single"),
                ours=values.get("ours"),
            ),
        )
    losses = found.scores.losses
    return OutputEntry(
        naive=losses.get("identity"),
        alpha_half=losses.get("alpha_0.5"),
        one_alpha=losses.get("one_alpha"),
        sweep=None if found.sweep is None else _sweep(found.sweep),
        best_single=losses.get("best_single"),
        ours=losses.get("ours"),
        kept=found.fallback or "ours",
        loss=found.scores.loss,
        search=None if found.whole is None else found.whole.search,
        held_out=None if found.whole is None else found.whole.held_out,
        metrics=metrics,
    )


def _sweep(sweep: Sweep) -> SweepEntry:
    return SweepEntry(
        alpha=sweep.alpha,
        loss=sweep.loss,
        trials=len(sweep.results),
        seconds=sweep.seconds,
        study=sweep.study_name,
    )


def _guard(found: SearchOutcome) -> tuple[GuardEntry, ...]:
    if found.fallback is not None:
        lower = (
            f"{found.fallback} has a lower loss at the model's output on held-out data than the winners of the search"
        )
        reason = found.doubt.reason if found.doubt is not None and found.doubt.decides else lower
        return (GuardEntry(proposed="ours", kept=found.fallback, reason=reason),)
    decided = [(name, result.overruled) for name, result in found.sites.items()]
    whole = None if found.whole is None else found.whole.overruled
    return tuple(_overruled(name, o) for name, o in [*decided, (None, whole)] if o is not None)


def _overruled(site: str | None, decision: Overruled) -> GuardEntry:
    lost = "none that is finite" if decision.proposed_loss is None else number(decision.proposed_loss)
    return GuardEntry(
        site=site,
        proposed=decision.proposed_kind,
        proposed_trial=decision.proposed,
        proposed_loss=decision.proposed_loss,
        kept=decision.kept_kind,
        kept_trial=decision.kept,
        kept_loss=decision.kept_loss,
        reason=f"trial {decision.proposed} ({_words(decision.proposed_kind)}) won the search; its held-out loss is {lost}, "
        f"that of trial {decision.kept} ({_words(decision.kept_kind)}), which takes its place, {number(decision.kept_loss)}",
    )


def _words(kind: CandidateKind) -> str:
    return kind.replace("_", " ")


def model_groups(result: ModelResult) -> tuple[Group, ...]:
    """The groups of a search over the whole model; sizes are over all its sites."""
    counts = [labels.bincount(minlength=len(result.ranges)).tolist() for labels in result.labels.values()]
    return group_records(result, [sum(column) for column in zip(*counts, strict=True)])
