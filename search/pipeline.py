"""The main job, end to end: search, guard, prove, quantize, keep. Source: architecture.md section 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import optuna
from torch import nn

from alphasmith.objectives.calibration import weight_absmax
from alphasmith.objectives.candidate_model import CandidateModel
from alphasmith.objectives.equivalence import Equivalence, fold_and_prove
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.memory import measured_peak, resident_bytes, resident_model_bytes, return_large_blocks
from alphasmith.objectives.model_objective import ModelLoss, ModelObjective
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing, smoothing_scales
from alphasmith.search.compare import Variant, best_variant, score_float, score_variants, task_loss
from alphasmith.search.config import RunConfig
from alphasmith.search.model_search import ModelResult, SiteStatistics, search_model
from alphasmith.search.outcome import Found, Products, Proof
from alphasmith.search.prepare import Prepared, prepare, search_device, survey
from alphasmith.search.progress import Progress, Silent
from alphasmith.search.ranges import DEFAULT_ALPHA
from alphasmith.search.recorder import DEFAULT_STORAGE, RunRecorder, RunResult
from alphasmith.search.refinement import RefinementResult
from alphasmith.search.site_result import SiteResult
from alphasmith.search.site_stage import refine_sites, search_sites
from alphasmith.search.studies import TrialResult
from alphasmith.search.task import Task, load_task
from alphasmith.search.threads import thread_budget
from alphasmith.search.writer import Writer
from alphasmith.storage.database import check_reachable
from alphasmith.storage.output import OutputFolder


def run(
    config: RunConfig | None = None,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Search, smooth, quantize and keep a model.

    Args:
        config: What to do; None: the embedded image demo.
        model: A module in place of ``config.model``; copied, never changed.
        batches: Batches in place of ``config.data``: tensors, tuples, dicts or ``Batch``.
        metric: Task metric of a model, in place of ``config.data.metric``.
        progress: Told what happens; None: silent.

    Returns:
        The run's id, folder, manifest and tables.

    Raises:
        InputError: Anything the user can mend; nothing is left behind.
        EquivalenceError: Folding changed the float model; nothing is written.
    """
    config = config or RunConfig()
    progress = progress or Silent()
    # Optuna logs a line per trial to standard error, which the progress display replaces.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.out is not None:
        OutputFolder(config.out)  # refuses a used target before any work
    check_reachable(config.storage or DEFAULT_STORAGE)
    return_large_blocks()
    progress.stage("loading model and data")
    task = load_task(config, model=model, batches=batches, metric=metric)
    if config.search.loss == "task" and config.search.scope == "model" and task.metric is None:
        raise InputError("search.loss", "is 'task' but there is no metric", "give data.metric, or use 'mse' or 'kl'")
    for note in task.notes:
        progress.note(note)
    found_sites = survey(config, task)
    float_metric = score_float(found_sites.model, task.metric, progress)
    # The prediction starts with the libraries: the model is part of it.
    baseline = resident_bytes() - resident_model_bytes(found_sites.model)
    prepared = prepare(config, task, found_sites, progress)
    with thread_budget(config.search.threads), RunRecorder(config, task, prepared) as recorder:
        candidate = CandidateModel(
            prepared.survey.model,
            prepared.sites,
            input_ranges(prepared),
            config.scheme.build(),
            skip_patterns(config, prepared),
            keep_dense=prepared.plan.dense > 0,
        )
        found = _search(config, task, prepared, candidate, float_metric, recorder, progress)
        products = _produce(config, task, prepared, candidate, found, baseline, progress)
        progress.stage("writing")
        return recorder.write(found, products)


def _search(
    config: RunConfig,
    task: Task,
    prepared: Prepared,
    candidate: CandidateModel,
    float_metric: float | None,
    recorder: RunRecorder,
    progress: Progress,
) -> Found:
    device = search_device(config)
    held_out = [b.to(device) for b in task.held_out]
    statistics = _statistics(prepared)
    smoothings: dict[Variant, Mapping[str, Smoothing]] = {
        "identity": {},
        "alpha_0.5": _single(statistics, DEFAULT_ALPHA),
    }
    sites: dict[str, SiteResult] = {}
    whole: ModelResult | None = None
    refinement: RefinementResult | None = None
    kind = config.search.loss if config.search.scope == "model" else "mse"
    reserve = ModelObjective(candidate, held_out, loss=_output_loss(config, task, float_metric))
    if config.search.scope == "site":
        candidate.reset()
        with Writer() as writer:
            sites = search_sites(config, prepared, recorder, writer, progress)
        if config.search.refine and sites:
            judge = ModelObjective(candidate, [b.to(device) for b in task.calibration], loss="mse")
            sites, refinement = refine_sites(config, prepared, sites, judge, reserve, recorder, progress)
        smoothings["best_single"] = {n: r.best_single for n, r in sites.items()}
        smoothings["ours"] = {n: r.smoothing for n, r in sites.items()}
    else:
        whole = _search_whole(config, task, candidate, statistics, reserve, float_metric, recorder, progress)
        smoothings["best_single"] = _single(statistics, whole.best_single_alpha)
        smoothings["ours"] = whole.smoothings
    scores = score_variants(candidate, reserve, kind, smoothings, task.metric, float_metric, progress)
    candidate.reset()
    best = best_variant(scores)
    ours = scores.losses["ours"]
    # A winner that breaks the whole model is never kept, whatever its sites say.
    fallback = best if best != "ours" and (config.search.guard == "output" or ours is None) else None
    if best != "ours" and fallback is None:
        progress.note(
            f"note: at the model's output {best} has the lower held-out loss "
            f"({scores.losses[best]:.3g} against {ours:.3g}); search.guard='output' would keep it"
        )
    notes = _fewer_groups(config.groups.k, {"the model": whole} if whole else sites)
    for note in notes:
        progress.note(f"warning: {note}")
    found = Found(
        sites=sites,
        whole=whole,
        smoothings=smoothings,
        fallback=fallback,
        scores=scores,
        refinement=refinement,
        notes=notes,
    )
    recorder.outcome(found)
    return found


def _search_whole(
    config: RunConfig,
    task: Task,
    candidate: CandidateModel,
    statistics: Mapping[str, SiteStatistics],
    reserve: ModelObjective,
    float_metric: float | None,
    recorder: RunRecorder,
    progress: Progress,
) -> ModelResult:
    device = search_device(config)
    batches = [b.to(device) for b in task.calibration]
    judge = ModelObjective(candidate, batches, loss=_output_loss(config, task, float_metric))
    progress.stage("searching the model", config.search.trials)
    best: list[float] = []

    def told(result: TrialResult) -> None:
        if result.loss is not None:
            best.append(result.loss)
        progress.advance(f"best loss {min(best):.3g}" if best else "")

    result = search_model(
        statistics,
        judge,
        reserve,
        groups=config.groups,
        search=config.search,
        rho=recorder.rho,
        storage=recorder.optuna_storage,
        study_name=recorder.study_name("model"),
        on_trial=told,
    )
    recorder.whole(result)
    return result


def _output_loss(config: RunConfig, task: Task, float_metric: float | None) -> ModelLoss:
    """Loss at the model's output: relative MSE beside site studies, what the user chose where the model is searched."""
    if config.search.scope == "site" or config.search.loss == "mse":
        return "mse"
    if config.search.loss == "task" and task.metric is not None and float_metric is not None:
        return task_loss(task.metric, float_metric)
    return "kl"


def _produce(
    config: RunConfig,
    task: Task,
    prepared: Prepared,
    candidate: CandidateModel,
    found: Found,
    baseline: int,
    progress: Progress,
) -> Products:
    """Quantize, then fold and prove on the same model; EquivalenceError leaves nothing behind.

    The quantized weights are kept while the model they came from is folded, so there is never a second float model.
    """
    progress.stage("quantizing", 1)
    candidate.apply(found.final)
    summary = candidate.summary()
    tensors, structure = candidate.payload()
    model = candidate.reset()
    candidate.check_pristine()
    progress.advance()
    progress.stage("proving equivalence", 1)
    foldable = [s for s in prepared.sites if s.mode == "fold" and s.name in found.final]
    proven: Equivalence | None = None
    if foldable:
        device = search_device(config)
        proven = fold_and_prove(
            model,
            foldable,
            found.final,
            [b.to(device) for b in task.proof],
            tolerance=config.proof.tolerance,
            float64_bytes=prepared.plan.float64,
        )
    progress.advance()
    return Products(
        folded=model,
        tensors=tensors,
        structure=structure,
        summary=summary,
        proof=Proof(
            tolerance=config.proof.tolerance,
            error=proven.error if proven else None,
            batches=len(task.proof),
            dtype=proven.dtype if proven else None,
        ),
        peak=measured_peak(baseline),
    )


def input_ranges(prepared: Prepared) -> dict[str, ChannelRange]:
    """Site -> calibrated range of every channel, for every site with data."""
    return {name: prepared.calibration.input_range(name) for name in prepared.calibration.sites}


def skip_patterns(config: RunConfig, prepared: Prepared) -> tuple[str, ...]:
    """Operators to leave in float: those the user names, and those no calibration row reached."""
    missing = (o.name for s in prepared.sites if s.name not in prepared.calibration.sites for o in s.operators)
    return (*config.sites.skip, *missing)


def _fewer_groups(k: int | Literal["auto"], results: Mapping[str, SiteResult | ModelResult]) -> tuple[str, ...]:
    """One line on where there are fewer groups than asked for; none where there are as many."""
    if k == "auto":
        return ()
    fewer = {name: len(r.ranges) for name, r in results.items() if len(r.ranges) < k}
    if not fewer:
        return ()
    first, groups = next(iter(fewer.items()))
    more = f" and fewer than {k} at {len(fewer) - 1} more sites" if len(fewer) > 1 else ""
    return (f"groups.k = {k} is reduced to {groups} at {first}{more}: the magnitudes of the channels support no more",)


def _statistics(prepared: Prepared) -> dict[str, SiteStatistics]:
    by_name: dict[str, Site] = {s.name: s for s in prepared.sites}
    parameters = {n: p.detach() for n, p in prepared.survey.model.named_parameters()}
    parameters |= dict(prepared.survey.model.named_buffers())
    return {
        name: SiteStatistics(
            activation=prepared.calibration.activation_statistic(name),
            weight=weight_absmax(by_name[name], parameters),
            ties=by_name[name].ties.cpu(),
        )
        for name in sorted(prepared.order, key=[s.name for s in prepared.sites].index)
    }


def _single(statistics: Mapping[str, SiteStatistics], alpha: float) -> dict[str, Smoothing]:
    return {
        n: Smoothing(scales=smoothing_scales(s.activation, s.weight, alpha, ties=s.ties)) for n, s in statistics.items()
    }
