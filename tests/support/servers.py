"""Throwaway databases on the servers of this machine. Where there is no such server, tests skip with the reason."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

#: Address of a database to connect to first, per kind of server.
SERVERS = {
    "postgresql": os.environ.get("ALPHASMITH_TEST_POSTGRESQL", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"),
    "mysql": os.environ.get("ALPHASMITH_TEST_MYSQL", "mysql+pymysql://root@127.0.0.1:3306/mysql"),
}


@contextmanager
def administrator(kind: str) -> Iterator[Engine]:
    """Connections to a server, past all of our own code."""
    engine = create_engine(SERVERS[kind], isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    try:
        engine.connect().close()
    except OperationalError as error:
        pytest.skip(f"no {kind} server: {str(error.orig).splitlines()[0]}")
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def empty_database(kind: str, *, password: str | None = None) -> Iterator[str]:
    """Address of an empty database, gone afterwards; with a password if one is to be kept secret."""
    name = f"alphasmith_test_{secrets.token_hex(6)}"
    with administrator(kind) as engine:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            address = make_url(SERVERS[kind]).set(database=name)
            if password is not None:
                address = address.set(password=password)
            yield address.render_as_string(hide_password=False)
        finally:
            drop(engine, name)


def drop(engine: Engine, name: str) -> None:
    """Remove a database, whoever uses it."""
    force = " WITH (FORCE)" if engine.dialect.name == "postgresql" else ""
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name}{force}"))
