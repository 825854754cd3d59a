"""Studies: order of trials, failures, stopping, samplers, frozen spaces, what the storage keeps."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from optuna.trial import FrozenTrial

from alphasmith.objectives.errors import AlphasmithError, InputError, NonFiniteError
from alphasmith.search.config import RunConfig, SamplerName, SearchConfig
from alphasmith.search.interruption import Interrupted
from alphasmith.search.study import study_record as study_log
from alphasmith.search.study.alpha_ranges import group_ranges
from alphasmith.search.study.candidates import Candidate, TrialResult, baselines
from alphasmith.search.study.guard import guard
from alphasmith.search.study.space import OFFSET_RANGE, SearchSpace
from alphasmith.search.study.study import RecordedStudy, play
from alphasmith.search.study.study_record import StoredLog
from alphasmith.search.study.trial import Outcome, Pruning, best_trial
from alphasmith.search.study.types import StudyContext
from alphasmith.search.study.writer import Writer
from alphasmith.storage.database.connection import open_optuna
from alphasmith.storage.database.optuna_private import insert_trials

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = SearchSpace.of(group_ranges([1.0, 10.0, 100.0], scale="log"))
TARGET = (0.2, 0.5, 0.8)


class Bowl:
    """Squared distance of the alphas to TARGET, on three growing subsets; identity costs 10."""

    def __init__(self, broken: frozenset[int] = frozenset()) -> None:
        self.calls = 0
        self.batches: list[int] = []
        self.recalled: list[int] = []
        self.broken = broken

    def score(self, candidates: Sequence[Candidate], *, protected: int, pruning: Pruning | None) -> list[Outcome]:
        self.batches.append(len(candidates))
        return [self._one(i, c, i < protected, pruning) for i, c in enumerate(candidates)]

    def recall(self, results: Sequence[TrialResult]) -> None:
        self.recalled.append(len(results))

    def _one(self, index: int, candidate: Candidate, protected: bool, pruning: Pruning | None) -> Outcome:
        call, self.calls = self.calls, self.calls + 1
        if call in self.broken:
            return Outcome(state="FAIL", loss=None, seconds=1.0, reason="the loss is nan")
        steps: list[tuple[int, float]] = []
        for step in (1, 2, 4):
            loss = 10.0
            if candidate.alphas is not None:
                loss = sum((a - t) ** 2 for a, t in zip(candidate.alphas, TARGET, strict=True)) + 0.01 / step
            steps.append((step, loss))
            if not protected and pruning is not None and pruning(index, step, loss):
                return Outcome(state="PRUNED", loss=None, seconds=1.0, steps=tuple(steps))
        return Outcome(state="COMPLETE", loss=steps[-1][1], seconds=1.0, steps=tuple(steps))


def settings(**values: object) -> SearchConfig:
    return RunConfig.build({"search": {"seed": 3, **values}}).search


def new_study(storage: str | None = None, writer: Writer | None = None, **values: object) -> RecordedStudy[Candidate]:
    log = None if storage is None else StoredLog(open_optuna(storage), "one", writer=writer)
    return RecordedStudy(settings(**values), SPACE, StudyContext(log=log, name="one"))


def run(study: RecordedStudy[Candidate], scorer: Bowl, trials: int = 20, single: float = 0.95, **values: object) -> str:
    return play(study, scorer, first=baselines(3, single), protected=3, trials=trials, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_every_sampler_plays_a_whole_study_inside_the_ranges(sampler: str, tmp_path: Path) -> None:
    study = new_study(f"sqlite:///{tmp_path}/a.db", sampler=sampler)
    run(study, Bowl(), trials=16)
    kinds = [r.candidate.kind for r in study.results]
    assert kinds[:3] == ["identity", "alpha_0.5", "best_single"]
    assert set(kinds[3:]) == {"sampler"}
    trials = open_optuna(f"sqlite:///{tmp_path}/a.db").get_all_trials(1)
    assert trials[0].params == {}
    assert trials[1].params["alpha_2"] == 0.5
    assert trials[2].params["alpha_0"] == 0.95, "a baseline outside the ranges is recorded as it is"
    for result, trial in zip(study.results[3:], trials[3:], strict=True):
        assert result.candidate.alphas == tuple(trial.params[n] for n in SPACE.names)
        for value, (_, low, high) in zip(result.candidate.alphas, SPACE.floats, strict=True):
            assert low <= value <= high
    sets = {r.candidate.alphas for r in study.results}
    assert len(sets) == len(study.results), "the N sets are pairwise different (claim A-2)"
    assert best_trial(study.results).loss == min(t.value for t in trials if t.value is not None)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_learning_samplers_sample_jointly(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = new_study(sampler=sampler)
    seen = []
    inner = study._memory.sampler
    independent = inner.sample_independent
    monkeypatch.setattr(inner, "sample_independent", lambda *a: seen.append(a) or independent(*a))  # type: ignore[func-returns-value]
    run(study, Bowl(), trials=20)
    assert len(seen) <= 3 * 4, "after its start-up trials a sampler must use the whole space at once"


def test_same_seed_same_trials() -> None:
    first, second = new_study(), new_study()
    for study in (first, second):
        run(study, Bowl())
    assert first.results == second.results


def test_tpe_beats_the_baselines_here() -> None:
    study = new_study()
    run(study, Bowl(), trials=40)
    assert best_trial(study.results).candidate.kind == "sampler"


def test_failed_trials_keep_their_reason(tmp_path: Path) -> None:
    study = new_study(f"sqlite:///{tmp_path}/a.db")
    run(study, Bowl(broken=frozenset({0, 4})))
    assert [r.number for r in study.results if r.state == "FAIL"] == [0, 4]
    trial = open_optuna(f"sqlite:///{tmp_path}/a.db").get_all_trials(1)[4]
    assert trial.state == optuna.trial.TrialState.FAIL
    assert "nan" in trial.user_attrs["reason"]
    assert best_trial(study.results).number not in (0, 4)


def test_all_trials_failing_is_an_error() -> None:
    with pytest.raises(AlphasmithError, match="every trial failed"):
        run(new_study(), Bowl(broken=frozenset(range(20))), trials=4)


def test_all_trials_failing_is_an_error_although_the_study_might_stop_early() -> None:
    """Nothing improves where everything fails, and nothing can be proposed around a best trial that is not there."""
    asked: list[int] = []

    def around_the_best() -> list[Candidate]:
        asked.append(1)
        return []

    with pytest.raises(AlphasmithError, match="every trial failed"):
        run(new_study(), Bowl(broken=frozenset(range(20))), trials=12, patience=2, follow_up=around_the_best)
    assert asked == []


def test_pruned_trials_have_no_loss_and_baselines_are_never_pruned(tmp_path: Path) -> None:
    study = new_study(f"sqlite:///{tmp_path}/a.db", sampler="random", pruner="median")
    run(study, Bowl(), trials=40)
    pruned = [r for r in study.results if r.state == "PRUNED"]
    assert pruned
    assert all(r.loss is None and r.number > 2 for r in pruned)
    trial = open_optuna(f"sqlite:///{tmp_path}/a.db").get_all_trials(1)[pruned[0].number]
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert trial.intermediate_values, "what it was pruned for is kept"


def test_ties_go_to_the_lowest_number() -> None:
    tie = [
        TrialResult(number=n, candidate=Candidate("sampler", (0.1 * n,)), state="COMPLETE", loss=1.0, seconds=0.0)
        for n in (2, 0, 1)
    ]
    assert best_trial(tie).number == 0


def test_a_study_refuses_another_space(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/a.db"
    run(new_study(storage), Bowl(), trials=5)
    other = SearchSpace.of(group_ranges([1.0, 10.0, 1000.0]))
    with pytest.raises(InputError, match="search space"):
        RecordedStudy(settings(), other, StudyContext(log=StoredLog(open_optuna(storage), "one"), name="one"))


def test_a_stored_study_continues_to_its_total_budget_and_repeats_nothing(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/a.db"
    before = new_study(storage)
    run(before, Bowl(), trials=6)
    after, scorer = new_study(storage), Bowl()
    run(after, scorer, trials=10)
    assert after.results[:6] == before.results, "what was found before is known again, to the bit"
    assert scorer.calls == 4
    assert scorer.recalled == [6], "the scorer learns of the record once, before anything new is scored"
    undisturbed = new_study()
    run(undisturbed, Bowl(), trials=10)
    assert after.results == undisturbed.results
    assert [r.number for r in after.results] == list(range(10))
    verdict = guard(after.results, lambda cs: [1.0 for _ in cs], best_single_alpha=0.5)
    assert verdict.search.identity == 10.0, "the baselines of a continued study are its trials 0 to 2"


def test_a_study_cut_short_among_its_first_candidates_goes_on_there(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/a.db"
    run(new_study(storage), Bowl(), trials=2)
    after = new_study(storage)
    run(after, Bowl(), trials=6)
    assert [r.candidate.kind for r in after.results[:3]] == ["identity", "alpha_0.5", "best_single"]


def test_first_candidates_are_scored_together() -> None:
    scorer = Bowl()
    run(new_study(), scorer, trials=9, batch=3)
    assert scorer.batches == [3, 3, 3]


def test_a_study_stops_when_it_is_good_enough() -> None:
    study = new_study()
    why = run(study, Bowl(), trials=30, enough=lambda best: "near enough" if best < 1.0 else "")
    assert why == "near enough"
    assert len(study.results) == 3


def test_a_study_stops_when_nothing_improves() -> None:
    class Flat(Bowl):
        def _one(self, *_: object) -> Outcome:
            return Outcome(state="COMPLETE", loss=1.0, seconds=0.0)

    study = new_study()
    why = run(study, Flat(), trials=30, patience=5)
    assert "5 sampler trials" in why
    assert len(study.results) == 8


def test_writing_in_another_thread_keeps_the_same_trials(tmp_path: Path) -> None:
    direct, queued = f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db"
    run(new_study(direct), Bowl(), trials=12)
    with Writer() as writer:
        run(new_study(queued, writer), Bowl(), trials=12)
    a, b = (open_optuna(url).get_all_trials(1) for url in (direct, queued))
    assert [(t.number, t.params, t.value, t.user_attrs) for t in a] == [
        (t.number, t.params, t.value, t.user_attrs) for t in b
    ]


def test_batches_that_wait_are_stored_together_but_not_before_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    sizes: list[int] = []

    def insert(storage: optuna.storages.BaseStorage, study_id: int, trials: Sequence[FrozenTrial], **how: Any) -> None:
        sizes.append(len(trials))
        insert_trials(storage, study_id, trials, **how)
        noted.append("found" in storage.get_study_user_attrs(study_id))

    noted: list[bool] = []
    monkeypatch.setattr(study_log, "insert_trials", insert)
    busy = threading.Event()
    with Writer() as writer:
        study = new_study(url, writer)
        writer.submit(busy.wait)
        run(study, Bowl(), trials=9)
        study.note("found", 9)
        run(study, Bowl(), trials=13)
        busy.set()
    assert list(zip(sizes, noted, strict=True)) == [(9, False), (4, True)]
    trials = open_optuna(url).get_all_trials(1)
    assert [(t.number, t.value) for t in trials] == [(r.number, r.loss) for r in study.results]


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("cut", [3, 5, 9, 14])
def test_a_study_cut_anywhere_goes_on_as_if_nothing_had_happened(sampler: str, cut: int, tmp_path: Path) -> None:
    """The sampler's state, that of CMA-ES and QMC too, is rebuilt from the record."""
    undisturbed = new_study(sampler=sampler)
    run(undisturbed, Bowl(), trials=18)
    storage = f"sqlite:///{tmp_path}/a.db"
    run(new_study(storage, sampler=sampler), Bowl(), trials=cut)
    after, scorer = new_study(storage, sampler=sampler), Bowl()
    run(after, scorer, trials=18)
    assert scorer.calls == 18 - cut
    assert after.results == undisturbed.results


def test_where_the_record_differs_from_the_replay_it_counts_as_it_is(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/a.db"
    before = new_study(storage)
    run(before, Bowl(), trials=8)
    after, scorer = new_study(storage, seed=4), Bowl()  # another sampler, as another library version would be
    run(after, scorer, trials=12)
    assert after.results[:8] == before.results
    assert scorer.calls == 4
    assert [t.number for t in open_optuna(storage).get_all_trials(1)] == list(range(12))


def test_a_study_can_be_left_after_any_batch(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/a.db"
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 4

    study = new_study(storage)
    with pytest.raises(Interrupted):
        run(study, Bowl(), trials=20, stop=stop)
    assert len(study.results) == len(open_optuna(storage).get_all_trials(1)) == 3 + 3
    after = new_study(storage)
    run(after, Bowl(), trials=20)
    undisturbed = new_study()
    run(undisturbed, Bowl(), trials=20)
    assert after.results == undisturbed.results


def test_a_failing_write_stops_the_search_and_writes_no_later_trial() -> None:
    done: list[int] = []

    def job(number: int) -> None:
        if number == 2:
            raise OSError("disk full")
        done.append(number)

    def write_all() -> None:
        with Writer() as writer:
            for number in range(400):
                writer.submit(job, number)

    with pytest.raises(OSError, match="disk full"):
        write_all()
    assert done == [0, 1], "what is stored is a prefix of what was found"


def test_the_guard_prefers_a_baseline_that_is_better_on_held_out_data() -> None:
    study = new_study()
    run(study, Bowl(), trials=30)
    best = best_trial(study.results)

    def overfitted(candidates: Sequence[Candidate]) -> list[float | None]:
        return [{"identity": 3.0, "alpha_0.5": 2.0, "best_single": 1.0}.get(c.kind, 1.5) for c in candidates]

    verdict = guard(study.results, overfitted, best_single_alpha=0.5)
    found = verdict.overruled
    assert found is not None
    assert (found.proposed, found.proposed_kind, found.proposed_loss) == (best.number, best.candidate.kind, 1.5)
    assert (found.kept, found.kept_kind, found.kept_loss) == (2, "best_single", 1.0)
    assert verdict.winner.candidate.kind == "best_single"
    assert verdict.held_out.ours == 1.0
    kept = guard(study.results, lambda cs: [1.0 for _ in cs], best_single_alpha=0.5)
    assert kept.overruled is None
    assert kept.winner == best
    assert kept.search.identity == 10.0


def test_the_guard_lets_another_trial_win_on_held_out_data() -> None:
    study = new_study()
    run(study, Bowl(), trials=30)
    rival = next(r for r in study.results if r.candidate.kind == "sampler" and r != best_trial(study.results))
    verdict = guard(
        study.results,
        lambda cs: [0.5 if c == rival.candidate else 1.0 for c in cs],
        also=[rival],
        best_single_alpha=0.5,
    )
    assert verdict.winner == rival
    assert verdict.search.ours == rival.loss


def test_a_failed_baseline_cannot_win() -> None:
    study = new_study()
    run(study, Bowl(broken=frozenset({0})), trials=10)
    verdict = guard(study.results, lambda cs: [0.0 if c.kind == "identity" else 1.0 for c in cs], best_single_alpha=0.5)
    assert verdict.winner.candidate.kind != "identity"
    assert verdict.held_out.identity is None
    with pytest.raises(NonFiniteError, match="held-out"):
        guard(study.results, lambda cs: [None for _ in cs], best_single_alpha=0.5)


def test_candidates_survive_the_way_through_parameters() -> None:
    candidate = Candidate(
        "noise_model",
        (0.1, 0.2),
        (0.9, 0.7),
        (-0.5, 0.0),
        shift="mean",
        range="margin",
        grouping="range",
        statistic="rms",
    )
    assert Candidate.of("noise_model", candidate.params()) == candidate
    assert Candidate("identity", None).params() == {}


def test_spaces_tell_every_kind_of_coefficient_apart() -> None:
    ranges = group_ranges([1.0, 10.0])
    spaces = [
        SearchSpace.of(ranges),
        SearchSpace.of(ranges, offsets=True),
        SearchSpace.of(ranges, betas=True),
        SearchSpace.of(ranges, choices={"shift": ("none", "mean")}),
    ]
    assert len({s.digest() for s in spaces}) == len(spaces)
    assert SearchSpace.of(ranges, choices={"shift": ("none",)}) == spaces[0], "a single value is no choice"
    assert math.isclose(spaces[1].distributions()["offset_1"].high, OFFSET_RANGE[1])  # type: ignore[attr-defined]
