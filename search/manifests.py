"""The manifest of a run, put together from what it decided. The schema lives in storage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import DEAD_CHANNEL_RULE, SCALE_MIN
from alphasmith.search.config import RunConfig
from alphasmith.search.hardware import HardwareBudget
from alphasmith.search.model_search import ModelResult
from alphasmith.search.outcome import Found, Products
from alphasmith.search.prepare import Prepared
from alphasmith.search.ranges import AlphaRange
from alphasmith.search.site_search import SiteResult
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.studies import CandidateKind, Losses, best_trial
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
    OutputEntry,
    PayloadEntry,
    ProofEntry,
    RunEntry,
    SchemeEntry,
    SiteEntry,
    SkippedEntry,
)
from alphasmith.storage.record_types import RunRecord

#: Fields of the configuration that say where a result lies, not what it is.
_PLACES = {"out", "storage"}


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
            statistic=search.statistic,
            percentile=search.percentile if search.statistic == "percentile" else None,
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
        memory=MemoryEntry(predicted=prepared.plan.total, measured=products.peak),
    ).with_artifacts(artifacts)


def space_hash(spaces: Mapping[str, SearchSpace]) -> str:
    """One digest over the spaces of all studies."""
    text = "\n".join(f"{name} {space.digest()}" for name, space in sorted(spaces.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def scale_tensors(
    sites: Sequence[Site], scales: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]]]:
    """Scales and edits as tensors, so that they can be taken out of the model again without it.

    Args:
        sites: All sites.
        scales: Site -> (C,), for smoothed sites.
        names: Parameter name here -> name in the user's model.

    Returns:
        Tensors ``scale/SITE`` (C,) and ``channel/SITE/I`` (channel of every element), and per folded site its edits as
        the manifest lists them.
    """
    tensors: dict[str, Tensor] = {}
    edits: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        if site.name not in scales:
            continue
        tensors[f"scale/{site.name}"] = scales[site.name]
        if site.mode != "fold":
            continue
        for i, edit in enumerate(site.edits):
            key = f"channel/{site.name}/{i}"
            tensors[key] = edit.channel
            edits.setdefault(site.name, []).append(
                {
                    "parameter": names.get(edit.parameter, edit.parameter),
                    "power": edit.power,
                    "offset": edit.offset,
                    "channel": key,
                }
            )
    return tensors, edits


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
    if site.name in found.final:
        _, edits = scale_tensors([site], found.final, prepared.survey.names)
        entry["edits"] = tuple(EditEntry(**e) for e in edits.get(site.name, ()))
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
    return _groups(sizes, result.magnitudes, result.ranges, result.alphas)


def _groups_of_model(whole: ModelResult) -> tuple[GroupEntry, ...]:
    counts = [labels.bincount(minlength=len(whole.ranges)) for labels in whole.labels.values()]
    sizes = [int(sum(int(c[k]) for c in counts)) for k in range(len(whole.ranges))]
    return _groups(sizes, whole.magnitudes, whole.ranges, whole.alphas)


def _groups(
    sizes: Sequence[int],
    magnitudes: Sequence[float],
    ranges: Sequence[AlphaRange],
    alphas: Sequence[float] | None,
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
