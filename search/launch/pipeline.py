"""The main job, end to end: search, guard, prove, quantize, keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.memory import resident_bytes, return_large_blocks
from alphasmith.objectives.judge.model_objective import ModelLoss, ModelObjective
from alphasmith.objectives.literals import OutputLoss, Variant
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.config import DEFAULT_STORAGE, RunConfig
from alphasmith.search.devices import search_device, thread_budget
from alphasmith.search.engines.choose import make_engine
from alphasmith.search.engines.types import Engine, ModelWork
from alphasmith.search.inputs.permission import check_code, named_in
from alphasmith.search.inputs.preparation import PreparedModel, RunInputs, begin, site_schemes, survey
from alphasmith.search.inputs.streaming import open_task
from alphasmith.search.inputs.task import Task
from alphasmith.search.interruption import leave, never
from alphasmith.search.launch._blockwise import finish_blockwise
from alphasmith.search.launch._formats import with_formats
from alphasmith.search.launch._look_ahead import check_disk, look_ahead
from alphasmith.search.launch._lookup import (
    Place,
    check_out,
    check_same,
    find_run,
    named,
    new_run,
    open_existing_run,
    open_run,
    places_of,
    stored_config,
    writable_store,
)
from alphasmith.search.launch._outcome import SearchOutcome, decide, produce, with_shares
from alphasmith.search.launch._rounded import with_rounded_scales
from alphasmith.search.launch.recorder import RunRecorder, RunResult, conclude, written_before
from alphasmith.search.launch.site_searches import (
    input_ranges,
    search_sites,
    single_alpha,
    skip_patterns,
    statistics_of,
)
from alphasmith.search.model.refinement import RefinementResult
from alphasmith.search.model.refinement_stage import refine_sites, with_one_alpha
from alphasmith.search.model.search import ModelResult, ModelScales, SiteStatistics, search_model
from alphasmith.search.model.sweep import SWEEP_TRIALS, Sweep, sweep_alpha
from alphasmith.search.model.variants import score_variants, task_loss
from alphasmith.search.progress import Progress, Silent
from alphasmith.search.site.result import SiteResult
from alphasmith.search.study.alpha_ranges import DEFAULT_ALPHA
from alphasmith.search.study.candidates import TrialResult
from alphasmith.search.study.types import StudyContext
from alphasmith.search.study.writer import Writer
from alphasmith.search.toml_values import merged
from alphasmith.search.work.session import RunHandle
from alphasmith.storage.artifacts.run_artifacts import RunArtifacts
from alphasmith.storage.database.connection import Database, check_writable, find_database, opened
from alphasmith.storage.runs.data_frames import ONE_ALPHA
from alphasmith.storage.runs.records import RunRecord


def run(
    config: RunConfig | Mapping[str, Any] | None = None,
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
        config: What to do, or the fields of it; None: the embedded image demo.
        model: A module in place of ``config.model``; copied, never changed.
        batches: Batches in place of ``config.data``: tensors, tuples, dicts or ``Batch``.
        metric: Task metric of a model, in place of ``config.data.metric``.
        progress: Receives stages and notes; None: silent.
        fresh: Begin a new run in any case.
        stop: Polled; returns True to stop in good order.

    Returns:
        The run's id, folder, manifest and tables.

    Raises:
        InputError: Anything the user can mend; nothing is left behind.
        EquivalenceError: Folding changed the float model; nothing is written.
        Interrupted: ``stop`` said so; what was found is on record, see :func:`resume`.
    """
    config = RunConfig.build(config or {})
    given = ScriptInputs(model=model, batches=batches, metric=metric)
    return drive(config, given, progress or Silent(), stop, fresh=fresh)


def resume(
    run: str,
    *,
    storage: str | None = None,
    changes: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    allow_code: Collection[str | Path] = (),
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> RunResult:
    """Resume a run that was interrupted, killed or failed, and finish it. No finished trial is repeated.

    Args:
        run: Its id, or the beginning of it.
        storage: The database it is in; None: the default one.
        changes: Fields of its configuration to change, of those that decide no result: ``engine``, ``workers``, ``out``,
            ``{"data": {"batch_size": 1}}``, ...
        model: Where the run was given a module: the same one.
        batches: Likewise.
        metric: Likewise.
        allow_code: Functions ``module:function`` and folders that the run's record may lead to: what it names beside these
            and those in ``changes`` is not run. Whoever can write to a database must not run code as its readers.
        progress: Receives stages and notes; None: silent.
        stop: Polled; returns True to stop in good order.

    Raises:
        InputError: No such run, it is finished or driven by another live process, its model, data or configuration is
            not what it was, or it names code that was not allowed.
        Interrupted: As :func:`run`.
    """
    url = storage or DEFAULT_STORAGE
    given = ScriptInputs(model=model, batches=batches, metric=metric)
    with opened(url) as database:
        record = open_existing_run(database, run)
        config = RunConfig.build(merged(stored_config(record, url).model_dump(), changes or {}))
        replaced = [name for name in ("model", "batches", "metric") if getattr(given, name) is not None]
        check_code(config, [*allow_code, *named_in(changes or {})], f"run {record.id}", replaced)
        return drive(config, given, progress or Silent(), stop, recorded=(database, record))


@dataclass(frozen=True, kw_only=True)
class ScriptInputs:
    """What a launch script gives in place of a configuration's sections."""

    model: nn.Module | None
    batches: Iterable[Any] | None
    metric: Callable[[nn.Module], float] | None


def drive(
    config: RunConfig,
    given: ScriptInputs,
    progress: Progress,
    stop: Callable[[], bool],
    *,
    recorded: tuple[Database, RunRecord] | None = None,
    fresh: bool = False,
) -> RunResult:
    """Drive a run to its end: a new one, the unfinished one of the same configuration, or the one given.

    Args:
        config: Its configuration.
        given: What is not in the configuration.
        progress: Receives stages and notes.
        stop: Polled; returns True to stop.
        recorded: The database, open, and the run in it, its objects where they are seen from here; None: find it, else
            begin one.
        fresh: Begin a new one even if there is an unfinished one.

    Raises:
        InputError: As ``run`` and ``resume``.
        Interrupted: ``stop`` said so.
    """
    # Optuna logs a line per trial to standard error, which the progress display replaces.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = config.storage or DEFAULT_STORAGE
    database, record = recorded or (None, None)
    with ExitStack() as stack:
        check_out(config, record, new=fresh)
        place = Place(config, stack)
        place.reserve(record)
        check_writable(url)
        if database is None and (found := find_database(url)) is not None:
            database = stack.enter_context(closing(found))
        return_large_blocks()
        progress.stage("loading model and data")
        config, task, streamed = open_task(
            config, model=given.model, batches=given.batches, metric=given.metric, progress=progress, stop=stop
        )
        baseline = resident_bytes()  # with the libraries that the model brought; used where no weight is in memory yet
        if config.search.loss == "task" and config.search.scope == "model" and task.metric is None:
            raise InputError(
                "search.loss", "is 'task' but there is no metric", "give data.metric, or use 'mse' or 'kl'"
            )
        for note in task.notes:
            progress.note(note)
        if record is not None:
            check_same(record, config, task)
        ahead = None if streamed is None else look_ahead(config, task, streamed, baseline, progress)
        found_sites = survey(config, task) if ahead is None else ahead.survey
        for note in found_sites.notes:
            progress.note(f"warning: {note}")
        if record is None and database is not None and not fresh:
            record = find_run(database, config, task, progress)
        # What can be wrong with places and engine shows before the model is calibrated, and leaves nothing on record.
        check_out(config, record, new=True)
        place.reserve(record)
        store = writable_store(config, record)
        if ahead is not None:
            check_disk(ahead, *places_of(config, record))
        with make_engine(config, stop) as engine:
            before: RunInputs | None = None
            if record is None and ahead is None:
                others = None if database is None else RunArtifacts(database, store, "")
                before = begin(config, task, found_sites, progress, stop, others=others)
            # Made only now: what was wrong with model and data has left nothing behind.
            database = database or stack.enter_context(opened(url, create=True))
            if record is None and not fresh:  # another process may have begun the same meanwhile
                record = find_run(database, config, task, progress)
            record = record or new_run(database, config, task, found_sites, store)
            place.reserve(record)
            handle = open_run(database, config, record, store, engine=engine.name, place=place)
            with named(handle.id, handle.storage), handle:
                # First what earlier drivers left: one that wakes can publish nothing after that, or has published already.
                handle.discard_partial_output()
                written = written_before(handle)
                if written is not None:
                    progress.note(f"{handle.folder} was written before; only its record is finished")
                    return conclude(handle, written, handle.store.trials(handle.id))
                if streamed is not None and ahead is not None:
                    return finish_blockwise(config, task, streamed, ahead, handle, engine, progress, stop)
                inputs = before or begin(config, task, found_sites, progress, stop, handle.kept)
                if before is not None:
                    before.calibrations.attach(handle.kept)
                return _finish(config, task, inputs, handle, engine, progress, stop)


def _finish(
    config: RunConfig,
    task: Task,
    inputs: RunInputs,
    handle: RunHandle,
    engine: Engine,
    progress: Progress,
    stop: Callable[[], bool],
) -> RunResult:
    """Everything from the first search on."""
    prepared = inputs.prepared
    if prepared.coverage.left:
        progress.note(f"warning: {prepared.coverage.account()}")
    with thread_budget(config.search.threads):
        recorder = RunRecorder(handle, config, task, prepared)
        candidate = CandidateModel(
            prepared.survey.model,
            prepared.sites,
            input_ranges(prepared),
            site_schemes(config, prepared.sites),
            skip_patterns(config, prepared),
            keep_dense=prepared.plan.dense > 0,
        )
        launch = _Launch(
            config, task, prepared, candidate, inputs.float_metric, handle, recorder, engine, progress, stop
        )
        found = _search(launch)
        leave(stop)
        products = produce(config, task, prepared, candidate, found, inputs.baseline, progress)
        progress.stage("writing")
        return recorder.write(found, products)


@dataclass(frozen=True)
class _Launch:
    """What the stages of a run share."""

    config: RunConfig
    task: Task
    prepared: PreparedModel
    candidate: CandidateModel
    float_metric: float | None
    handle: RunHandle
    recorder: RunRecorder
    engine: Engine
    progress: Progress
    stop: Callable[[], bool]


def _search(launch: _Launch) -> SearchOutcome:
    config, task, prepared, candidate = launch.config, launch.task, launch.prepared, launch.candidate
    device = search_device(config)
    held_out = [b.to(device) for b in task.held_out]
    statistics = statistics_of(prepared)
    smoothings: dict[Variant, Mapping[str, Smoothing]] = {
        "identity": {},
        "alpha_0.5": single_alpha(statistics, DEFAULT_ALPHA),
    }
    sites: dict[str, SiteResult] = {}
    whole: ModelResult | None = None
    sweep: Sweep | None = None
    refinement: RefinementResult | None = None
    kind = config.search.loss if config.search.scope == "model" else loss_of_answers(prepared.survey.model, held_out[0])
    reserve = ModelObjective(candidate, held_out, loss=_output_loss(task, launch.float_metric, kind))
    with Writer() as writer:
        if config.search.scope == "site":
            sites = search_sites(config, prepared, launch.handle, launch.engine, writer, launch.progress, launch.stop)
            if sites:
                sites, sweep, refinement = _search_output(launch, sites, ModelScales(statistics), reserve, writer)
            if sweep is not None:
                smoothings["one_alpha"] = single_alpha(statistics, sweep.alpha)
            smoothings["best_single"] = {n: r.best_single for n, r in sites.items()}
            smoothings["ours"] = {n: r.smoothing for n, r in sites.items()}
        else:
            whole = _search_whole(launch, statistics, reserve, writer)
            smoothings["best_single"] = single_alpha(statistics, whole.best_single_alpha)
            smoothings["ours"] = whole.smoothings
    if whole is not None:
        launch.recorder.whole(whole)
    scores = score_variants(candidate, reserve, kind, smoothings, task.metric, launch.float_metric, launch.progress)
    found = decide(
        config,
        scores,
        smoothings,
        launch.progress,
        sites=sites,
        whole=whole,
        refinement=refinement,
        sweep=sweep,
        swept=lambda best: with_one_alpha(config, prepared, sites, smoothings["one_alpha"], best),
    )
    found = with_rounded_scales(found, config, task, prepared, candidate, reserve, launch.progress)
    found = with_shares(found, config, task, prepared, candidate, launch.progress, launch.stop)
    found = with_formats(found, config, task, prepared, candidate, reserve, launch.handle, launch.progress, launch.stop)
    launch.recorder.outcome(found)
    return found


def _search_output(
    launch: _Launch, sites: dict[str, SiteResult], scales: ModelScales, reserve: ModelObjective, writer: Writer
) -> tuple[dict[str, SiteResult], Sweep | None, RefinementResult | None]:
    """What follows the searches of the sites at the model's output: one alpha swept, then from coarse to fine."""
    config, task, prepared = launch.config, launch.task, launch.prepared
    device = search_device(config)
    launch.progress.stage("outputs of the float model")  # no part of the time that the sweep takes
    judge = ModelObjective(
        launch.candidate, [b.to(device) for b in task.judging], loss=reserve.kind, remembered=prepared.plan.remembered
    )

    def context(of: str) -> StudyContext:
        return launch.handle.study_context(of, writer, device=str(device), stop=launch.stop)

    launch.progress.stage("one alpha for the whole model", SWEEP_TRIALS)
    heard = replace(context(ONE_ALPHA), on_trial=lambda _: launch.progress.advance())
    with launch.candidate.restored():
        sweep = sweep_alpha(scales, judge, config.search, heard)
    if not config.search.refine:
        return sites, sweep, None
    sites, refinement = refine_sites(config, prepared, sites, scales, sweep, judge, reserve, context, launch.progress)
    judge.forget()  # what it remembers is of no use to the variants, shares and models that follow
    return sites, sweep, refinement


def _search_whole(
    launch: _Launch, statistics: Mapping[str, SiteStatistics], reserve: ModelObjective, writer: Writer
) -> ModelResult:
    config, task, prepared = launch.config, launch.task, launch.prepared
    device = search_device(config)
    loss = _output_loss(task, launch.float_metric, config.search.loss)
    judge = ModelObjective(launch.candidate, [b.to(device) for b in task.judging], loss=loss)

    def shipped() -> ModelWork:
        return ModelWork(
            model=prepared.survey.model,
            sites=prepared.sites,
            ranges=input_ranges(prepared),
            scheme=launch.candidate.schemes,
            skip=skip_patterns(config, prepared),
            batches=tuple(task.judging),
            loss=loss,
        )

    launch.progress.stage("searching the model", config.search.trials)
    best: list[float] = []

    def told(result: TrialResult) -> None:
        if result.loss is not None:
            best.append(result.loss)
        launch.progress.advance(f"best loss {min(best):.3g}" if best else "")

    context = launch.handle.study_context("model", writer, device=str(device), stop=launch.stop)
    with launch.candidate.restored():
        return search_model(
            statistics,
            judge,
            reserve,
            config,
            rho=prepared.survey.scarcity.rho,
            racer=launch.engine.racer(judge, shipped),
            batch=max(1, launch.engine.slots),
            context=replace(context, on_trial=told),
        )


def _output_loss(task: Task, float_metric: float | None, kind: OutputLoss) -> ModelLoss:
    """Loss at the model's output: of the kind that its answers ask for beside site studies, that the user chose where the model is searched."""
    if kind == "task":
        return "kl" if task.metric is None or float_metric is None else task_loss(task.metric, float_metric)
    return kind
