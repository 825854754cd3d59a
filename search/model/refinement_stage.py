"""The refinement of the sites' winners at the model's output, after all sites were searched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from alphasmith.objectives.calibration.site_data import SiteData, to_device
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.literals import Variant
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sensitivity.rival_contributions import rival_contributions
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.interruption import leave, never
from alphasmith.search.model._settings import SearchedSite, Setting
from alphasmith.search.model.refinement import RefinementResult, costs_to_come, refine
from alphasmith.search.model.search import ModelScales
from alphasmith.search.model.sweep import Sweep
from alphasmith.search.progress import Progress
from alphasmith.search.site.result import SiteResult
from alphasmith.search.study.alpha_ranges import DEFAULT_ALPHA
from alphasmith.search.study.candidates import Candidate
from alphasmith.search.study.types import StudyContext
from alphasmith.search.work.site_sources import PreparedSites
from alphasmith.storage.runs.data_frames import REFINEMENT_KINDS, REFINEMENT_SITES
from alphasmith.storage.runs.entries import Losses

#: Studies of the refinement as stages of a run.
_STAGES = {REFINEMENT_KINDS: "refining kinds of sites", REFINEMENT_SITES: "refining single sites"}
#: Samples that say which sites matter most and which moves pay.
_FORESEEN_SAMPLES = 16


def refine_sites(
    config: RunConfig,
    prepared: PreparedModel,
    results: Mapping[str, SiteResult],
    scales: ModelScales,
    sweep: Sweep | None,
    judge: ModelObjective,
    reserve: ModelObjective,
    contexts: Callable[[str], StudyContext],
    progress: Progress,
) -> tuple[dict[str, SiteResult], RefinementResult]:
    """Look at the winners of all sites together, at the output; changed sites come back re-scored on their own rows.

    Args:
        config: The run's configuration.
        prepared: Sites and calibration.
        results: Winner of every searched site.
        scales: One alpha -> smoothing of every site.
        sweep: The best alpha for the whole model; None: there is none.
        judge: Loss at the output on the search batches; its model is the float model again afterwards.
        reserve: The same on held-out batches.
        contexts: Name of a study -> where it is recorded, and when it is left.
        progress: Receives stages and notes.

    Raises:
        Interrupted: ``stop`` of a context said so.
    """
    by_name = {s.name: s for s in prepared.sites}
    alphas = {name: _alphas(result, sweep) for name, result in results.items()}
    sites = [_searched(by_name[name], result, scales, alphas[name]) for name, result in results.items()]
    stages, stop = _Stages(progress), never

    def heard(*_: object) -> None:
        stages.advance()

    def context(name: str) -> StudyContext:
        nonlocal stop
        stages.begin(_STAGES[name], costs_to_come(sites, config.search)[name])
        made = contexts(name)
        stop = made.stop
        return replace(made, on_trial=heard)

    def step() -> None:
        leave(stop)
        stages.advance()

    def contributions(rivals: Sequence[Mapping[str, Smoothing]]) -> tuple[dict[str, float], ...]:
        samples = sum(batch.size for batch in judge.batches)
        stages.begin("what sites add at the output", [1.0] * min(samples, _FORESEEN_SAMPLES))
        return _contributions(config, prepared, judge, rivals, step)

    with judge.candidate.restored():  # sites are scored again on the float weights
        refinement = refine(
            sites,
            judge,
            reserve,
            config.search,
            static=judge.candidate.schemes.static,
            contexts=context,
            on_score=heard,
            contributions=contributions,
        )
    stages.end()
    progress.note(f"refinement: {refinement.reason}")
    final = dict(results)
    for name in refinement.changed:
        setting = refinement.settings[name]
        candidate = _changed(results[name], setting, alphas[name])
        final[name] = replace(results[name], candidate=candidate, smoothing=refinement.smoothings[name])
    _rescore(config, prepared, final, refinement.changed)
    return final, refinement


class _Stages:
    """Stages of which it is only known what is likely to be done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._left = 0

    def begin(self, name: str, costs: Sequence[float]) -> None:
        """A stage follows whose units are likely to have these relative costs; the one before has ended."""
        self.end()
        self._left = len(costs)
        self._progress.stage(name, len(costs))
        self._progress.expect(costs)

    def advance(self) -> None:
        """A unit is done; those beyond what was likely are not counted."""
        if self._left:
            self._left -= 1
            self._progress.advance()

    def end(self) -> None:
        """What was likely and not done is done."""
        while self._left:
            self.advance()


def _contributions(
    config: RunConfig,
    prepared: PreparedModel,
    judge: ModelObjective,
    rivals: Sequence[Mapping[str, Smoothing]],
    step: Callable[[], None],
) -> tuple[dict[str, float], ...]:
    """What every site is predicted to add to the output's loss under each of several smoothings, on a few of the judge's samples."""
    plan = prepared.plan
    return rival_contributions(
        judge.candidate,
        rivals,
        judge.batches,
        loss=judge.kind,
        seed=config.search.seed,
        memory=plan.beside_model(config.hardware.search_memory),
        samples=_FORESEEN_SAMPLES,
        step=step,
    )


def _alphas(result: SiteResult, sweep: Sweep | None) -> dict[Variant, float]:
    """The choices that are one alpha for the whole site."""
    known: dict[Variant, float] = {"alpha_0.5": DEFAULT_ALPHA, "best_single": result.best_single_alpha}
    return known if sweep is None else {**known, "one_alpha": sweep.alpha}


def _searched(site: Site, result: SiteResult, scales: ModelScales, alphas: Mapping[Variant, float]) -> SearchedSite:
    plain = {kind: smoothing for kind, smoothing in result.plain.items() if kind in ("alpha_0.5", "best_single")}

    def single(choice: Variant) -> Callable[[float], Smoothing]:
        """One alpha, as the baseline of the site's own study where that is what it is."""
        known, alpha = plain.get(choice), alphas[choice]

        def moved(shift: float) -> Smoothing:
            if shift == 0.0 and known is not None:
                return known
            return scales.of_site(site.name, min(1.0, max(0.0, alpha + shift)))

        return moved

    choices: dict[Variant, Callable[[float], Smoothing]] = {
        "identity": lambda _: result.plain["identity"],
        **{choice: single(choice) for choice in alphas},
        "ours": lambda shift: result.moved(shift)[1],
    }
    return SearchedSite(
        name=site.name,
        operators=tuple(o.name for o in site.operators),
        choices=choices,
        loss=result.held_out_loss,
    )


def _changed(result: SiteResult, setting: Setting, alphas: Mapping[Variant, float]) -> Candidate:
    """The candidate that the refinement put in the place of a site's winner."""
    if setting.choice == "ours":
        candidate = replace(result.moved(setting.shift)[0], kind="refined")
    elif setting.choice == "identity":
        candidate = Candidate("refined", None)
    else:
        alpha = min(1.0, max(0.0, alphas[setting.choice] + setting.shift))
        candidate = Candidate("refined", (alpha,) * len(result.ranges))
    return candidate if setting.range == 1 else replace(candidate, range="output")


def with_one_alpha(
    config: RunConfig,
    prepared: PreparedModel,
    results: Mapping[str, SiteResult],
    smoothings: Mapping[str, Smoothing],
    sweep: Sweep,
) -> dict[str, SiteResult]:
    """Results of all sites with one alpha for the whole model in the place of their winners, scored on their own rows.

    Args:
        config: The run's configuration.
        prepared: Sites and calibration.
        results: Winner of every searched site.
        smoothings: What that alpha does to every site.
        sweep: Where it comes from.
    """
    final = {
        name: replace(
            result,
            candidate=Candidate("one_alpha", (sweep.alpha,) * len(result.ranges)),
            smoothing=smoothings[name],
        )
        for name, result in results.items()
    }
    _rescore(config, prepared, final, final.keys())
    return final


def _rescore(
    config: RunConfig, prepared: PreparedModel, results: dict[str, SiteResult], changed: Collection[str]
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
                _with_ours(losses, _loss(data, result, config.scheme.of(name), device))
                for losses, data in zip((result.search, result.held_out), rows, strict=True)
            )
            results[name] = replace(result, search=search, held_out=held_out)


def _loss(data: SiteData, result: SiteResult, scheme: Scheme, device: torch.device) -> float:
    return SiteObjective(to_device(data, device), scheme).loss(result.smoothing.to(device))


def _with_ours(losses: Losses, ours: float) -> Losses:
    limit = None if losses.limit is None else min(losses.limit, ours)
    return losses.model_copy(update={"ours": ours, "limit": limit})
