"""A copy of a whole database in one file, consistent while others write; it appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from sqlalchemy.engine import URL

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import usable_path
from alphasmith.storage.database.connection import Database, StorageError
from alphasmith.storage.database.schema_lock import PATIENCE
from alphasmith.storage.database.urls import secrets_of
from alphasmith.storage.files.durable import NO_SPACE, sync_file, sync_folder

_FIELD = "FILE"


def back_up(database: Database, file: Path) -> int:
    """Copy everything in a database, Optuna's tables included, into a new file.

    SQLite: an SQLite file (a copy put in the place of the first restores it). PostgreSQL: ``pg_dump``, custom format, for
    ``pg_restore``. MySQL and MariaDB: SQL of ``mysqldump`` or ``mariadb-dump``. Passwords go to these through the environment.

    Args:
        database: Open.
        file: Must not exist.

    Returns:
        Its size [bytes].

    Raises:
        InputError: The file exists or cannot be written, or the program is not installed.
        StorageError: The database could not be read.
    """
    usable_path(_FIELD, file)
    file = file.expanduser().absolute()
    if file.exists() or file.is_symlink():
        raise InputError(_FIELD, f"{file} already exists", "choose another name")
    if not file.parent.is_dir():
        raise InputError(_FIELD, f"there is no folder {file.parent}", "make it, or choose another one")
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        # Only its owner reads it: the database may be better guarded than this folder.
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        _copy(database, partial)
        sync_file(partial)
        _publish(partial, file)
        return file.stat().st_size
    except OSError as error:
        if error.errno in NO_SPACE:
            raise _no_space(file) from error
        raise InputError(_FIELD, f"{file} cannot be written ({error.strerror})", "choose another place") from error
    finally:
        for rest in (partial, *(partial.with_name(partial.name + end) for end in ("-wal", "-shm", "-journal"))):
            with suppress(OSError):
                rest.unlink(missing_ok=True)


def _publish(partial: Path, file: Path) -> None:
    try:
        os.link(partial, file)  # fails where a rename would replace what another made meanwhile
    except FileExistsError as error:
        raise InputError(_FIELD, f"{file} already exists", "choose another name") from error
    except OSError:  # a device without links
        os.rename(partial, file)
    sync_folder(file.parent)


def _copy(database: Database, partial: Path) -> None:
    url = database.engine.url
    if database.backend == "sqlite":
        _copy_sqlite(database, partial)
    elif database.backend == "postgresql":
        command = ["pg_dump", "--format=custom", "--no-password", f"--file={partial}"]
        _dump(database, partial, command, _postgresql_environment(url), "PostgreSQL's client programs")
    else:
        _dump(database, partial, _mysql_command(database, partial), _mysql_environment(url), "MySQL's client programs")


def _copy_sqlite(database: Database, partial: Path) -> None:
    try:
        with (
            closing(sqlite3.connect(str(database.engine.url.database), timeout=PATIENCE)) as source,
            closing(sqlite3.connect(partial)) as target,
        ):
            source.backup(target)  # in one step: a snapshot, which with a write-ahead log holds no writer up
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise _no_space(partial) from error
        raise StorageError(f"{database.masked} cannot be copied ({error})") from error


def _dump(
    database: Database, partial: Path, command: Sequence[str], environment: Mapping[str, str], needed: str
) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise InputError(_FIELD, f"{command[0]} is not installed", f"install {needed}, or use another backup")
    done = subprocess.run(
        [program, *command[1:]],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        line = next(reversed([row for row in done.stderr.splitlines() if row.strip()]), f"exit code {done.returncode}")
        for secret in secrets_of(database.engine.url):
            line = line.replace(secret, "***")
        if "No space left" in done.stderr:
            raise _no_space(partial)
        raise StorageError(f"{database.masked} cannot be copied ({line.strip()})")


def _postgresql_environment(url: URL) -> dict[str, str]:
    from psycopg.pq import Conninfo  # installed: the database is open

    told: dict[str, object] = {"host": url.host, "port": url.port, "user": url.username, "dbname": url.database}
    told |= {"password": url.password, **url.query}
    variables = {item.keyword.decode(): item.envvar for item in Conninfo.get_defaults()}
    found = {}
    for keyword, value in told.items():
        variable = variables.get(keyword)
        if value is not None and variable is not None:
            found[variable.decode()] = ",".join(value) if isinstance(value, tuple) else str(value)
    return found


def _mysql_command(database: Database, partial: Path) -> list[str]:
    url = database.engine.url
    with database.engine.connect() as connection:
        mariadb = bool(getattr(connection.dialect, "is_mariadb", False))
    names = ("mariadb-dump", "mysqldump") if mariadb else ("mysqldump", "mariadb-dump")
    program = next((name for name in names if shutil.which(name)), names[0])
    command = [program, "--single-transaction", "--quick", "--no-tablespaces", f"--result-file={partial}"]
    socket = url.query.get("unix_socket")
    if isinstance(socket, str):
        command.append(f"--socket={socket}")
    else:
        # A host named localhost would mean a socket to this program, and does not to the driver.
        command += ["--protocol=TCP", f"--host={url.host or '127.0.0.1'}", f"--port={url.port or 3306}"]
    if url.username:
        command.append(f"--user={url.username}")
    for option in ("ssl_ca", "ssl_cert", "ssl_key"):
        value = url.query.get(option)
        if isinstance(value, str):
            command.append(f"--{option.replace('_', '-')}={value}")
    return [*command, str(url.database)]


def _mysql_environment(url: URL) -> dict[str, str]:
    return {"MYSQL_PWD": str(url.password)} if url.password else {}


def _no_space(file: Path) -> InputError:
    return InputError(
        _FIELD, f"no space left in {file.parent}; nothing was kept", "free space or choose another device"
    )
