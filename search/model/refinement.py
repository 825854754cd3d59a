"""Whole-model refinement: from coarse to fine at the model's output, over what the losses of single sites cannot see.

A site's winner is judged by the output of its own operators. How errors of sites meet on their way through the model is
seen at the output only: lower site losses can go with a higher perplexity. So two studies follow the searches of the sites,
each from what the one before found: one setting for all sites of a kind, then one for each of the sites that matter most. A
setting is a choice (the site's winner, one of the baselines), a shift of its alphas and a factor on its static range.
Candidates are judged on samples that set no range, and what a step found is kept only where held-out samples say so beyond
their own scatter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.literals import Variant
from alphasmith.objectives.quantization.plan import same_smoothing
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.config import SearchConfig
from alphasmith.search.model._descent import MoveScorer, descend, site_moves
from alphasmith.search.model._settings import (
    OURS,
    Change,
    SearchedSite,
    Setting,
    SettingSpace,
    site_kinds,
    smoothings_of,
)
from alphasmith.search.model.held_out import HeldOutScore, Judgement, held_out_score, judged
from alphasmith.search.study.study import RecordedStudy
from alphasmith.search.study.trial import Trial
from alphasmith.search.study.types import StudyContext
from alphasmith.storage.runs.data_frames import REFINEMENT_KINDS, REFINEMENT_SITES

#: Trials that moving one site takes, about: the second study takes so many sites as its trials allow.
_TRIALS_PER_SITE = 5
#: Sites are many, so that some seem better by luck: a move of one has to gain so many paired standard errors, and the study ends
#: after so many sites in a row that gained nothing.
_SITE_ERRORS, _SITE_PATIENCE = 2.0, 4
#: What single sites start from: without smoothing, or at alpha 0.5, one of them alone is hardly ever better.
_SITE_CHOICES: tuple[Variant, ...] = ("one_alpha", "best_single", "ours")
#: Moves of a kind that are tried, about, beside its choices.
_MOVES_PER_KIND = 5

#: Choices whose ranges may have a margin.
_WITH_MARGIN: tuple[Variant, ...] = ("ours", "best_single")
#: A site is moved before any trial where that is predicted to lower what it adds to the loss by this share of it.
_FORESEEN = 0.2
#: Most sites that get settings of their own.
_SITES_MAX = 40

#: Smoothings of all sites, several of them -> what every site adds to the loss at the output under each; sites of which that is
#: not known are left out.
_Contributions: TypeAlias = Callable[[Sequence[Mapping[str, Smoothing]]], Sequence[Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Step(Judgement):
    """One study of the refinement, and what held-out samples say of its best change. Losses: see :class:`Judgement`.

    Attributes:
        name: What got settings of its own.
        units: Unit -> its sites, in the order in which they were moved.
        results: All trials.
        study_name: Name of the Optuna study.
        seconds: Wall time [s].
    """

    name: Literal["kinds", "sites"]
    units: Mapping[str, tuple[str, ...]]
    results: tuple[Trial[Change], ...]
    study_name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RefinementResult:
    """What the refinement decided, and how it came to that. Losses are of the output on held-out batches.

    Attributes:
        steps: The studies, in order.
        settings: Final setting of every site.
        smoothings: What they do.
        changed: Site -> its setting in words, for the sites that differ from their winners.
        overall: The sites' winners against what is kept.
        kinds: Kind -> its sites.
        seconds: Wall time [s].
        evaluations: Candidate models scored, stopped ones included, on search and held-out batches.
    """

    steps: tuple[Step, ...]
    settings: Mapping[str, Setting]
    smoothings: Mapping[str, Smoothing]
    changed: Mapping[str, str]
    overall: Judgement
    kinds: Mapping[str, tuple[str, ...]]
    seconds: float
    evaluations: int

    @property
    def accepted(self) -> bool:
        """Whether anything changed."""
        return bool(self.changed)

    @property
    def reason(self) -> str:
        """Why it was accepted or not, in one sentence."""
        told = [step.reason for step in self.steps if step.accepted] or [step.reason for step in self.steps]
        return "; ".join(dict.fromkeys(told))


def refine(
    sites: Sequence[SearchedSite],
    judge: ModelObjective,
    reserve: ModelObjective,
    search: SearchConfig,
    *,
    static: bool = True,
    contexts: Callable[[str], StudyContext] | None = None,
    on_score: Callable[[], None] | None = None,
    contributions: _Contributions | None = None,
) -> RefinementResult:
    """Search around the sites' winners and the baselines at the model's output.

    Args:
        sites: Every smoothed site, in forward order.
        judge: Loss at the output on the search batches; ``mse`` or ``kl``.
        reserve: The same on held-out batches.
        search: Its ``refine_trials`` and ``seed``.
        static: Whether activations have static ranges, which can be widened and clipped.
        contexts: Name of a study -> where it is recorded, who hears of its trials, and when it is left; None: nothing is kept. Called once
            for each study, when it begins.
        on_score: Called after every candidate model that is scored outside the studies.
        contributions: Says which sites matter most at the output, and which moves of them are likely to pay; None: those with the largest
            losses of their own are moved first.

    Raises:
        Interrupted: ``stop`` of a context said so.
        InputError: No sites, a site given twice or without ``ours``, fewer than one trial, or an objective that scores a
            task metric, which has no samples.
    """
    _check(sites, search.refine_trials)
    contexts = contexts or (lambda _: StudyContext())
    run = _Refinement(sites, judge, reserve, search, static, contexts, on_score or _nobody, contributions or _unknown)
    start = run.clock()
    evaluations = judge.evaluations + reserve.evaluations
    winners = {site.name: Setting() for site in sites}
    before = run.held_out(winners)  # first, as a task metric is refused here
    kinds = site_kinds(sites)
    kept, score, coarse = run.of_kinds(winners, before, kinds)
    kept, score, fine = run.of_sites(kept, score)
    ours, final = smoothings_of(sites, winners), smoothings_of(sites, kept)
    changed = {name: str(setting) for name, setting in kept.items() if not same_smoothing(final[name], ours[name])}
    return RefinementResult(
        steps=(coarse, fine),
        settings=kept,
        smoothings=final if changed else ours,
        changed=changed,
        overall=judged(before, score, reserve.weight),
        kinds=kinds,
        seconds=run.clock() - start,
        evaluations=judge.evaluations + reserve.evaluations - evaluations,
    )


def costs_to_come(sites: Sequence[SearchedSite], search: SearchConfig) -> dict[str, list[float]]:
    """Study -> relative cost of every candidate model that it is likely to score, in order.

    Of the kinds: the winners on the held-out batches, the plain choices, the moves, of which half are given up early, and what they
    end with. Of single sites, where what comes before the site is remembered: the moves, until some sites have gained nothing, and
    what they end with.

    Args:
        sites: As for :func:`refine`.
        search: Likewise.
    """
    plain = len(set.intersection(*(set(site.choices) for site in sites)))
    moves = len(site_kinds(sites)) * (plain - 1 + _MOVES_PER_KIND)
    first = min(plain, search.refine_trials)
    kinds = [1.0] + [1.0] * first + [0.6] * min(search.refine_trials - first, moves) + [1.0] * 2
    likely = min(len(sites), _SITE_PATIENCE + 2) * (_TRIALS_PER_SITE + 1)
    single = [1.0] + [0.4] * min(search.refine_trials - 1, likely) + [1.0]
    return {REFINEMENT_KINDS: kinds, REFINEMENT_SITES: single}


def _nobody() -> None:
    """Hears nothing."""


def _unknown(rivals: Sequence[Mapping[str, Smoothing]]) -> Sequence[Mapping[str, float]]:
    """Nothing is known of any."""
    return [{} for _ in rivals]


def _check(sites: Sequence[SearchedSite], trials: int) -> None:
    if not sites:
        raise InputError("sites", "is empty", "refine a model with at least one smoothed site")
    twice = [name for name, count in Counter(site.name for site in sites).items() if count > 1]
    if twice:
        raise InputError("sites", f"names {twice[0]!r} more than once", "give every site once")
    for site in sites:
        if OURS not in site.choices or not site.operators:
            raise InputError("sites", f"{site.name!r} lacks {OURS!r} or its operators", "give both for every site")
    if trials < 1:
        raise InputError("trials", f"is {trials}", "give at least 1")


class _Refinement:
    """What the two studies share."""

    def __init__(
        self,
        sites: Sequence[SearchedSite],
        judge: ModelObjective,
        reserve: ModelObjective,
        search: SearchConfig,
        static: bool,
        contexts: Callable[[str], StudyContext],
        heard: Callable[[], None],
        contributions: _Contributions,
    ) -> None:
        self._sites = sites
        self._judge = judge
        self._reserve = reserve
        self._search = search
        self._static = static
        self._contexts = contexts
        self._heard = heard
        self._contributions = contributions
        self._of_kinds = contexts(REFINEMENT_KINDS)
        self.clock = self._of_kinds.clock

    def held_out(self, settings: Mapping[str, Setting]) -> HeldOutScore | None:
        """Held-out score of a setting of all sites."""
        score = held_out_score(self._reserve, smoothings_of(self._sites, settings))
        self._heard()
        return score

    def of_kinds(
        self, winners: dict[str, Setting], before: HeldOutScore | None, kinds: Mapping[str, tuple[str, ...]]
    ) -> tuple[dict[str, Setting], HeldOutScore | None, Step]:
        """Every plain choice for the whole model, then one setting for each kind from the best of them."""
        start = self.clock()
        losses = {site.name: site.loss for site in self._sites}
        ordered = dict(sorted(kinds.items(), key=lambda item: -sum(losses[name] for name in item[1])))
        space = SettingSpace(self._sites, ordered, winners)
        study, change = self._study(self._of_kinds, space, space.plain())
        plain = None if change is None else _plain(study.results)
        kept, score = winners, before
        told: Judgement = Judgement(
            accepted=False, reason="every trial failed", before=_loss(before), after=_loss(before)
        )
        # The simplest first: the best plain choice, then what moving the kinds made of it.
        for candidate, simpler in ((plain, True), (change, False)):
            if candidate is None or space.settings(candidate) == kept:
                continue
            settings = space.settings(candidate)
            found = self.held_out(settings)
            verdict = judged(score, found, self._reserve.weight, simpler=simpler)
            if verdict.accepted or not told.accepted:
                told = verdict
            if verdict.accepted:
                kept, score = settings, found
        if change is not None and told.reason == "every trial failed":
            told = replace(told, reason="nothing tried has a lower output loss than the sites' winners")
        return kept, score, self._step("kinds", told, ordered, study, start)

    def of_sites(
        self, kept: dict[str, Setting], score: HeldOutScore | None
    ) -> tuple[dict[str, Setting], HeldOutScore | None, Step]:
        """A setting of their own for the sites that matter most."""
        start = self.clock()
        known, foreseen = self._foreseen(kept)
        context = self._contexts(REFINEMENT_SITES)
        # Sites of unknown share come last, those with the largest losses first; stable: forward order on ties.
        ordered = sorted(self._sites, key=lambda site: (-known.get(site.name, 0.0), -site.loss))
        most = _SITES_MAX if foreseen else max(1, (self._search.refine_trials - 1) // _TRIALS_PER_SITE)
        units = {site.name: (site.name,) for site in ordered[:most]}
        space = SettingSpace(self._sites, units, kept, among=_SITE_CHOICES)
        as_kept = Change(kind="ours", settings={name: kept[name] for name in units})
        leaps = [{name: foreseen[name] for name in units if name in foreseen}]
        # Where all of them together do not pay, those of the sites that matter most may.
        leaps.append(dict(list(leaps[0].items())[: (len(leaps[0]) + 3) // 4]))
        study, change = self._study(
            context, space, [as_kept], errors=_SITE_ERRORS, patience=_SITE_PATIENCE, leaps=leaps
        )
        told = Judgement(
            accepted=False, reason="no site alone lowers the output loss", before=_loss(score), after=_loss(score)
        )
        if change is not None and space.settings(change) != kept:
            settings = space.settings(change)
            found = self.held_out(settings)
            told = judged(score, found, self._reserve.weight)
            if told.accepted:
                kept, score = settings, found
        return kept, score, self._step("sites", told, units, study, start)

    def _foreseen(self, kept: Mapping[str, Setting]) -> tuple[Mapping[str, float], dict[str, Setting]]:
        """What every site adds to the loss as it is, and the setting under which it is predicted to add clearly less."""
        rivals = [dict(kept)]
        for move in site_moves(self._static):
            settings = {site.name: move(kept[site.name]) for site in self._sites}
            known = {site.name: settings[site.name].choice in site.choices for site in self._sites}
            rivals.append({name: setting if known[name] else kept[name] for name, setting in settings.items()})
        if self._static:
            # Ranges with a margin for rows that calibration did not show cost more at the output than they save, at some sites.
            rivals += [
                {s.name: s.without_margin(choice) if choice in s.choices else kept[s.name] for s in self._sites}
                for choice in _WITH_MARGIN
            ]
        found = self._contributions([smoothings_of(self._sites, rival) for rival in rivals])
        foreseen = {}
        for name, as_kept in found[0].items():
            value, number = min((of_sites.get(name, as_kept), number) for number, of_sites in enumerate(found))
            if value < (1 - _FORESEEN) * as_kept:
                foreseen[name] = rivals[number][name]
        return found[0], foreseen

    def _study(
        self,
        context: StudyContext,
        space: SettingSpace,
        first: Sequence[Change],
        *,
        errors: float = 1.0,
        patience: int | None = None,
        leaps: Sequence[Mapping[str, Setting]] = (),
    ) -> tuple[RecordedStudy[Change], Change | None]:
        study = RecordedStudy(self._search, space, context)
        study.note("units", {unit: list(names) for unit, names in space.units.items()})
        scorer = MoveScorer(self._judge, space, context.clock, errors=errors, remember=patience is not None)
        change = descend(
            study,
            scorer,
            space,
            first,
            trials=self._search.refine_trials,
            static=self._static,
            stop=context.stop,
            fine=patience is None,
            patience=patience,
            leaps=leaps,
        )
        return study, change

    def _step(
        self,
        name: Literal["kinds", "sites"],
        told: Judgement,
        units: Mapping[str, tuple[str, ...]],
        study: RecordedStudy[Change],
        start: float,
    ) -> Step:
        return Step(
            **vars(told),
            name=name,
            units=units,
            results=tuple(study.results),
            study_name=study.name,
            seconds=self.clock() - start,
        )


def _plain(results: Sequence[Trial[Change]]) -> Change | None:
    """The best of the plain choices."""
    plain = [r for r in results if r.candidate.kind != "proposal" and r.loss is not None]
    return min(plain, key=lambda r: (r.loss, r.number)).candidate if plain else None


def _loss(score: HeldOutScore | None) -> float | None:
    return None if score is None else score.loss
