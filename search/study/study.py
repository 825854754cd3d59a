"""One recorded study of anything that has a kind and parameters: a site, the whole model, a refinement. Source: claim A-2."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.search.config import SearchConfig
from alphasmith.search.interruption import leave, never
from alphasmith.search.study._sampler import make_pruner, make_sampler
from alphasmith.search.study.space import check_space, space_digest
from alphasmith.search.study.study_record import StudyNote, StudyStart, StudyTrials
from alphasmith.search.study.trial import C, Outcome, Trial, recorded_trial
from alphasmith.search.study.types import Scorer, Space, StudyContext


class RecordedStudy(Generic[C]):
    """An Optuna study whose sampler works in memory while a log keeps every batch of finished trials.

    Parameters are the price of a stored trial: asking, suggesting and telling through the database
    costs many times what the search does. Here finished trials are recorded off the search's path, all of a batch together.

    A study of which trials are recorded already is played again from its beginning: the sampler is asked as it was then and
    told what is on record, so its state is what it was, and nothing that finished is scored a second time. Where the
    replayed candidates differ from the recorded ones (another library, another machine), the rest of the record is taken as
    it is, as history, and counts like any other trial.

    Attributes:
        name: Name of the study.
        results: All trials so far, in order of their numbers.
        pruning: Whether an Optuna pruner decides, instead of the paired rule.

    Args:
        search: Sampler, pruner, seed.
        space: Frozen space of the sampler's proposals. Candidates may lie outside: ranges are defaults, not laws (T3).
        context: Where the study is recorded, and who hears of its trials.
        sampler: In place of the one that ``search`` names.

    Raises:
        InputError: What is recorded was found in another space.
    """

    def __init__(
        self, search: SearchConfig, space: Space[C], context: StudyContext, *, sampler: BaseSampler | None = None
    ) -> None:
        self._space = space
        self._distributions = space.distributions()
        self.pruning = search.pruner != "paired"
        self._memory = optuna.create_study(
            study_name=context.name,
            sampler=sampler or make_sampler(search.sampler, seed=search.seed, space=self._distributions),
            pruner=make_pruner(search.pruner),
        )
        self.name = self._memory.study_name
        self.results: list[Trial[C]] = []
        self._on_trial = context.on_trial
        self._log = log = context.log
        self._past: deque[FrozenTrial] = deque(() if log is None else log.past.trials)
        #: Whether trials on record were taken over that the scorer does not know of.
        self._unknown_to_scorer = False
        if log is not None:
            canonical = space.canonical()
            check_space(log.past.notes, self.name, canonical)
            log.tell(StudyStart(space=canonical, space_digest=space_digest(canonical), device=context.device))

    def note(self, name: str, value: Any) -> None:
        """Keep a fact with the study, as an attribute of that name."""
        if self._log is not None and self._log.past.notes.get(name) != value:
            self._log.tell(StudyNote(name=name, value=value))

    def attempt(
        self, scorer: Scorer[C], candidates: Sequence[C], *, protected: int = 0, most: int | None = None
    ) -> list[Trial[C]]:
        """Score and record candidates that the sampler did not propose; those recorded already are not scored again.

        Args:
            scorer: Scores candidates.
            candidates: What to try, together.
            protected: The first so many are never stopped early.
            most: Trials the study may hold; None: any number.
        """
        return self._try(scorer, [(None, c) for c in candidates], protected=protected, most=most)

    def sample(self, scorer: Scorer[C], count: int, *, most: int) -> list[Trial[C]]:
        """Ask the sampler for ``count`` candidates, score them together and tell it how they fared.

        Args:
            scorer: Scores candidates.
            count: Proposals asked for before the sampler learns anything new.
            most: Trials the study may hold.
        """
        asked = [self._ask() for _ in range(min(count, most - len(self.results)))]
        return self._try(scorer, asked, protected=0, most=most)

    def _ask(self) -> tuple[optuna.Trial, C]:
        if self._space.fixed:
            self._memory.enqueue_trial(dict(self._space.fixed))
        asked = self._memory.ask(self._distributions)
        return asked, self._space.candidate("sampler", asked.params)

    def _try(
        self, scorer: Scorer[C], tried: Sequence[tuple[optuna.Trial | None, C]], *, protected: int, most: int | None
    ) -> list[Trial[C]]:
        """Take over what is on record, score and record the rest; with the trials that the sampler was asked for."""
        known = self._known([candidate for _, candidate in tried])
        added = [self._add(*one, recorded) for one, recorded in zip(tried, known, strict=False)]
        self._unknown_to_scorer |= bool(known)
        fresh = tried[len(known) :]
        if not fresh:
            return added
        self._end_replay(scorer)
        left = len(fresh) if most is None else max(0, most - len(self.results))
        for asked, _ in fresh[left:]:
            if asked is not None:  # history has filled the study meanwhile
                self._memory.tell(asked, state=TrialState.FAIL)
        fresh = fresh[:left]
        if not fresh:
            return added

        proposed = [asked for asked, _ in fresh if asked is not None]

        def pruned(index: int, step: int, loss: float) -> bool:
            proposed[index].report(loss, step)
            return proposed[index].should_prune()

        pruning = pruned if self.pruning and proposed else None
        candidates = [candidate for _, candidate in fresh]
        outcomes = scorer.score(candidates, protected=max(0, protected - len(known)), pruning=pruning)
        trials = tuple(self._recorded(c, o) for c, o in zip(candidates, outcomes, strict=True))
        first = len(self.results)
        added += [
            self._add(*one, trial, reported=pruning is not None) for one, trial in zip(fresh, trials, strict=True)
        ]
        if self._log is not None:
            self._log.tell(StudyTrials(first=first, trials=trials))
        return added

    def _recorded(self, candidate: C, outcome: Outcome) -> FrozenTrial:
        params = self._space.params(candidate)
        return recorded_trial(candidate.kind, params, self._space.holding(params), outcome)

    def _known(self, candidates: Sequence[C]) -> list[FrozenTrial]:
        """The trials of ``candidates``, from the first on, that are on record as the next ones of the study."""
        found = []
        for candidate in candidates:
            tried = (candidate.kind, self._space.params(candidate))
            if not self._past or (self._past[0].user_attrs["candidate"], self._past[0].params) != tried:
                break
            found.append(self._past.popleft())
        return found

    def _end_replay(self, scorer: Scorer[C]) -> None:
        """Something new is to be scored: what is left on record counts as it is, and the scorer learns of all of it."""
        self._unknown_to_scorer |= bool(self._past)
        while self._past:
            recorded = self._past.popleft()
            self._add(None, self._space.candidate(recorded.user_attrs["candidate"], recorded.params), recorded)
        if self._unknown_to_scorer:
            self._unknown_to_scorer = False
            scorer.recall(self.results)

    def _add(
        self, asked: optuna.Trial | None, candidate: C, recorded: FrozenTrial, *, reported: bool = False
    ) -> Trial[C]:
        """Count a trial and tell the sampler; a pruner received the steps while they were made."""
        if asked is None:
            self._memory.add_trial(recorded)
        else:
            for step, loss in () if reported else sorted(recorded.intermediate_values.items()):
                asked.report(loss, step)
            complete = recorded.state == TrialState.COMPLETE
            self._memory.tell(asked, recorded.value if complete else None, state=recorded.state)
        result = Trial.of(len(self.results), candidate, recorded)
        self.results.append(result)
        if self._on_trial is not None:
            self._on_trial(result)
        return result


def play(
    study: RecordedStudy[C],
    scorer: Scorer[C],
    *,
    first: Sequence[C],
    protected: int,
    trials: int,
    batch: int = 1,
    patience: int | None = None,
    enough: Callable[[float], str] | None = None,
    follow_up: Callable[[], Sequence[C]] | None = None,
    stop: Callable[[], bool] = never,
) -> str:
    """Try ``first`` together, then what the sampler proposes, until the study holds ``trials`` trials or may stop.

    A non-finite loss is a failed trial with its reason.

    Args:
        study: Fresh, or with trials on record: these count towards ``trials`` and are not repeated.
        scorer: Scores candidates.
        first: Baselines and proposals, as far as ``trials`` reach.
        protected: Baselines among them, at its head: never stopped early.
        trials: Total budget of the study.
        batch: Proposals asked for at a time; the sampler learns of their losses together.
        patience: Stop after this many sampler trials without improvement; None: never.
        enough: Best loss -> why the search may stop, empty to go on; asked after ``first`` and after every batch.
        follow_up: Further candidates, asked for once where ``first`` was not enough, before the sampler's.
        stop: Asked before every batch whether to leave; what was found by then is on record.

    Returns:
        Why the study stopped, in one clause.

    Raises:
        AlphasmithError: Every trial failed.
        Interrupted: ``stop`` said so.
    """
    leave(stop)
    study.attempt(scorer, list(first)[:trials], protected=protected, most=trials)
    since = 0
    while True:
        best = min((r.loss for r in study.results if r.loss is not None), default=None)
        if best is not None and enough is not None and (why := enough(best)):
            return why
        left = trials - len(study.results)
        if left <= 0 or (patience is not None and since >= patience):
            break
        leave(stop)
        if best is not None and follow_up is not None:
            more, follow_up = list(follow_up())[:left], None
            if more:
                study.attempt(scorer, more, most=trials)
                continue
        for result in study.sample(scorer, batch, most=trials):
            improved = result.loss is not None and (best is None or result.loss < best)
            since = 0 if improved else since + 1
    if best is None:
        reasons = {r.reason for r in study.results if r.reason}
        raise AlphasmithError(f"study {study.name}: every trial failed ({'; '.join(sorted(reasons))})")
    return f"all {trials} trials were made" if left <= 0 else f"no improvement in {since} sampler trials"
