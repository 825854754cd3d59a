"""A deleted run is gone with all that only it needs; what others need stays, whatever happens in between."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from sqlalchemy import select, text, update

from alphasmith.objectives.errors import InputError
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import Database
from alphasmith.storage.database.tables import Base, RunRow, StoredArtifactRow, WorkerRow
from alphasmith.storage.queue.leases import Identity
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.upkeep.check import violations
from alphasmith.storage.upkeep.delete import delete_run
from alphasmith.storage.upkeep.garbage import collect
from tests.support.boards import board, elsewhere
from tests.support.made_runs import SITE, FinishedRun, age, make, optuna_of, what

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def made(database: Database, tmp_path: Path) -> Iterator[FinishedRun]:
    """A finished run, and nothing of any run afterwards."""
    yield make(database, tmp_path / "store")
    with database.session() as session:
        session.execute(text("DELETE FROM alphasmith_run"))
    for study in optuna.get_all_study_names(optuna_of(database)):
        optuna.delete_study(study_name=study, storage=optuna_of(database))


def rows_of(database: Database, run: str) -> int:
    """Rows of ours that name a run."""
    with database.engine.connect() as connection:
        tables = [table for table in Base.metadata.tables.values() if "run_id" in table.c]
        found = sum(len(connection.execute(select(t.c.run_id).where(t.c.run_id == run)).all()) for t in tables)
        return found + len(connection.execute(select(RunRow.id).where(RunRow.id == run)).all())


def objects(made: FinishedRun) -> set[str]:
    """Ids of the objects in the store of a run."""
    return {item.id for item in made.kept.store.listed() if item.id.endswith(".safetensors")}


def join_from_elsewhere(database: Database, run: str, *, heard: datetime) -> None:
    """A worker of another machine that was last heard of at a time."""
    with database.session() as session:
        session.add(
            WorkerRow(
                id=elsewhere(run).worker, run_id=run, role="worker", host="elsewhere", pid=1, engine="", state="alive",
                joined=heard, heartbeat=heard,
            )
        )  # fmt: skip


@pytest.mark.parametrize("status", ["finished", "failed", "running"])
def test_everything_of_a_run_goes_and_its_output_stays(
    database: Database, tmp_path: Path, made: FinishedRun, status: str
) -> None:
    run = make(database, tmp_path / "store", status=status)
    with database.session() as session:
        then = datetime.now(UTC) - timedelta(days=2)
        session.add(
            WorkerRow(
                id="elsewhere/1/0123abcd/0--", run_id=run.id, role="driver", host="elsewhere", pid=1, engine="", state="left",
                joined=then, heartbeat=then,
            )
        )  # fmt: skip
    left = f"out.partial-{run.id}-0123abcd"
    for folder in ("out", left, "out.partial-0123abcd", "out.partial-mine"):
        (tmp_path / folder).mkdir()
    would = delete_run(database, run.id, dry_run=True)
    assert rows_of(database, run.id) > 5
    assert run.has("result")
    assert delete_run(database, run.id) == would
    found = what(would)
    assert {kind: found[kind] for kind in ("artifact", "study", "folder")} == {"artifact": 3, "study": 1, "folder": 1}
    assert rows_of(database, run.id) == 0
    assert optuna.get_all_study_names(optuna_of(database)) == [made.study]
    assert len(objects(made)) == 3
    assert {path.name for path in tmp_path.iterdir()} >= {"out", "out.partial-mine", "out.partial-0123abcd"}
    assert not (tmp_path / left).exists()
    assert violations(database, deep=True) == []
    assert all(made.has(kind) for kind in ("calibration", "weights", "result"))
    with pytest.raises(InputError, match="no run"):
        delete_run(database, run.id)


def test_an_object_that_another_run_needs_stays(database: Database, tmp_path: Path, made: FinishedRun) -> None:
    other = make(database, tmp_path / "store", status="failed")
    for run in (made, other):
        run.kept.put("weights", "same", {"same": torch.ones(5)})
    assert len(objects(made)) == 7
    delete_run(database, made.id)
    assert other.kept.get("weights", "same") is not None
    assert len(objects(other)) == 4
    assert violations(database, deep=True) == []
    delete_run(database, other.id)
    assert objects(other) == set()


def test_a_result_that_only_its_record_names_goes_or_stays_with_it(
    database: Database, tmp_path: Path, made: FinishedRun
) -> None:
    other = make(database, tmp_path / "store", status="failed")
    made.kept.forget(["result"])
    other.kept.forget(["result"])
    delete_run(database, made.id)
    assert len(objects(other)) == 3
    assert violations(database, deep=True) == []


def test_a_run_that_a_process_works_on_is_refused(database: Database, made: FinishedRun) -> None:
    now = datetime.now(UTC)
    join_from_elsewhere(database, made.id, heard=now)
    for dry_run in (True, False):
        with pytest.raises(InputError, match=r"^RUN: .* is worked on by process 1 on elsewhere; .*end it$"):
            delete_run(database, made.id, dry_run=dry_run)
    with database.session() as session:
        session.execute(update(WorkerRow).values(heartbeat=now - timedelta(days=1)))
    driver = board(database, made.id, identity=Identity.here())
    driver.drive()
    with pytest.raises(InputError, match="worked on by process"):
        delete_run(database, made.id)
    assert made.has("result")
    driver.stop_driving()
    delete_run(database, made.id)
    assert rows_of(database, made.id) == 0


def test_young_objects_are_left_to_the_collector_while_others_work(
    database: Database, tmp_path: Path, made: FinishedRun
) -> None:
    other = make(database, tmp_path / "store", status="failed")
    with database.session() as session:
        query = select(StoredArtifactRow.artifact_id)
        ids = session.scalars(query.where(StoredArtifactRow.run_id == made.id, StoredArtifactRow.kind == "weights"))
        (old,) = ids
    age(made.folder)
    for artifact_id in objects(made) - {old}:
        made.kept.store.backend.touch(artifact_id)
    join_from_elsewhere(database, other.id, heard=datetime.now(UTC))
    found = what(delete_run(database, made.id))
    assert (found["artifact"], found["spared"]) == (1, 1)
    assert violations(database, deep=True) == []
    age(made.folder)
    assert what(collect(database)) == {"artifact": 2}
    assert violations(database, deep=True) == []


def test_a_store_that_another_database_uses_or_that_is_gone_is_spared(
    database: Database, tmp_path: Path, made: FinishedRun
) -> None:
    made.kept.store.announce("postgresql://elsewhere/runs")
    before = objects(made)
    assert what(delete_run(database, made.id))["spared"] == 1
    assert objects(made) == before
    moved = make(database, tmp_path / "moved")
    moved.folder.rename(tmp_path / "away")
    assert "artifact" not in what(delete_run(database, moved.id))
    assert rows_of(database, moved.id) == 0


@pytest.mark.parametrize("at", range(5))  # three objects, a study, the records
def test_a_second_deletion_finishes_what_was_killed_anywhere(
    database: Database, tmp_path: Path, made: FinishedRun, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run = make(database, tmp_path / "store", status="failed")
    steps = itertools.count()

    def dies(real: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            if next(steps) == at:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return step

    storage = type(optuna_of(database))
    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "remove", dies(ArtifactStore.remove))
        patch.setattr(storage, "delete_study", dies(storage.delete_study))
        patch.setattr(RunStore, "delete", dies(RunStore.delete))
        with pytest.raises(KeyboardInterrupt):
            delete_run(database, run.id)
    assert next(steps) == at + 1
    assert RunStore(database).get(run.id).status == "failed"
    delete_run(database, run.id)
    assert rows_of(database, run.id) == 0
    assert optuna.get_all_study_names(optuna_of(database)) == [made.study]
    assert len(objects(made)) == 3
    assert made.kept.get("weights", SITE) is not None
    assert violations(database, deep=True) == []
