"""What a driver does outside the database is done in one step with the check that it still drives the run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.connection import Database
from alphasmith.storage.output.output_folder import (
    OutputFolder,
    attempt_name,
    discard_partial,
    partial_folder,
    partial_folders,
)
from alphasmith.storage.queue.board import Board, LeaseLostError
from alphasmith.storage.queue.status import past_drivers
from alphasmith.storage.runs.run_store import RunStore
from tests.support.boards import board, elsewhere, forgetful, new_run, until


@pytest.fixture
def run_id(database: Database) -> Iterator[str]:
    """A new run, deleted afterwards."""
    made = new_run(database)
    yield made
    RunStore(database).delete(made)


def _replaced(database: Database, run_id: str) -> tuple[Board, Board]:
    """A driver that was not heard of for a lease, and the one that took its place."""
    frozen = board(database, run_id, lease=0.05, identity=elsewhere("frozen"))
    frozen.drive()
    frozen.join()
    next_ = board(database, run_id)

    def drives() -> bool:
        try:
            next_.drive()
        except InputError:
            return False
        return True

    until(drives)
    next_.join()
    return frozen, next_


def test_only_the_driver_takes_the_step(database: Database, run_id: str) -> None:
    taken: list[str] = []
    mine, other = board(database, run_id), board(database, run_id)
    mine.drive()
    mine.while_driving(lambda: taken.append("mine"))
    with pytest.raises(LeaseLostError, match="taken over"):
        other.while_driving(lambda: taken.append("other"))
    mine.stop_driving()
    with pytest.raises(LeaseLostError):
        mine.while_driving(lambda: taken.append("late"))
    assert taken == ["mine"]


def test_nobody_becomes_the_driver_during_the_step(database: Database, run_id: str) -> None:
    if database.backend == "sqlite":
        pytest.skip("on SQLite the right ends with the process")
    mine = board(database, run_id, lease=0.05, identity=elsewhere("slow"))
    mine.drive()
    other = board(database, run_id)
    order: list[str] = []
    began = threading.Event()

    def take_over() -> None:
        began.wait(60)
        until(lambda: _tried(other) or None)
        order.append("replaced")

    thread = threading.Thread(target=take_over)
    thread.start()

    def step() -> None:
        began.set()
        thread.join(0.5)
        order.append("step")

    mine.while_driving(step)
    thread.join(60)
    assert order == ["step", "replaced"]
    other.stop_driving()


def _tried(other: Board) -> bool:
    try:
        other.drive()
    except InputError:
        return False
    return True


def test_a_step_whose_answer_was_lost_is_taken_again(database: Database, run_id: str) -> None:
    weak = forgetful(database)
    mine = board(weak, run_id)
    mine.drive()
    weak.losses.append("out")
    taken: list[int] = []
    mine.while_driving(lambda: taken.append(1))
    assert taken == [1, 1]


def test_a_driver_that_was_replaced_while_it_wrote_publishes_nothing(
    database: Database, run_id: str, tmp_path: Path
) -> None:
    if database.backend == "sqlite":
        pytest.skip("on SQLite the right ends with the process")
    frozen, next_ = _replaced(database, run_id)
    out = tmp_path / "out"

    def late() -> None:
        with OutputFolder(out, attempt=attempt_name(run_id, frozen.token), publish=frozen.while_driving) as folder:
            folder.write_text("a", "late")

    with pytest.raises(LeaseLostError):
        late()
    assert list(tmp_path.iterdir()) == []
    with OutputFolder(out, attempt=attempt_name(run_id, next_.token), publish=next_.while_driving) as folder:
        folder.write_text("a", "in time")
    assert (out / "a").read_text() == "in time"
    next_.stop_driving()


def test_what_an_earlier_driver_left_is_found_by_its_own_name(database: Database, run_id: str, tmp_path: Path) -> None:
    first, other = board(database, run_id), board(database, run_id)
    for one in (first, other):
        one.drive()
        one.join()
        one.stop_driving()
    nobody = board(database, run_id, identity=elsewhere("another"))
    assert set(past_drivers(database, run_id)) == {first.token, other.token}
    out = tmp_path / "out"
    mine = partial_folder(out, attempt_name(run_id, first.token))
    foreign = [
        partial_folder(out, attempt_name(run_id, nobody.token)),
        partial_folder(out, attempt_name("r-20260101-ffffff", first.token)),
        partial_folder(out, "0123abcd"),
        partial_folder(out, "2025-backup"),
    ]
    for folder in (mine, *foreign):
        folder.mkdir()
        (folder / "thesis.txt").write_text("x")
    link = partial_folder(out, attempt_name(run_id, other.token))
    link.symlink_to(foreign[0])
    found = partial_folders(out, run_id, past_drivers(database, run_id))
    assert found == [mine]
    discard_partial(mine)
    assert not mine.exists()
    assert link.is_symlink()
    assert all((folder / "thesis.txt").is_file() for folder in foreign)
    assert len(list(tmp_path.iterdir())) == len(foreign) + 1
