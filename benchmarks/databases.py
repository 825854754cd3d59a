"""Empty databases to measure on, gone afterwards: SQLite in a file, PostgreSQL and MariaDB or MySQL on servers."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError

BACKENDS = ("sqlite", "postgresql", "mysql")
#: Server and statement that drops a database; addresses may be given by the same variables as for the tests.
_SERVERS = {
    "postgresql": (
        os.environ.get("ALPHASMITH_TEST_POSTGRESQL", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"),
        "DROP DATABASE IF EXISTS {name} WITH (FORCE)",
    ),
    "mysql": (
        os.environ.get("ALPHASMITH_TEST_MYSQL", "mysql+pymysql://root@127.0.0.1:3306/mysql"),
        "DROP DATABASE IF EXISTS {name}",
    ),
}


@contextmanager
def fresh_database(backend: str) -> Iterator[str | None]:
    """Address of an empty database; None where there is no such server."""
    if backend == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{Path(folder) / 'alphasmith.db'}"
        return
    server, drop = _SERVERS[backend]
    name = f"alphasmith_benchmark_{secrets.token_hex(6)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError:
        yield None
        return
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(drop.format(name=name)))
        engine.dispose()
