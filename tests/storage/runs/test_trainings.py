"""Records of trainings, on every backend: what is stored comes back, states move one way, what is deleted goes whole or is refused."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import optuna
import pytest
from sqlalchemy import text

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.storage.database.connection import Database, StorageError, optuna_storage
from alphasmith.storage.output.reservation import Reservation, reservation_file
from alphasmith.storage.output.reserved_work import driver_of
from alphasmith.storage.runs.records import RunSpec
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.runs.trainings import (
    TrainingRecord,
    TrainingSpec,
    TrainingStatus,
    TrainingStore,
    is_training_id,
    owner_of_study,
)
from alphasmith.storage.upkeep.check import violations
from alphasmith.storage.upkeep.delete import delete_run, delete_training
from alphasmith.storage.upkeep.garbage import collect
from tests.support.boards import LONG, elsewhere

NOW = datetime(2026, 1, 31, 12, 30, 15, 123456, tzinfo=UTC)
SPEC = TrainingSpec(
    parent="r-20260131-000000",
    parent_digest="a" * 64,
    config={"settings": {"learning_rate": 2e-4, "steps": None}, "note": "ü"},
    config_digest="b" * 64,
    data_digest="c" * 64,
    folder="/somewhere/{id}",
)


@pytest.fixture
def store(database: Database) -> Iterator[TrainingStore]:
    """A store whose clock goes on by a second and whose ids are counted; no training is in the database."""
    seconds, tokens = itertools.count(), itertools.count()
    yield TrainingStore(
        database, clock=lambda: NOW + timedelta(seconds=next(seconds)), token=lambda: f"{next(tokens):06x}"
    )
    with database.session() as session:
        session.execute(text("DELETE FROM alphasmith_training"))
        session.execute(text("DELETE FROM alphasmith_run"))


def a_run(database: Database) -> str:
    spec = RunSpec(
        name="run", model_digest="", data_digest="", config={}, scheme="w8a8-channel-static", hardware={}, scope="site",
        versions={}, space_hash="",
    )  # fmt: skip
    return RunStore(database).create(spec).id


def test_what_is_stored_comes_back(store: TrainingStore) -> None:
    made = store.create(SPEC)
    assert made.id == "t-20260131-000000"
    assert (made.status, made.reason, made.created, made.finished, made.entry) == ("running", "", NOW, None, None)
    assert (made.config, made.folder) == (SPEC.config, "/somewhere/t-20260131-000000")
    assert made.run_id is None, "its run is not in this database"
    assert store.get("t-2026") == made
    assert store.listing() == [made]


def test_states_move_one_way(store: TrainingStore) -> None:
    made = store.create(SPEC)
    assert store.interrupt(made.id, "by Ctrl-C").status == "interrupted"
    assert store.find_unfinished("b" * 64, "a" * 64, "c" * 64) == [store.get(made.id)]
    assert store.find_unfinished("b" * 64, "a" * 64, "d" * 64) == []
    again = store.start(made.id)
    assert (again.status, again.reason, again.finished) == ("running", "", None)
    assert store.fail(made.id, "no memory").reason == "no memory"
    done = store.finish(made.id, {"kept": True, "gain": 0.25})
    assert (done.status, done.reason, done.entry) == ("finished", "", {"kept": True, "gain": 0.25})
    assert store.finish(made.id, {"kept": False}).entry == {"kept": True, "gain": 0.25}
    assert store.find_unfinished("b" * 64, "a" * 64, "c" * 64) == []
    with pytest.raises(InputError, match="is finished and cannot become failed"):
        store.fail(made.id, "too late")


def test_what_is_not_there_is_said(store: TrainingStore) -> None:
    first, second = store.create(SPEC), store.create(SPEC)
    assert [record.id for record in store.listing()] == [second.id, first.id]
    with pytest.raises(InputError, match="fits 2 trainings"):
        store.get("t-2026")
    store.delete(first.id)
    store.delete(first.id)
    assert store.get("t-2026") == second
    for missing in ("t-9", first.id):
        with pytest.raises(InputError, match="no training"):
            store.get(missing)
    with pytest.raises(InputError, match="no training"):
        store.start(first.id)
    with pytest.raises(NonFiniteError):
        store.finish(second.id, {"gain": float("nan")})
    with pytest.raises(NonFiniteError):
        replace(SPEC, config={"rate": float("inf")})


def test_a_row_that_holds_no_training_stands_in_nobodys_way(database: Database, store: TrainingStore) -> None:
    whole, damaged = store.create(SPEC), store.create(SPEC)
    with database.session() as session:
        session.execute(text("UPDATE alphasmith_training SET entry = '{' WHERE id = :id"), {"id": damaged.id})
    assert store.listing() == [whole]
    with pytest.raises(InputError, match="restore a backup"):
        store.get(damaged.id)


def test_ids_that_are_taken_are_passed_over(database: Database, store: TrainingStore) -> None:
    taken = store.create(SPEC).id
    tokens = iter([taken[-6:], "ffffff"])
    other = TrainingStore(database, clock=lambda: NOW + timedelta(hours=1), token=lambda: next(tokens))
    assert other.create(SPEC).id == "t-20260131-ffffff"
    stuck = TrainingStore(database, clock=lambda: NOW + timedelta(hours=2), token=lambda: taken[-6:])
    with pytest.raises(StorageError, match="no free training id"):
        stuck.create(SPEC)


def test_ids_tell_trainings_from_runs() -> None:
    assert [is_training_id(name) for name in ("t-20260131-1f9c3a", "t-2026", "t-", "r-20260131-1f9c3a", "test")] == [
        *(True, True, False, False, False)
    ]
    assert owner_of_study("t-20260131-1f9c3a/settings") == "t-20260131-1f9c3a"
    assert owner_of_study("r-20260131-1f9c3a/model") is None
    assert owner_of_study("t-20260131-1f9c3a") is None


def test_a_deleted_run_takes_its_trainings_along(database: Database, store: TrainingStore, tmp_path: Path) -> None:
    run = a_run(database)
    mine = store.create(replace(SPEC, parent=run, folder=f"{tmp_path}/{{id}}"))
    other = store.create(SPEC)
    assert mine.run_id == run
    assert store.listing(run) == [mine]
    storage = optuna_storage(database)
    names = [f"{training.id}/settings" for training in (mine, other)]
    for name in names:
        optuna.create_study(study_name=name, storage=storage)
    for folder in (mine.id, f"{mine.id}.partial-{mine.id}", f"{mine.id}.partial-{mine.id}-0123abcd", "other.partial-1"):
        (tmp_path / folder).mkdir()
    assert {v.check for v in violations(database)} <= {"artifacts", "trainings"}
    told = {(item.what, item.name.rpartition("/")[2]) for item in delete_run(database, run)}
    assert told >= {
        ("folder", f"{mine.id}.partial-{mine.id}"),
        ("study", "settings"),
        ("row", "1 in alphasmith_training"),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.partial-1", mine.id]
    assert store.listing() == [other]
    assert [name for name in optuna.get_all_study_names(storage) if name in names] == names[1:]
    store.delete(other.id)
    assert ("study", names[1]) in {(item.what, item.name) for item in collect(database)}
    assert names[1] not in optuna.get_all_study_names(storage)


@contextmanager
def worked_on(training: TrainingRecord) -> Iterator[Reservation]:
    """While a living process of another machine works on a training."""
    with Reservation(Path(training.folder), storage="", lease=LONG, identity=elsewhere("trainer")) as place:
        place.take(training.id)
        yield place


def test_a_run_and_a_training_that_goes_on_are_not_deleted(
    database: Database, store: TrainingStore, tmp_path: Path
) -> None:
    run = a_run(database)
    training = store.create(replace(SPEC, parent=run, folder=f"{tmp_path}/{{id}}"))
    (tmp_path / f"{training.id}.partial-{training.id}").mkdir()
    with worked_on(training):
        for delete in (
            partial(delete_run, database, run),
            partial(delete_run, database, run, dry_run=True),
            partial(delete_training, database, training),
            partial(delete_training, database, training, dry_run=True),
        ):
            with pytest.raises(InputError, match=rf"^RUN: {training.id}.* is worked on by process .*; .*end it$"):
                delete()
        assert [v for v in violations(database) if v.check == "trainings"] == []
    assert store.listing(run) == [training]
    assert (tmp_path / f"{training.id}.partial-{training.id}").is_dir()
    delete_run(database, run)
    assert (store.listing(), list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "finished"])
def test_a_training_is_deleted_alone(
    database: Database, store: TrainingStore, tmp_path: Path, status: TrainingStatus
) -> None:
    run = a_run(database)
    training, other = (store.create(replace(SPEC, parent=run, folder=f"{tmp_path}/{{id}}")) for _ in range(2))
    storage = optuna_storage(database)
    names = {one.id: f"{one.id}/settings" for one in (training, other)}
    for one in (training, other):
        optuna.create_study(study_name=names[one.id], storage=storage)
        (tmp_path / f"{one.id}.partial-{one.id}").mkdir()
    (tmp_path / training.id).mkdir()
    abandon(training)
    if status == "finished":
        store.finish(training.id, {})
    elif status == "interrupted":
        store.interrupt(training.id, "why")
    elif status == "failed":
        store.fail(training.id, "why")
    would = delete_training(database, store.get(training.id), dry_run=True)
    assert {one.what for one in would} == {"folder", "study", "temporary"}
    assert len(store.listing(run)) == 2
    assert delete_training(database, store.get(training.id)) == would
    assert [record.id for record in store.listing(run)] == [other.id]
    assert [name for name in optuna.get_all_study_names(storage) if name in names.values()] == [names[other.id]]
    assert {path.name for path in tmp_path.iterdir()} == {training.id, f"{other.id}.partial-{other.id}"}
    assert RunStore(database).get(run).id == run
    optuna.delete_study(study_name=names[other.id], storage=storage)


def abandon(training: TrainingRecord) -> None:
    """As if the process of a training had been killed: its reservation stays and nobody renews it."""
    with worked_on(training):
        file = reservation_file(Path(training.folder))
        content = file.read_bytes()
    file.write_bytes(content)
    os.utime(file, (1, 1))


def test_a_training_of_a_dead_process_is_found(database: Database, store: TrainingStore, tmp_path: Path) -> None:
    dead, interrupted = (store.create(replace(SPEC, folder=f"{tmp_path}/{{id}}")) for _ in range(2))
    store.interrupt(interrupted.id, "why")
    abandon(dead)
    (found,) = [v for v in violations(database) if v.check == "trainings"]
    assert found.subject == dead.id
    assert f"`alphasmith resume {dead.id}`" in found.problem
    assert f"`alphasmith delete {dead.id}`" in found.problem
    with worked_on(dead):
        assert [v for v in violations(database) if v.check == "trainings"] == []


def test_a_process_that_works_there_on_something_else_is_not_of_the_training(
    database: Database, store: TrainingStore, tmp_path: Path
) -> None:
    one, other = (store.create(replace(SPEC, folder=f"{tmp_path}/same")) for _ in range(2))
    with worked_on(other):
        assert driver_of(database, one) is None
        assert driver_of(database, other) is not None
        delete_training(database, one)
        assert reservation_file(tmp_path / "same").is_file()
    assert store.listing() == [other]


def test_a_place_that_is_not_seen_from_here_may_be_worked_at(
    database: Database, store: TrainingStore, tmp_path: Path
) -> None:
    training = store.create(replace(SPEC, folder=f"{tmp_path}/elsewhere/{{id}}"))
    seen = database.backend == "sqlite"  # which serves one machine
    assert (driver_of(database, training) is None) == seen
    assert bool([v for v in violations(database) if v.check == "trainings"]) == seen
    store.interrupt(training.id, "why")
    assert driver_of(database, store.get(training.id)) is None
