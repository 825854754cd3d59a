"""What must hold in a database is seen when it does not; what is garbage goes, and nothing else; copies and upgrades are whole."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import pytest
import torch
from sqlalchemy import inspect, make_url, text, update

from alphasmith.objectives.errors import InputError
from alphasmith.storage.artifacts.run_artifacts import place_of
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import Database, StorageError, initialise, open_database
from alphasmith.storage.database.tables import RunRow, TicketRow, WorkerRow
from alphasmith.storage.output.reservation import Reservation, reservation_file
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.upkeep.backup import back_up
from alphasmith.storage.upkeep.check import Violation, heads, violations
from alphasmith.storage.upkeep.garbage import Removal, collect
from alphasmith.storage.upkeep.upgrade import upgrade
from tests.support.made_runs import OLD, FinishedRun, age, make, optuna_of, what

NONE = timedelta(0)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def shown(found: list[Violation]) -> list[str]:
    """Checks that failed, with the problem."""
    return [f"{item.check}: {item.problem}" for item in found]


@pytest.fixture
def made(database: Database, tmp_path: Path) -> Iterator[FinishedRun]:
    """A finished run, and nothing of it afterwards."""
    run = make(database, tmp_path / "store")
    yield run
    with database.session() as session:
        session.execute(text("DELETE FROM alphasmith_run"))
    for study in optuna.get_all_study_names(optuna_of(database)):
        optuna.delete_study(study_name=study, storage=optuna_of(database))


def change(database: Database, statement: str, **values: object) -> None:
    """Change rows behind everybody's back, on SQLite with keys switched off."""
    with database.engine.connect() as connection:
        if database.backend == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.execute(text(statement), values)
        connection.commit()
        connection.invalidate()


# ----------------------------------------------------------------------------------------------------- violations


def test_a_run_that_was_recorded_whole_violates_nothing(database: Database, made: FinishedRun) -> None:
    assert violations(database, deep=True) == []
    assert violations(database, made.kept.store, deep=True) == []


SECOND = "number = 1 AND study_id = (SELECT study_id FROM studies WHERE study_name = :study)"
BREAKS: dict[str, tuple[str, str]] = {
    "no result": ("DELETE FROM alphasmith_result WHERE run_id = :run", "results: done, with 0 results"),
    "not done": (
        "UPDATE alphasmith_ticket SET state = 'waiting' WHERE run_id = :run",
        "results: has a result, but is waiting",
    ),
    "no ticket": ("DELETE FROM alphasmith_ticket WHERE run_id = :run", "results: has a result, but no ticket"),
    "trial twice": (
        f"UPDATE trials SET number = 0 WHERE {SECOND}",
        "trials: is there more than once",
    ),
    "trial running": (
        f"UPDATE trials SET state = 'RUNNING' WHERE {SECOND}",
        "trials: is RUNNING; trials of ours are recorded when they have ended",
    ),
    "wrong size": (
        "UPDATE alphasmith_stored_artifact SET bytes = 1 WHERE run_id = :run AND kind = 'weights'",
        "bytes, not 1",
    ),
    "no store": (
        "UPDATE alphasmith_run SET artifacts = '' WHERE id = :run",
        "artifacts: its run names no artifact store",
    ),
}


def test_what_does_not_hold_is_seen(database: Database, tmp_path: Path, made: FinishedRun) -> None:
    broken = {}
    for name, (statement, _) in BREAKS.items():
        run = make(database, tmp_path / "store")
        broken[name] = run.id
        values = {key: value for key, value in (("run", run.id), ("study", run.study)) if f":{key}" in statement}
        change(database, statement, **values)
    found = violations(database)
    for name, (_, told) in BREAKS.items():
        assert any(told in line for line in shown([item for item in found if broken[name] in item.subject])), name
    assert not [item for item in found if made.id in item.subject]


def test_objects_that_are_gone_or_damaged_are_seen(database: Database, made: FinishedRun) -> None:
    weights, calibration = (
        next(item for item in made.kept.store.listed() if item.id == artifact)
        for artifact in (kept_id(database, made, "weights"), kept_id(database, made, "calibration"))
    )
    path = made.folder / weights.id
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert violations(database) == []  # only a deep look reads objects
    made.kept.store.remove(calibration.id)
    found = shown(violations(database, deep=True))
    assert len(found) == 2
    assert any(line.endswith("is gone") for line in found)
    assert any("not what was recorded" in line for line in found)


def kept_id(database: Database, made: FinishedRun, kind: str) -> str:
    """Id of an object."""
    with database.engine.connect() as connection:
        query = text("SELECT artifact_id FROM alphasmith_stored_artifact WHERE run_id = :run AND kind = :kind")
        return str(connection.execute(query, {"run": made.id, "kind": kind}).scalar_one())


def test_a_store_that_is_not_there_is_one_violation(database: Database, made: FinishedRun) -> None:
    made.folder.rename(made.folder.with_name("moved"))
    (found,) = violations(database)
    assert "is no folder of this machine; 3 artifacts are due" in found.problem
    assert violations(database, ArtifactStore.open(str(made.folder.with_name("moved")))) == []


def test_a_running_ticket_needs_a_lease_or_a_driver(database: Database, tmp_path: Path, made: FinishedRun) -> None:
    run = make(database, tmp_path / "store", status="running")
    now = datetime.now(UTC)
    ticket = {"state": "running", "lease_until": now - timedelta(minutes=1)}
    with database.session() as session:
        session.execute(text("DELETE FROM alphasmith_result WHERE run_id = :run"), {"run": run.id})
        session.execute(update(TicketRow).where(TicketRow.run_id == run.id).values(ticket))
    (found,) = violations(database)
    assert found.check == "leases"
    assert run.id in found.subject
    assert violations(database, now=now - timedelta(minutes=2)) == []  # the lease had not run out then
    with database.session() as session:
        driver = {"driver": "elsewhere/1/aa/0--", "driver_until": now + timedelta(minutes=5)}
        session.execute(update(RunRow).where(RunRow.id == run.id).values(driver))
    assert violations(database) == []


def test_another_schema_is_the_only_violation(database: Database, made: FinishedRun) -> None:
    change(database, "UPDATE alphasmith_alembic_version SET version_num = '0001'")
    try:
        (found,) = violations(database)
        assert "schema 0001, not" in found.problem
    finally:
        change(database, "UPDATE alphasmith_alembic_version SET version_num = :head", head=heads(database).ours_head)
    change(
        database, "DROP INDEX ix_alphasmith_run_created" + (" ON alphasmith_run" if database.backend == "mysql" else "")
    )
    try:
        (found,) = violations(database)
        assert "ix_alphasmith_run_created" in found.subject
    finally:
        change(database, "CREATE INDEX ix_alphasmith_run_created ON alphasmith_run (created)")


# -------------------------------------------------------------------------------------------------------- garbage


def test_garbage_of_a_finished_run_goes_and_its_records_stay(database: Database, made: FinishedRun) -> None:
    finish_long_ago(database, made.id)
    age(made.folder)
    dry = collect(database, dry_run=True)
    assert what(dry) == {"artifact row": 1, "artifact": 3}
    assert made.has("weights")
    assert collect(database) == dry
    assert sum(item.bytes for item in dry) > 0
    assert not made.has("weights")
    assert [p.name for p in made.folder.iterdir()] == [next(p.name for p in made.folder.glob("used-by-*"))]
    assert len(made.store.sites(made.id)) == 1
    assert len(made.store.trials(made.id)) == 2
    assert violations(database, deep=True) == []
    assert collect(database) == []


def finish_long_ago(database: Database, run: str) -> None:
    """As if it had finished two days ago."""
    with database.session() as session:
        session.execute(update(RunRow).where(RunRow.id == run).values(finished=datetime.now(UTC) - OLD))


def test_runs_that_can_go_on_and_young_objects_lose_nothing(
    database: Database, tmp_path: Path, made: FinishedRun
) -> None:
    for status in ("running", "failed"):
        run = make(database, tmp_path / status, status=status)
        age(run.folder)
        assert collect(database, older_than=timedelta(minutes=1)) == []
        assert all(run.has(kind) for kind in ("calibration", "weights", "result"))
    assert made.has("weights")  # finished, but younger than the grace


def test_a_result_without_an_artifact_row_is_kept_while_its_run_can_go_on(
    database: Database, tmp_path: Path, made: FinishedRun
) -> None:
    run = make(database, tmp_path / "store", status="failed")
    run.kept.forget(["result"])
    age(run.folder)
    collect(database)
    assert violations(database, deep=True) == []


def test_an_object_that_two_runs_need_goes_with_the_second(
    database: Database, tmp_path: Path, made: FinishedRun
) -> None:
    other = make(database, tmp_path / "store", status="failed")
    mine, theirs = ({"same": torch.ones(5)} for _ in range(2))
    assert made.kept.put("weights", "same", mine) == other.kept.put("weights", "same", theirs)
    finish_long_ago(database, made.id)
    age(made.folder)
    collect(database)
    assert made.kept.get("weights", "same") is None
    assert other.kept.get("weights", "same") is not None


def test_a_stray_object_goes_and_one_being_written_stays(database: Database, made: FinishedRun) -> None:
    stray = made.kept.store.put({"x": torch.zeros(4)})
    (made.folder / ".00.partial").write_bytes(b"123")
    (made.folder / "note.txt").write_text("somebody's")
    age(made.folder)
    young = made.kept.store.put({"x": torch.zeros(5)})
    (made.folder / ".01.partial").write_bytes(b"1")
    assert what(collect(database)) == {"artifact": 1, "temporary": 1}
    names = {path.name for path in made.folder.iterdir()}
    assert {young.path, ".01.partial", "note.txt"} <= names
    assert not {stray.path, ".00.partial"} & names


def test_a_store_that_another_database_uses_is_spared(database: Database, made: FinishedRun) -> None:
    stray = made.kept.store.put({"x": torch.zeros(4)})
    made.kept.store.announce("postgresql://elsewhere/runs")
    age(made.folder)
    assert what(collect(database)) == {"spared": 1}
    made.kept.store.check(stray.path)
    assert what(collect(database, shared=True)) == {"artifact": 1}


def test_a_database_is_another_one_although_its_address_is_the_same(tmp_path: Path) -> None:
    # Two machines, each with its own /data/runs.db, and one bucket.
    places = []
    for _ in range(2):
        made = open_database(f"sqlite:///{tmp_path}/runs.db")
        initialise(made)
        places.append(place_of(made))
        assert place_of(made) == places[-1], "asked twice"
        made.close()
        for file in tmp_path.iterdir():
            file.unlink()
    assert len(set(places)) == 2


def test_what_another_database_may_need_is_not_discarded_with_a_finished_run(made: FinishedRun) -> None:
    made.kept.put("calibration", "rows", {"x": torch.zeros(3)})
    made.kept.store.announce("postgresql://elsewhere/runs")
    before = {item.id for item in made.kept.store.listed()}
    assert made.kept.discard(["calibration"]) == 0
    assert {item.id for item in made.kept.store.listed()} == before
    assert made.kept.get("calibration", "rows") is None


def test_rows_and_studies_of_a_deleted_run_go(database: Database, tmp_path: Path, made: FinishedRun) -> None:
    other = make(database, tmp_path / "store")
    mine = optuna.create_study(study_name="r-mine/of my own", storage=optuna_of(database))
    change(database, "DELETE FROM alphasmith_run WHERE id = :run", run=other.id)
    orphaned = database.backend == "sqlite"  # servers cannot switch keys off
    assert (shown(violations(database)) != []) == orphaned
    removed = what(collect(database))
    assert removed.pop("study") == 1
    assert (removed.pop("row", 0) > 0) == orphaned
    assert removed == {}
    assert violations(database) == []
    assert set(optuna.get_all_study_names(optuna_of(database))) == {made.study, mine.study_name}


def test_unfinished_output_folders_of_ended_runs_go(database: Database, tmp_path: Path, made: FinishedRun) -> None:
    live = make(database, tmp_path / "store", status="running")
    now = datetime.now(UTC)
    with database.session() as session:
        for run, token in ((made.id, "0123abcd"), (live.id, "4567abcd")):
            session.add(
                WorkerRow(
                    id=f"elsewhere/1/{token}/0--", run_id=run, role="driver", host="elsewhere", pid=1, engine="", state="alive",
                    joined=now, heartbeat=now - OLD if run == made.id else now,
                )
            )  # fmt: skip
    mine, other = (f"out.partial-{run}-{token}" for run, token in ((made.id, "0123abcd"), (live.id, "4567abcd")))
    foreign = (
        "out.partial-0123abcd",
        "out.partial-mine",
        f"other.partial-{made.id}-0123abcd",
        f"out.partial-{made.id}-9999abcd",
    )
    for name in (mine, other, *foreign, "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"1234")
    assert collect(database) == []  # young
    for name in (mine, other, *foreign, "out"):
        age(tmp_path / name)
    assert collect(database) == [Removal(what="folder", name=str(tmp_path / mine), bytes=4)]  # the other one is at work
    with database.session() as session:
        session.execute(update(WorkerRow).values(heartbeat=now - OLD))
    assert collect(database) == [Removal(what="folder", name=str(tmp_path / other), bytes=4)]
    assert {p.name for p in tmp_path.iterdir()} == {*foreign, "out", "store"}


def test_the_reservation_of_a_killed_driver_goes(database: Database, tmp_path: Path, made: FinishedRun) -> None:
    killed = Reservation(tmp_path / "out", storage="", lease=60.0)
    file = reservation_file(tmp_path / "out")
    for run, gone in (("r-20260101-ffffff", False), (made.id, True)):
        killed.take(run)
        assert collect(database) == []  # young
        os.utime(file, times=((datetime.now(UTC) - OLD).timestamp(),) * 2)
        found = collect(database)
        assert ([item.name for item in found], file.exists()) == ([str(file)] if gone else [], not gone)


# -------------------------------------------------------------------------------------------------------- backups


def test_a_backup_is_whole_and_refuses_to_replace(database: Database, tmp_path: Path, made: FinishedRun) -> None:
    file = tmp_path / "copy"
    assert back_up(database, file) == file.stat().st_size > 1000
    assert file.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    if database.backend == "sqlite":
        copy = open_database(f"sqlite:///{file}")
        assert [run.id for run in RunStore(copy).runs()] == [made.id]
        assert violations(copy) == []
        copy.close()
    elif database.backend == "postgresql":
        listed = subprocess.run(["pg_restore", "--list", str(file)], capture_output=True, text=True, check=True)
        assert "TABLE DATA public alphasmith_result" in listed.stdout
    else:
        dumped = file.read_text()
        assert "CREATE TABLE `alphasmith_result`" in dumped
        assert made.id in dumped
        assert "-- Dump completed" in dumped
    with pytest.raises(InputError, match="already exists"):
        back_up(database, file)
    with pytest.raises(InputError, match="there is no folder"):
        back_up(database, tmp_path / "no" / "copy")


def test_a_copy_made_while_others_write_is_of_one_moment(tmp_path: Path) -> None:
    """Every transaction writes two rows: a copy with one of them would be torn."""
    database = open_database(f"sqlite:///{tmp_path}/busy.db")
    with database.session() as session:
        session.execute(text("CREATE TABLE pair (n INTEGER)"))
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            with database.session() as session:
                session.execute(text("INSERT INTO pair VALUES (1)"))
                session.execute(text("INSERT INTO pair VALUES (2)"))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(10):
            back_up(database, tmp_path / f"copy{number}")
            connection = sqlite3.connect(tmp_path / f"copy{number}")
            assert connection.execute("SELECT count(*) % 2 FROM pair").fetchone() == (0,)
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            connection.close()
    finally:
        ended.set()
        writer.join()
        database.close()


def test_a_program_that_is_missing_or_fails_leaves_nothing(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if database.backend == "sqlite":
        pytest.skip("needs no program")
    gone = replace(database, engine=database.engine.execution_options())
    gone.engine.url = make_url(database.url).set(database="no_such_database")
    with pytest.raises(StorageError, match="cannot be copied"):
        back_up(gone, tmp_path / "copy")
    gone.engine.url = make_url(database.url)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="is not installed; install"):
        back_up(database, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- upgrades


def older(database: Database) -> None:
    """Optuna's tables as its earlier version had them."""
    index = "trials_study_id_key"
    if index in {found["name"] for found in inspect(database.engine).get_indexes("trials")}:
        change(database, f"DROP INDEX {index}" + (" ON trials" if database.backend == "mysql" else ""))
    change(database, "UPDATE alembic_version SET version_num = 'v3.0.0.d'")


def test_upgrade_copies_first_and_brings_both_schemas_to_their_heads(database: Database, made: FinishedRun) -> None:
    assert upgrade(database).backup is None
    older(database)
    assert not heads(database).current
    done = upgrade(database)
    assert (done.before.optuna, done.after.current) == ("v3.0.0.d", True)
    assert "trials_study_id_key" in {index["name"] for index in inspect(database.engine).get_indexes("trials")}
    assert violations(database) == []
    assert (done.backup is not None) == (database.backend == "sqlite")
    if done.backup is not None:
        assert done.backup.name == f"alphasmith.db.before-{done.before.ours}"
        copy = open_database(f"sqlite:///{done.backup}")
        assert heads(copy).optuna == "v3.0.0.d"
        copy.close()


@pytest.mark.parametrize(
    "column", [lambda now: {"driver": "elsewhere/1/aa/0--", "driver_until": now + OLD}, None], ids=["driver", "worker"]
)
def test_upgrade_refuses_while_a_run_goes_on(
    database: Database, made: FinishedRun, column: Callable[[datetime], dict[str, object]] | None
) -> None:
    older(database)
    now = datetime.now(UTC)
    with database.session() as session:
        if column is not None:
            session.execute(update(RunRow).values(column(now)))
        else:
            session.add(
                WorkerRow(
                    id="elsewhere/1/aa/0--", run_id=made.id, role="worker", host="elsewhere", pid=1, engine="", state="alive",
                    joined=now, heartbeat=now,
                )
            )  # fmt: skip
    with pytest.raises(InputError, match=r"1 live run .*process 1 on elsewhere.*--force"):
        upgrade(database)
    assert heads(database).optuna == "v3.0.0.d"
    assert upgrade(database, force=True).after.current


def test_upgrade_refuses_what_a_newer_version_made(database: Database, made: FinishedRun) -> None:
    change(database, "UPDATE alembic_version SET version_num = 'v99'")
    try:
        with pytest.raises(InputError, match="newer Optuna"):
            upgrade(database)
    finally:
        change(database, "UPDATE alembic_version SET version_num = :head", head=heads(database).optuna_head)
