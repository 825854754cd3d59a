"""Throwaway databases on every backend. Servers are found by address, or the tests that need them are skipped."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from alphasmith.storage.database import Database, initialise, open_database

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


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "mysql"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an empty database that lives as long as the test module."""
    backend = request.param
    if backend == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('database')}/new/alphasmith.db"
        return
    server, drop = _SERVERS[backend]
    name = f"alphasmith_test_{secrets.token_hex(6)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError as error:
        pytest.skip(f"no {backend} server: {str(error.orig).splitlines()[0]}")
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(drop.format(name=name)))
        engine.dispose()


@pytest.fixture(scope="module")
def database(address: str) -> Iterator[Database]:
    """An initialised database on every backend."""
    opened = open_database(address)
    initialise(opened)
    yield opened
    opened.close()
