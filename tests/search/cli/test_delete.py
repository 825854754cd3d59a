"""``alphasmith delete``: it asks, says what went, and refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from alphasmith.objectives.errors import InputError
from alphasmith.search.cli.main import app
from alphasmith.storage.database.connection import Database, initialise, open_database
from tests.support.boards import board
from tests.support.made_runs import FinishedRun, make


@dataclass(frozen=True)
class Kept:
    """A database with one run that is finished and has an output folder."""

    database: Database
    run: FinishedRun

    def told(self, *arguments: str, typed: str = "") -> Result:
        """What the command answers."""
        return CliRunner().invoke(app, ["delete", *arguments, "--storage", self.database.url], input=typed)

    @property
    def ids(self) -> list[str]:
        """Runs that are there."""
        return [record.id for record in self.run.store.runs()]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    database = open_database(f"sqlite:///{tmp_path}/runs.db")
    initialise(database)
    run = make(database, tmp_path / "store")
    run.store.place(run.id, str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    yield Kept(database, run)
    database.close()


def test_it_asks_on_a_terminal_and_takes_no_for_an_answer(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True)
    refused = kept.told(kept.run.id[:12], typed="n\n")
    assert refused.exit_code == 1
    assert refused.stdout == ""
    assert f"{kept.run.id} made, finished" in refused.stderr
    assert "3 x artifact" in refused.stderr
    assert refused.stderr.endswith("nothing was deleted\n")
    assert kept.ids == [kept.run.id]
    done = kept.told(kept.run.id[:12], typed="y\n")
    assert done.exit_code == 0
    assert f"{kept.run.id} is deleted" in done.stdout
    assert done.stdout.endswith(f"its output folder stays: {kept.run.folder.with_name('out')}\n")
    assert kept.ids == []


def test_nothing_goes_unasked_without_a_terminal(kept: Kept) -> None:
    refused = kept.told(kept.run.id, "--json")
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception).startswith("--yes: is missing")
    assert kept.ids == [kept.run.id]
    done = kept.told("made", "--yes", "--json")  # by its name, as other commands take it
    answer = json.loads(done.stdout)
    assert answer["run"] == kept.run.id
    assert answer["folder"] == str(kept.run.folder.with_name("out"))
    assert answer["bytes"] == sum(item["bytes"] for item in answer["removed"]) > 0
    assert {item["what"] for item in answer["removed"]} == {"artifact", "row", "study"}
    assert kept.ids == []


def test_a_run_that_goes_on_is_refused_before_anybody_is_asked(kept: Kept) -> None:
    driver = board(kept.database, kept.run.id)
    driver.drive()
    refused = kept.told(kept.run.id, "--yes")
    driver.stop_driving()
    assert isinstance(refused.exception, InputError)
    assert "is worked on by process" in str(refused.exception)
    assert kept.ids == [kept.run.id]
    assert isinstance(kept.told("r-none", "--yes").exception, InputError)
