"""One contract of the run store, on every backend."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import optuna
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphasmith.objectives.errors import AlphasmithError, InputError, NonFiniteError
from alphasmith.storage.database import Database, DuplicateError, StorageError, open_database, optuna_storage
from alphasmith.storage.frames import groups_frame, sites_frame, trials_frame
from alphasmith.storage.record_types import RangeStatistic, TrialKind, params_hash, prose
from alphasmith.storage.records import (
    ArtifactRecord,
    GroupRecord,
    Losses,
    RunSpec,
    RunStore,
    SiteRecord,
    TrialDigest,
)
from tests.storage.boards import forgetful

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
LOSSES = Losses(
    identity=8.7e-3, alpha_half=3.31e-4, best_single=2.47e-4, best_single_alpha=0.55, ours=2.38e-4, limit=2.21e-4
)
GROUPS = (
    GroupRecord(index=0, size=3, low=0.1, high=0.5, alpha=0.3, magnitude=1.0, explanation="small"),
    GroupRecord(index=1, size=1, low=0.5, high=0.9, alpha=0.8, magnitude=60.0, beta=0.3, offset=-0.25),
)
SITE = SiteRecord(
    name="layers.0.q_proj",
    position=0,
    mode="fold",
    channels=4,
    operators=("layers.0.q_proj", "layers.0.k_proj"),
    study_name="first/layers.0.q_proj",
    search=LOSSES,
    held_out=replace(LOSSES, limit=None),
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
    facts={"stopped": "within 1 % of the limit", "noise_model": None, "k_tried": [1, 2, 4]},
)


#: ``replace`` for values that the types forbid.
change: Callable[..., Any] = replace


def trial(number: int = 0, study: str = "first/layers.0.q_proj", **changes: Any) -> TrialDigest:
    values: dict[str, Any] = {
        "kind": "sampler",
        "params": {"alpha_0": 0.25, "alpha_1": 0.75},
        "state": "complete",
        "loss": 0.5,
        "seconds": 0.01,
    }
    return TrialDigest.of(study_name=study, trial_number=number, **(values | changes))


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
        store.add_site(run, SITE, iter([trial(0)]))
        lose()
        store.set_groups(run, GROUPS)
        lose()
        store.add_trials(run, iter([trial(0, "whole"), trial(1, "whole")]))
        lose()
        store.set_artifacts(run, iter([ArtifactRecord(kind="k", path="p", sha256="d" * 64, bytes=1)]))
        lose()
        store.conclude(run, space_hash="d" * 64, folder="/out")
        lose()
        store.interrupt(run, "told to stop")
        lose()
        store.fail(run, "why")
        store.start(run)
        lose()
        assert store.finish(run).status == "finished"
        assert (len(store.sites(run)), len(store.trials(run)), len(store.groups(run))) == (1, 3, 2)
        with pytest.raises(InputError, match="is finished"):
            store.finish(run)
        lose()
        assert store.delete(run) == (SITE.study_name, "whole")
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
        assert [run.id for run in store.runs(limit=2)] == made[:0:-1]
        assert store.runs(limit=0) == []
        with pytest.raises(InputError, match="negative"):
            store.runs(limit=-1)
        for run in made:
            store.delete(run)

    def test_prefix(self, database: Database) -> None:
        tokens = iter(["ab0001", "ab0002", "cd0001", "ab000"])
        store = RunStore(database, clock=lambda: NOW.replace(year=2001), token=lambda: next(tokens))
        made = [store.create(SPEC).id for _ in range(4)]
        assert store.get("r-20010131-c").id == made[2]
        assert store.get("r-20010131-ab0002").id == made[1]
        assert store.get("r-20010131-ab000").id == made[3]  # exact, although also a prefix of others
        with pytest.raises(InputError, match=r"fits 4 runs .*\.\.\."):
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
            lambda: store.add_trials("r-x", [trial()]),
            lambda: store.set_artifacts("r-x", []),
            lambda: store.sites("r-x"),
            lambda: store.groups("r-x"),
            lambda: store.trials("r-x"),
            lambda: store.artifacts("r-x"),
        ]
        for call in calls:
            with pytest.raises(InputError, match="no run 'r-x'"):
                call()

    def test_failure_needs_a_reason(self, store: RunStore, run_id: str) -> None:
        with pytest.raises(InputError, match="reason"):
            store.fail(run_id, " ")


class TestSites:
    def test_site_comes_back_whole(self, store: RunStore, run_id: str) -> None:
        trials = [trial(0, kind="identity", params={}), trial(1), trial(2, state="failed", loss=None, reason="NaN")]
        left = SiteRecord(name="head", position=1, mode="left", reason="weight shared with embeddings", channels=9)
        store.add_site(run_id, left)
        store.add_site(run_id, SITE, trials)
        assert store.sites(run_id) == [SITE, left]
        assert store.trials(run_id) == trials
        assert store.trials(run_id, study_name="other") == []

    def test_losses_survive_a_failed_baseline(self, store: RunStore, run_id: str) -> None:
        failed = replace(SITE, held_out=replace(LOSSES, identity=None), groups=(replace(GROUPS[0], alpha=None),))
        store.add_site(run_id, failed)
        assert store.sites(run_id) == [failed]

    def test_every_kind_of_trial_can_be_stored(self, store: RunStore, run_id: str) -> None:
        trials = [trial(number, kind=kind) for number, kind in enumerate(get_args(TrialKind))]
        store.add_site(run_id, SITE, trials)
        assert store.trials(run_id) == trials

    def test_same_name_replaces(self, store: RunStore, run_id: str) -> None:
        store.add_site(run_id, SITE, [trial(0), trial(1)])
        better = replace(SITE, seconds=9.0, groups=GROUPS[:1])
        store.add_site(run_id, better, [trial(1)])
        assert store.sites(run_id) == [better]
        assert store.trials(run_id) == [trial(1)]

    def test_names_differ_by_case(self, store: RunStore, run_id: str) -> None:
        store.add_site(run_id, SITE)
        store.add_site(run_id, replace(SITE, name=SITE.name.upper(), position=1))
        assert len(store.sites(run_id)) == 2

    def test_a_refused_trial_takes_everything_with_it(self, store: RunStore, run_id: str) -> None:
        store.add_site(run_id, SITE, [trial(0)])
        other = replace(SITE, name="other", position=1)
        with pytest.raises(DuplicateError):
            store.add_site(run_id, other, [trial(7), trial(0)])
        assert store.sites(run_id) == [SITE]
        assert store.trials(run_id) == [trial(0)]

    def test_model_scope(self, store: RunStore, run_id: str) -> None:
        store.add_site(run_id, replace(SITE, groups=(), study_name=None))
        store.set_groups(run_id, GROUPS[:1])
        store.set_groups(run_id, GROUPS)
        store.add_trials(run_id, [trial(1, "whole"), trial(0, "whole")])
        store.add_trials(run_id, [])
        store.add_trials(run_id, [trial(2, "whole"), trial(1, "whole")])  # one of them is stored already, alike
        with pytest.raises(DuplicateError):
            store.add_trials(run_id, [trial(3, "whole"), trial(1, "whole", loss=0.75)])
        assert store.groups(run_id) == list(GROUPS)
        assert store.sites(run_id)[0].groups == ()
        assert [item.trial_number for item in store.trials(run_id)] == [0, 1, 2]

    def test_repeated_parameters_are_found(self, store: RunStore, run_id: str) -> None:
        store.add_site(
            run_id, SITE, [trial(0, state="failed", loss=None, reason="killed"), trial(1), trial(2, loss=0.75)]
        )
        study = str(SITE.study_name)
        assert store.find_trial(study, params_hash({"alpha_1": 0.75, "alpha_0": 0.25 + 1e-15})) == trial(1)
        assert store.find_trial(study, params_hash({"alpha_1": 0.75})) is None
        assert store.find_trial("other", params_hash({"alpha_1": 0.75, "alpha_0": 0.25})) is None

    def test_artifacts(self, store: RunStore, run_id: str) -> None:
        files = [
            ArtifactRecord(kind="smoothed", path=f"smoothed/{i}", sha256="d" * 64, bytes=5 * 2**40) for i in (1, 0)
        ]
        store.set_artifacts(run_id, files[:1])
        store.set_artifacts(run_id, files)
        assert store.artifacts(run_id) == files[::-1]
        with pytest.raises(DuplicateError):
            store.set_artifacts(run_id, files + files)
        assert store.artifacts(run_id) == files[::-1]

    def test_delete_takes_everything_of_ours_and_nothing_of_optunas(self, store: RunStore, database: Database) -> None:
        storage = optuna_storage(database)
        study = optuna.create_study(study_name=str(SITE.study_name), storage=storage)
        study.tell(study.ask(), 1.0)
        kept, gone = store.create(SPEC).id, store.create(SPEC).id
        store.add_site(kept, replace(SITE, study_name="kept"), [trial(0, "kept")])
        store.add_site(gone, SITE, [trial(0)])
        store.set_groups(gone, GROUPS)
        store.add_trials(gone, [trial(0, "whole")])
        store.set_artifacts(gone, [ArtifactRecord(kind="k", path="p", sha256="d" * 64, bytes=1)])
        assert store.delete(gone) == (SITE.study_name, "whole")
        with database.engine.connect() as connection:
            for table in ("site", "group", "trial_digest", "artifact"):
                count = connection.exec_driver_sql(f"SELECT COUNT(*) FROM alphasmith_{table} WHERE run_id = '{gone}'")
                assert count.scalar() == 0, table
        assert len(store.sites(kept)) == 1
        assert len(optuna.load_study(study_name=str(SITE.study_name), storage=storage).trials) == 1
        # The other way round: our rows never keep Optuna from deleting its own.
        store.add_site(kept, SITE, [trial(0)])
        optuna.delete_study(study_name=str(SITE.study_name), storage=storage)
        assert str(SITE.study_name) not in optuna.get_all_study_names(storage)
        assert store.trials(kept, study_name=str(SITE.study_name)) == [trial(0)]
        store.delete(kept)

    def test_long_reasons_and_explanations(self, store: RunStore, run_id: str) -> None:
        long = "ü" * 70_000
        store.add_site(run_id, replace(SITE, mode="left", reason=long, groups=(replace(GROUPS[0], explanation=long),)))
        (site,) = store.sites(run_id)
        assert (site.reason, site.groups[0].explanation) == (long, long)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = NUMBERS.map(abs)
# PROSE is what users and libraries write; NAMES are module paths and must stay distinct in every collation.
PROSE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=40)
NAMES = st.text(st.characters(categories=["L", "N"], include_characters="._-"), min_size=1, max_size=40)
PARAMS = st.dictionaries(NAMES, st.one_of(NUMBERS, st.integers(-(2**53), 2**53), st.booleans(), PROSE), max_size=4)
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
        lambda ends, **rest: GroupRecord(index=0, low=min(ends), high=max(ends), **rest),
        ends=st.tuples(NUMBERS, NUMBERS),
        size=st.integers(0, 2**31 - 1),
        alpha=st.none() | NUMBERS,
        magnitude=NUMBERS,
        explanation=PROSE,
        beta=st.none() | NUMBERS,
        offset=st.none() | NUMBERS,
    ),
    max_size=3,
).map(lambda groups: tuple(replace(group, index=index) for index, group in enumerate(groups)))
SOME_SITES = st.builds(
    SiteRecord,
    name=NAMES,
    position=st.integers(0, 1000),
    mode=st.sampled_from(["fold", "explicit", "left"]),
    reason=PROSE,
    channels=st.integers(0, 2**31 - 1),
    operators=st.lists(PROSE, max_size=3).map(tuple),
    study_name=st.none() | NAMES,
    search=st.none() | SOME_LOSSES,
    held_out=st.none() | SOME_LOSSES,
    winner=st.none() | st.sampled_from(get_args(TrialKind)),
    trials=st.integers(0, 10**6),
    exact_evaluations=st.integers(0, 10**6),
    seconds=POSITIVE,
    groups=SOME_GROUPS,
    shift=st.booleans(),
    range_statistic=st.sampled_from(get_args(RangeStatistic)),
    range_factor=POSITIVE,
    grouping=PROSE.map(lambda text: text[:32]),
    statistic=PROSE.map(lambda text: text[:16]),
    facts=st.none() | st.dictionaries(PROSE, NUMBERS | PROSE | st.none() | st.lists(st.integers(0, 9)), max_size=3),
)
SOME_TRIALS = st.lists(
    st.builds(
        lambda params, state, loss, reason, seconds: trial(
            0, params=params, state=state, loss=None if state == "failed" else loss, reason=reason, seconds=seconds
        ),
        params=PARAMS,
        state=st.sampled_from(["complete", "pruned", "failed"]),
        loss=POSITIVE,
        reason=PROSE.filter(bool),
        seconds=POSITIVE,
    ),
    max_size=3,
).map(lambda trials: [replace(item, trial_number=number) for number, item in enumerate(trials)])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    site=SOME_SITES,
    trials=SOME_TRIALS,
    config=st.dictionaries(PROSE, st.recursive(NUMBERS | PROSE, st.lists), max_size=3),
)
def test_what_is_stored_is_what_comes_back(
    store: RunStore, site: SiteRecord, trials: list[TrialDigest], config: dict[str, Any]
) -> None:
    run = store.create(replace(SPEC, config=config))
    store.add_site(run.id, site, trials)
    assert store.get(run.id).config == config
    assert store.sites(run.id) == [site]
    assert store.trials(run.id) == trials
    store.delete(run.id)


# Numbers of eight digits lie well inside a rounding interval of nine: the last bits cannot carry them over its edge.
@given(params=PARAMS, number=st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.8g}")))
def test_params_hash_ignores_what_does_not_matter(params: dict[str, Any], number: float) -> None:
    assert params_hash(dict(reversed(params.items()))) == params_hash(params)
    assert params_hash({"a": number}) == params_hash({"a": number * (1 + 2**-50)})
    assert params_hash({"a": 1}) == params_hash({"a": 1.0})
    assert params_hash({"a": -0.0}) == params_hash({"a": 0.0})
    assert len({params_hash({"a": value}) for value in (1, True, "1", 1.000001)}) == 4
    assert params_hash({"a": 0.25, "b": 0.5}) != params_hash({"a": 0.5, "b": 0.25})


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
    attempts: list[Callable[[], object]] = [
        lambda: replace(LOSSES, ours=bad),
        lambda: replace(GROUPS[0], alpha=bad),
        lambda: replace(GROUPS[0], offset=bad),
        lambda: replace(SITE, range_factor=bad),
        lambda: replace(SITE, facts={"noise_model": {"median_log_ratio": bad}}),
        lambda: trial(loss=bad),
        lambda: trial(params={"alpha_0": bad}),
        lambda: replace(SITE, seconds=bad),
        lambda: replace(SPEC, config={"a": [bad]}),
    ]
    for attempt in attempts:
        with pytest.raises(NonFiniteError):
            attempt()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: replace(LOSSES, ours=-1.0), "ours"),
        (lambda: replace(GROUPS[0], low=0.9), "groups.low"),
        (lambda: replace(GROUPS[0], size=-1), "groups.size"),
        (lambda: change(SITE, mode="bend"), "sites.mode"),
        (lambda: replace(SITE, name=""), "sites.name"),
        (lambda: replace(SITE, name="n" * 513), "sites.name"),
        (lambda: replace(SITE, name="a\x00"), "sites.name"),
        (lambda: change(SITE, winner="luck"), "sites.winner"),
        (lambda: change(SITE, range_statistic="luck"), "sites.range_statistic"),
        (lambda: replace(SITE, range_factor=-1.0), "sites.range_factor"),
        (lambda: replace(SITE, grouping="n" * 33), "sites.grouping"),
        (lambda: replace(SITE, facts={"stopped": "a\x00"}), "sites.facts"),
        (lambda: replace(SITE, groups=GROUPS[:1] * 2), "sites.groups"),
        (lambda: replace(SITE, operators=("a\x00",)), "sites.operators"),
        (lambda: trial(loss=None), "trials.loss"),
        (lambda: trial(state="failed", reason="why"), "trials.loss"),
        (lambda: trial(state="failed", loss=None), "trials.reason"),
        (lambda: trial(-1), "trials.trial_number"),
        (lambda: trial(kind="luck"), "trials.kind"),
        (lambda: change(SPEC, scope="world"), "run.scope"),
        (lambda: change(SPEC, config={1: 2}), "json"),
        (lambda: replace(SPEC, config={"a": object()}), "json"),
        (lambda: ArtifactRecord(kind="k", path="p", sha256="d", bytes=1), "artifacts.sha256"),
    ],
)
def test_impossible_records_cannot_be_made(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.field == field


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
        frame = trials_frame([trial(3), trial(4, state="failed", loss=None, reason="NaN", params={"alpha_1": 1.0})])
        assert frame["number"].tolist() == [3, 4]
        assert frame["alpha_1"].tolist() == [0.75, 1.0]
        assert frame["alpha_0"].isna().tolist() == [False, True]
        assert frame["loss"].isna().tolist() == [False, True]

    @pytest.mark.parametrize(
        ("make", "full"), [(sites_frame, [SITE]), (groups_frame, [SITE]), (trials_frame, [trial()])]
    )
    def test_empty_frames_have_the_same_columns_and_types(
        self, make: Callable[..., pd.DataFrame], full: list[Any]
    ) -> None:
        empty, filled = make([]), make(full)
        own = [name for name in map(str, filled.columns) if not name.startswith("alpha_") or name == "alpha_half"]
        assert list(empty.columns) == own
        numeric = [str(name) for name in filled[own].select_dtypes("number").columns]
        assert [empty[name].dtype for name in numeric] == [filled[name].dtype for name in numeric]
