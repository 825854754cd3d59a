"""Results of searches as the storage keeps them: one site's record, its groups, its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from alphasmith.objectives.sites.types import Site
from alphasmith.search.manifests import search_facts
from alphasmith.search.model_search import ModelResult
from alphasmith.search.refinement import RefinementKind, RefinementResult
from alphasmith.search.site_result import SiteResult
from alphasmith.search.studies import Losses, TrialResult
from alphasmith.storage import record_types as stored

_STATES: Mapping[str, stored.TrialState] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
_REFINEMENT_KINDS: Mapping[RefinementKind, stored.TrialKind] = {
    "ours": "refined",
    "proposal": "refined",
    "best_single": "best_single",
    "alpha_0.5": "alpha_0.5",
    "sampler": "sampler",
}


def site_record(site: Site, position: int, result: SiteResult | None = None) -> stored.SiteRecord:
    """The record of a site.

    Args:
        site: The site.
        position: Its place in forward order, from 0.
        result: What was found; None where nothing was searched.
    """
    plain = stored.SiteRecord(
        name=site.name,
        position=position,
        mode=site.mode,
        reason=site.reason,
        channels=site.channels,
        operators=tuple(o.name for o in site.operators),
    )
    if result is None:
        return plain
    sizes = [int(n) for n in result.labels.bincount(minlength=len(result.ranges))]
    return replace(
        plain,
        study_name=result.study_name,
        search=_losses(result.search, result.best_single_alpha),
        held_out=_losses(result.held_out, result.best_single_alpha),
        winner=result.winner,
        trials=len(result.results),
        exact_evaluations=result.exact_evaluations,
        seconds=result.seconds,
        groups=_groups(result, sizes, betas=result.candidate.betas, offsets=result.candidate.offsets),
        shift=result.smoothing.shift is not None,
        range_statistic=result.candidate.range,
        range_factor=result.smoothing.range_factor,
        grouping=result.grouping,
        statistic=result.statistic,
        facts=search_facts(result).model_dump(mode="json"),
    )


def model_groups(result: ModelResult) -> tuple[stored.GroupRecord, ...]:
    """The groups of a search over the whole model; sizes are over all its sites."""
    counts = [labels.bincount(minlength=len(result.ranges)).tolist() for labels in result.labels.values()]
    return _groups(result, [sum(column) for column in zip(*counts, strict=True)])


def trial_digests(study_name: str, results: Sequence[TrialResult]) -> list[stored.TrialDigest]:
    """What is worth keeping of a study's trials beside Optuna's own records."""
    return [
        stored.TrialDigest.of(
            study_name=study_name,
            trial_number=r.number,
            kind=r.candidate.kind,
            params=r.candidate.params(),
            state=_STATES[r.state],
            loss=r.loss,
            seconds=r.seconds,
            reason=r.reason,
        )
        for r in results
    ]


def refinement_digests(refinement: RefinementResult) -> list[stored.TrialDigest]:
    """Trials of the refinement; parameters are named as in its Optuna study."""
    return [
        stored.TrialDigest.of(
            study_name=refinement.study_name,
            trial_number=r.number,
            kind=_REFINEMENT_KINDS[r.candidate],
            params={f"delta {kind}": delta for kind, delta in r.change.deltas.items()}
            | {f"choice {site}": choice for site, choice in r.change.choices.items()}
            | {"rest": r.change.rest},
            state=_STATES[r.state],
            loss=r.loss,
            seconds=r.seconds,
            reason=r.reason,
        )
        for r in refinement.results
    ]


def _losses(losses: Losses, best_single_alpha: float) -> stored.Losses:
    return stored.Losses(
        identity=losses.identity,
        alpha_half=losses.alpha_half,
        best_single=losses.best_single,
        best_single_alpha=best_single_alpha,
        ours=losses.ours,
        limit=losses.limit,
    )


def _groups(
    result: SiteResult | ModelResult, sizes: Sequence[int], betas: Sequence[float] = (), offsets: Sequence[float] = ()
) -> tuple[stored.GroupRecord, ...]:
    return tuple(
        stored.GroupRecord(
            index=k,
            size=size,
            low=bounds.low,
            high=bounds.high,
            alpha=None if result.alphas is None else result.alphas[k],
            magnitude=result.magnitudes[k],
            explanation=bounds.explanation,
            beta=betas[k] if betas else None,
            offset=offsets[k] if offsets else None,
        )
        for k, (size, bounds) in enumerate(zip(sizes, result.ranges, strict=True))
    )
