"""Rows that some other program, or an attacker, put into the table of runs: told of, in nobody's way."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.search.cli.answers import runs_table
from alphasmith.search.cli.commands import list_runs
from alphasmith.storage.database.connection import opened
from alphasmith.storage.queue.status import database_now, live_runs
from alphasmith.storage.runs.entries import SiteRecord
from alphasmith.storage.runs.records import RunRecord, UnreadableRun
from alphasmith.storage.runs.run_store import RunStore
from tests.support.stored_records import record_study, run_spec, study_trials

DEEP = "[" * 500 + "]" * 500


def column(name: str, value: object) -> Callable[[sqlite3.Connection], object]:
    return lambda connection: connection.execute(f"update alphasmith_run set {name} = ? where name = 'odd'", (value,))


ODD: dict[str, tuple[Callable[[sqlite3.Connection], object], str]] = {
    "no JSON": (column("config", "{"), "JSON"),
    "a list": (column("config", "[1]"), "config"),
    "deep": (column("hardware", f'{{"a": {DEEP}}}'), "deep"),
    "half a surrogate pair": (column("hardware", r'{"a": "\ud800"}'), "surrogate"),
    "no time": (column("created", "soon"), "soon"),
    "bytes": (column("reason", b"\xff\x01"), "reason"),
    "no UTF-8": (column("reason", None), "reason"),
    "a number too large": (column("config", '{"a": 1e999}'), "finite"),
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/runs.db"
    with opened(url, create=True) as database:
        store = RunStore(database)
        for name in ("first", "odd", "last"):
            store.create(run_spec(name))
    return url


def spoil(url: str, change: Callable[[sqlite3.Connection], object]) -> None:
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("pragma ignore_check_constraints = on")
        if change is ODD["no UTF-8"][0]:
            connection.execute("update alphasmith_run set reason = cast(x'ff' as text) where name = 'odd'")
        else:
            change(connection)
    connection.close()


@pytest.mark.parametrize("kind", ODD)
def test_a_row_of_another_shape_hides_nothing(kind: str, url: str) -> None:
    change, word = ODD[kind]
    spoil(url, change)
    with opened(url) as database:
        store = RunStore(database)
        found = store.listing()
        (odd,) = [run for run in found if isinstance(run, UnreadableRun)]
        assert {run.name for run in found if isinstance(run, RunRecord)} == {"first", "last"}
        assert word in odd.reason
        assert [run.id for run in store.runs()] == [run.id for run in found if run is not odd]
        with pytest.raises(InputError, match=f"RUN: {odd.id} cannot be read: .*{word}"):
            store.get(odd.id)
        live_runs(database, database_now(database))
    rows = list_runs(url)
    assert [(row["status"], row["id"]) for row in rows if row["status"] == "unreadable"] == [("unreadable", odd.id)]
    assert {tuple(sorted(row)) for row in rows} == {tuple(sorted(rows[0]))}
    json.dumps(rows, allow_nan=False)
    assert odd.id in runs_table(rows)


@pytest.mark.parametrize("value", [f"[{DEEP}]", "{}", '{"name": 1}', "", "no JSON"])
def test_a_site_of_another_shape_is_one_line(value: str, url: str) -> None:
    with opened(url) as database:
        store = RunStore(database)
        run = store.get("odd")
        store.add_site(run.id, SiteRecord(name="a", position=0, mode="left", channels=4))
        spoil(url, lambda connection: connection.execute("update alphasmith_site set entry = ?", (value,)))
        with pytest.raises(InputError, match=f"RUN: sites of {run.id} cannot be read"):
            store.sites(run.id)
        spoil(url, lambda connection: connection.execute("update alphasmith_run set model_groups = ?", (value,)))
        with pytest.raises(InputError, match=f"RUN: groups of {run.id} cannot be read"):
            store.groups(run.id)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a\u202eb", "a\x7f"])
def test_a_name_holds_no_control_characters(name: str, url: str) -> None:
    with opened(url) as database, pytest.raises(InputError, match=r"run\.name"):
        RunStore(database).create(run_spec(name))


def test_what_a_row_says_steers_no_terminal(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    from alphasmith.search.cli.main import main

    spoil(url, column("reason", "\x1b[2J\x07gone\u202e"))
    with pytest.raises(SystemExit):
        main(["list", "--storage", url])
    out: Any = capsys.readouterr().out
    assert r"\x1b[2J\x07gone\u202e" in out
    assert all(c.isprintable() or c == "\n" for c in out)


@pytest.mark.parametrize(
    "statement",
    [
        "update trial_user_attributes set value_json = '{'",
        f"update trial_user_attributes set value_json = '{DEEP}'",
        "update trial_user_attributes set value_json = '[1]' where key = 'candidate'",
        "update trial_user_attributes set value_json = '\"soon\"' where key = 'seconds'",
        "update trial_params set distribution_json = '{}'",
    ],
)
def test_trials_of_another_shape_are_one_line(statement: str, url: str) -> None:
    with opened(url) as database:
        store = RunStore(database)
        run = store.get("odd")
        record_study(database, f"{run.id}/a", study_trials(2, groups=2, generator=np.random.default_rng(0)))
        assert len(store.trials(run.id)) == 2
        spoil(url, lambda connection: connection.execute(statement))
        with pytest.raises(InputError, match=r"^RUN: .*; restore a backup$"):
            store.trials(run.id)
