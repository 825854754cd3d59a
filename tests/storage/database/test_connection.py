"""Opening, schema and Optuna side by side, on every backend."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Integer, MetaData, Table, event, func, inspect, select, text

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.storage.database import connection as room
from alphasmith.storage.database import schema_lock as locks
from alphasmith.storage.database.connection import (
    Database,
    DuplicateError,
    StorageError,
    initialise,
    open_database,
    optuna_storage,
)
from alphasmith.storage.database.tables import Base
from alphasmith.storage.migrations import CONTEXT_OPTIONS, HEAD, VERSION_TABLE

_RUN = {
    "id": "r-interrupted",
    "name": "",
    "status": "created",
    "reason": "",
    "folder": "",
    "model_digest": "",
    "data_digest": "",
    "config": {},
    "scheme": "",
    "hardware": {},
    "scope": "site",
    "versions": {},
    "space_hash": "",
    "created": datetime(2026, 1, 31, tzinfo=UTC),
}
_RACE = """
import os, sys
from alphasmith.storage.database.connection import initialise, open_database, optuna_storage
import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)
ready, go = os.pipe()
children = []
for number in range(8):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(ready, 1)  # returns when the parent closes its end: all start together
        database = open_database(sys.argv[1])
        initialise(database)
        study = optuna.create_study(study_name=f"race-{number}", storage=optuna_storage(database))
        study.tell(study.ask(), 1.0)
        os._exit(0)
    children.append(child)
os.close(go)
failed = [child for child in children if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
sys.exit(f"{len(failed)} of 8 failed" if failed else 0)
"""


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Database]:
    """An SQLite database without tables."""
    opened = open_database(f"sqlite:///{tmp_path}/a.db")
    yield opened
    opened.close()


def _tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names())


class TestEmptyDatabase:
    """In order: each test leaves the module's database further along."""

    @pytest.mark.slow
    def test_eight_processes_open_it_at_once(self, address: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _RACE, address], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        opened = open_database(address)
        names = {summary.study_name for summary in optuna.get_all_study_summaries(optuna_storage(opened))}
        assert names == {f"race-{number}" for number in range(8)}
        opened.close()

    def test_models_and_migrations_agree(self, database: Database) -> None:
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts=dict(CONTEXT_OPTIONS))
            assert compare_metadata(context, Base.metadata) == []

    def test_the_newest_migration_is_the_one_that_is_asked_for(self) -> None:
        assert ScriptDirectory(str(Path(room.__file__).parents[1] / "migrations")).get_current_head() == HEAD

    def test_the_comparison_would_see_a_difference_but_never_optunas_tables(self, database: Database) -> None:
        other = MetaData()
        for table in Base.metadata.tables.values():
            table.to_metadata(other)
        Table("alphasmith_run", other, Column("extra", Integer), extend_existing=True)
        with database.engine.connect() as connection:
            found = compare_metadata(MigrationContext.configure(connection, opts=dict(CONTEXT_OPTIONS)), other)
        assert [(item[0], item[3].name) for item in found] == [("add_column", "extra")]

    def test_version_tables_are_apart(self, database: Database) -> None:
        assert {"alembic_version", VERSION_TABLE, *Base.metadata.tables} <= _tables(database)
        with database.engine.connect() as connection:
            ours = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars().all()
            theirs = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
        assert ours == [HEAD]
        assert HEAD not in theirs

    def test_initialise_again_changes_nothing(self, database: Database) -> None:
        before = _tables(database)
        initialise(database)
        assert _tables(database) == before

    def test_optuna_keeps_trials_pruning_and_deletes(self, database: Database) -> None:
        storage = optuna_storage(database)
        study = optuna.create_study(study_name="whole", storage=storage)
        trial = study.ask({"alpha_0": optuna.distributions.FloatDistribution(0.1, 0.9)})
        trial.report(0.5, 1)
        trial.set_user_attr("reason", "a" * 500)
        study.tell(trial, 0.25)
        again = optuna.load_study(study_name="whole", storage=optuna_storage(database))
        assert again.best_value == 0.25
        assert again.trials[0].intermediate_values == {1: 0.5}
        optuna.delete_study(study_name="whole", storage=storage)
        assert "whole" not in {s.study_name for s in optuna.get_all_study_summaries(storage)}

    def test_a_newer_schema_is_refused(self, database: Database) -> None:
        with database.engine.begin() as connection:
            connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
        try:
            with pytest.raises(InputError, match="newer Alphasmith") as caught:
                initialise(database)
            assert caught.value.field == "storage"
        finally:
            with database.engine.begin() as connection:
                connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0003'"))
        initialise(database)

    def test_another_optuna_schema_is_refused(self, database: Database) -> None:
        with database.engine.begin() as connection:
            was = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            connection.execute(text("UPDATE alembic_version SET version_num = 'v99.0.0'"))
        try:
            with pytest.raises(InputError, match="another version of Optuna"):
                optuna_storage(database)
        finally:
            with database.engine.begin() as connection:
                connection.execute(text("UPDATE alembic_version SET version_num = :was"), {"was": was})
        optuna_storage(database)

    def test_waiting_for_another_that_makes_the_tables_ends(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(locks, "PATIENCE", 1)
        with (
            locks.schema_lock(database.engine, database.masked),
            pytest.raises(InputError, match="another process has been making the tables"),
            locks.schema_lock(database.engine, database.masked),
        ):
            pass

    def test_an_interrupted_migration_goes_on(self, database: Database) -> None:
        with database.engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                table.drop(connection)
            connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))

        def interrupt(_c: Any, _cursor: Any, statement: str, _p: Any, _x: Any, _m: bool) -> None:
            if "ix_alphasmith_trial_digest_params" in statement:
                raise KeyboardInterrupt

        event.listen(database.engine, "before_cursor_execute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            initialise(database)
        event.remove(database.engine, "before_cursor_execute", interrupt)
        left = _tables(database) & set(Base.metadata.tables)
        # MySQL commits every table by itself; the others take all of them back.
        assert bool(left) == (database.backend == "mysql")
        initialise(database)
        self.test_models_and_migrations_agree(database)

    def test_threads_may_initialise_together(self, database: Database) -> None:
        failures: list[AlphasmithError] = []

        def work() -> None:
            try:
                initialise(database)
            except AlphasmithError as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_errors_inside_a_session_leave_nothing(self, database: Database) -> None:
        with pytest.raises(StorageError) as caught, database.session() as session:
            session.execute(text("CREATE TABLE_ nonsense"))
        assert caught.value.__cause__ is not None
        assert "\n" not in str(caught.value)
        site = Base.metadata.tables["alphasmith_site"]
        row = {"run_id": "r-none", "name": "fc1", "position": 0, "entry": "{}"}
        with pytest.raises(DuplicateError), database.session() as session:
            session.execute(site.insert(), [row])  # no such run: a key is violated

    def test_an_interrupt_inside_a_session_leaves_nothing(self, database: Database) -> None:
        run = Base.metadata.tables["alphasmith_run"]

        def work() -> None:
            with database.session() as session:
                session.execute(run.insert(), [_RUN])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work()
        with database.session() as session:
            assert session.execute(select(func.count()).select_from(run)).scalar() == 0


class TestSqlite:
    def test_first_connection_has_every_setting(self, fresh: Database) -> None:
        for _ in range(2):
            with fresh.engine.connect() as connection:
                found = [
                    connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                    for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
                ]
            assert found == ["wal", 1, 1, 60000]
            fresh.close()

    def test_optunas_connection_is_as_fast(self, fresh: Database) -> None:
        initialise(fresh)
        rdb = room._optuna_rdb(fresh, create=False)
        with rdb.engine.connect() as connection:
            found = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            ]
        assert found == ["wal", 1, 0, 60000]
        rdb.engine.dispose()

    def test_two_names_of_one_file_are_one_database(self, tmp_path: Path) -> None:
        open_database(f"sqlite:///{tmp_path}/a.db").close()
        (tmp_path / "b.db").symlink_to(tmp_path / "a.db")
        linked = open_database(f"sqlite:///{tmp_path}/b.db")
        assert linked.engine.url.database == str(tmp_path / "a.db")
        linked.close()

    def test_folders_are_made(self, tmp_path: Path) -> None:
        open_database(f"sqlite:///{tmp_path}/a/b/c.db").close()
        assert (tmp_path / "a/b/c.db").is_file()

    def test_path_with_braces_and_percent(self, tmp_path: Path) -> None:
        opened = open_database(f"sqlite:///{tmp_path}/x{{1}} 100%.db")
        initialise(opened)
        optuna.create_study(storage=optuna_storage(opened), study_name="odd")
        assert [path.name for path in tmp_path.glob("*.db")] == ["x{1} 100%.db"]
        opened.close()

    @pytest.mark.parametrize(
        ("place", "part"),
        [("file/x.db", "not writable"), ("folder", "is a folder"), ("text.db", "not an SQLite database")],
    )
    def test_unusable_file_is_refused(self, tmp_path: Path, place: str, part: str) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder").mkdir()
        (tmp_path / "text.db").write_text("this is no database, only text " * 100)
        with pytest.raises(InputError, match=part) as caught:
            open_database(f"sqlite:///{tmp_path / place}")
        assert caught.value.field == "storage"
        assert "\n" not in str(caught.value)

    def test_tables_must_be_made_first(self, fresh: Database) -> None:
        with pytest.raises(InputError, match="initialise"):
            optuna_storage(fresh)

    def test_waiting_for_a_locked_file_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "PATIENCE", 0.1)
        holder = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InputError, match="locked by another process"):
            open_database(f"sqlite:///{tmp_path}/a.db")
        holder.close()

    def test_checks_make_nothing(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/a/b/c.db"
        room.check_writable(url)
        with pytest.raises(InputError, match="no database"):
            room.check_exists(url)
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "a").write_text("x")
        with pytest.raises(InputError, match="not writable"):
            room.check_writable(url)

    def test_an_opened_database_is_closed_whatever_happens_in_the_block(
        self, fresh: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed: list[str] = []
        monkeypatch.setattr(Database, "close", lambda self: closed.append(self.url))
        with pytest.raises(InputError, match="holds no runs"), room.opened(fresh.url):
            pass
        assert closed == [fresh.url]
        with room.opened(fresh.url, create=True) as made, suppress(ZeroDivisionError):
            assert made.url == fresh.url
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), room.opened(fresh.url):
            raise ZeroDivisionError
        assert closed == [fresh.url] * 3

    def test_only_an_existing_database_passes_the_checks(self, fresh: Database, tmp_path: Path) -> None:
        room.check_exists(fresh.url)
        room.check_writable(fresh.url)
        with pytest.raises(InputError, match="no database"):
            room.check_exists(f"sqlite:///{tmp_path}/no.db")


class TestUnreachable:
    @pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
    def test_closed_port(self, scheme: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        with pytest.raises(InputError, match="cannot be used") as caught:
            open_database(f"{scheme}://user:hunter2%40x@127.0.0.1:9/name?connect_timeout=2")
        assert caught.value.field == "storage"
        printed = f"{caught.value} {caught.value!r} {caplog.text}"
        assert "hunter2" not in printed
        assert "\n" not in str(caught.value)

    def test_missing_driver(self) -> None:
        with pytest.raises(InputError, match="driver"):
            open_database("postgresql+asyncpg_not_there://u:hunter2@127.0.0.1/d")

    def test_driver_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pymysql", None)
        with pytest.raises(InputError, match=r"alphasmith\[mysql\]"):
            open_database("mysql://u:hunter2@127.0.0.1/d")


def test_password_is_in_no_repr_and_no_log(address: str, caplog: pytest.LogCaptureFixture) -> None:
    if address.startswith("sqlite"):
        pytest.skip("SQLite has no passwords")
    caplog.set_level(logging.DEBUG)
    # A server that trusts everyone takes any password; one that does not refuses it. Neither may print it.
    with_password = address.replace("@", ":hunter2@", 1)
    printed = []
    try:
        opened = open_database(with_password)
    except InputError as error:
        printed += [str(error), repr(error)]
    else:
        initialise(opened)
        assert "hunter2" in opened.url
        printed += [repr(opened), opened.masked, repr(opened.engine)]
        opened.close()
    assert "hunter2" not in caplog.text
    assert all("hunter2" not in text for text in printed)


def test_wrong_database_name_is_named(address: str) -> None:
    if address.startswith("sqlite"):
        pytest.skip("SQLite makes its database")
    with pytest.raises(InputError, match="nowhere_to_be_found"):
        open_database(address.rpartition("/")[0] + "/nowhere_to_be_found")
