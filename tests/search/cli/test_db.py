"""``alphasmith db``: every command, plain and as JSON; one-line errors; no password in anything it says."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import make_url, text

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.search.cli._db import db
from alphasmith.storage.artifacts.store import default_address
from alphasmith.storage.database.connection import initialise, open_database
from alphasmith.storage.upkeep.check import heads
from tests.support.servers import SERVERS, administrator

PASSWORD = "s3cret-Pa55"


def told(*arguments: str) -> Result:
    """What a command answers; an error of ours is its exception."""
    return CliRunner().invoke(db, list(arguments))


def answer(*arguments: str) -> Any:
    """Its answer as JSON."""
    result = told(*arguments, "--json")
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


@pytest.fixture
def address(tmp_path: Path) -> str:
    """An SQLite database with its tables."""
    url = f"sqlite:///{tmp_path}/runs.db"
    assert told("init", "--storage", url).exit_code == 0
    return url


def test_init_makes_the_tables_and_says_which(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/runs.db"
    result = told("init", "--storage", url)
    database = open_database(url)
    found = heads(database)
    database.close()
    assert found.current
    assert result.stdout == f"{url} is ready: schema {found.ours}, Optuna's {found.optuna}\n"
    assert answer("init", "--storage", url) == {"storage": url, "alphasmith": found.ours, "optuna": found.optuna}


@pytest.mark.parametrize("command", [["upgrade"], ["check"], ["gc"], ["backup", "copy"]])
def test_a_database_that_is_not_there_is_refused_and_not_made(command: list[str], tmp_path: Path) -> None:
    result = told(*command, "--storage", f"sqlite:///{tmp_path}/none.db")
    assert isinstance(result.exception, InputError)
    assert "no database" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_the_database_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert told("init").exit_code == 0
    assert (tmp_path / "alphasmith.db").is_file()
    assert told("check").exit_code == 0


def test_check_lists_what_is_wrong_and_exits_with_one(address: str) -> None:
    assert told("check", "--storage", address).stdout == f"{address} is in order\n"
    assert answer("check", "--deep", "--storage", address) == {"storage": address, "violations": []}
    connection = sqlite3.connect(make_url(address).database or "")
    connection.execute("INSERT INTO alphasmith_site (run_id, name, position, entry) VALUES ('r-gone', 'fc1', 0, '{}')")
    connection.commit()
    connection.close()
    result = told("check", "--storage", address)
    assert result.exit_code == 1
    assert "orphans: alphasmith_site: 1 rows without their run" in result.stdout
    result = told("check", "--json", "--storage", address)
    assert result.exit_code == 1
    assert [item["check"] for item in json.loads(result.stdout)["violations"]] == ["orphans"]
    assert answer("gc", "--storage", address)["removed"] == [
        {"what": "row", "name": "1 in alphasmith_site", "bytes": 0}
    ]
    assert told("check", "--storage", address).exit_code == 0


def test_gc_says_what_and_how_much(address: str) -> None:
    folder = Path(default_address(address))
    folder.mkdir()
    (folder / f"{'0' * 64}.safetensors").write_bytes(b"x" * 2048)
    assert told("gc", "--storage", address).stdout == "0 B freed\n"  # young
    assert "2 KiB would be freed" in told("gc", "--older-than", "0s", "--dry-run", "--storage", address).stdout
    assert answer("gc", "--older-than", "0s", "--storage", address)["bytes"] == 2048
    assert list(folder.iterdir()) == []
    assert "is no length of time" in told("gc", "--older-than", "soon", "--storage", address).stderr


def test_upgrade_and_backup_say_where_the_copy_is(address: str, tmp_path: Path) -> None:
    assert told("upgrade", "--storage", address).stdout.startswith("nothing to upgrade: schema")
    connection = sqlite3.connect(make_url(address).database or "")
    connection.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    connection.commit()
    connection.close()
    assert "schema v3.0.0.d, not" in told("check", "--storage", address).stdout
    done = answer("upgrade", "--storage", address)
    assert done["before"]["optuna"] == "v3.0.0.d"
    assert Path(done["backup"]).is_file()
    assert told("check", "--storage", address).exit_code == 0
    copied = answer("backup", str(tmp_path / "copy.db"), "--storage", address)
    assert copied["bytes"] == (tmp_path / "copy.db").stat().st_size
    assert isinstance(told("backup", str(tmp_path / "copy.db"), "--storage", address).exception, InputError)


@pytest.mark.parametrize("schema", ["0001", "0002"])
def test_a_database_of_an_earlier_version_is_checked_copied_and_upgraded(schema: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    shutil.copy(Path(__file__).parents[2] / "storage" / "data" / f"schema_{schema}.sqlite", tmp_path / "old.db")
    assert f"schema {schema}, not" in told("check", "--storage", url).stdout
    done = answer("upgrade", "--storage", url)
    assert (done["before"]["alphasmith"], done["backup"]) == (schema, f"{tmp_path}/old.db.before-{schema}")
    assert told("check", "--storage", url).stdout == f"{url} is in order\n"
    copied = told("check", "--storage", f"sqlite:///{done['backup']}")
    assert f"schema {schema}, not" in copied.stdout


# ------------------------------------------------------------------------------------------------------ passwords


@pytest.fixture(params=["postgresql", "mysql"])
def guarded(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address, with its password, of an initialised database of a user of its own."""
    name = f"alphasmith_test_{secrets.token_hex(6)}"
    if request.param == "postgresql":
        made = [f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'", f"CREATE DATABASE {name} OWNER {name}"]
        undone = [f"DROP DATABASE IF EXISTS {name} WITH (FORCE)", f"DROP ROLE IF EXISTS {name}"]
    else:
        made = [
            f"CREATE DATABASE {name}",
            f"CREATE USER '{name}'@'%' IDENTIFIED BY '{PASSWORD}'",
            f"GRANT ALL ON {name}.* TO '{name}'@'%'",
        ]
        undone = [f"DROP DATABASE IF EXISTS {name}", f"DROP USER IF EXISTS '{name}'@'%'"]
    url = make_url(SERVERS[request.param]).set(database=name, username=name, password=PASSWORD)
    with administrator(request.param) as engine:
        with engine.connect() as connection:
            for statement in made:
                connection.execute(text(statement))
        try:
            opened = open_database(url.render_as_string(hide_password=False))
            initialise(opened)
            opened.close()
            yield url.render_as_string(hide_password=False)
        finally:
            with engine.connect() as connection:
                for statement in undone:
                    connection.execute(text(statement))


def test_no_command_tells_a_password(
    guarded: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    url = make_url(guarded)
    wrong = url.set(password=f"{PASSWORD}-wrong").render_as_string(hide_password=False)
    lost = url.set(database="no_such_database").render_as_string(hide_password=False)
    away = url.set(port=1).render_as_string(hide_password=False)
    said = []
    for number, place in enumerate((guarded, wrong, lost, away)):
        for command in (["init"], ["upgrade", "--backup", f"u{number}"], ["check"], ["gc"], ["backup", f"b{number}"]):
            result = told(*command, "--storage", place)
            assert result.exception is None or isinstance(result.exception, AlphasmithError), result.exception
            assert (result.exception is None) or place != guarded, result.exception
            assert (result.exception is not None) or place in {guarded, wrong}  # a server may trust everybody
            said += [result.output, str(result.exception)]
            assert "\n" not in str(result.exception)
    out, err = capfd.readouterr()
    everything = "\n".join([*said, out, err, caplog.text])
    assert "***" in everything
    assert PASSWORD not in everything
    for file in ("u0", "b0"):
        data = (tmp_path / file).read_bytes()
        assert len(data) > 1000
        assert PASSWORD.encode() not in data
