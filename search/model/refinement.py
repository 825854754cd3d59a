"""Whole-model refinement: a small study at the model's output over what the losses of single sites cannot see.

A site's winner is judged by the output of its own operators. How errors of sites meet on their way through the model is
seen at the output only: lower site losses can go with a higher perplexity. Two things are tried there, from the winners: a
shift of alpha for all sites of a kind, and another choice at the few sites where that alone lowers the output's loss.
Nothing changes unless held-out data say so beyond their own scatter.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.samplers import TPESampler

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.config import SearchConfig
from alphasmith.search.interruption import leave
from alphasmith.search.model._output_scorer import OutputScorer, outcome_of
from alphasmith.search.model._refinement_space import (
    OURS,
    PLAIN,
    Change,
    RefinableSite,
    RefinementSpace,
    distinct_choices,
    site_kinds,
)
from alphasmith.search.model._refinement_verdict import RefinementVerdict, held_out_score, judge_held_out
from alphasmith.search.study.fault_isolation import race_all, remembered
from alphasmith.search.study.study import RecordedStudy
from alphasmith.search.study.trial import Outcome, Pruning, Trial
from alphasmith.search.study.types import StudyContext

#: Shift of the alphas in proposals.
STEP = 0.1
#: Sites whose choice is re-opened at most.
REOPENED_MAX = 4
#: Fact of the study under which they are kept.
_REOPENED = "reopened"


@dataclass(frozen=True, kw_only=True)
class RefinementResult(RefinementVerdict):
    """What the refinement decided, and how it came to that.

    Attributes:
        smoothings: Final smoothing of every site.
        changed: Site -> what it has now, for the sites that differ from their winner: a choice, or ``alphas +0.100``.
        deltas: Kind -> accepted shift of its alphas; kinds without one are left out.
        kinds: Kind -> its sites.
        reopened: Sites whose choice was re-opened, the largest gain first.
        results: All trials.
        study_name: Name of the Optuna study.
        seconds: Wall time [s].
        evaluations: Candidate models scored, stopped ones included, on search and held-out batches.
    """

    smoothings: Mapping[str, Smoothing]
    changed: Mapping[str, str]
    deltas: Mapping[str, float]
    kinds: Mapping[str, tuple[str, ...]]
    reopened: tuple[str, ...]
    results: tuple[Trial[Change], ...]
    study_name: str
    seconds: float
    evaluations: int


def refine(
    sites: Sequence[RefinableSite],
    judge: ModelObjective,
    reserve: ModelObjective,
    search: SearchConfig,
    *,
    probes: int | None = None,
    context: StudyContext | None = None,
    on_score: Callable[[], None] | None = None,
) -> RefinementResult:
    """Search around the sites' winners at the model's output; keep them unless a held-out gain exceeds its standard error.

    Order: the winners; every site at its best single alpha; every site at alpha 0.5; no smoothing at all; what the probes found,
    together; all alphas up and down by ``STEP``; each kind alone in the better of the two directions; the moves that helped, together;
    then Optuna's TPE. Only the best trial on the search batches is looked at on the held-out ones, once.

    Args:
        sites: Every smoothed site, in forward order.
        judge: Loss at the output on the search batches; ``mse`` or ``kl``.
        reserve: The same on held-out batches.
        search: Its ``refine_trials`` and ``seed``.
        probes: Candidates scored before the study to find the sites to re-open: one site at another choice, the rest ours.
            None: half as many as trials.
        context: Where the study is recorded, who hears of its trials, and when it is left; None: nothing is kept.
        on_score: Called after every candidate model that is scored outside the study: the winners, and each probe.

    Raises:
        Interrupted: ``context.stop`` said so.
        InputError: No sites, a site given twice or without ``ours``, fewer than one trial, or an objective that scores a
            task metric, which has no samples.
    """
    context = context or StudyContext()
    clock, trials = context.clock, search.refine_trials
    start = clock()
    _check(sites, trials)
    evaluations = judge.evaluations + reserve.evaluations
    kinds = site_kinds(sites)
    winners = {site.name: site.choices[OURS] for site in sites}
    heard = on_score or _nobody
    before = held_out_score(reserve, winners)  # first, as a task metric is refused here
    heard()
    began = clock()
    ours = remembered(judge, winners)  # all that follows differs from them at some sites
    ours_outcome = outcome_of(ours, clock() - began)
    heard()
    noted = context.noted(_REOPENED)
    if noted is None:
        swaps = _swaps(sites, trials // 2 if probes is None else probes)
        probed = _probe(sites, judge, ours, swaps, context.stop, heard)
    else:
        probed = {name: (choice, loss) for name, choice, loss in noted}
    space = RefinementSpace(sites, kinds, tuple(probed))
    study = RecordedStudy(search, space, context, sampler=TPESampler(seed=search.seed, n_startup_trials=8))
    study.note("kinds", {kind: list(names) for kind, names in kinds.items()})
    study.note(_REOPENED, [[name, *found] for name, found in probed.items()])
    scorer = _ChangeScorer(judge, space, ours, ours_outcome, clock)
    study.attempt(scorer, [space.whole(Change(kind="ours"))], protected=1)
    _run_trials(study, scorer, space, {name: choice for name, (choice, _) in probed.items()}, trials, context.stop)

    verdict = judge_held_out(study.results, space, reserve, before)
    return RefinementResult(
        **vars(verdict),
        smoothings=space.smoothings(verdict.change),
        changed=space.changed(verdict.change),
        deltas=space.shifted_kinds(verdict.change),
        kinds=kinds,
        reopened=tuple(probed),
        results=tuple(study.results),
        study_name=study.name,
        seconds=clock() - start,
        evaluations=judge.evaluations + reserve.evaluations - evaluations,
    )


def costs_to_come(sites: Sequence[RefinableSite], search: SearchConfig, context: StudyContext) -> list[float]:
    """Relative cost of every candidate model that :func:`refine` scores, in order.

    The winners, on the held-out batches and, to be remembered, on those of the search; probes that are not on record, of which
    much is remembered; and the trials, of which the first is the winners again and the others change all sites or those of a kind.
    """
    probes = len(_swaps(sites, search.refine_trials // 2)) if context.noted(_REOPENED) is None else 0
    return [1.0, 2.0] + [0.8] * probes + [0.01] + [1.5] * (search.refine_trials - 1)


def _nobody() -> None:
    """Hears nothing."""


def _check(sites: Sequence[RefinableSite], trials: int) -> None:
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


class _ChangeScorer(OutputScorer[Change]):
    """Scores changes one after the other; the winners were scored before the study, whose space depends on them."""

    def __init__(
        self,
        judge: ModelObjective,
        space: RefinementSpace,
        ours: ModelScore,
        ours_outcome: Outcome,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(judge, space.smoothings, clock=clock, best=ours)
        self._ours = ours_outcome

    def score(self, candidates: Sequence[Change], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        """See :class:`alphasmith.search.study.types.Scorer`; no pruner is asked, and no steps are kept."""
        known = candidates[0].kind == "ours"
        outcomes = [self._ours] if known else super().score(candidates, protected=protected, pruning=None)
        return [replace(outcome, steps=()) for outcome in outcomes]


def _swaps(sites: Sequence[RefinableSite], probes: int) -> list[tuple[str, str]]:
    """Sites and the other choice to probe there, at most ``probes``.

    The first other choice of every site is tried before the second of any, sites with the largest loss first.
    """
    ordered = sorted(sites, key=lambda site: -site.loss)  # stable: forward order on ties
    others = {site.name: distinct_choices(site)[1:] for site in ordered}
    rounds = itertools.zip_longest(*([(name, choice) for choice in choices] for name, choices in others.items()))
    return [swap for turn in rounds for swap in turn if swap is not None][: max(0, probes)]


def _probe(
    sites: Sequence[RefinableSite],
    judge: ModelObjective,
    ours: ModelScore,
    swaps: Sequence[tuple[str, str]],
    stop: Callable[[], bool],
    heard: Callable[[], None],
) -> dict[str, tuple[str, float]]:
    """Sites to re-open -> their best choice and the loss with it alone, lowest loss first.

    A choice counts where the loss falls by more than its paired standard error: the lowest of many losses is often luck.
    """
    found: dict[str, tuple[str, float]] = {}
    of_site = {site.name: site.choices for site in sites}
    winners = {name: choices[OURS] for name, choices in of_site.items()}
    incumbent = None if ours.loss is None else ours.errors
    for name, choice in swaps:
        leave(stop)
        # One candidate a time: several at once would be quantized anew for every batch.
        score = race_all(judge, [winners | {name: of_site[name][choice]}], incumbent=incumbent)[0]
        heard()
        if score.loss is None or score.loss >= found.get(name, ("", math.inf))[1]:
            continue
        if _falls(ours, score, judge.weight):
            found[name] = (choice, score.loss)
    return dict(sorted(found.items(), key=lambda item: item[1][1])[:REOPENED_MAX])


def _falls(before: ModelScore, after: ModelScore, weight: float) -> bool:
    """Whether a loss falls by more than its paired standard error; from no finite loss to one, it does."""
    if before.loss is None:
        return True
    difference, standard_error = paired_difference(before.errors, after.errors, weight)
    return difference > standard_error


def _run_trials(
    study: RecordedStudy[Change],
    scorer: _ChangeScorer,
    space: RefinementSpace,
    swaps: Mapping[str, str],
    trials: int,
    stop: Callable[[], bool],
) -> None:
    """Baselines, proposals and the sampler, until there are ``trials`` results (the first, the winners, is there)."""
    ours = _lowest(study.results[:1])
    helpful: list[Change] = []

    def attempt(change: Change) -> float:
        """Loss of a change; infinite where it was stopped or failed, changes nothing, or no trial is left for it."""
        if len(study.results) >= trials or (change.kind == "proposal" and not space.changed(change)):
            return math.inf
        leave(stop)
        protected = int(change.kind in PLAIN)
        return _lowest(study.attempt(scorer, [space.whole(change)], protected=protected, most=trials))

    for plain in space.plain:
        attempt(Change(kind=plain, rest=plain))
    if swaps and attempt(Change(choices=swaps)) < ours:
        helpful.append(Change(choices=swaps))
    moves = [Change(deltas=dict.fromkeys(space.kinds, step)) for step in (STEP, -STEP)]
    losses = [attempt(move) for move in moves]
    better = moves[losses.index(min(losses))]
    if min(losses) < ours and len(space.kinds) == 1:
        helpful.append(better)
    if len(space.kinds) > 1 and min(losses) < math.inf:
        for kind in space.kinds:
            alone = Change(deltas={kind: better.deltas[kind]})
            if attempt(alone) < ours:
                helpful.append(alone)
    if len(helpful) > 1:
        together = Change(
            deltas={kind: delta for change in helpful for kind, delta in change.deltas.items()},
            choices={name: choice for change in helpful for name, choice in change.choices.items()},
        )
        attempt(together)
    while len(study.results) < trials:
        leave(stop)
        study.sample(scorer, 1, most=trials)


def _lowest(results: Sequence[Trial[Change]]) -> float:
    return min((r.loss for r in results if r.loss is not None), default=math.inf)
