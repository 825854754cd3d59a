"""The manifest of a run, put together from what it decided. The schema lives in storage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import DEAD_CHANNEL_RULE, SCALE_MIN, Smoothing
from alphasmith.search.candidates import CandidateKind
from alphasmith.search.config import RunConfig
from alphasmith.search.hardware import HardwareBudget
from alphasmith.search.model_search import ModelResult
from alphasmith.search.outcome import Found, Products
from alphasmith.search.prepare import Prepared
from alphasmith.search.ranges import AlphaRange
from alphasmith.search.refinement import RefinementResult
from alphasmith.search.site_result import SiteResult
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.studies import Losses, best_trial
from alphasmith.search.task import Task
from alphasmith.storage.files import ArtifactDigest
from alphasmith.storage.manifest import Manifest
from alphasmith.storage.manifest_parts import (
    Budget,
    ConventionsEntry,
    EditEntry,
    GroupEntry,
    GuardEntry,
    HardwareEntry,
    LossesEntry,
    LossPair,
    MemoryEntry,
    MetricEntry,
    ModelEntry,
    NoiseModelFacts,
    OutputEntry,
    PayloadEntry,
    ProofEntry,
    RefinementEntry,
    RunEntry,
    SchemeEntry,
    SearchFacts,
    ShiftEditEntry,
    SiteEntry,
    SkippedEntry,
)
from alphasmith.storage.record_types import RunRecord

#: Fields of the configuration that say where a result lies, not what it is.
_PLACES = {"out", "storage", "artifacts", "workers", "engine"}


def build_manifest(
    record: RunRecord,
    *,
    config: RunConfig,
    task: Task,
    prepared: Prepared,
    found: Found,
    products: Products,
    artifacts: Sequence[ArtifactDigest],
    studies: Mapping[str, str],
) -> Manifest:
    """Everything that explains the result.

    Args:
        record: The run as stored, finished.
        config: Its configuration.
        task: Model and data.
        prepared: Sites and calibration.
        found: Decisions.
        products: Models made.
        artifacts: Files written so far.
        studies: Site name (or ``model``) -> Optuna study.
    """
    search = config.search
    whole = None if found.whole is None else found.kept(found.whole)
    return Manifest(
        run=RunEntry(
            id=record.id,
            name=record.name,
            created=record.created,
            started=record.started or record.created,
            finished=record.finished or record.created,
        ),
        versions=dict(record.versions),
        config=config.model_dump(mode="json", exclude=_PLACES),
        seeds={"search": search.seed, "calibration": search.seed, "held_out": search.seed + 1},
        notes=(*task.notes, *found.notes),
        model=ModelEntry(
            kind=task.kind, name=task.name, digest=task.loaded.digest, parameter_count=task.loaded.parameter_count
        ),
        data_digest=task.data_digest,
        scheme=SchemeEntry.of(Scheme(**config.scheme.model_dump())),
        conventions=ConventionsEntry(
            statistic=search.statistic[0],
            percentile=search.percentile if "percentile" in search.statistic else None,
            clamp=SCALE_MIN,
            dead_channels=DEAD_CHANNEL_RULE,
        ),
        hardware=_hardware(prepared),
        scope=search.scope,
        space_hash=record.space_hash,
        study=studies.get("model"),
        groups=() if whole is None else _groups_of_model(whole),
        sites=tuple(_site(s, prepared, found, studies.get(s.name)) for s in prepared.sites),
        skipped=tuple(SkippedEntry(name=n, reason=r) for n, r in products.summary.skipped),
        output=_output(found, task),
        proof=None
        if products.proof.error is None
        else ProofEntry(tolerance=products.proof.tolerance, error=products.proof.error, batches=products.proof.batches),
        payload=PayloadEntry(
            weights_float=products.summary.float_bytes,
            weights_quantized=products.summary.payload_bytes,
            other=products.summary.total_bytes - products.summary.payload_bytes,
        ),
        guard=_guard(found),
        refinement=None if found.refinement is None else refinement_entry(found.refinement),
        memory=MemoryEntry(predicted=prepared.plan.total, measured=products.peak),
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


def search_facts(result: SiteResult) -> SearchFacts:
    """How the search of a site went, as manifest and storage keep it."""
    noise = result.facts.noise_model
    return SearchFacts(
        stopped=result.facts.stopped,
        noise_model=None
        if noise is None
        else NoiseModelFacts(
            median_log_ratio=noise.median_log_ratio,
            kendall_tau=noise.kendall_tau,
            seconds=noise.seconds,
            proposals=noise.proposals,
            evaluations_saved=noise.evaluations_saved,
            seconds_saved=noise.seconds_saved,
        ),
        noise_reason=result.facts.noise_reason,
        k_tried=result.facts.k_tried,
        range_losses=dict(result.facts.range_losses),
    )


def refinement_entry(refinement: RefinementResult) -> RefinementEntry:
    """What the refinement at the output did, as manifest and storage keep it."""
    return RefinementEntry(
        accepted=refinement.accepted,
        before=refinement.before,
        after=refinement.after,
        difference=refinement.difference,
        standard_error=refinement.standard_error,
        reason=refinement.reason,
        deltas=dict(refinement.deltas),
        changed=dict(refinement.changed),
        trials=len(refinement.results),
        seconds=refinement.seconds,
        study=refinement.study_name,
    )


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


def _hardware(prepared: Prepared) -> HardwareEntry:
    scarcity = prepared.survey.scarcity
    return HardwareEntry(
        budget=_budget(scarcity.available),
        required=_budget(scarcity.required),
        rho=scarcity.rho,
        explanation=scarcity.explanation,
    )


def _budget(budget: HardwareBudget) -> Budget:
    return Budget(memory=budget.memory, threads=budget.gpu_threads, bandwidth=budget.bandwidth)


def _site(site: Site, prepared: Prepared, found: Found, study: str | None) -> SiteEntry:
    result = found.kept(found.sites[site.name]) if site.name in found.sites else None
    entry: dict[str, Any] = {
        "name": site.name,
        "mode": site.mode,
        "reason": site.reason,
        "channels": site.channels,
        "operators": tuple(o.name for o in site.operators),
        "producers": site.producers,
    }
    smoothing = found.final.get(site.name)
    if smoothing is not None:
        entry["shift"] = smoothing.shift is not None
        if site.mode == "fold":
            entry["edits"] = _edits(site, prepared.survey.names)
        if smoothing.shift is not None:
            entry["shift_edits"] = _shift_edits(site, prepared.survey.names)
    if result is not None:
        entry |= {
            "study": study,
            "groups": _groups_of_site(result),
            "labels": tuple(result.labels.tolist()),
            "losses": LossPair(
                search=_losses(result.search, result.best_single_alpha),
                held_out=_losses(result.held_out, result.best_single_alpha),
            ),
            "winner": result.winner,
            "trials": len(result.results),
            "exact_evaluations": result.exact_evaluations,
            "seconds": result.seconds,
            "range_statistic": result.range_statistic,
            "range_factor": result.smoothing.range_factor,
            "grouping": result.grouping,
            "statistic": result.statistic,
            "facts": search_facts(result),
        }
    elif found.whole is not None and site.name in found.whole.labels:
        entry["labels"] = tuple(found.whole.labels[site.name].tolist())
    return SiteEntry(**entry)


def _losses(losses: Losses, best_single_alpha: float) -> LossesEntry:
    return LossesEntry(
        identity=losses.identity,
        alpha_half=losses.alpha_half,
        best_single=losses.best_single,
        best_single_alpha=best_single_alpha,
        ours=losses.ours,
        limit=losses.limit,
    )


def _groups_of_site(result: SiteResult) -> tuple[GroupEntry, ...]:
    sizes = result.labels.bincount(minlength=len(result.ranges)).tolist()
    candidate = result.candidate
    return _groups(sizes, result.magnitudes, result.ranges, result.alphas, candidate.betas, candidate.offsets)


def _groups_of_model(whole: ModelResult) -> tuple[GroupEntry, ...]:
    counts = [labels.bincount(minlength=len(whole.ranges)) for labels in whole.labels.values()]
    sizes = [int(sum(int(c[k]) for c in counts)) for k in range(len(whole.ranges))]
    return _groups(sizes, whole.magnitudes, whole.ranges, whole.alphas)


def _groups(
    sizes: Sequence[int],
    magnitudes: Sequence[float],
    ranges: Sequence[AlphaRange],
    alphas: Sequence[float] | None,
    betas: Sequence[float] = (),
    offsets: Sequence[float] = (),
) -> tuple[GroupEntry, ...]:
    return tuple(
        GroupEntry(
            index=k,
            size=size,
            magnitude=magnitude,
            low=bounds.low,
            high=bounds.high,
            alpha=None if alphas is None else alphas[k],
            explanation=bounds.explanation,
            beta=betas[k] if betas else None,
            offset=offsets[k] if offsets else None,
        )
        for k, (size, magnitude, bounds) in enumerate(zip(sizes, magnitudes, ranges, strict=True))
    )


def _output(found: Found, task: Task) -> OutputEntry:
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
                best_single=values.get("best_single"),
                ours=values.get("ours"),
            ),
        )
    losses = found.scores.losses
    return OutputEntry(
        naive=losses.get("identity"),
        alpha_half=losses.get("alpha_0.5"),
        best_single=losses.get("best_single"),
        ours=losses.get("ours"),
        kept=found.fallback or "ours",
        loss=found.scores.loss,
        search=None if found.whole is None else _losses(found.whole.search, found.whole.best_single_alpha),
        held_out=None if found.whole is None else _losses(found.whole.held_out, found.whole.best_single_alpha),
        metrics=metrics,
    )


def _guard(found: Found) -> tuple[GuardEntry, ...]:
    if found.fallback is not None:
        reason = (
            f"{found.fallback} has a lower loss at the model's output on held-out data than the winners of the search"
        )
        return (GuardEntry(proposed="ours", kept=found.fallback, reason=reason),)
    reason = "the winner of the search had a higher loss on held-out data"
    entries = [
        GuardEntry(site=name, proposed=_proposed(result), kept=result.winner, reason=reason)
        for name, result in found.sites.items()
        if result.guarded
    ]
    if found.whole is not None and found.whole.guarded:
        entries.append(GuardEntry(proposed=_proposed(found.whole), kept=found.whole.winner, reason=reason))
    return tuple(entries)


def _proposed(result: SiteResult | ModelResult) -> CandidateKind:
    return best_trial(result.results).candidate.kind
