"""Scales rounded to powers of two, so that folding changes exponents alone, and what that costs at the model's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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
from alphasmith.search.model.held_out import HeldOutScore, held_out_score, judged
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
    sites = folded(prepared.sites)
    if config.round_scales == "none" or not sites.keys() & found.final.keys():
        return found
    progress.stage("rounding scales", 2)
    final = rounded_smoothings(found.final, sites)
    before, after = held_out_score(reserve, found.final), held_out_score(reserve, final)
    progress.advance()
    metric = _metric(candidate, task, final) if task.metric is not None else None
    progress.advance()
    made = RoundedModel(smoothings=final, before=before, after=after, weight=reserve.weight, metric=metric)
    return with_rounded(found, made, list(sites.values()), progress)


@dataclass(frozen=True, kw_only=True)
class RoundedModel:
    """The model that is kept, with rounded scales.

    Attributes:
        smoothings: Site -> smoothing, rounded where the site is folded.
        before: Score on held-out samples with the scales as found; None where it is not finite.
        after: With the rounded ones.
        weight: What the sums of their errors are divided by.
        metric: Task metric with the rounded ones.
    """

    smoothings: Mapping[str, Smoothing]
    before: HeldOutScore | None
    after: HeldOutScore | None
    weight: float
    metric: float | None


def folded(sites: Iterable[Site]) -> dict[str, Site]:
    """Of some sites, those that are folded, by name."""
    return {site.name: site for site in sites if site.mode == "fold"}


def rounded_smoothings(smoothings: Mapping[str, Smoothing], sites: Mapping[str, Site]) -> dict[str, Smoothing]:
    """Smoothings with the scales of folded sites rounded to powers of two.

    Args:
        smoothings: Site -> smoothing.
        sites: The folded ones by name.
    """
    return {n: replace(s, scales=power_of_two_scales(s.scales)) if n in sites else s for n, s in smoothings.items()}


def with_rounded(found: SearchOutcome, made: RoundedModel, sites: Sequence[Site], progress: Progress) -> SearchOutcome:
    """The outcome with rounded scales in what is kept, and what they cost.

    Args:
        found: What the search decided.
        made: What is kept, rounded.
        sites: The folded sites.
        progress: Receives the note.
    """
    verdict = judged(made.before, made.after, made.weight)
    rounded = [site for site in sites if site.name in made.smoothings]
    result = RoundingEntry(
        to="pow2",
        sites=len(rounded),
        inexact=tuple(site.name for site in rounded if not _exact(site, made.smoothings[site.name])),
        before=verdict.before,
        after=verdict.after,
        difference=verdict.difference,
        standard_error=verdict.standard_error,
    )
    kept = found.fallback or "ours"
    scores = found.scores
    if made.after is not None:
        scores = replace(
            scores,
            losses={**scores.losses, kept: made.after.loss},
            errors={**scores.errors, kept: made.after.errors},
        )
    if scores.metrics:
        scores = replace(scores, metrics={**scores.metrics, kept: made.metric})
    told = rounding_note(result)
    progress.note(told)
    return replace(
        found,
        smoothings={**found.smoothings, kept: made.smoothings},
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
