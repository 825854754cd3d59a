"""Formats of sites in a run: after the alphas were found, before anything is folded or quantized."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.formats.advice import advise
from alphasmith.search.formats.record import FORMATS, StoredPlans
from alphasmith.search.formats.stage import FormatRequest, FormatResult, choose_formats
from alphasmith.search.inputs.hardware import target_budget
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.inputs.task import Task
from alphasmith.search.interruption import leave
from alphasmith.search.progress import Progress
from alphasmith.search.work.session import RunHandle
from alphasmith.storage.output.format_entries import FormatAdvice, FormatPoint, FormatsEntry

if TYPE_CHECKING:
    from collections.abc import Callable

    from alphasmith.search.launch._outcome import SearchOutcome


def with_formats(
    found: SearchOutcome,
    config: RunConfig,
    task: Task,
    prepared: PreparedModel,
    candidate: CandidateModel,
    reserve: ModelObjective,
    handle: RunHandle,
    progress: Progress,
    stop: Callable[[], bool],
) -> SearchOutcome:
    """The outcome with a format for every site, or with advice where no choice was asked for.

    Args:
        found: What the search decided.
        config: The run's configuration.
        task: Its data.
        prepared: Sites, and the memory plan of the run.
        candidate: The model.
        reserve: Loss at the output on held-out batches.
        handle: The run, for its record.
        progress: Receives stages and notes.
        stop: Polled; returns True to stop.

    Raises:
        Interrupted: ``stop`` said so.
    """
    scheme = config.scheme.build()
    choices = config.budget.choices(scheme, config.sites.formats, config.target)
    device = search_device(config)
    if not choices:
        if found.shares is None:
            return found
        leave(stop)
        progress.stage("advice on formats", 1)
        advice = advise(
            candidate,
            found.final,
            found.shares,
            reserve,
            task.calibration[0].narrow(0, 1).to(device),
            before=found.scores.losses.get(found.fallback or "ours"),
            target=config.target,
        )
        progress.advance()
        return replace(found, format_advice=advice)
    progress.stage("outputs of the float model")
    judging, held_out = ([b.to(device) for b in batches] for batches in (task.judging, task.held_out))
    kind = loss_of_answers(prepared.survey.model, held_out[0])
    judge = ModelObjective(candidate, judging, loss=kind)
    if found.scores.loss != kind:
        reserve = ModelObjective(candidate, held_out, loss=kind)
    plan = prepared.plan
    handle.check_driving()
    result = choose_formats(
        candidate,
        found.final,
        judge,
        reserve,
        FormatRequest(
            schemes=candidate.schemes,
            formats=choices,
            budget=config.budget,
            hardware=target_budget(config.hardware),
            target=config.target,
            seed=config.search.seed,
            calibration=sum(batch.size for batch in task.calibration),
            memory=plan.beside_model(config.hardware.search_memory),
        ),
        StoredPlans(handle.optuna_storage, handle.study_name(FORMATS), handle.board.driver_fence()),
        begin=progress.stage,
        advance=progress.advance,
        note=progress.note,
        stop=stop,
    )
    if result is None:
        return found
    progress.note(f"formats: {result.reason}")
    metric = None
    if task.metric is not None:
        with candidate.using(result.schemes()), candidate.applied(found.final) as model:
            metric = task.metric.score(model)
    return replace(found, formats=result, format_metric=metric)


def formats_entry(result: FormatResult, metric: float | None) -> FormatsEntry:
    """What the manifest says of the choice.

    Args:
        result: The choice.
        metric: Task metric under it; None: there is none.
    """
    request, verdict = result.request, result.held_out
    judged = {} if verdict is None else asdict(verdict)
    return FormatsEntry(
        own=result.own,
        choices=request.formats,
        target=request.target,
        sites=len(result.sites),
        loss=result.loss,
        cost_unit="time relative to the scheme's own format" if request.budget.timed else "share of multiply-adds",
        limit=request.budget.limit,
        points=tuple(
            FormatPoint(
                number=point.number,
                formats=dict(point.changed),
                cost=point.cost,
                share_of_macs=point.share_of_macs,
                predicted=point.predicted,
                loss=point.loss,
                on_front=point.number in result.front,
                reason=point.reason,
            )
            for point in result.points
        ),
        picked=result.picked,
        reason=result.reason,
        **{name: judged.get(name) for name in ("before", "after", "difference", "standard_error")},
        metric=metric,
        passes=result.passes,
        seconds=result.seconds,
        study=result.study,
    )


def advice_entry(found: SearchOutcome) -> FormatAdvice | None:
    """What the manifest says of the advice; None: there is none.

    Args:
        found: What the search decided.
    """
    return None if found.format_advice is None else FormatAdvice(**asdict(found.format_advice))
