"""A checkpoint is written in files as large as it came, with an index where there are several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alphasmith.storage.output.checkpoint import INDEX, SHARD, SINGLE, shard_bytes, write_checkpoint
from alphasmith.storage.output.output_folder import OutputFolder

TENSORS = {
    "a": torch.arange(100.0),
    "b": torch.arange(400.0),
    "c": torch.ones(10, dtype=torch.int64),
    "d": torch.ones(50),
}
TYPES = {"b": torch.bfloat16, "d": torch.float16}


@pytest.mark.parametrize(("most", "files"), [(SHARD, 1), (1200, 2), (500, 3), (1, 4)])
@pytest.mark.parametrize("below", ["", "smoothed"])
def test_tensors_come_back_in_their_types_from_files_that_are_not_too_large(
    tmp_path: Path, most: int, files: int, below: str
) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        write_checkpoint(folder, below, TENSORS, types=TYPES, most=most)
    there = tmp_path / "out" / below
    shards = sorted(there.glob("*.safetensors"))
    assert len(shards) == files
    assert [shards[0].name] == [SINGLE] if files == 1 else shards[0].name == f"model-00001-of-{files:05}.safetensors"
    found = {shard.name: load_file(shard) for shard in shards}
    assert {n: v.dtype for part in found.values() for n, v in part.items()} == {
        n: v.dtype for n, v in TENSORS.items()
    } | TYPES
    for part in found.values():
        assert len(part) == 1 or sum(v.numel() * v.element_size() for v in part.values()) <= most
        assert all(torch.equal(value, TENSORS[name].to(value.dtype)) for name, value in part.items())
    if files > 1:
        index = json.loads((there / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, part in found.items() for name in part}
        assert index["metadata"]["total_size"] == 400 + 800 + 80 + 100
    assert (there / INDEX).exists() == (files > 1)


def test_files_may_be_as_large_as_those_of_the_source(tmp_path: Path) -> None:
    assert shard_bytes(None) == shard_bytes(tmp_path) == SHARD
    for name, size in (("model-00001-of-00002.safetensors", 70), ("model-00002-of-00002.safetensors", 50)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / INDEX).write_text("{}")
    assert shard_bytes(tmp_path) == 70
    (tmp_path / SINGLE).write_bytes(b"x")
    assert shard_bytes(tmp_path) == SHARD
