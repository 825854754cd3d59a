"""One process at a time makes or changes the schema (racing processes fail or corrupt it)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from filelock import FileLock, Timeout
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from alphasmith.objectives.errors import InputError

#: Seconds to wait for a locked database or for another process that makes the schema.
PATIENCE = 60

#: PostgreSQL's code of a lock that was waited for in vain.
_LOCK_NOT_AVAILABLE = "55P03"
#: Key of the advisory lock on servers: the text "alphasmi" as a 64-bit number; any constant would do.
_LOCK_KEY = int.from_bytes(b"alphasmi", "big")


def schema_lock(engine: Engine, masked: str) -> AbstractContextManager[None]:
    """Keep every other process from changing the schema of the same database while the block runs.

    A file lock beside an SQLite file, an advisory lock on servers. Both end with the process that holds them.

    Args:
        engine: Connections to the database.
        masked: What to call it in errors.

    Raises:
        InputError: Field ``storage``: another process held the lock for too long, or the lock file cannot be written.
    """
    if engine.url.get_backend_name() == "sqlite":
        return _file_lock(f"{engine.url.database}.lock", masked)
    return _server_lock(engine, masked)


@contextmanager
def _file_lock(path: str, masked: str) -> Iterator[None]:
    lock = FileLock(path, timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise _locked(masked) from error
    except OSError as error:
        raise InputError(
            "storage", f"{path} is not writable ({error.strerror})", "choose another folder for the database"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _server_lock(engine: Engine, masked: str) -> Iterator[None]:
    # A separate connection: Optuna and Alembic work on others while this one holds the lock.
    with engine.connect() as connection:
        if engine.url.get_backend_name() == "postgresql":
            # Bound to the transaction, so it is given back even through a pooler and when this process is killed.
            connection.execute(text(f"SET LOCAL lock_timeout = '{PATIENCE}s'"))
            # This transaction sleeps while others make the tables.
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            try:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                    raise
                raise _locked(masked) from error
            yield
            connection.rollback()
        else:
            # MySQL's named locks span all databases of a server; the name must tell them apart.
            name = "CONCAT('alphasmith.', MD5(DATABASE()))"
            if not connection.execute(text(f"SELECT GET_LOCK({name}, {PATIENCE})")).scalar():
                raise _locked(masked)
            connection.commit()  # the lock stays, and no transaction sleeps while others make the tables
            try:
                yield
            finally:
                connection.execute(text(f"SELECT RELEASE_LOCK({name})"))


def _locked(masked: str) -> InputError:
    return InputError(
        "storage",
        f"another process has been making the tables of {masked} for {PATIENCE} s",
        "wait for it or end it, then try again",
    )
