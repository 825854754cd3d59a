"""The connection to a database: opening, creation of the schema, and Optuna's storage on it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, column, create_engine, event, inspect, select, table, text
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import IntegrityError as SqlIntegrityError
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.storage.database.retries import PATIENCE as RETRY_PATIENCE
from alphasmith.storage.database.retries import retry_lost
from alphasmith.storage.database.schema_lock import PATIENCE, schema_lock
from alphasmith.storage.database.urls import mask, parse, secrets_of
from alphasmith.storage.migrations import HEAD, VERSION_TABLE

# Alembic and Optuna are imported where they are needed: reading records needs neither, and must not wait for them.
if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage

__all__ = [
    "Database",
    "DuplicateError",
    "StorageError",
    "initialise",
    "mask",
    "open_database",
    "optuna_storage",
    "retry_lost",
]

T = TypeVar("T")

_Listener = Callable[[Any, ConnectionPoolEntry], None]

#: A process that is frozen inside a transaction keeps its locks, and so the others, no longer than this [s].
_ASLEEP = 20
#: A link that is silently gone is noticed within two minutes; by itself TCP waits for hours.
_POSTGRESQL = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_MYSQL = {"connect_timeout": 10, "read_timeout": 120, "write_timeout": 120}

_MIGRATIONS = Path(__file__).parents[1] / "migrations"

# Alembic keeps the running migration in module attributes, so two threads must not migrate at once.
_ALEMBIC = threading.Lock()


class StorageError(AlphasmithError):
    """The database refused or lost an operation; the driver's own error is its cause. Nothing was written."""


class DuplicateError(StorageError):
    """A row with the same key exists."""


@dataclass(frozen=True)
class Database:
    """An open database. Usable from many threads; open it anew in every process (connections do not survive a fork).

    Attributes:
        engine: Connections, with the settings of the backend.
        url: The full address. It may hold a password: print ``masked`` instead.
        masked: The address without passwords.
    """

    engine: Engine = field(repr=False)
    url: str = field(repr=False)
    masked: str

    @property
    def backend(self) -> str:
        """``sqlite``, ``postgresql`` or ``mysql`` (MariaDB included)."""
        return self.engine.url.get_backend_name()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction: commits at the end, rolls back on any error.

        Raises:
            DuplicateError: A key exists already.
            StorageError: Any other error of the database, chained.
        """
        session = Session(self.engine, expire_on_commit=False)
        try:
            yield session
            session.commit()
        except SqlIntegrityError as error:
            raise DuplicateError(f"{self.masked}: {driver_line(error, self.engine.url)}") from error
        except SQLAlchemyError as error:
            raise StorageError(f"{self.masked}: {driver_line(error, self.engine.url)}") from error
        finally:
            session.close()  # rolls back what was not committed

    def transact(
        self,
        operation: Callable[[Session], T],
        *,
        patience: float = RETRY_PATIENCE,
        sleep: Callable[[float], None] = time.sleep,
    ) -> T:
        """Run ``operation`` in one transaction, again from its beginning if the database lost it.

        Lost means: the connection dropped, the server restarts or refuses connections, a deadlock or serialization failure,
        a locked SQLite file. A commit whose answer was lost may have happened, so the operation must be safe to run twice.

        Args:
            operation: Given a new session each time; commits when it returns.
            patience: Seconds after which it is not begun again; 0: once only.
            sleep: Waits for so many seconds.

        Returns:
            What the operation returns.

        Raises:
            DuplicateError: A key exists already.
            StorageError: Any other error of the database, chained; a lost operation after ``patience`` seconds.
        """

        def once() -> T:
            with self.session() as session:
                return operation(session)

        return retry_lost(once, patience=patience, sleep=sleep)

    def close(self) -> None:
        """Close all idle connections; the object stays usable."""
        self.engine.dispose()


def open_database(url: str) -> Database:
    """Connect to a database and check that it answers. No table is made: see ``initialise``.

    SQLite: WAL, ``synchronous=NORMAL``, 60 s of patience, foreign keys enforced; folders are created. Servers: connections
    are tested before use, so a dropped one is replaced unseen.

    Args:
        url: ``sqlite:///FILE``, ``postgresql://...`` (psycopg 3) or ``mysql://...`` (PyMySQL).

    Raises:
        InputError: Field ``storage``: not an address, driver missing, unreachable, or not writable. Without passwords.
    """
    parsed = parse(url)
    if parsed.get_backend_name() == "sqlite":
        _make_folder(parsed)
    try:
        engine = create_engine(parsed, **_engine_settings(parsed))
    except ModuleNotFoundError as error:
        raise InputError("storage", f"driver {error.name!r} is not installed", _driver_remedy(parsed)) from error
    except NoSuchModuleError as error:
        raise InputError("storage", f"driver {parsed.drivername!r} is unknown", _driver_remedy(parsed)) from error
    _set_up(engine, parsed, _sqlite_connection)
    database = Database(engine=engine, url=parsed.render_as_string(hide_password=False), masked=mask(str(url)))
    try:
        if database.backend == "sqlite":
            _switch_to_wal(database)
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        engine.dispose()
        raise _unusable(database, error) from error
    return database


def check_writable(url: str) -> None:
    """Refuse an SQLite file that cannot be written, without making it; a server says so when it is opened.

    Raises:
        InputError: Field ``storage``: not an address, or a file or folder that cannot be written.
    """
    parsed = parse(url)
    if parsed.get_backend_name() != "sqlite":
        return
    file = Path(str(parsed.database))
    folder = next(parent for parent in file.parents if parent.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise InputError("storage", f"{file} is not writable", "choose another place with --storage sqlite:///FILE")


def check_exists(url: str) -> None:
    """Refuse to read from a database that nothing was ever written to.

    Raises:
        InputError: Field ``storage``: not an address, or an SQLite file that does not exist.
    """
    parsed = parse(url)
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).is_file():
        raise InputError(
            "storage", f"no database {parsed.database}", "run `alphasmith run`, or name one with --storage"
        )


def find_database(url: str) -> Database | None:
    """Connect to a database that holds runs, its tables brought up to date; None where there is none. Nothing is made.

    Raises:
        InputError: Field ``storage``: as ``open_database`` and ``initialise``.
    """
    parsed = parse(url)
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).is_file():
        return None
    database = open_database(url)
    with ExitStack() as unless_returned:
        unless_returned.callback(database.close)
        try:
            ours = _revision(database) is not None
        except SQLAlchemyError as error:
            raise _unusable(database, error) from error
        if not ours:
            return None
        initialise(database)
        unless_returned.pop_all()
    return database


def open_existing(url: str) -> Database:
    """Connect to a database that holds runs; tables of an earlier Alphasmith are brought up to date.

    Raises:
        InputError: Field ``storage``: as ``check_exists`` and ``find_database``, or nothing of ours is in it.
    """
    check_exists(url)
    database = find_database(url)
    if database is None:
        raise InputError("storage", f"{mask(url)} holds no runs", "name the database that `alphasmith run` used")
    return database


@contextmanager
def opened(url: str, *, create: bool = False) -> Iterator[Database]:
    """A database that holds runs, closed at the end of the block.

    Args:
        url: Its address.
        create: Make it, or its tables, where there is none.

    Raises:
        InputError: Field ``storage``: as ``open_existing``; with ``create`` as ``open_database`` and ``initialise``.
    """
    with closing(open_database(url) if create else open_existing(url)) as database:
        if create:
            initialise(database)
        yield database


def open_optuna(url: str) -> BaseStorage:
    """Open and initialise a database and return Optuna's storage on it."""
    database = open_database(url)
    initialise(database)
    return optuna_storage(database)


def initialise(database: Database, *, force: bool = False) -> None:
    """Make Optuna's tables and ours, or bring ours up to date. Safe to call from many processes at once.

    One process works under a lock (a file lock beside an SQLite file, an advisory lock on servers), the others wait and
    find everything in place. Optuna's tables are made first; our migrations change none of them.

    Args:
        database: Open.
        force: Upgrade even while a process of an earlier version drives a run; it may fail.

    Raises:
        InputError: Field ``storage``: the database belongs to another version of Optuna or to a newer Alphasmith, is not
            writable, or another process held the lock for too long.
    """
    try:
        # Our version is written last, so a database at head is complete and needs no lock.
        if _revision(database) == HEAD:
            return
        with schema_lock(database.engine, database.masked):
            revision = _revision(database)
            if revision == HEAD:
                return
            if revision is not None and revision not in _known_revisions():
                raise InputError(
                    "storage",
                    f"{database.masked} was made by a newer Alphasmith (schema {revision})",
                    "upgrade Alphasmith or use another database",
                )
            _optuna_rdb(database, create=True).engine.dispose()
            _migrate(database, force=force)
    except SQLAlchemyError as error:
        raise _unusable(database, error) from error


def optuna_storage(database: Database) -> BaseStorage:
    """Optuna's storage on the same database, with the same settings and Optuna's own cache around it.

    The cache makes polling by a dashboard eight times cheaper. Foreign keys are left as Optuna expects them on SQLite:
    not enforced.

    Args:
        database: An initialised database.

    Raises:
        InputError: Field ``storage``: the tables are missing or of another version of Optuna.
    """
    try:
        ready = inspect(database.engine).has_table("version_info")
    except SQLAlchemyError as error:
        raise _unusable(database, error) from error
    if not ready:
        raise InputError("storage", f"{database.masked} has no tables yet", "initialise it first")
    from optuna.storages import get_storage

    return get_storage(_optuna_rdb(database, create=False))


def _engine_settings(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": PATIENCE}}
    # Sessions are held per call only, so a handful of connections serves a process; servers count them.
    settings: dict[str, Any] = {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 6, "pool_recycle": 1800}
    patient = _POSTGRESQL if url.get_backend_name() == "postgresql" else _MYSQL
    settings["connect_args"] = {name: value for name, value in patient.items() if name not in url.query}
    return settings


def _set_up(engine: Engine, url: URL, sqlite: _Listener) -> None:
    """Set up every new connection: on SQLite what ``sqlite`` tells it, on servers how long it may sleep."""
    listener = {"sqlite": sqlite, "postgresql": _postgresql_connection}.get(url.get_backend_name(), _mysql_connection)
    event.listen(engine, "connect", listener)
    if listener is _postgresql_connection:
        # Many rows in one statement. psycopg's executemany is a pipeline, in which the server counts no idle time: a process
        # that is frozen in the middle of one would keep its locks for good.
        engine.dialect.use_insertmanyvalues_wo_returning = True


def _postgresql_connection(connection: Any, _entry: ConnectionPoolEntry) -> None:
    connection.autocommit = True  # a setting made in a transaction would end with it
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_ASLEEP}s'")
    connection.autocommit = False


def _mysql_connection(connection: Any, _entry: ConnectionPoolEntry) -> None:
    if "mariadb" not in str(connection.get_server_info()).lower():
        return  # MySQL itself has no such setting
    with connection.cursor() as cursor:
        cursor.execute(f"SET SESSION idle_transaction_timeout = {_ASLEEP}")


def _sqlite_connection(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    _pragmas(connection, "synchronous=NORMAL", "foreign_keys=ON")


def _sqlite_optuna_connection(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    _pragmas(connection, "synchronous=NORMAL")


def _pragmas(connection: DBAPIConnection, *pragmas: str) -> None:
    cursor = connection.cursor()
    for pragma in pragmas:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _make_folder(url: URL) -> None:
    path = Path(str(url.database))
    if path.is_dir():
        raise InputError("storage", f"{path} is a folder", "name a file: sqlite:///FOLDER/alphasmith.db")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "storage", f"{path.parent} is not writable ({error.strerror})", "choose another folder for the database"
        ) from error


def _switch_to_wal(database: Database) -> None:
    # The mode is a property of the file. Switching does not wait for other connections as statements do, hence the lock.
    with database.engine.connect() as connection:
        if _journal_mode(connection) == "wal":
            return
    with schema_lock(database.engine, database.masked), database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    database.engine.dispose()


def _journal_mode(connection: Connection) -> str:
    return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())


def _revision(database: Database) -> str | None:
    with database.engine.connect() as connection:
        if not inspect(connection).has_table(VERSION_TABLE):
            return None
        version = select(table(VERSION_TABLE, column("version_num")).c.version_num)
        return connection.execute(version).scalar()


def _known_revisions() -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory(str(_MIGRATIONS)).walk_revisions()}


def _migrate(database: Database, *, force: bool) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["force"] = force
    config.attributes["connection"] = connection = database.engine.connect()
    with _ALEMBIC, connection:
        try:
            if database.backend == "sqlite":
                # Keys must rest while tables are rebuilt; an open transaction makes the migration whole or absent.
                connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            command.upgrade(config, "head")
            connection.commit()
        finally:
            connection.invalidate()  # no one else may get a connection without keys


def _optuna_rdb(database: Database, *, create: bool) -> RDBStorage:
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage

    url = database.engine.url
    try:
        storage = RDBStorage(
            # Optuna runs the address through str.format.
            url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
            engine_kwargs=_engine_settings(url),
            skip_table_creation=not create,
        )
    except RuntimeError as error:
        raise InputError(
            "storage",
            f"the Optuna tables of {database.masked} belong to another version of Optuna",
            "back the database up and run 'optuna storage upgrade --storage URL', or use another database",
        ) from error
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
        raise _unusable(database, cause or error) from error
    _set_up(storage.engine, url, _sqlite_optuna_connection)
    storage.engine.dispose()  # the connection it opened on the way has not seen the event
    return storage


def _driver_remedy(url: URL) -> str:
    backend = url.get_backend_name()
    return {
        "postgresql": "pip install 'alphasmith[postgresql]'",
        "mysql": "pip install 'alphasmith[mysql]'",
    }.get(backend, "use sqlite:///FILE")


def _unusable(database: Database, error: BaseException) -> InputError:
    message = driver_line(error, database.engine.url)
    if database.backend == "sqlite":
        if "not a database" in message or "malformed" in message:
            return InputError("storage", f"{database.masked} is not an SQLite database", "choose another file")
        if "locked" in message:
            return InputError("storage", f"{database.masked} is locked by another process", "wait for it or end it")
        return InputError(
            "storage", f"{database.masked} is not writable ({message})", "check the permissions of file and folder"
        )
    return InputError(
        "storage", f"{database.masked} cannot be used ({message})", "check address, user, password and that it runs"
    )


def driver_line(error: BaseException, url: URL) -> str:
    """First line of the driver's message, without statements, parameters or anything secret in the address."""
    cause = getattr(error, "orig", None) or error
    # PyMySQL keeps a number and a text; the number alone says nothing.
    told = [part for part in cause.args if isinstance(part, str)] if isinstance(cause, BaseException) else []
    lines = (told[-1] if told else str(cause)).strip().splitlines() or [type(cause).__name__]
    line = lines[0]
    for secret in secrets_of(url):
        line = line.replace(secret, "***")
    return line
