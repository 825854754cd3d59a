"""Scales rounded to powers of two, so that folding changes exponents alone, and what that costs at the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing, power_of_two_scales
from alphasmith.objectives.text import counted, listed, number
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.inputs.task import Task
from alphasmith.search.launch._outcome import SearchOutcome
from alphasmith.search.model.held_out import held_out_score, judged
from alphasmith.search.progress import Progress
from alphasmith.storage.output.entries import RoundingEntry

_NAMED = 3


def with_rounded_scales(
    found: SearchOutcome,
    config: RunConfig,
    task: Task,
    prepared: PreparedModel,
    candidate: CandidateModel,
    reserve: ModelObjective,
    progress: Progress,
) -> SearchOutcome:
    """The outcome with the scales of folded sites rounded, where the configuration asks for it.

    Args:
        found: What the search decided.
        config: The run's configuration.
        task: Its metric.
        prepared: Sites.
        candidate: The model; the float one afterwards.
        reserve: Loss at the output on held-out batches.
        progress: Receives stages and notes.
    """
    sites = {site.name: site for site in prepared.sites if site.mode == "fold"}
    rounded = {name: smoothing for name, smoothing in found.final.items() if name in sites}
    if config.round_scales == "none" or not rounded:
        return found
    progress.stage("rounding scales", 2)
    final = {**found.final, **{n: replace(s, scales=power_of_two_scales(s.scales)) for n, s in rounded.items()}}
    before, after = held_out_score(reserve, found.final), held_out_score(reserve, final)
    progress.advance()
    verdict = judged(before, after, reserve.weight)
    result = RoundingEntry(
        to="pow2",
        sites=len(rounded),
        inexact=tuple(name for name in rounded if not _exact(sites[name], final[name])),
        before=verdict.before,
        after=verdict.after,
        difference=verdict.difference,
        standard_error=verdict.standard_error,
    )
    kept = found.fallback or "ours"
    scores = found.scores
    if after is not None:
        scores = replace(
            scores, losses={**scores.losses, kept: after.loss}, errors={**scores.errors, kept: after.errors}
        )
    if task.metric is not None:
        scores = replace(scores, metrics={**scores.metrics, kept: _metric(candidate, task, final)})
    progress.advance()
    told = rounding_note(result)
    progress.note(told)
    return replace(
        found,
        smoothings={**found.smoothings, kept: final},
        scores=scores,
        rounding=result,
        notes=(*found.notes, told),
    )


def rounding_note(entry: RoundingEntry) -> str:
    """What was rounded and what that cost, in one line.

    Args:
        entry: What the manifest says of it.
    """
    losses = " -> ".join("not finite" if loss is None else number(loss) for loss in (entry.before, entry.after))
    scatter = "" if entry.standard_error is None else f" +- {number(entry.standard_error)}"
    change = "" if entry.difference is None else f" (difference {number(-entry.difference)}{scatter})"
    names = f"; the fold of {listed(entry.inexact, _NAMED)} is not exact all the same" if entry.inexact else ""
    return f"scales are powers of two at {counted(entry.sites, 'site')}: held-out output loss {losses}{change}{names}"


def _exact(site: Site, smoothing: Smoothing) -> bool:
    shifted = smoothing.shift is not None and bool(site.shift_edits)
    return not shifted and not any(edit.offset for edit in site.edits)


def _metric(candidate: CandidateModel, task: Task, smoothings: Mapping[str, Smoothing]) -> float | None:
    try:
        with candidate.applied(smoothings) as model:
            return None if task.metric is None else task.metric.score(model)
    except NonFiniteError:
        return None
