"""Every kind of fault once, at a moment that a seed chooses; ``python -m tests.chaos`` plays hundreds of them."""

from __future__ import annotations

import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.chaos import invariants
from tests.chaos.kinds import FAULTS
from tests.chaos.scenes import Scene, World
from tests.chaos.servers import Missing

#: Ways to break the records of a finished run, and a word of what the invariants say to that: a check must be able to fail.
_BREAKS = (
    ("DELETE FROM alphasmith_result WHERE id = (SELECT min(id) FROM alphasmith_result)", "accepted results"),
    ("UPDATE alphasmith_ticket SET state = 'waiting' WHERE position = 0", "accepted results"),
    ("UPDATE trials SET state = 'RUNNING' WHERE trial_id = 1", "is RUNNING"),
    ("UPDATE trials SET number = 1 WHERE trial_id = 1", "has trials"),
    (
        "DELETE FROM trials WHERE number = (SELECT max(number) FROM trials WHERE study_id = 1) AND study_id = 1",
        "counts",
    ),
    ("UPDATE trial_values SET value = value * 2 WHERE trial_id = 1", "undisturbed"),
    ("DELETE FROM trial_user_attributes WHERE trial_id = 1 AND key = 'candidate'", "who proposed it"),
    ("UPDATE alphasmith_attempt SET state = 'running' WHERE id = 1", "are running"),
    ("UPDATE alphasmith_ticket SET attempts = attempts + 1 WHERE position = 0", "attempts counted"),
    ("UPDATE alphasmith_ticket SET blocked = 1 WHERE position = 0", "blocked by"),
    ("UPDATE alphasmith_run SET driver = 'someone'", "driver someone"),
    ("UPDATE alphasmith_result SET sha256 = 'x'", "damaged"),
    ('UPDATE alphasmith_site SET entry = replace(entry, \'"shift":\', \'"shift":1,"was":\')', "undisturbed"),
)

#: Seeds that are tried until a fault strikes.
_SEEDS = 3


@pytest.mark.slow
def test_the_checks_see_what_is_broken(world: World) -> None:
    with Scene(world, "alone") as scene:
        scene.start()
        assert scene.finish(expected=world.expected("site")).wrong == ()
        whole = (scene.folder / "runs.db").read_bytes()
        for statement, word in _BREAKS:
            with closing(sqlite3.connect(scene.folder / "runs.db")) as connection, connection:
                assert connection.execute(statement).rowcount > 0
            found = invariants.when_finished(scene.url, expected=world.expected("site"))
            assert any(word in sentence for sentence in found), (statement, found)
            _put_back(scene.folder / "runs.db", whole)
        scales = scene.folder / "out" / "scales.safetensors"
        kept = scales.read_bytes()
        scales.write_bytes(kept[:-1])
        found = invariants.when_finished(scene.url, expected=None)
        assert "scales.safetensors is not as it was written" in found
        scales.write_bytes(kept)
        (scene.folder / "out.partial-1234").mkdir()
        assert any("partial" in sentence for sentence in invariants.when_finished(scene.url, expected=None))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_what_must_hold_holds_after(world: World, kind: str) -> None:
    for seed in range(_SEEDS):
        try:
            verdict = FAULTS[kind](world, random.Random(f"{kind} {seed}"))
        except Missing as missing:
            pytest.skip(str(missing))
        assert verdict.wrong == ()
        if verdict.struck:
            return
    pytest.fail(f"{kind} came too late with {_SEEDS} seeds")


@pytest.mark.slow
def test_the_clock_of_a_process_jumps(world: World) -> None:
    # Without this a library that is not loaded would make every jump one of zero seconds.
    try:
        zygote = world.moody_zygote()
    except Missing as missing:
        pytest.skip(str(missing))
    (world.folder / "hour").write_text("3600")
    told = zygote.start(
        cwd=world.folder, call="tests.chaos.spoils:tell_time", environment={"CHAOS_CLOCK": str(world.folder / "hour")}
    )
    assert told.wait() == 0
    assert float(told.said) - time.time() == pytest.approx(3600, abs=60)


def _put_back(file: Path, content: bytes) -> None:
    for end in ("-wal", "-shm"):
        file.with_name(file.name + end).unlink(missing_ok=True)
    file.write_bytes(content)
