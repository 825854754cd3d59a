"""One contract of the run store, on every backend."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypeVar, get_args

import optuna
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from alphasmith.objectives.errors import AlphasmithError, InputError, NonFiniteError
from alphasmith.objectives.literals import CandidateKind, RangeStatistic
from alphasmith.storage.database.connection import Database, StorageError, open_database, optuna_storage
from alphasmith.storage.runs.data_frames import groups_frame, sites_frame, trials_frame
from alphasmith.storage.runs.entries import Group, Losses, LossPair, NoiseFacts, Part, SearchFacts, SiteRecord, prose
from alphasmith.storage.runs.records import RunSpec, TrialRecord
from alphasmith.storage.runs.run_store import RunStore
from tests.support.boards import forgetful
from tests.support.stored_records import record_study

NOW = datetime(2026, 1, 31, 12, 30, 15, 123456, tzinfo=UTC)
SPEC = RunSpec(
    name="first",
    model_digest="a" * 64,
    data_digest="b" * 64,
    config={"groups": 4, "scheme": {"weights": "int8"}, "note": "ü"},
    scheme="w8a8-channel-static",
    hardware={"memory": 16 * 2**30, "bandwidth": 1.5e12},
    scope="site",
    versions={"torch": "2.13.0"},
    space_hash="c" * 64,
)
P = TypeVar("P", bound=Part)


def changed(part: P, **values: Any) -> P:
    """The part with other values, checked anew."""
    return type(part).model_validate(dict(part) | values)


LOSSES = Losses(
    identity=8.7e-3, alpha_half=3.31e-4, best_single=2.47e-4, best_single_alpha=0.55, ours=2.38e-4, limit=2.21e-4
)
GROUPS = (
    Group(index=0, size=3, low=0.1, high=0.5, alpha=0.3, magnitude=1.0, explanation="small"),
    Group(index=1, size=1, low=0.5, high=0.9, alpha=0.8, magnitude=60.0, beta=0.3, offset=-0.25),
)
SITE = SiteRecord(
    name="layers.0.q_proj",
    position=0,
    mode="fold",
    channels=4,
    operators=("layers.0.q_proj", "layers.0.k_proj"),
    study="first/layers.0.q_proj",
    losses=LossPair(search=LOSSES, held_out=changed(LOSSES, limit=None)),
    winner="sampler",
    trials=3,
    exact_evaluations=40,
    seconds=1.25,
    groups=GROUPS,
    shift=True,
    range_statistic="percentile",
    range_factor=0.93,
    grouping="kmeans",
    statistic="absmax",
    facts=SearchFacts(stopped="within 1 % of the limit", k_tried=(1, 2, 4)),
)


#: ``replace`` for values that the types forbid.
change: Callable[..., Any] = replace


def trial(run: str, number: int = 0, of: str = "layers.0.q_proj", **changes: Any) -> TrialRecord:
    values: dict[str, Any] = {
        "kind": "sampler",
        "params": {"alpha_0": 0.25, "alpha_1": 0.75},
        "state": "complete",
        "loss": 0.5,
        "seconds": 0.01,
    }
    return TrialRecord(study_name=f"{run}/{of}", number=number, **(values | changes))


def frozen(record: TrialRecord) -> FrozenTrial:
    """The ended Optuna trial that is read as this record."""
    attributes: dict[str, Any] = {"candidate": record.kind, "seconds": record.seconds}
    limits: dict[str, BaseDistribution] = {
        name: FloatDistribution(value, value) if isinstance(value, float) else CategoricalDistribution([value])
        for name, value in record.params.items()
    }
    return optuna.trial.create_trial(
        state={"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[record.state],
        value=record.loss,
        params=dict(record.params),
        distributions=limits,
        user_attrs=attributes | ({"reason": record.reason} if record.reason else {}),
    )


def recorded(database: Database, trials: Iterable[TrialRecord]) -> None:
    """Put trials into Optuna's tables, in studies of their own."""
    by_study: dict[str, list[TrialRecord]] = {}
    for record in trials:
        by_study.setdefault(record.study_name, []).append(record)
    for name, mine in by_study.items():
        record_study(database, name, [frozen(record) for record in mine])


@pytest.fixture(scope="module")
def store(database: Database) -> RunStore:
    """A store whose clock ticks one second per look, and whose ids count up."""
    seconds = itertools.count()
    numbers = itertools.count()
    return RunStore(
        database, clock=lambda: NOW + timedelta(seconds=next(seconds)), token=lambda: f"{next(numbers):06x}"
    )


@pytest.fixture
def run_id(store: RunStore) -> Iterator[str]:
    """A new run, deleted afterwards."""
    made = store.create(SPEC).id
    yield made
    if made in {run.id for run in store.runs()}:
        store.delete(made)


class TestRuns:
    def test_created_run_comes_back_whole(self, store: RunStore, run_id: str) -> None:
        run = store.get(run_id)
        assert {name: getattr(run, name) for name in vars(SPEC)} == vars(SPEC)
        assert (run.status, run.reason, run.started, run.finished) == ("created", "", None, None)
        assert run.created.tzinfo is UTC
        assert run.created.microsecond == NOW.microsecond
        assert run.id.startswith("r-20260131-")
        with pytest.raises(FrozenInstanceError):
            run.name = "other"  # type: ignore[misc]

    def test_life_of_a_run(self, store: RunStore, run_id: str) -> None:
        started = store.start(run_id)
        assert (started.status, started.finished) == ("running", None)
        failed = store.fail(run_id, "out of memory\x00")
        assert (failed.status, failed.reason) == ("failed", "out of memory\\x00")
        assert failed.finished is not None
        resumed = store.start(run_id)
        assert (resumed.status, resumed.reason, resumed.finished) == ("running", "", None)
        finished = store.finish(run_id)
        assert finished.status == "finished"
        assert finished.created < (finished.started or NOW) < (finished.finished or NOW)

    def test_an_interrupted_run_goes_on(self, store: RunStore, run_id: str) -> None:
        store.start(run_id)
        stopped = store.interrupt(run_id, "told to stop")
        assert (stopped.status, stopped.reason) == ("interrupted", "told to stop")
        assert stopped.finished is not None
        with pytest.raises(InputError, match="reason"):
            store.interrupt(run_id, "")
        assert store.interrupt(run_id, "again").reason == "again"
        assert store.start(run_id).finished is None
        store.finish(run_id)
        with pytest.raises(InputError, match="is finished"):
            store.interrupt(run_id, "late")

    def test_unfinished_runs_are_found_by_their_digests(self, store: RunStore) -> None:
        spec = replace(SPEC, config_digest="e" * 64, artifacts="s3://bucket/runs")
        made = [store.create(spec).id for _ in range(4)]
        others = [
            store.create(change(spec, **{name: "f" * 64})).id
            for name in ("config_digest", "model_digest", "data_digest")
        ]
        store.start(made[1])
        store.interrupt(made[1], "told to stop")
        store.start(made[2])
        store.finish(made[2])
        store.fail(made[3], "out of memory")
        found = store.find_unfinished("e" * 64, "a" * 64, "b" * 64)
        assert [(run.id, run.status) for run in found] == [
            (made[3], "failed"),
            (made[1], "interrupted"),
            (made[0], "created"),
        ]
        assert {(run.artifacts, run.config_digest) for run in found} == {("s3://bucket/runs", "e" * 64)}
        assert store.find_unfinished("g" * 64, "a" * 64, "b" * 64) == []
        for run in made + others:
            store.delete(run)

    def test_lost_answers_are_not_seen(self, database: Database) -> None:
        weak = forgetful(database)
        store = RunStore(weak)

        def lose() -> None:
            assert weak.losses == [], "the last loss did not happen"
            weak.losses.extend(["out"] * 2)

        before = len(store.runs())
        lose()
        run = store.create(SPEC).id
        assert len(store.runs()) == before + 1
        lose()
        store.start(run)
        lose()
        store.add_site(run, SITE)
        lose()
        store.set_groups(run, GROUPS)
        lose()
        store.conclude(run, space_hash="d" * 64, folder="/out")
        lose()
        store.interrupt(run, "told to stop")
        lose()
        store.fail(run, "why")
        store.start(run)
        lose()
        assert store.finish(run).status == "finished"
        assert (len(store.sites(run)), store.trials(run), len(store.groups(run))) == (1, [], 2)
        with pytest.raises(InputError, match="is finished"):
            store.finish(run)
        recorded(database, [trial(run, of="fc1"), trial(run, of="model")])
        lose()
        store.delete(run)
        with pytest.raises(InputError, match="no run"):
            store.delete(run)

    def test_conclusion_is_added_while_it_runs(self, store: RunStore, run_id: str) -> None:
        with pytest.raises(InputError, match="is created"):
            store.conclude(run_id, space_hash="d" * 64, folder="/out")
        store.start(run_id)
        store.conclude(run_id, space_hash="d" * 64, folder="/out")
        finished = store.finish(run_id)
        assert (finished.space_hash, finished.folder, finished.status) == ("d" * 64, "/out", "finished")
        assert finished.refinement is None
        with pytest.raises(InputError, match="is finished"):
            store.conclude(run_id, space_hash="e" * 64, folder="/other")

    def test_refinement_comes_back_and_must_be_storable(self, store: RunStore, run_id: str) -> None:
        store.start(run_id)
        told = {"accepted": True, "before": 1.23e-3, "deltas": {"q_proj,k_proj": -0.1}, "standard_error": None}
        for bad in ({"before": math.inf}, {"reason": "\x00"}):
            with pytest.raises(AlphasmithError):
                store.conclude(run_id, space_hash="", folder="/out", refinement=bad)
        assert store.get(run_id).refinement is None
        assert store.conclude(run_id, space_hash="", folder="/out", refinement=told).refinement == told
        assert store.finish(run_id).refinement == told

    @pytest.mark.parametrize(
        ("before", "act"),
        [
            ((), RunStore.finish),
            ((RunStore.start, RunStore.finish), RunStore.start),
            ((RunStore.start, RunStore.finish), RunStore.finish),
            ((RunStore.start, RunStore.finish), lambda store, run: store.fail(run, "late")),
        ],
    )
    def test_steps_out_of_order_are_refused(
        self, store: RunStore, run_id: str, before: tuple[Callable[..., Any], ...], act: Callable[..., Any]
    ) -> None:
        for step in before:
            step(store, run_id)
        status = store.get(run_id)
        with pytest.raises(InputError, match=f"is {status.status}") as caught:
            act(store, run_id)
        assert caught.value.field == "RUN"
        assert store.get(run_id) == status

    def test_of_many_that_finish_one_succeeds(self, store: RunStore, run_id: str) -> None:
        store.start(run_id)
        told: list[str] = []

        def work() -> None:
            try:
                told.append(store.finish(run_id).status)
            except AlphasmithError as error:
                told.append(type(error).__name__)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(told) == ["InputError"] * 3 + ["finished"]

    def test_newest_first(self, store: RunStore) -> None:
        made = [store.create(SPEC).id for _ in range(3)]
        assert [run.id for run in store.runs()][:3] == made[::-1]
        for run in made:
            store.delete(run)

    def test_prefix(self, database: Database) -> None:
        tokens = iter(["ab0001", "ab0002", "cd0001", "ab000"])
        store = RunStore(database, clock=lambda: NOW.replace(year=2001), token=lambda: next(tokens))
        made = [store.create(SPEC).id for _ in range(4)]
        assert store.get("r-20010131-c").id == made[2]
        assert store.get("r-20010131-ab0002").id == made[1]
        assert store.get("r-20010131-ab000").id == made[3]  # exact, although also a prefix of others
        with pytest.raises(InputError, match=r"fits 4 runs .* and 1 more\)"):
            store.get("r-2001")
        for unknown in ("r-20010131-x", "R-20010131-C", "r_20010131", "%", "r-20010131-ab000_"):
            with pytest.raises(InputError, match="no run"):
                store.get(unknown)
        with pytest.raises(InputError, match="RUN: is empty"):
            store.get("")
        for run in made:
            store.delete(run)

    def test_taken_id_is_not_taken_again(self, database: Database) -> None:
        tokens = iter(["aaaaaa", "aaaaaa", "aaaaaa", "bbbbbb"])
        store = RunStore(database, clock=lambda: NOW.replace(year=2002), token=lambda: next(tokens))
        first, second = store.create(SPEC), store.create(SPEC)
        assert (first.id, second.id) == ("r-20020131-aaaaaa", "r-20020131-bbbbbb")
        stuck = RunStore(database, clock=lambda: NOW.replace(year=2002), token=lambda: "aaaaaa")
        with pytest.raises(StorageError, match="no free run id"):
            stuck.create(SPEC)
        for run in (first, second):
            store.delete(run.id)

    def test_clock_without_zone_is_refused(self, database: Database) -> None:
        with pytest.raises(InputError, match="no time zone"):
            RunStore(database, clock=lambda: NOW.replace(tzinfo=None)).create(SPEC)

    def test_clock_of_another_zone_is_converted(self, database: Database) -> None:
        east = NOW.astimezone(timezone(timedelta(hours=14)))
        store = RunStore(database, clock=lambda: east, token=lambda: "east00")
        made = store.create(SPEC)
        assert (made.created, made.id[:10]) == (NOW, "r-20260131")
        store.delete(made.id)

    def test_every_method_refuses_an_unknown_run(self, store: RunStore) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.start("r-x"),
            lambda: store.finish("r-x"),
            lambda: store.fail("r-x", "why"),
            lambda: store.delete("r-x"),
            lambda: store.add_site("r-x", SITE),
            lambda: store.set_groups("r-x", GROUPS),
            lambda: store.sites("r-x"),
            lambda: store.groups("r-x"),
            lambda: store.trials("r-x"),
        ]
        for call in calls:
            with pytest.raises(InputError, match="no run 'r-x'"):
                call()

    def test_failure_needs_a_reason(self, store: RunStore, run_id: str) -> None:
        with pytest.raises(InputError, match="reason"):
            store.fail(run_id, " ")


class TestSites:
    def test_site_comes_back_whole(self, store: RunStore, run_id: str) -> None:
        left = SiteRecord(name="head", position=1, mode="left", reason="weight shared with embeddings", channels=9)
        store.add_site(run_id, left)
        store.add_site(run_id, SITE)
        assert store.sites(run_id) == [SITE, left]

    def test_losses_survive_a_failed_baseline(self, store: RunStore, run_id: str) -> None:
        failed = changed(
            SITE,
            losses=LossPair(search=LOSSES, held_out=changed(LOSSES, identity=None)),
            groups=(changed(GROUPS[0], alpha=None),),
        )
        store.add_site(run_id, failed)
        assert store.sites(run_id) == [failed]

    def test_same_name_replaces(self, store: RunStore, run_id: str) -> None:
        store.add_site(run_id, SITE)
        better = changed(SITE, seconds=9.0, groups=GROUPS[:1])
        store.add_site(run_id, better)
        assert store.sites(run_id) == [better]

    def test_names_differ_by_case(self, store: RunStore, run_id: str) -> None:
        store.add_site(run_id, SITE)
        store.add_site(run_id, changed(SITE, name=SITE.name.upper(), position=1))
        assert len(store.sites(run_id)) == 2

    def test_model_scope(self, store: RunStore, run_id: str) -> None:
        store.add_site(run_id, changed(SITE, groups=(), study=None))
        assert store.groups(run_id) == []
        store.set_groups(run_id, GROUPS[:1])
        store.set_groups(run_id, GROUPS)
        assert store.groups(run_id) == list(GROUPS)
        assert store.sites(run_id)[0].groups == ()

    def test_delete_takes_everything_of_ours_and_nothing_of_optunas(self, store: RunStore, database: Database) -> None:
        kept, gone = store.create(SPEC).id, store.create(SPEC).id
        trials = [trial(run, of=of) for run in (kept, gone) for of in ("fc1", "model")]
        recorded(database, trials)
        for run in (kept, gone):
            store.add_site(run, SITE)
            store.set_groups(run, GROUPS)
        store.delete(gone)
        with database.engine.connect() as connection:
            count = connection.exec_driver_sql(f"SELECT COUNT(*) FROM alphasmith_site WHERE run_id = '{gone}'")
            assert count.scalar() == 0
        assert (len(store.sites(kept)), store.trials(kept)) == (1, trials[:2])
        storage = optuna_storage(database)
        assert len(optuna.load_study(study_name=f"{gone}/fc1", storage=storage).trials) == 1
        # The other way round: our rows never keep Optuna from deleting its own.
        optuna.delete_study(study_name=f"{kept}/fc1", storage=storage)
        assert store.trials(kept) == trials[1:2]
        store.delete(kept)

    def test_long_reasons_and_explanations(self, store: RunStore, run_id: str) -> None:
        long = "ü" * 70_000
        store.add_site(run_id, changed(SITE, mode="left", reason=long, groups=(changed(GROUPS[0], explanation=long),)))
        (site,) = store.sites(run_id)
        assert (site.reason, site.groups[0].explanation) == (long, long)


class TestTrials:
    def test_they_are_read_from_optunas_tables(self, store: RunStore, database: Database, run_id: str) -> None:
        trials = [
            trial(run_id, 0, kind="identity", params={}),
            trial(run_id, 1, params={"alpha_0": 0.1 + 0.2, "shift": "none", "forced": True}),
            trial(run_id, 2, state="pruned", loss=None),
            trial(run_id, 3, state="failed", loss=None, reason="the loss is nan"),
            trial(run_id, 0, of="model", seconds=0.0),
        ]
        recorded(database, trials)
        assert store.trials(run_id) == trials
        assert store.trials(run_id, study_name=f"{run_id}/model") == trials[4:]
        assert store.trials(run_id, study_name="other/model") == []
        assert [found.site for found in trials[3:]] == ["layers.0.q_proj", "model"]

    def test_every_kind_is_read(self, store: RunStore, database: Database, run_id: str) -> None:
        kinds = get_args(CandidateKind)
        recorded(database, [trial(run_id, number, kind=kind) for number, kind in enumerate(kinds)])
        assert [found.kind for found in store.trials(run_id)] == list(kinds)

    def test_the_refinements_own_candidates_are_refined_ones(
        self, store: RunStore, database: Database, run_id: str
    ) -> None:
        kinds = ("ours", "best_single", "alpha_0.5", "proposal", "sampler")
        recorded(database, [trial(run_id, n, "refinement", kind=kind) for n, kind in enumerate(kinds)])
        found = [record.kind for record in store.trials(run_id)]
        assert found == ["refined", "best_single", "alpha_0.5", "refined", "sampler"]

    def test_trials_that_run_or_that_others_made_are_left_out(
        self, store: RunStore, database: Database, run_id: str
    ) -> None:
        recorded(database, [trial(run_id)])
        study = optuna.load_study(study_name=f"{run_id}/layers.0.q_proj", storage=optuna_storage(database))
        study.ask()
        study.add_trial(optuna.trial.create_trial(value=1.0))
        other = store.create(SPEC).id
        recorded(database, [trial(other), trial(f"{run_id}0")])
        assert store.trials(run_id) == [trial(run_id)]
        assert store.trials(other) == [trial(other)]
        store.delete(other)

    def test_counts_are_those_of_the_records(self, store: RunStore, database: Database) -> None:
        runs = [store.create(SPEC).id for _ in range(3)]
        for run, count in zip(runs, (5, 3, 0), strict=True):
            failed = [trial(run, n, state="failed", loss=None, reason="NaN") for n in range(min(count, 2))]
            recorded(database, failed + [trial(run, n) for n in range(2, count)])
        for run in runs:
            assert store.trial_counts(run) == Counter(found.state for found in store.trials(run))
            store.delete(run)
        assert store.trial_counts(runs[0]) == {"failed": 2, "complete": 3}
        assert store.trial_counts("r-unknown") == {}


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = NUMBERS.map(abs)
# PROSE is what users and libraries write; NAMES are module paths and must stay distinct in every collation.
PROSE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=40)
NAMES = st.text(st.characters(categories=["L", "N"], include_characters="._-"), min_size=1, max_size=40)
PARAMS = st.dictionaries(
    st.sampled_from(["alpha_0", "alpha_10", "offset_0", "shift", "rest"]), NUMBERS | st.booleans() | PROSE, max_size=4
)
SOME_LOSSES = st.builds(
    Losses,
    identity=st.none() | POSITIVE,
    alpha_half=st.none() | POSITIVE,
    best_single=st.none() | POSITIVE,
    best_single_alpha=NUMBERS,
    ours=POSITIVE,
    limit=st.none() | POSITIVE,
)
SOME_GROUPS = st.lists(
    st.builds(
        lambda ends, **rest: Group(index=0, low=min(ends), high=max(ends), **rest),
        ends=st.tuples(NUMBERS, NUMBERS),
        size=st.integers(0, 2**31 - 1),
        alpha=st.none() | NUMBERS,
        magnitude=POSITIVE,
        explanation=PROSE,
        beta=st.none() | NUMBERS,
        offset=st.none() | NUMBERS,
    ),
    max_size=3,
).map(lambda groups: tuple(changed(group, index=index) for index, group in enumerate(groups)))
SOME_SITES = st.builds(
    SiteRecord,
    name=NAMES,
    position=st.integers(0, 1000),
    mode=st.sampled_from(["fold", "explicit", "left"]),
    reason=PROSE,
    channels=st.integers(0, 2**31 - 1),
    operators=st.lists(PROSE, max_size=3).map(tuple),
    study=st.none() | NAMES,
    losses=st.none() | st.builds(LossPair, search=SOME_LOSSES, held_out=SOME_LOSSES),
    winner=st.none() | st.sampled_from(get_args(CandidateKind)),
    trials=st.integers(0, 10**6),
    exact_evaluations=st.integers(0, 10**6),
    seconds=POSITIVE,
    groups=SOME_GROUPS,
    shift=st.booleans(),
    range_statistic=st.sampled_from(get_args(RangeStatistic)),
    range_factor=POSITIVE.filter(bool),
    grouping=PROSE.map(lambda text: text[:32]),
    statistic=PROSE.map(lambda text: text[:16]),
    facts=st.none()
    | st.builds(
        SearchFacts,
        stopped=PROSE,
        noise_model=st.none() | st.builds(NoiseFacts, median_log_ratio=NUMBERS, kendall_tau=st.none() | NUMBERS),
        k_tried=st.lists(st.integers(1, 9), max_size=3).map(tuple),
        range_losses=st.dictionaries(PROSE, POSITIVE, max_size=3),
    ),
)
SOME_TRIALS = st.lists(
    st.builds(
        lambda state, loss, reason, **rest: trial(
            "r", state=state, loss=loss if state == "complete" else None, reason=reason * (state == "failed"), **rest
        ),
        params=PARAMS,
        state=st.sampled_from(["complete", "pruned", "failed"]),
        loss=POSITIVE,
        reason=PROSE,
        seconds=POSITIVE,
    ),
    max_size=3,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    site=SOME_SITES,
    trials=SOME_TRIALS,
    config=st.dictionaries(PROSE, st.recursive(NUMBERS | PROSE, st.lists), max_size=3),
)
def test_what_is_stored_is_what_comes_back(
    store: RunStore, database: Database, site: SiteRecord, trials: list[TrialRecord], config: dict[str, Any]
) -> None:
    run = store.create(replace(SPEC, config=config))
    store.add_site(run.id, site)
    store.set_groups(run.id, site.groups)
    mine = [replace(found, study_name=f"{run.id}/fc1", number=number) for number, found in enumerate(trials)]
    recorded(database, mine)
    assert store.get(run.id).config == config
    assert store.sites(run.id) == [site]
    assert store.groups(run.id) == list(site.groups)
    assert store.trials(run.id) == mine
    store.delete(run.id)


@given(st.text())
def test_prose_is_always_storable_and_stable(text: str) -> None:
    kept = prose(text)
    kept.encode()
    assert "\x00" not in kept
    assert prose(kept) == kept
    if "\x00" not in text and text.isprintable():
        assert kept == text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_no_records(bad: float) -> None:
    parts: list[Callable[[], object]] = [
        lambda: changed(LOSSES, ours=bad),
        lambda: changed(GROUPS[0], alpha=bad),
        lambda: changed(GROUPS[0], offset=bad),
        lambda: changed(SITE, range_factor=bad),
        lambda: NoiseFacts(median_log_ratio=bad),
        lambda: SearchFacts(range_losses={"absmax": bad}),
        lambda: changed(SITE, seconds=bad),
    ]
    for attempt in parts:
        with pytest.raises(ValidationError, match="finite number"):
            attempt()
    with pytest.raises(NonFiniteError):
        replace(SPEC, config={"a": [bad]})


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: change(SPEC, scope="world"), "run.scope"),
        (lambda: change(SPEC, config={1: 2}), "json"),
        (lambda: replace(SPEC, config={"a": object()}), "json"),
    ],
)
def test_impossible_records_cannot_be_made(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: changed(LOSSES, ours=-1.0), "ours"),
        (lambda: changed(LOSSES, other=1.0), "other"),
        (lambda: changed(GROUPS[0], low=0.9), ""),
        (lambda: changed(GROUPS[0], size=-1), "size"),
        (lambda: changed(GROUPS[0], size=1.5), "size"),
        (lambda: changed(SITE, mode="bend"), "mode"),
        (lambda: changed(SITE, name=""), "name"),
        (lambda: changed(SITE, name="n" * 513), "name"),
        (lambda: changed(SITE, name="a\x00"), "name"),
        (lambda: changed(SITE, study="n" * 513), "study"),
        (lambda: changed(SITE, winner="luck"), "winner"),
        (lambda: changed(SITE, range_statistic="luck"), "range_statistic"),
        (lambda: changed(SITE, range_factor=-1.0), "range_factor"),
        (lambda: changed(SITE, grouping="n" * 33), "grouping"),
        (lambda: changed(SITE, groups=GROUPS[:1] * 2), ""),
        (lambda: changed(SITE, operators=("a\x00",)), "operators.0"),
    ],
)
def test_impossible_parts_cannot_be_made(make: Callable[[], object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make()
    assert {".".join(map(str, error["loc"])) for error in caught.value.errors()} == {field}


def test_free_text_is_made_storable() -> None:
    assert changed(SITE, reason="a\x00", facts=SearchFacts(stopped="\ud800")).reason == "a\\x00"
    assert SearchFacts(stopped="\ud800").stopped == "\\ud800"


def test_store_without_tables_says_so(tmp_path: Any) -> None:
    opened = open_database(f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(StorageError, match="no such table"):
        RunStore(opened).runs()
    opened.close()


class TestFrames:
    def test_sites(self) -> None:
        left = SiteRecord(name="head", position=1, mode="left", reason="tied", channels=9)
        frame = sites_frame([SITE, left])
        assert frame["site"].tolist() == [SITE.name, "head"]
        found = [float(frame[name].iloc[0]) for name in ("identity", "ours", "search_limit")]
        assert found == [8.7e-3, 2.38e-4, 2.21e-4]
        assert frame.loc[1, ["identity", "ours", "limit", "search_ours"]].isna().all()
        assert math.isnan(float(frame["limit"].iloc[0]))
        assert frame["trials"].tolist() == [3, 0]
        assert frame["groups"].tolist() == [2, 0]
        assert frame["shift"].tolist() == [True, False]
        assert frame["range_statistic"].tolist() == ["percentile", "absmax"]
        assert frame["stopped"].tolist() == ["within 1 % of the limit", ""]

    def test_groups(self) -> None:
        frame = groups_frame([SITE], model_groups=GROUPS[:1])
        assert frame["site"].tolist() == ["", SITE.name, SITE.name]
        assert frame["group"].tolist() == [0, 0, 1]
        assert frame["alpha"].tolist() == [0.3, 0.3, 0.8]
        assert frame["offset"].isna().tolist() == [True, True, False]
        assert frame["beta"].iloc[2] == 0.3

    def test_trials(self) -> None:
        frame = trials_frame(
            [trial("r", 3), trial("r", 4, state="failed", loss=None, reason="NaN", params={"alpha_1": 1.0})]
        )
        assert frame["number"].tolist() == [3, 4]
        assert frame["site"].tolist() == ["layers.0.q_proj"] * 2
        assert frame["alpha_1"].tolist() == [0.75, 1.0]
        assert frame["alpha_0"].isna().tolist() == [False, True]
        assert frame["loss"].isna().tolist() == [False, True]

    @pytest.mark.parametrize(
        ("make", "full"), [(sites_frame, [SITE]), (groups_frame, [SITE]), (trials_frame, [trial("r")])]
    )
    def test_empty_frames_have_the_same_columns_and_types(
        self, make: Callable[..., pd.DataFrame], full: list[Any]
    ) -> None:
        empty, filled = make([]), make(full)
        own = [name for name in map(str, filled.columns) if not name.startswith("alpha_") or name == "alpha_half"]
        assert list(empty.columns) == own
        numeric = [str(name) for name in filled[own].select_dtypes("number").columns]
        assert [empty[name].dtype for name in numeric] == [filled[name].dtype for name in numeric]
