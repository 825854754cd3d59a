"""Throwaway databases on every backend. Servers are found by address, or the tests that need them are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from alphasmith.storage.database.connection import Database, initialise, open_database
from tests.support.servers import empty_database


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "mysql"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an empty database that lives as long as the test module."""
    backend = request.param
    if backend == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('database')}/new/alphasmith.db"
        return
    with empty_database(backend) as url:
        yield url


@pytest.fixture(scope="module")
def database(address: str) -> Iterator[Database]:
    """An initialised database on every backend."""
    opened = open_database(address)
    initialise(opened)
    yield opened
    opened.close()
