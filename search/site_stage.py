"""All sites of a run, one study each, then the refinement of their winners at the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from alphasmith.objectives.model_objective import ModelObjective
from alphasmith.objectives.site_data import SiteData, to_device
from alphasmith.objectives.site_objective import SiteObjective
from alphasmith.objectives.sites.folded_weights import FoldedWeights
from alphasmith.objectives.sites.types import Site
from alphasmith.search.candidates import BASELINES, Candidate
from alphasmith.search.config import RunConfig
from alphasmith.search.prepare import Prepared, search_device
from alphasmith.search.progress import Progress
from alphasmith.search.recorder import RunRecorder
from alphasmith.search.refinement import RefinementResult, refine
from alphasmith.search.refinement_space import RefinableSite
from alphasmith.search.site_result import SiteResult
from alphasmith.search.site_search import search_data
from alphasmith.search.studies import Losses
from alphasmith.search.writer import Writer


def search_sites(
    config: RunConfig, prepared: Prepared, recorder: RunRecorder, writer: Writer, progress: Progress
) -> dict[str, SiteResult]:
    """One study per site. Weights carry the folds of the sites searched before, see ``producers_first``.

    Args:
        config: The run's configuration.
        prepared: Sites and calibration.
        recorder: Keeps each result as soon as it is found.
        writer: The thread that writes.
        progress: Told after each site.
    """
    by_name = {s.name: s for s in prepared.sites}
    weights = _weights(prepared)
    device = search_device(config)
    results: dict[str, SiteResult] = {}
    progress.stage("searching sites", len(prepared.order))
    for name in prepared.order:
        site = by_name[name]
        data, reserve = _rows(prepared, site, weights, device)
        result = search_data(
            data,
            reserve,
            scheme=config.scheme.build(),
            groups=config.groups,
            search=config.search,
            rho=prepared.survey.scarcity.rho,
            storage=recorder.optuna_storage,
            study_name=recorder.study_name(name),
            shiftable=site.shiftable,
            budget=_scratch(config, prepared, device),
            writer=writer,
        )
        results[name] = result
        writer.submit(recorder.site, site, result)
        weights.fold(site, result.smoothing)
        progress.advance(f"best loss {result.held_out_loss:.3g} at the last site")
    return results


def refine_sites(
    config: RunConfig,
    prepared: Prepared,
    results: Mapping[str, SiteResult],
    judge: ModelObjective,
    reserve: ModelObjective,
    recorder: RunRecorder,
    progress: Progress,
) -> tuple[dict[str, SiteResult], RefinementResult]:
    """Look at the winners of all sites together, at the output; changed sites come back re-scored on their own rows.

    Args:
        config: The run's configuration.
        prepared: Sites and calibration.
        results: Winner of every searched site.
        judge: Loss at the output on the search batches.
        reserve: The same on held-out batches.
        recorder: Names the study.
        progress: Told after each trial.
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
        storage=recorder.optuna_storage,
        study_name=recorder.study_name("refinement"),
        device=str(search_device(config)),
        on_trial=lambda _: progress.advance(),
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


def _scratch(config: RunConfig, prepared: Prepared, device: torch.device) -> int | None:
    """Memory for the buffers of one judge [bytes]; None: its own default.

    On a GPU half of what is free, shared by two judges. On the CPU, where a budget is given, what the plan leaves of it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    given = config.hardware.search_memory
    return None if given is None else max(prepared.plan.evaluator, given - prepared.plan.total)


def _changed(result: SiteResult, refinement: RefinementResult, name: str) -> Candidate:
    """The candidate that the refinement put in the place of a site's winner."""
    choice = refinement.changed[name]
    if choice in BASELINES:
        return next(replace(r.candidate, kind="refined") for r in result.results if r.candidate.kind == choice)
    kind = next(kind for kind, names in refinement.kinds.items() if name in names)
    return result.moved(refinement.deltas[kind])[0]


def _rescore(config: RunConfig, prepared: Prepared, results: dict[str, SiteResult], changed: Mapping[str, str]) -> None:
    """Put the losses of changed sites, on their own rows, into their results."""
    weights = _weights(prepared)
    device = search_device(config)
    by_name = {s.name: s for s in prepared.sites}
    for name in prepared.order:
        if name in changed:
            result = results[name]
            rows = _rows(prepared, by_name[name], weights, device)
            search, held_out = (
                _with_ours(losses, SiteObjective(data, config.scheme.build()).loss(result.smoothing))
                for losses, data in zip((result.search, result.held_out), rows, strict=True)
            )
            results[name] = replace(result, search=search, held_out=held_out)
        weights.fold(by_name[name], results[name].smoothing)


def _with_ours(losses: Losses, ours: float) -> Losses:
    limit = None if losses.limit is None else min(losses.limit, ours)
    return replace(losses, ours=ours, limit=limit)


def _weights(prepared: Prepared) -> FoldedWeights:
    model = prepared.survey.model
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return FoldedWeights({name: value.detach() for name, value in tensors.items()})


def _rows(
    prepared: Prepared, site: Site, weights: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[SiteData, SiteData]:
    """Search and held-out rows of a site, both with the calibrated ranges."""
    data = prepared.calibration.site_data(site, weights)
    held_out = prepared.held_out.site_data(site, weights, ranges_from=prepared.calibration)
    return to_device(data, device), to_device(held_out, device)
