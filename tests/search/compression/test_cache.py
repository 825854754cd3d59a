"""Finished stages: shared by processes, made once, and nobody waits for a process that is dead."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.packed.packing import PackedModel, pack
from alphasmith.search.compression._cache import AS_IT_IS, StageCache, stage_key
from alphasmith.search.interruption import Interrupted, never
from alphasmith.storage.output.reservation import Reservation, reservation_file

KEY = stage_key("train", "parent", {"steps": 1})


def result() -> tuple[PackedModel, dict[str, Any]]:
    return pack(nn.Linear(3, 2), AS_IT_IS), {"notes": []}


def unexpected() -> tuple[PackedModel, dict[str, Any]]:
    raise AssertionError("it is there")


def test_a_stage_is_made_once_and_nothing_but_it_is_left(tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "stages")
    made, _ = cache.made(KEY, result, never)
    again, facts = cache.made(KEY, unexpected, never)
    assert facts == {"notes": []}
    assert all(torch.equal(made.tensors[name], again.tensors[name]) for name in made.tensors)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == [KEY]


def test_who_needs_what_another_process_makes_waits_for_it_and_takes_it(tmp_path: Path) -> None:
    other = StageCache(tmp_path)
    with Reservation(tmp_path / KEY, storage="", lease=60.0) as place:
        place.take()

        def sleep(seconds: float) -> None:
            other.put(KEY, *result())
            place.__exit__(None, None, None)

        _, facts = StageCache(tmp_path, sleep=sleep).made(KEY, unexpected, never)
    assert facts == {"notes": []}


def test_waiting_can_be_stopped(tmp_path: Path) -> None:
    with Reservation(tmp_path / KEY, storage="", lease=60.0) as place:
        place.take()
        with pytest.raises(Interrupted):
            StageCache(tmp_path).made(KEY, unexpected, lambda: True)


def test_nobody_waits_for_a_process_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from alphasmith.storage.output.reservation import Reservation\n"
        f"with Reservation(Path({json.dumps(str(tmp_path / KEY))}), storage='', lease=1e6) as place:\n"
        "    place.take(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert reservation_file(tmp_path / KEY).exists()

    def sleep(seconds: float) -> None:
        raise AssertionError("it waits for a dead process")

    StageCache(tmp_path, sleep=sleep).made(KEY, result, never)
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"{")])
def test_a_stage_that_is_not_whole_is_made_anew(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    cache = StageCache(tmp_path)
    cache.made(KEY, result, never)
    spoil(next((tmp_path / KEY).glob("*.safetensors")))
    _, facts = cache.made(KEY, lambda: (result()[0], {"notes": ["anew"]}), never)
    assert facts == {"notes": ["anew"]}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"study\.cache: .*name another folder"):
        StageCache(tmp_path / "file" / "stages").made(KEY, result, never)
