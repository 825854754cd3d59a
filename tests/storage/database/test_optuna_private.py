"""Bulk insert of trials: the same rows as Optuna's add_trial writes, on every backend."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import optuna
import psycopg
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.samplers import GPSampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from packaging.specifiers import SpecifierSet
from sqlalchemy import Connection, MetaData, Table, select, text
from sqlalchemy.exc import OperationalError

from alphasmith.storage.database import optuna_private as optuna_trials
from alphasmith.storage.database.connection import Database, StorageError, optuna_storage
from alphasmith.storage.database.optuna_private import STUDIES, TRIALS, insert_trials, optuna_migrations

optuna.logging.set_verbosity(optuna.logging.WARNING)

#: Versions of Optuna whose private names were checked.
CHECKED = ">=5.0,<5.1"
SPACE: dict[str, BaseDistribution] = {
    "alpha_10": FloatDistribution(0.1, 0.9),
    "alpha_2": FloatDistribution(1e-3, 1.0, log=True),
    "shift": CategoricalDistribution((False, True)),
    "range": CategoricalDistribution(("absmax", "p99.9", "größer")),
}
#: Tables that refer to a trial.
TABLES = (
    "trial_values",
    "trial_params",
    "trial_user_attributes",
    "trial_system_attributes",
    "trial_intermediate_values",
)


@pytest.fixture
def storage(database: Database) -> BaseStorage:
    """Optuna's storage on every backend, with its cache."""
    return optuna_storage(database)


@pytest.fixture
def no_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bulk inserts must not hand a trial to Optuna after all."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a trial went to create_new_trial")

    monkeypatch.setattr(RDBStorage, "create_new_trial", refuse)


def test_private_names_are_those_that_were_checked() -> None:
    """What ``optuna_private`` uses is there, in a version it was checked with. Another version: check, then widen the range."""
    assert SpecifierSet(CHECKED).contains(optuna.__version__), f"Optuna {optuna.__version__} was not checked"
    columns: dict[Any, set[str]] = {
        models.StudyModel: {"study_id", "study_name"},
        models.TrialModel: {"trial_id", "study_id", "number", "state", "datetime_start", "datetime_complete"},
        models.TrialValueModel: {"trial_id", "objective", "value", "value_type"},
        models.TrialParamModel: {"trial_id", "param_name", "param_value", "distribution_json"},
        models.TrialUserAttributeModel: {"trial_id", "key", "value_json"},
        models.TrialSystemAttributeModel: {"trial_id", "key", "value_json"},
        models.TrialIntermediateValueModel: {
            *("trial_id", "step", "intermediate_value", "intermediate_value_type"),
        },
    }
    for model, wanted in columns.items():
        assert wanted <= set(model.__table__.columns.keys()), model
    for light, model in ((STUDIES, models.StudyModel), (TRIALS, models.TrialModel)):
        assert light.name == model.__table__.name
        assert set(light.columns.keys()) <= set(model.__table__.columns.keys())
    assert models.TrialValueModel.value_to_stored_repr(1.0) == (1.0, models.TrialValueModel.TrialValueType.FINITE)
    assert models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(1.0)[0] == 1.0
    assert (optuna_migrations() / "versions").is_dir()
    cached = _CachedStorage(RDBStorage("sqlite://"))
    assert isinstance(cached._backend, RDBStorage)
    assert cached._backend.engine.dialect.name == "sqlite"
    study = optuna.create_study()
    study.add_trial(create_trial(value=1.0))
    assert [trial.number for trial in study._get_trials()] == [0]
    assert "_get_trials" in inspect.getsource(GPSampler), "no view is needed any more"


PARAMS: dict[str, Any] = {"alpha_10": 0.1 + 0.2, "alpha_2": 1 / 3, "shift": True, "range": "größer"}


def finished(state: TrialState = TrialState.COMPLETE, value: float | None = None, **changes: Any) -> FrozenTrial:
    trial = create_trial(
        **{
            "state": state,
            "value": value,
            "params": PARAMS,
            "distributions": SPACE,
            "user_attrs": {"candidate": "sampler", "seconds": 0.1, "facts": {"größe": [1, None, 2.5]}},
            "system_attrs": {"origin": "test"},
            "intermediate_values": {1: 3.5, 2: 1e-300, 4: float("nan")},
            **changes,
        }
    )
    trial.datetime_start = datetime(2026, 7, 1, 12, 30, 5, 250_000)
    trial.datetime_complete = trial.datetime_start + timedelta(seconds=90)
    return trial


def every_kind() -> list[FrozenTrial]:
    plain: dict[str, Any] = {"params": {}, "distributions": {}, "system_attrs": {}, "intermediate_values": {}}
    return [
        finished(value=10.0, **plain),
        finished(value=0.1 + 0.2),
        finished(TrialState.PRUNED),
        finished(TrialState.PRUNED, value=4.0),
        finished(TrialState.FAIL, user_attrs={"reason": "the loss is nan"}),
        finished(value=float("inf"), user_attrs={}),
    ]


def new_study(storage: BaseStorage, name: str) -> tuple[optuna.Study, int]:
    study = optuna.create_study(study_name=name, storage=storage, sampler=optuna.samplers.TPESampler(seed=1))
    return study, storage.get_study_id_from_name(name)


def rows(database: Database, study_id: int) -> dict[str, list[dict[str, Any]]]:
    """All rows of a study's trials, in the order they were written, with numbers in place of ids."""
    catalogue = MetaData()
    catalogue.reflect(database.engine, only=("trials", *TABLES))
    trials = catalogue.tables["trials"]

    def read(table: Table, keys: Sequence[int]) -> list[dict[str, Any]]:
        (key,) = table.primary_key
        chosen = select(table).where(table.c.trial_id.in_(keys)).order_by(key)
        own = {key.name, "study_id"}
        return [{k: v for k, v in row.items() if k not in own} for row in connection.execute(chosen).mappings()]

    with database.engine.connect() as connection:
        keys = select(trials.c.trial_id, trials.c.number).where(trials.c.study_id == study_id)
        numbers = {row.trial_id: row.number for row in connection.execute(keys)}
        found = {name: read(table, list(numbers)) for name, table in catalogue.tables.items() if name != "studies"}
    for row in (row for name in TABLES for row in found[name]):
        row["trial_id"] = numbers[row["trial_id"]]
    return found


def fields(trial: FrozenTrial) -> dict[str, Any]:
    """Everything a trial holds but its id, as text: nan differs from itself."""
    return {k: repr(v) for k, v in vars(trial).items() if k != "_trial_id"}


class TestContract:
    def test_the_rows_are_those_of_add_trial(
        self, database: Database, storage: BaseStorage, request: pytest.FixtureRequest
    ) -> None:
        one_by_one, reference = new_study(storage, "one by one")
        for trial in every_kind():
            one_by_one.add_trial(trial)
        request.getfixturevalue("no_detour")
        bulk, study_id = new_study(storage, "bulk")
        insert_trials(storage, study_id, every_kind())
        expected, found = rows(database, reference), rows(database, study_id)
        for table in ("trials", *TABLES):
            assert expected[table], f"nothing to compare in {table}"
            assert found[table] == expected[table], table
        fresh = optuna_storage(database)
        for reader in (storage, fresh):
            trials, wanted = reader.get_all_trials(study_id), reader.get_all_trials(reference)
            assert [fields(t) for t in trials] == [fields(t) for t in wanted]
            assert [list(t.params) for t in trials] == [list(t.params) for t in wanted]
        assert bulk.best_trial.number == 1

    def test_what_was_read_before_does_not_hide_what_comes(self, database: Database, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "read before")
        elsewhere = optuna.load_study(study_name="read before", storage=optuna_storage(database))
        for total in (1, 3, 6):
            insert_trials(storage, study_id, every_kind()[len(study.trials) : total])
            assert [t.number for t in study.trials] == list(range(total))
            assert [t.number for t in elsewhere.trials] == list(range(total))

    def test_samplers_and_add_trial_go_on(self, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "goes on")
        _, other = new_study(storage, "another study")
        insert_trials(storage, study_id, [finished(value=float(i)) for i in range(12)])
        insert_trials(storage, other, [finished(value=0.0)])
        asked = study.ask(SPACE)
        assert asked.number == 12
        assert set(asked.params) == set(SPACE)
        insert_trials(storage, study_id, [finished(value=0.5), finished(TrialState.PRUNED)])
        study.tell(asked, 0.25)
        study.add_trial(finished(value=0.75))
        assert [t.number for t in study.trials] == list(range(16))
        assert [t.value for t in study.trials[12:]] == [0.25, 0.5, None, 0.75]
        assert study.best_trial.number == 0

    def test_numbers_are_given_once(self, database: Database, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "together")
        together = threading.Barrier(3)

        def work(add: Callable[[], None]) -> None:
            together.wait()
            for _ in range(4):
                add()

        def in_bulk() -> None:
            insert_trials(optuna_storage(database), study_id, [finished(value=1.0), finished(value=2.0)])

        threads = [threading.Thread(target=work, args=(add,)) for add in (in_bulk, in_bulk, one_at_a_time(study))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [t.number for t in study.trials] == list(range(20))
        assert all(set(t.params) == set(SPACE) for t in study.trials), "no trial has another's parameters"


def one_at_a_time(study: optuna.Study) -> Callable[[], None]:
    return lambda: study.add_trial(finished(value=3.0))


class TestNumbersAskedFor:
    def test_a_repeated_call_changes_nothing(self, database: Database, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "repeated")
        insert_trials(storage, study_id, every_kind()[:2], first=0)
        insert_trials(storage, study_id, every_kind()[2:], first=2)
        before = rows(database, study_id)
        insert_trials(storage, study_id, every_kind()[2:], first=2)
        insert_trials(storage, study_id, every_kind()[:2], first=0)
        assert rows(database, study_id) == before
        assert len(study.trials) == 6

    @pytest.mark.parametrize(
        ("first", "trials"),
        [
            (0, [finished(value=9.0), finished(value=2.0)]),  # another value
            (0, [finished(value=1.0, params={**PARAMS, "alpha_10": 0.5}), finished(value=2.0)]),  # another parameter
            (0, [finished(TrialState.PRUNED, value=1.0), finished(value=2.0)]),  # another state
            (1, [finished(value=2.0), finished(value=3.0)]),  # only one of them is there
            (3, [finished(value=3.0)]),  # one would be missing before it
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, database: Database, storage: BaseStorage, first: int, trials: list[FrozenTrial]
    ) -> None:
        name = f"does not fit {first} {trials[0].state} {trials[0].value} {trials[0].params['alpha_10']}"
        _, study_id = new_study(storage, name)
        insert_trials(storage, study_id, [finished(value=1.0), finished(value=2.0)], first=0)
        before = rows(database, study_id)
        with pytest.raises(StorageError, match="holds 2 trials"):
            insert_trials(storage, study_id, trials, first=first)
        assert rows(database, study_id) == before

    def test_a_lost_connection_and_a_lost_answer_are_not_seen(
        self, database: Database, storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study, study_id = new_study(storage, "lost")
        losses = ["before the commit", "after it"]
        real = optuna_trials._insert

        def lose(*arguments: Any) -> None:
            how = losses.pop() if losses else ""
            if how != "before the commit":
                real(*arguments)
            if how:
                raise OperationalError("INSERT", {}, Exception(how), connection_invalidated=True)

        monkeypatch.setattr(optuna_trials, "_insert", lose)
        insert_trials(storage, study_id, every_kind(), first=0)
        assert losses == []
        assert [t.number for t in study.trials] == list(range(6))

    @pytest.mark.usefixtures("no_detour")
    def test_a_fence_that_refuses_leaves_nothing(self, database: Database, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "fenced")

        class Refused(Exception):
            pass

        def refuse(connection: Connection) -> None:
            assert connection.execute(select(1)).scalar() == 1
            raise Refused

        for first in (0, None):
            with pytest.raises(Refused):
                insert_trials(storage, study_id, every_kind(), first=first, fence=refuse)
        assert study.trials == []

    @pytest.mark.usefixtures("no_detour")
    def test_what_the_database_refuses_does_not_pass_a_fence_by(self, database: Database, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "refused behind a fence")

        def fail(connection: Connection) -> None:
            connection.execute(text("SELECT nonsense FROM nowhere"))

        with pytest.raises(StorageInternalError):
            insert_trials(storage, study_id, every_kind(), fence=fail)
        assert study.trials == []

    def test_storages_without_tables(self) -> None:
        storage = InMemoryStorage()
        _, study_id = new_study(storage, "memory")
        insert_trials(storage, study_id, every_kind(), first=0)
        with pytest.raises(StorageError, match="does not hold 0"):
            insert_trials(storage, study_id, every_kind(), first=0)
        with pytest.raises(ValueError, match="relational"):
            insert_trials(storage, study_id, every_kind(), fence=lambda _: None)
        assert storage.get_n_trials(study_id) == 6


class TestErrors:
    def test_an_empty_list_changes_nothing(self, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "empty")
        insert_trials(storage, study_id, [])
        assert study.trials == []

    def test_an_error_leaves_nothing_of_the_trials(self, database: Database, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "refused")
        with pytest.raises(TypeError, match="JSON"):
            insert_trials(storage, study_id, [finished(value=1.0), finished(value=2.0, user_attrs={"key": object()})])
        assert study.trials == []
        assert all(found == [] for found in rows(database, study_id).values())

    def test_trials_that_wait_are_refused(self, storage: BaseStorage) -> None:
        study, study_id = new_study(storage, "waiting")
        with pytest.raises(ValueError, match="WAITING"):
            insert_trials(storage, study_id, [finished(value=1.0), finished(TrialState.WAITING)])
        assert study.trials == []

    def test_a_study_that_is_not_there(self, storage: BaseStorage) -> None:
        with pytest.raises(KeyError, match="987654"):
            insert_trials(storage, 987_654, [finished(value=1.0)])

    def test_what_the_database_refuses_optuna_tries_again(
        self, storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study, study_id = new_study(storage, "deadlock")

        def deadlock(*_: object) -> None:
            raise OperationalError("INSERT", {}, Exception("deadlock detected"))

        monkeypatch.setattr(optuna_trials, "_parts", deadlock)
        insert_trials(storage, study_id, every_kind())
        assert [t.number for t in study.trials] == list(range(6))
        assert [t.state for t in study.trials] == [t.state for t in every_kind()]


def test_storages_without_tables_take_trials_one_by_one() -> None:
    storage = InMemoryStorage()
    study, study_id = new_study(storage, "memory")
    insert_trials(storage, study_id, every_kind())
    assert [t.state for t in study.trials] == [t.state for t in every_kind()]


@pytest.mark.usefixtures("no_detour")
def test_a_storage_without_its_cache_is_written_in_bulk() -> None:
    storage = RDBStorage("sqlite://")
    study_id = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "bare")
    insert_trials(storage, study_id, every_kind())
    assert [t.number for t in storage.get_all_trials(study_id)] == list(range(6))


def test_no_lock_is_held_in_a_pipeline(
    database: Database, storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server counts no idle time inside psycopg's pipelines: a process frozen there would hold its locks for good.
    if database.backend != "postgresql":
        pytest.skip("only psycopg turns many rows into a pipeline")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("rows went through a pipeline")

    study = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "no pipeline")
    monkeypatch.setattr(psycopg.Cursor, "executemany", refuse)
    insert_trials(storage, study, [finished(value=float(i)) for i in range(40)], first=0)
    assert [trial.value for trial in storage.get_all_trials(study)] == [float(i) for i in range(40)]
