"""The main job, end to end: search, guard, prove, quantize, keep. Source: architecture.md section 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna
import torch
from torch import nn

from alphasmith.objectives.calibration import weight_absmax
from alphasmith.objectives.candidate_model import CandidateModel
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.memory import return_large_blocks
from alphasmith.objectives.model_objective import ModelLoss, ModelObjective
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing, smoothing_scales
from alphasmith.search.begin import Begun, begin
from alphasmith.search.compare import Variant, best_variant, score_variants, task_loss
from alphasmith.search.config import RunConfig
from alphasmith.search.defaults import DEFAULT_STORAGE
from alphasmith.search.engines.choose import make_engine
from alphasmith.search.engines.types import Engine, ModelWork
from alphasmith.search.interruption import leave, never
from alphasmith.search.model_search import ModelResult, SiteStatistics, search_model
from alphasmith.search.open_run import (
    check_out,
    find_run,
    named,
    new_run,
    objects_of_others,
    open_existing_run,
    open_run,
    writable_store,
)
from alphasmith.search.outcome import Found
from alphasmith.search.planning import plan_sites
from alphasmith.search.prepare import Prepared, search_device, survey
from alphasmith.search.produce import produce
from alphasmith.search.progress import Progress, Silent
from alphasmith.search.ranges import DEFAULT_ALPHA
from alphasmith.search.recorder import RunRecorder, RunResult, conclude, written_before
from alphasmith.search.refine_stage import refine_sites
from alphasmith.search.refinement import RefinementResult
from alphasmith.search.resuming import check_same, stored_config
from alphasmith.search.run_handle import RunHandle
from alphasmith.search.site_keeper import SiteKeeper
from alphasmith.search.site_result import SiteResult
from alphasmith.search.site_source import PreparedSites
from alphasmith.search.site_stage import SiteSettings, SiteStage
from alphasmith.search.studies import TrialResult
from alphasmith.search.task import Task, load_task
from alphasmith.search.threads import thread_budget
from alphasmith.search.writer import Writer
from alphasmith.storage.database import check_reachable, open_existing
from alphasmith.storage.record_types import RunRecord


def run(
    config: RunConfig | None = None,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    stop: Callable[[], bool] = never,
) -> RunResult:
    """Search, smooth, quantize and keep a model; an unfinished run of the same configuration, model and data is continued.

    Args:
        config: What to do; None: the embedded image demo.
        model: A module in place of ``config.model``; copied, never changed.
        batches: Batches in place of ``config.data``: tensors, tuples, dicts or ``Batch``.
        metric: Task metric of a model, in place of ``config.data.metric``.
        progress: Told what happens; None: silent.
        fresh: Begin a new run in any case.
        stop: Asked again and again whether to leave in good order.

    Returns:
        The run's id, folder, manifest and tables.

    Raises:
        InputError: Anything the user can mend; nothing is left behind.
        EquivalenceError: Folding changed the float model; nothing is written.
        Interrupted: ``stop`` said so; what was found is on record, see :func:`resume`.
    """
    config = config or RunConfig()
    given = Given(model=model, batches=batches, metric=metric)
    return drive(config, given, progress or Silent(), stop, record=None, fresh=fresh)


def resume(
    run: str,
    *,
    storage: str | None = None,
    changes: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> RunResult:
    """Go on with a run that was interrupted, killed or failed, and finish it. No finished trial is repeated.

    Args:
        run: Its id, or the beginning of it.
        storage: The database it is in; None: the default one.
        changes: Fields of its configuration to change, of those that decide no result: ``engine``, ``workers``, ``out``, ...
        model: Where the run was given a module: the same one.
        batches: Likewise.
        metric: Likewise.
        progress: Told what happens; None: silent.
        stop: Asked again and again whether to leave in good order.

    Raises:
        InputError: No such run, it is finished or driven by another live process, or its model, data or configuration is
            not what it was.
        Interrupted: As :func:`run`.
    """
    url = storage or DEFAULT_STORAGE
    database = open_existing(url)
    try:
        record = open_existing_run(database, run)
    finally:
        database.close()
    values = stored_config(record, url).model_dump()
    config = RunConfig.build({**values, **(changes or {})})
    given = Given(model=model, batches=batches, metric=metric)
    return drive(config, given, progress or Silent(), stop, record=record, fresh=False)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a launch script gives in place of a configuration's sections."""

    model: nn.Module | None
    batches: Iterable[Any] | None
    metric: Callable[[nn.Module], float] | None


def drive(
    config: RunConfig,
    given: Given,
    progress: Progress,
    stop: Callable[[], bool],
    *,
    record: RunRecord | None,
    fresh: bool,
) -> RunResult:
    """Drive a run to its end: a new one, the unfinished one of the same configuration, or the one given.

    Args:
        config: Its configuration.
        given: What is not in the configuration.
        progress: Told what happens.
        stop: Asked again and again whether to leave.
        record: The run, its objects where they are seen from here; None: find it, else begin one.
        fresh: Begin a new one even if there is an unfinished one.

    Raises:
        InputError: As ``run`` and ``resume``.
        Interrupted: ``stop`` said so.
    """
    # Optuna logs a line per trial to standard error, which the progress display replaces.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_out(config, record, new=fresh)
    check_reachable(config.storage or DEFAULT_STORAGE)
    return_large_blocks()
    progress.stage("loading model and data")
    task = load_task(config, model=given.model, batches=given.batches, metric=given.metric)
    if config.search.loss == "task" and config.search.scope == "model" and task.metric is None:
        raise InputError("search.loss", "is 'task' but there is no metric", "give data.metric, or use 'mse' or 'kl'")
    for note in task.notes:
        progress.note(note)
    if record is not None:
        check_same(record, config, task)
    found_sites = survey(config, task)
    if record is None and not fresh:
        record = find_run(config, task, progress)
    # What can be wrong with places and engine shows before the model is calibrated, and leaves nothing on record.
    check_out(config, record, new=True)
    store = writable_store(config, record)
    with make_engine(config, stop) as engine:
        before: Begun | None = None
        if record is None:
            with objects_of_others(config, store) as others:
                before = begin(config, task, found_sites, progress, stop, others=others)
            record = new_run(config, task, found_sites, store)
        handle = open_run(config, record, store, engine=engine.name)
        with named(handle.id, handle.storage), handle:
            written = written_before(handle)
            if written is not None:
                progress.note(f"{handle.folder} was written before; only its record is finished")
                return conclude(handle, written)
            handle.discard_partial_output()
            begun = before or begin(config, task, found_sites, progress, stop, handle.kept)
            if before is not None:
                before.calibrations.attach(handle.kept)
            return _finish(config, task, begun, handle, engine, progress, stop)


def _finish(
    config: RunConfig,
    task: Task,
    begun: Begun,
    handle: RunHandle,
    engine: Engine,
    progress: Progress,
    stop: Callable[[], bool],
) -> RunResult:
    """Everything from the first search on."""
    prepared = begun.prepared
    with thread_budget(config.search.threads):
        recorder = RunRecorder(handle, config, task, prepared)
        candidate = CandidateModel(
            prepared.survey.model,
            prepared.sites,
            input_ranges(prepared),
            config.scheme.build(),
            skip_patterns(config, prepared),
            keep_dense=prepared.plan.dense > 0,
        )
        launch = _Launch(
            config, task, prepared, candidate, begun.float_metric, handle, recorder, engine, progress, stop
        )
        found = _search(launch)
        leave(stop)
        products = produce(config, task, prepared, candidate, found, begun.baseline, progress)
        progress.stage("writing")
        return recorder.write(found, products)


@dataclass(frozen=True)
class _Launch:
    """What the stages of a run share."""

    config: RunConfig
    task: Task
    prepared: Prepared
    candidate: CandidateModel
    float_metric: float | None
    handle: RunHandle
    recorder: RunRecorder
    engine: Engine
    progress: Progress
    stop: Callable[[], bool]


def _search(launch: _Launch) -> Found:
    config, task, prepared, candidate = launch.config, launch.task, launch.prepared, launch.candidate
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
    reserve = ModelObjective(candidate, held_out, loss=_output_loss(config, task, launch.float_metric))
    with Writer() as writer:
        if config.search.scope == "site":
            candidate.reset()
            sites = _search_sites(launch, writer)
            if config.search.refine and sites:
                judge = ModelObjective(candidate, [b.to(device) for b in task.calibration], loss="mse")
                log = launch.handle.study_log("refinement", writer)
                name = launch.handle.study_name("refinement")
                sites, refinement = refine_sites(
                    config, prepared, sites, judge, reserve, log, name, launch.progress, launch.stop
                )
            smoothings["best_single"] = {n: r.best_single for n, r in sites.items()}
            smoothings["ours"] = {n: r.smoothing for n, r in sites.items()}
        else:
            whole = _search_whole(launch, statistics, reserve, writer)
            smoothings["best_single"] = _single(statistics, whole.best_single_alpha)
            smoothings["ours"] = whole.smoothings
    if whole is not None:
        launch.recorder.whole(whole)
    scores = score_variants(candidate, reserve, kind, smoothings, task.metric, launch.float_metric, launch.progress)
    candidate.reset()
    best = best_variant(scores)
    ours = scores.losses["ours"]
    # A winner that breaks the whole model is never kept, whatever its sites say.
    fallback = best if best != "ours" and (config.search.guard == "output" or ours is None) else None
    if best != "ours" and fallback is None:
        launch.progress.note(
            f"note: at the model's output {best} has the lower held-out loss "
            f"({scores.losses[best]:.3g} against {ours:.3g}); search.guard='output' would keep it"
        )
    notes = _fewer_groups(config.groups.k, {"the model": whole} if whole else sites)
    for note in notes:
        launch.progress.note(f"warning: {note}")
    found = Found(
        sites=sites,
        whole=whole,
        smoothings=smoothings,
        fallback=fallback,
        scores=scores,
        refinement=refinement,
        notes=notes,
    )
    launch.recorder.outcome(found)
    return found


def _search_sites(launch: _Launch, writer: Writer) -> dict[str, SiteResult]:
    config, prepared, handle = launch.config, launch.prepared, launch.handle
    source = PreparedSites(prepared)
    shared = plan_sites(config, prepared, source, handle, launch.progress)
    settings = SiteSettings(
        scheme=config.scheme.build(),
        groups=config.groups,
        search=config.search,
        rho=prepared.survey.scarcity.rho,
        budget=_scratch(config, prepared),
    )
    if shared:
        launch.progress.note(f"more workers: alphasmith worker {handle.id} --storage {handle.storage}")
    stage = SiteStage(
        handle.id,
        source,
        settings,
        engine=launch.engine,
        board=handle.board,
        keeper=SiteKeeper(handle.board, handle.kept, scheme=settings.scheme.name, position=source.position),
        storage=handle.optuna_storage,
        writer=writer,
        progress=launch.progress,
        stop=launch.stop,
    )
    stage.run()
    return stage.results()


def _search_whole(
    launch: _Launch, statistics: Mapping[str, SiteStatistics], reserve: ModelObjective, writer: Writer
) -> ModelResult:
    config, task, prepared = launch.config, launch.task, launch.prepared
    device = search_device(config)
    loss = _output_loss(config, task, launch.float_metric)
    judge = ModelObjective(launch.candidate, [b.to(device) for b in task.calibration], loss=loss)

    def shipped() -> ModelWork:
        launch.candidate.reset()
        return ModelWork(
            model=prepared.survey.model,
            sites=prepared.sites,
            ranges=input_ranges(prepared),
            scheme=config.scheme.build(),
            skip=skip_patterns(config, prepared),
            batches=tuple(task.calibration),
            loss=loss,
        )

    launch.progress.stage("searching the model", config.search.trials)
    best: list[float] = []

    def told(result: TrialResult) -> None:
        if result.loss is not None:
            best.append(result.loss)
        launch.progress.advance(f"best loss {min(best):.3g}" if best else "")

    return search_model(
        statistics,
        judge,
        reserve,
        groups=config.groups,
        search=config.search,
        rho=prepared.survey.scarcity.rho,
        log=launch.handle.study_log("model", writer),
        study_name=launch.handle.study_name("model"),
        device=str(device),
        racer=launch.engine.racer(judge, shipped),
        batch=max(1, launch.engine.slots),
        on_trial=told,
        stop=launch.stop,
    )


def _scratch(config: RunConfig, prepared: Prepared) -> int | None:
    """Memory for the buffers of one judge [bytes]; None: its own default.

    On a GPU half of what is free, shared by two judges. On the CPU, where a budget is given, what the plan leaves of it.
    """
    if search_device(config).type == "cuda":
        return int(torch.cuda.mem_get_info()[0]) // 4
    given = config.hardware.search_memory
    return None if given is None else max(prepared.plan.evaluator, given - prepared.plan.total)


def _output_loss(config: RunConfig, task: Task, float_metric: float | None) -> ModelLoss:
    """Loss at the model's output: relative MSE beside site studies, what the user chose where the model is searched."""
    if config.search.scope == "site" or config.search.loss == "mse":
        return "mse"
    if config.search.loss == "task" and task.metric is not None and float_metric is not None:
        return task_loss(task.metric, float_metric)
    return "kl"


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
