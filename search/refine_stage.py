"""The refinement of the sites' winners at the model's output, after all sites were searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from alphasmith.objectives.model_objective import ModelObjective
from alphasmith.objectives.site_data import SiteData, to_device
from alphasmith.objectives.site_objective import SiteObjective
from alphasmith.objectives.sites.types import Site
from alphasmith.search.candidates import BASELINES, Candidate
from alphasmith.search.config import RunConfig
from alphasmith.search.interruption import never
from alphasmith.search.prepare import Prepared, search_device
from alphasmith.search.progress import Progress
from alphasmith.search.refinement import RefinementResult, refine
from alphasmith.search.refinement_space import RefinableSite
from alphasmith.search.site_result import SiteResult
from alphasmith.search.site_source import PreparedSites
from alphasmith.search.studies import Losses
from alphasmith.search.study_log import StudyLog


def refine_sites(
    config: RunConfig,
    prepared: Prepared,
    results: Mapping[str, SiteResult],
    judge: ModelObjective,
    reserve: ModelObjective,
    log: StudyLog,
    study_name: str,
    progress: Progress,
    stop: Callable[[], bool] = never,
) -> tuple[dict[str, SiteResult], RefinementResult]:
    """Look at the winners of all sites together, at the output; changed sites come back re-scored on their own rows.

    Args:
        config: The run's configuration.
        prepared: Sites and calibration.
        results: Winner of every searched site.
        judge: Loss at the output on the search batches.
        reserve: The same on held-out batches.
        log: Keeps the study, and knows what is on record of it.
        study_name: Its name.
        progress: Told after each trial.
        stop: Asked before every trial whether to leave.

    Raises:
        Interrupted: ``stop`` said so.
    """
    progress.stage("refining at the output", config.search.refine_trials)
    by_name = {s.name: s for s in prepared.sites}
    refinement = refine(
        [_refinable(by_name[name], result) for name, result in results.items()],
        judge,
        reserve,
        trials=config.search.refine_trials,
        probes=config.search.refine_trials // 2,
        seed=config.search.seed,
        log=log,
        study_name=study_name,
        device=str(search_device(config)),
        on_trial=lambda _: progress.advance(),
        stop=stop,
    )
    progress.note(f"refinement: {refinement.reason}")
    judge.reset()  # sites are scored again on the float weights
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


def _rescore(config: RunConfig, prepared: Prepared, results: dict[str, SiteResult], changed: Mapping[str, str]) -> None:
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
    return replace(losses, ours=ours, limit=limit)
