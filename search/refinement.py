"""Whole-model refinement: a small study at the model's output over what the losses of single sites cannot see.

A site's winner is judged by the output of its own operators. How errors of sites meet on their way through the model is
seen at the output only (peerbench.md: lower site losses, higher perplexity). Two things are tried there, from the winners:
a shift of alpha for all sites of a kind, and another choice at the few sites where that alone lowers the output's loss.
Nothing changes unless held-out data say so beyond their own scatter.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import optuna
from optuna.distributions import distribution_to_json
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from alphasmith.objectives.candidate_batch import paired_difference
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.losses import relative_loss
from alphasmith.objectives.model_objective import ModelObjective
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.interruption import leave, never
from alphasmith.search.refinement_space import (
    OURS,
    PLAIN,
    Change,
    RefinableSite,
    RefinementSpace,
    distinct_choices,
    site_kinds,
)
from alphasmith.search.spaces import check_space
from alphasmith.search.study_log import Began, Noted, StudyLog, Tried
from alphasmith.search.survival import race_all

RefinementKind = Literal["ours", "best_single", "alpha_0.5", "proposal", "sampler"]
TrialOutcome = Literal["COMPLETE", "PRUNED", "FAIL"]

#: Shift of the alphas in proposals.
STEP = 0.1
#: Sites whose choice is re-opened at most.
REOPENED_MAX = 4
#: Fact of the study under which they are kept.
_REOPENED = "reopened"


@dataclass(frozen=True, kw_only=True)
class RefinementTrial:
    """One trial of the refinement.

    Attributes:
        number: Optuna trial number.
        candidate: Where it comes from.
        change: What was tried.
        state: ``COMPLETE``, ``PRUNED`` (stopped, clearly above the best so far) or ``FAIL``.
        loss: Output loss on the search batches; None unless complete.
        seconds: Time spent in the objective [s].
        reason: Why it failed; empty otherwise.
    """

    number: int
    candidate: RefinementKind
    change: Change
    state: TrialOutcome
    loss: float | None
    seconds: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RefinementResult:
    """What the refinement decided. Losses are of the output on held-out batches; None where the output is not finite.

    Attributes:
        accepted: Whether anything changed.
        smoothings: Final smoothing of every site.
        before: Loss of the sites' winners.
        after: Loss of what is kept; ``before`` unless accepted.
        difference: ``before`` minus the loss of the best trial, positive where that is better; None where no trial was
            better on the search batches, or one of the two losses is not finite.
        standard_error: Paired standard error of ``difference`` over the held-out samples; None with it, or for one sample.
        reason: Why it was accepted or not, in one sentence.
        changed: Site -> what it has now, for the sites that differ from their winner: a choice, or ``alphas +0.100``.
        deltas: Kind -> accepted shift of its alphas; kinds without one are left out.
        kinds: Kind -> its sites.
        reopened: Sites whose choice was re-opened, the largest gain first.
        results: All trials.
        study_name: Name of the Optuna study.
        seconds: Wall time [s].
        evaluations: Candidate models scored, stopped ones included, on search and held-out batches.
    """

    accepted: bool
    smoothings: Mapping[str, Smoothing]
    before: float | None
    after: float | None
    difference: float | None
    standard_error: float | None
    reason: str
    changed: Mapping[str, str]
    deltas: Mapping[str, float]
    kinds: Mapping[str, tuple[str, ...]]
    reopened: tuple[str, ...]
    results: tuple[RefinementTrial, ...]
    study_name: str
    seconds: float
    evaluations: int


def refine(
    sites: Sequence[RefinableSite],
    judge: ModelObjective,
    reserve: ModelObjective,
    *,
    trials: int = 16,
    probes: int = 16,
    seed: int = 0,
    sampler: BaseSampler | None = None,
    log: StudyLog | None = None,
    study_name: str | None = None,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    on_trial: Callable[[RefinementTrial], None] | None = None,
    stop: Callable[[], bool] = never,
) -> RefinementResult:
    """Search around the sites' winners at the model's output; keep them unless a held-out gain exceeds its standard error.

    Order: the winners; every site at its best single alpha; every site at alpha 0.5; what the probes found, together; all
    alphas up and down by ``STEP``; each kind alone in the better of the two directions; the moves that helped, together;
    then the sampler. Only the best trial on the search batches is looked at on the held-out ones, once.

    Args:
        sites: Every smoothed site, in forward order.
        judge: Loss at the output on the search batches; ``mse`` or ``kl``.
        reserve: The same on held-out batches.
        trials: Trials of the study.
        probes: Candidates scored before the study to find the sites to re-open: one site at another choice, the rest ours.
        seed: Of the default sampler.
        sampler: None: Optuna's TPE.
        log: Keeps the study; trials it has on record are not scored again. None: nothing is kept.
        study_name: Name of the study, None for a random one.
        device: Recorded with the study.
        clock: Seconds, monotonic.
        on_trial: Called after each trial.
        stop: Asked before every trial whether to leave; what was found by then is on record.

    Raises:
        Interrupted: ``stop`` said so.
        InputError: No sites, a site given twice or without ``ours``, fewer than one trial, or an objective that scores a
            task metric, which has no samples.
    """
    start = clock()
    _check(sites, trials)
    evaluations = judge.evaluations + reserve.evaluations
    kinds = site_kinds(sites)
    winners = {site.name: site.choices[OURS] for site in sites}
    before = _reserved(reserve, winners)  # first, as a task metric is refused here
    referee = _Referee(judge)
    ours_start = clock()
    ours = referee.score(winners, protected=True)
    ours_seconds = clock() - ours_start
    noted = None if log is None else log.past.notes.get(_REOPENED)
    probed = _probe(sites, judge, ours, probes, stop) if noted is None else {n: (c, loss) for n, c, loss in noted}
    space = RefinementSpace(sites, kinds, tuple(probed))
    study = optuna.create_study(study_name=study_name, sampler=sampler or TPESampler(seed=seed, n_startup_trials=8))
    if log is not None:
        canonical = json.dumps({n: distribution_to_json(d) for n, d in space.distributions().items()}, sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        check_space(log.past.notes, study.study_name, canonical, digest)
        log.tell(Began(space=canonical, space_digest=digest, device=device))
        if noted is None:
            log.tell(Noted(name="kinds", value={kind: list(names) for kind, names in kinds.items()}))
            log.tell(Noted(name=_REOPENED, value=[[name, *found] for name, found in probed.items()]))
    driver = _Driver(study, space, referee, clock, log, on_trial, stop)
    driver.record("ours", Change(), ours, ours_seconds)
    _run_trials(driver, {name: choice for name, (choice, _) in probed.items()}, trials)

    verdict = _judge_held_out(driver.results, space, reserve, before)
    seconds = clock() - start
    change = verdict.change if verdict.accepted else Change()
    smoothings = space.smoothings(change)
    unchanged = None if before is None else before.loss
    return RefinementResult(
        accepted=verdict.accepted,
        smoothings=smoothings,
        before=unchanged,
        after=verdict.loss if verdict.accepted else unchanged,
        difference=verdict.difference,
        standard_error=verdict.standard_error,
        reason=verdict.reason,
        changed=space.changed(change),
        deltas=space.shifted_kinds(change),
        kinds=kinds,
        reopened=tuple(probed),
        results=tuple(driver.results),
        study_name=study.study_name,
        seconds=seconds,
        evaluations=judge.evaluations + reserve.evaluations - evaluations,
    )


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


@dataclass(frozen=True, kw_only=True)
class _Score:
    """Score of one candidate on the search batches; ``errors`` (N,) per sample only when complete."""

    state: TrialOutcome
    loss: float | None = None
    errors: Tensor | None = None
    reason: str = ""


class _Referee:
    """Scores candidates on the search batches against the best one so far, which stops those clearly above it."""

    def __init__(self, judge: ModelObjective) -> None:
        self._judge = judge
        self._best: _Score | None = None

    def score(self, smoothings: Mapping[str, Smoothing], *, protected: bool = False) -> _Score:
        """Score one candidate, to the end if ``protected``."""
        incumbent = None if self._best is None else self._best.errors
        score = _scored(self._judge, smoothings, incumbent, protected=protected)
        if score.loss is not None and (self._best is None or self._best.loss is None or score.loss < self._best.loss):
            self._best = score
        return score

    def recall(self, smoothings: Mapping[str, Smoothing], loss: float) -> None:
        """A candidate on record is the best one: its errors are needed again, unless a better one is known."""
        if self._best is None or self._best.loss is None or loss < self._best.loss:
            self.score(smoothings, protected=True)


def _scored(
    judge: ModelObjective, smoothings: Mapping[str, Smoothing], incumbent: Tensor | None, *, protected: bool = False
) -> _Score:
    # One candidate a time: several at once would be quantized anew for every batch.
    found = race_all(judge, [smoothings], incumbent=incumbent, protected=int(protected))[0]
    if found.failure:
        return _Score(state="FAIL", reason=found.failure)
    if found.stopped or found.loss is None:
        return _Score(state="PRUNED")
    if not math.isfinite(found.loss):
        return _Score(state="FAIL", reason=f"the loss is {found.loss}")
    return _Score(state="COMPLETE", loss=found.loss, errors=found.errors)


def _probe(
    sites: Sequence[RefinableSite], judge: ModelObjective, ours: _Score, probes: int, stop: Callable[[], bool]
) -> dict[str, tuple[str, float]]:
    """Sites to re-open -> their best choice and the loss with it alone, lowest loss first.

    A choice counts where the loss falls by more than its paired standard error: the lowest of many losses is often luck.
    The first other choice of every site is tried before the second of any, sites with the largest loss first.
    """
    ordered = sorted(sites, key=lambda site: -site.loss)  # stable: forward order on ties
    others = {site.name: distinct_choices(site)[1:] for site in ordered}
    rounds = itertools.zip_longest(*([(name, choice) for choice in choices] for name, choices in others.items()))
    swaps = [swap for turn in rounds for swap in turn if swap is not None]
    found: dict[str, tuple[str, float]] = {}
    of_site = {site.name: site.choices for site in sites}
    winners = {name: choices[OURS] for name, choices in of_site.items()}
    for name, choice in swaps[: max(0, probes)]:
        leave(stop)
        score = _scored(judge, winners | {name: of_site[name][choice]}, ours.errors)
        if score.loss is None or score.loss >= found.get(name, ("", math.inf))[1]:
            continue
        if _falls(ours, score, judge.weight):
            found[name] = (choice, score.loss)
    return dict(sorted(found.items(), key=lambda item: item[1][1])[:REOPENED_MAX])


def _falls(before: _Score, after: _Score, weight: float) -> bool:
    """Whether a loss falls by more than its paired standard error; from no finite loss to one, it does."""
    if before.errors is None or after.errors is None:
        return before.errors is None
    difference, standard_error = paired_difference(before.errors, after.errors, weight)
    return difference > standard_error


class _Driver:
    """Runs and records the trials of one refinement; those on record are replayed, see ``RecordedStudy``."""

    def __init__(
        self,
        study: optuna.Study,
        space: RefinementSpace,
        referee: _Referee,
        clock: Callable[[], float],
        log: StudyLog | None,
        on_trial: Callable[[RefinementTrial], None] | None,
        stop: Callable[[], bool],
    ) -> None:
        self.space = space
        self.results: list[RefinementTrial] = []
        self._study = study
        self._referee = referee
        self._clock = clock
        self._log = log
        self._past = deque(() if log is None else log.past.trials)
        self._on_trial = on_trial
        self._stop = stop

    def record(self, kind: RefinementKind, change: Change, score: _Score, seconds: float) -> None:
        """Add a trial that was scored already."""
        trial = self._ask(change)
        if not self._replay(trial, kind):
            self._finish(trial, kind, score, seconds)

    def run(self, kind: RefinementKind, change: Change | None) -> RefinementTrial:
        """Score ``change``, or what the sampler proposes. Baselines are never stopped."""
        trial = self._ask(change)
        if known := self._replay(trial, kind):
            return known
        leave(self._stop)
        self._recall()
        start = self._clock()
        smoothings = self.space.smoothings(self.space.change(trial.params))
        score = self._referee.score(smoothings, protected=kind in PLAIN)
        return self._finish(trial, kind, score, self._clock() - start)

    def _ask(self, change: Change | None) -> optuna.Trial:
        self._study.enqueue_trial(self.space.kept if change is None else self.space.params(change))
        return self._study.ask(self.space.distributions())

    def _replay(self, trial: optuna.Trial, kind: RefinementKind) -> RefinementTrial | None:
        """The trial as it is on record, where the next one there is this one."""
        if not self._past or (self._past[0].user_attrs["candidate"], self._past[0].params) != (kind, trial.params):
            return None
        known = self._known(self._past.popleft())
        self._study.tell(trial, known.loss, state=TrialState[known.state])
        return self._add(known)

    def _recall(self) -> None:
        """Something new is to be scored: the rest of the record counts as it is, and its best one is what to beat."""
        while self._past:
            frozen = self._past.popleft()
            self._study.add_trial(frozen)
            self._add(self._known(frozen))
        best = min((r for r in self.results if r.loss is not None), key=_loss_or_infinity, default=None)
        if best is not None and best.loss is not None:
            self._referee.recall(self.space.smoothings(best.change), best.loss)

    def _known(self, frozen: FrozenTrial) -> RefinementTrial:
        return RefinementTrial(
            number=len(self.results),
            candidate=frozen.user_attrs["candidate"],
            change=self.space.change(frozen.params),
            state=frozen.state.name,  # type: ignore[arg-type]  # finished trials have one of the three
            loss=frozen.value if frozen.state == TrialState.COMPLETE else None,
            seconds=frozen.user_attrs["seconds"],
            reason=frozen.user_attrs.get("reason", ""),
        )

    def _finish(self, trial: optuna.Trial, kind: RefinementKind, score: _Score, seconds: float) -> RefinementTrial:
        # Before tell: a finished trial refuses attributes.
        trial.set_user_attr("candidate", kind)
        trial.set_user_attr("seconds", seconds)
        if score.reason:
            trial.set_user_attr("reason", score.reason)
        frozen = self._study.tell(trial, score.loss, state=TrialState[score.state])
        result = self._known(frozen)
        if self._log is not None:
            self._log.tell(Tried(first=result.number, trials=(frozen,)))
        return self._add(result)

    def _add(self, result: RefinementTrial) -> RefinementTrial:
        self.results.append(result)
        if self._on_trial is not None:
            self._on_trial(result)
        return result


def _run_trials(driver: _Driver, swaps: Mapping[str, str], trials: int) -> None:
    """Baselines, proposals and the sampler, until there are ``trials`` results (the first, the winners, is there)."""
    ours = _loss_or_infinity(driver.results[0])
    helpful: list[Change] = []

    def propose(change: Change, kind: RefinementKind = "proposal") -> float:
        """Loss of a change; infinite where it was stopped or failed, changes nothing, or no trial is left for it."""
        if len(driver.results) >= trials or (kind == "proposal" and not driver.space.changed(change)):
            return math.inf
        return _loss_or_infinity(driver.run(kind, change))

    for plain in driver.space.plain:
        propose(Change(rest=plain), plain)
    if swaps and propose(Change(choices=swaps)) < ours:
        helpful.append(Change(choices=swaps))
    kinds = driver.space.kinds
    moves = [Change(deltas=dict.fromkeys(kinds, step)) for step in (STEP, -STEP)]
    losses = [propose(move) for move in moves]
    better = moves[losses.index(min(losses))]
    if min(losses) < ours and len(kinds) == 1:
        helpful.append(better)
    if len(kinds) > 1 and min(losses) < math.inf:
        for kind in kinds:
            alone = Change(deltas={kind: better.deltas[kind]})
            if propose(alone) < ours:
                helpful.append(alone)
    if len(helpful) > 1:
        together = Change(
            deltas={kind: delta for change in helpful for kind, delta in change.deltas.items()},
            choices={name: choice for change in helpful for name, choice in change.choices.items()},
        )
        propose(together)
    while len(driver.results) < trials:
        driver.run("sampler", None)


def _loss_or_infinity(trial: RefinementTrial) -> float:
    return math.inf if trial.loss is None else trial.loss


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """The best trial on held-out batches."""

    accepted: bool
    reason: str
    change: Change = field(default_factory=Change)
    loss: float | None = None
    difference: float | None = None
    standard_error: float | None = None


def _judge_held_out(
    results: Sequence[RefinementTrial], space: RefinementSpace, reserve: ModelObjective, before: _Reserved | None
) -> _HeldOut:
    complete = [r for r in results if r.loss is not None]
    if not complete:
        return _HeldOut(accepted=False, reason="every trial failed")
    best = min(complete, key=lambda r: (r.loss, r.number))
    if best.number == 0 or not space.changed(best.change):
        return _HeldOut(accepted=False, reason="nothing tried has a lower output loss than the sites' winners")
    found = _reserved(reserve, space.smoothings(best.change))
    if found is None:
        return _HeldOut(accepted=False, reason="the output of the best trial is not finite on held-out data")
    if before is None:
        return _HeldOut(
            accepted=True,
            reason="the output with the sites' winners is not finite on held-out data",
            change=best.change,
            loss=found.loss,
        )
    difference, standard_error = paired_difference(before.errors, found.errors, reserve.weight)
    if math.isinf(standard_error):
        return _HeldOut(
            accepted=False, reason="one held-out sample has no standard error", difference=difference, loss=found.loss
        )
    accepted = difference > standard_error
    scatter = f"{abs(difference):.3g} against a standard error of {standard_error:.3g}"
    if accepted:
        reason = f"held-out output loss falls by {scatter}"
    elif difference > 0:
        reason = f"the fall of the held-out output loss is within its standard error ({scatter})"
    else:
        reason = f"the best trial does not lower the held-out output loss (it changes by {-difference:.3g})"
    return _HeldOut(
        accepted=accepted,
        reason=reason,
        change=best.change,
        loss=found.loss,
        difference=difference,
        standard_error=standard_error,
    )


@dataclass(frozen=True, kw_only=True)
class _Reserved:
    """A candidate on held-out batches: (N,) contributions of the samples, and the loss they add up to."""

    errors: Tensor
    loss: float


def _reserved(reserve: ModelObjective, smoothings: Mapping[str, Smoothing]) -> _Reserved | None:
    """None where the output, or a loss relative to it, is not finite."""
    try:
        errors = reserve.sample_errors(smoothings)
        return _Reserved(errors=errors, loss=relative_loss(float(errors.sum()), reserve.weight))
    except NonFiniteError:
        return None
