"""The refinement of the sites' winners at the model's output, after all sites were searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from alphasmith.objectives.calibration.site_data import SiteData, to_device
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.sites.types import Site
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.model._refinement_space import RefinableSite
from alphasmith.search.model.refinement import RefinementResult, costs_to_come, refine
from alphasmith.search.progress import Progress
from alphasmith.search.site.result import SiteResult
from alphasmith.search.study.candidates import BASELINES, Candidate
from alphasmith.search.study.types import StudyContext
from alphasmith.search.work.site_sources import PreparedSites
from alphasmith.storage.runs.entries import Losses


def refine_sites(
    config: RunConfig,
    prepared: PreparedModel,
    results: Mapping[str, SiteResult],
    judge: ModelObjective,
    reserve: ModelObjective,
    context: StudyContext,
    progress: Progress,
) -> tuple[dict[str, SiteResult], RefinementResult]:
    """Look at the winners of all sites together, at the output; changed sites come back re-scored on their own rows.

    Args:
        config: The run's configuration.
        prepared: Sites and calibration.
        results: Winner of every searched site.
        judge: Loss at the output on the search batches; its model is the float model again afterwards.
        reserve: The same on held-out batches.
        context: Where the study is recorded, and when it is left.
        progress: Receives stages and notes.

    Raises:
        Interrupted: ``context.stop`` said so.
    """
    by_name = {s.name: s for s in prepared.sites}
    sites = [_refinable(by_name[name], result) for name, result in results.items()]
    costs = costs_to_come(sites, config.search, context)
    progress.stage("refining at the output", len(costs))
    progress.expect(costs)
    with judge.candidate.restored():  # sites are scored again on the float weights
        context = replace(context, on_trial=lambda _: progress.advance())
        refinement = refine(sites, judge, reserve, config.search, context=context, on_score=progress.advance)
    progress.note(f"refinement: {refinement.reason}")
    final = dict(results)
    if refinement.accepted:
        for name, smoothing in refinement.smoothings.items():
            if name in refinement.changed:
                candidate = _changed(results[name], refinement, name)
                final[name] = replace(results[name], candidate=candidate, smoothing=smoothing)
        _rescore(config, prepared, final, refinement.changed)
    return final, refinement


def _refinable(site: Site, result: SiteResult) -> RefinableSite:
    return RefinableSite(
        name=site.name,
        operators=tuple(o.name for o in site.operators),
        rescale=lambda delta: result.moved(delta)[1],
        choices={"ours": result.smoothing, **{kind: result.plain[kind] for kind in reversed(BASELINES)}},
        loss=result.held_out_loss,
    )


def _changed(result: SiteResult, refinement: RefinementResult, name: str) -> Candidate:
    """The candidate that the refinement put in the place of a site's winner."""
    choice = refinement.changed[name]
    if choice in BASELINES:
        return next(replace(r.candidate, kind="refined") for r in result.results if r.candidate.kind == choice)
    kind = next(kind for kind, names in refinement.kinds.items() if name in names)
    return result.moved(refinement.deltas[kind])[0]


def _rescore(
    config: RunConfig, prepared: PreparedModel, results: dict[str, SiteResult], changed: Mapping[str, str]
) -> None:
    """Put the losses of changed sites, on their own rows, into their results."""
    source = PreparedSites(prepared)
    device = search_device(config)
    for name in prepared.order:
        if name in changed:
            result = results[name]
            smoothings = {other: results[other].smoothing for other in source.depends_on(name)}
            rows = source.rows(name, smoothings)
            search, held_out = (
                _with_ours(losses, _loss(data, result, config, device))
                for losses, data in zip((result.search, result.held_out), rows, strict=True)
            )
            results[name] = replace(result, search=search, held_out=held_out)


def _loss(data: SiteData, result: SiteResult, config: RunConfig, device: torch.device) -> float:
    return SiteObjective(to_device(data, device), config.scheme.build()).loss(result.smoothing.to(device))


def _with_ours(losses: Losses, ours: float) -> Losses:
    limit = None if losses.limit is None else min(losses.limit, ours)
    return losses.model_copy(update={"ours": ours, "limit": limit})
