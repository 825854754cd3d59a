"""Records of compressions, on every backend: what is stored comes back, and goes with its study."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import optuna
import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.connection import Database, StorageError, optuna_storage
from alphasmith.storage.runs.compressions import CompressionSpec, CompressionStore, is_compression_id
from alphasmith.storage.upkeep.check import violations
from alphasmith.storage.upkeep.garbage import collect

NOW = datetime(2026, 1, 31, 12, 30, 15, 123456, tzinfo=UTC)
SPEC = CompressionSpec(
    config={"drop": {"tolerances": {"si_sdr": 0.6}}, "note": "ü"},
    config_digest="b" * 64,
    model_digest="c" * 64,
    folder="/somewhere/{id}",
    directions=("minimize", "minimize"),
)


@pytest.fixture
def store(database: Database) -> Iterator[CompressionStore]:
    seconds, tokens = itertools.count(), itertools.count()
    store = CompressionStore(
        database, clock=lambda: NOW + timedelta(seconds=next(seconds)), token=lambda: f"{next(tokens):06x}"
    )
    yield store
    for record in store.listing():
        store.delete(record)


def test_what_is_stored_comes_back(store: CompressionStore) -> None:
    made = store.create(SPEC)
    assert (made.id, made.folder, made.created) == ("c-20260131-000000", "/somewhere/c-20260131-000000", NOW)
    assert store.get("c-2026") == made == store.listing()[0]
    assert [direction.name for direction in store.study(made).directions] == ["MINIMIZE", "MINIMIZE"]


def test_an_id_in_use_is_not_given_again(database: Database) -> None:
    tokens = iter(["00000a", "00000a", "00000b", *["00000a"] * 9])
    store = CompressionStore(database, clock=lambda: NOW, token=lambda: next(tokens))
    first, second = store.create(SPEC), store.create(SPEC)
    assert [first.id[-6:], second.id[-6:]] == ["00000a", "00000b"]
    with pytest.raises(StorageError, match="no free compression id"):
        store.create(SPEC)
    for record in (first, second):
        store.delete(record)


def test_it_moves_and_says_why(store: CompressionStore) -> None:
    made = store.create(SPEC)
    failed = store.move(made, "failed", reason="the loss is NaN")
    assert store.get(made.id) == failed
    assert (failed.status, failed.reason, failed.finished) == ("failed", "the loss is NaN", NOW + timedelta(seconds=1))
    again = store.move(failed, "running", config={"more": 1})
    assert (again.status, again.reason, again.finished, again.config) == ("running", "", None, {"more": 1})


def test_only_unfinished_ones_of_the_same_kind_are_found_newest_first(store: CompressionStore) -> None:
    old, new, done = store.create(SPEC), store.create(SPEC), store.create(SPEC)
    store.move(done, "finished")
    assert store.find_unfinished("b" * 64, "c" * 64) == [new, old]
    assert store.find_unfinished("b" * 64, "d" * 64) == store.find_unfinished("d" * 64, "c" * 64) == []


def test_a_prefix_names_one_or_the_error_says_which(store: CompressionStore) -> None:
    store.create(SPEC)
    store.create(SPEC)
    with pytest.raises(InputError, match=r"fits 2 compressions \(c-20260131-000000"):
        store.get("c-2026")
    with pytest.raises(InputError, match="no compression 'c-2027'"):
        store.get("c-2027")
    assert store.get("c-20260131-000001").id == "c-20260131-000001"


def test_a_study_that_says_nothing_is_no_compression_and_stays(store: CompressionStore, database: Database) -> None:
    name = "c-20260131-ffffff/compression"
    study = optuna.create_study(study_name=name, storage=optuna_storage(database))
    assert store.listing() == []
    with pytest.raises(InputError, match="cannot be read"):
        store.get("c-20260131-ffffff")
    study.set_user_attr("alphasmith", {"id": "c-20260131-ffffff"})
    assert store.listing() == []
    optuna.delete_study(study_name=name, storage=optuna_storage(database))


def test_deleting_one_takes_its_study(store: CompressionStore, database: Database) -> None:
    made = store.create(SPEC)
    store.delete(made)
    with pytest.raises(KeyError):
        optuna.load_study(study_name=made.study, storage=optuna_storage(database))


def test_upkeep_leaves_them_alone_and_tells_of_one_that_nobody_works_on(
    store: CompressionStore, database: Database
) -> None:
    made = store.create(SPEC)
    collect(database, older_than=timedelta(0))
    assert store.get(made.id) == made
    if database.backend == "sqlite":  # elsewhere the process may be on a machine that sees the folder
        (violation,) = violations(database)
        assert (violation.check, violation.subject) == ("compressions", made.id)
        assert f"alphasmith resume {made.id}" in violation.problem
    store.move(made, "interrupted")
    assert list(violations(database)) == []


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("c-20260131-00000a", True), ("c-2026", True), ("c-", False), ("r-20260131-00000a", False), ("c-x", False)],
)
def test_ids_are_told_from_those_of_runs(text: str, is_one: bool) -> None:
    assert is_compression_id(text) == is_one
