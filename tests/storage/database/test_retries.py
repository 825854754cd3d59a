"""What is repeated and what is not, and for how long."""

from __future__ import annotations

import itertools
import sqlite3
import time
from pathlib import Path

import optuna
import psycopg
import pymysql  # type: ignore[import-untyped]
import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.storage.database import connection as room
from alphasmith.storage.database.connection import (
    Database,
    StorageError,
    initialise,
    open_database,
    optuna_storage,
    retry_lost,
)
from alphasmith.storage.database.retries import is_lost


class Time:
    """A clock that moves when someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def sqlite_error(path: Path) -> sqlite3.OperationalError:
    """What SQLite says when another holds the file."""
    holder, other = (sqlite3.connect(path, isolation_level=None, timeout=0) for _ in range(2))
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError) as caught:
        other.execute("BEGIN IMMEDIATE")
    holder.close()
    other.close()
    return caught.value


def operational(cause: BaseException) -> OperationalError:
    return OperationalError("SELECT", {}, cause)


class TestWhatIsLost:
    @pytest.mark.parametrize(
        "error",
        [
            operational(psycopg.errors.AdminShutdown("terminating connection")),
            operational(psycopg.errors.CannotConnectNow("the database system is starting up")),
            operational(psycopg.errors.DeadlockDetected("deadlock detected")),
            operational(psycopg.errors.SerializationFailure("could not serialize access")),
            operational(psycopg.OperationalError("connection failed: Connection refused")),
            operational(psycopg.OperationalError("FATAL:  the database system is starting up")),
            operational(pymysql.err.OperationalError(2003, "Can't connect")),
            operational(pymysql.err.OperationalError(2013, "Lost connection")),
            operational(pymysql.err.OperationalError(1213, "Deadlock found")),
            OperationalError("SELECT", {}, Exception("any"), connection_invalidated=True),
        ],
    )
    def test_these_are(self, error: SQLAlchemyError) -> None:
        assert is_lost(error)
        for wrapped in (StorageError("ours"), StorageInternalError("Optuna's")):
            wrapped.__cause__ = error
            assert is_lost(wrapped)

    @pytest.mark.parametrize(
        "error",
        [
            operational(psycopg.OperationalError('FATAL:  password authentication failed for user "x"')),
            operational(psycopg.OperationalError('FATAL:  database "x" does not exist')),
            operational(psycopg.errors.DiskFull("no space left on device")),
            operational(pymysql.err.OperationalError(1045, "Access denied")),
            IntegrityError("INSERT", {}, psycopg.errors.UniqueViolation("duplicate key")),
            ProgrammingError("SELECT", {}, psycopg.errors.UndefinedTable("no table")),
            operational(sqlite3.OperationalError("no such table: x")),
            InputError("storage", "is wrong", "mend it"),
            AlphasmithError("any"),
            KeyError("study"),
        ],
    )
    def test_these_are_not(self, error: Exception) -> None:
        assert not is_lost(error)

    def test_a_locked_file_is(self, tmp_path: Path) -> None:
        assert is_lost(operational(sqlite_error(tmp_path / "a.db")))


class TestRepeating:
    def test_it_ends_when_patience_does(self) -> None:
        time, calls = Time(), []

        def work() -> None:
            calls.append(time.now)
            raise StorageError("lost") from operational(psycopg.errors.CannotConnectNow("starting up"))

        with pytest.raises(StorageError, match="lost"):
            retry_lost(work, patience=120.0, sleep=time.sleep, clock=time.clock)
        assert time.now <= 120.0
        assert len(calls) > 20
        pauses = [later - earlier for earlier, later in itertools.pairwise(calls)]
        assert max(pauses) <= 5.0

    def test_what_passes_is_not_seen_and_what_does_not_is_told_at_once(self) -> None:
        time, answers = Time(), [operational(psycopg.errors.DeadlockDetected("deadlock")), None]

        def work() -> str:
            if (error := answers.pop(0)) is not None:
                raise error
            return "done"

        assert retry_lost(work, sleep=time.sleep, clock=time.clock) == "done"
        answers.extend([operational(sqlite3.OperationalError("no such table: x")), None])
        with pytest.raises(OperationalError):
            retry_lost(work, sleep=time.sleep, clock=time.clock)
        assert answers == [None]

    def test_a_transaction_that_waits_for_a_locked_file(self, tmp_path: Path) -> None:
        opened = open_database(f"sqlite:///{tmp_path}/a.db")
        initialise(opened)
        holder = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        calls = []

        def operation(session: Session) -> None:
            session.execute(text("PRAGMA busy_timeout = 0"))
            calls.append(1)
            session.execute(text("DELETE FROM alphasmith_run"))

        def sleep(_: float) -> None:
            holder.close()

        opened.transact(operation, sleep=sleep)
        assert len(calls) == 2
        opened.close()

    def test_errors_of_the_operation_go_through(self, database: Database) -> None:
        def operation(session: Session) -> None:
            session.execute(text("DELETE FROM alphasmith_worker"))
            raise InputError("field", "is wrong", "mend it")

        with pytest.raises(InputError):
            database.transact(operation)
        with pytest.raises(StorageError, match="nowhere"):
            database.transact(lambda session: session.execute(text("SELECT 1 FROM nowhere")))

    def test_who_sleeps_inside_a_transaction_holds_nobody_up(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A process that was stopped there (SIGSTOP, a laptop's lid) would keep its row locks until it is woken.
        if database.backend == "sqlite":
            pytest.skip("SQLite's locks are those of the file; see the faults of docs/faults.md")
        monkeypatch.setattr(room, "_ASLEEP", 1)
        sleeper, other = open_database(database.url), open_database(database.url)
        table = optuna_storage(sleeper).create_new_study([optuna.study.StudyDirection.MINIMIZE], "asleep")
        lock = text("SELECT study_id FROM studies WHERE study_id = :study FOR UPDATE")
        told: list[str] = []

        def sleep(session: Session) -> None:
            told.append("asleep")
            session.execute(lock, {"study": table})
            if len(told) == 1:
                began = time.monotonic()
                other.transact(lambda s: s.execute(lock, {"study": table}).all())
                told.append(f"{time.monotonic() - began < 30}")
            session.execute(lock, {"study": table})

        sleeper.transact(sleep)
        assert told == ["asleep", "True", "asleep"], "the sleeper is repeated, the other one waits a second"
        sleeper.close()
        other.close()

    def test_optunas_calls_may_be_repeated(self, database: Database) -> None:
        if database.backend == "sqlite":
            pytest.skip("SQLite has no connection to cut")
        storage = optuna_storage(database)
        study = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "cut")
        calls = []

        def work() -> int:
            calls.append(1)
            if len(calls) == 1:
                cut_all(database)
            storage.set_study_user_attr(study, "calls", len(calls))
            return int(storage.get_study_user_attrs(study)["calls"])

        assert retry_lost(work) == len(calls)


def cut_all(database: Database) -> None:
    """Let the server end every other connection to the database."""
    with database.engine.connect() as connection:
        if database.backend == "postgresql":
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
            return
        others = text("SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()")
        for number in connection.execute(others).scalars().all():
            connection.execute(text(f"KILL {number}"))
