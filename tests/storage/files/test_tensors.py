"""Safetensors files: the library reads what we write, bytes repeat, damage is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.storage.files.durable import CHUNK, digest_file
from alphasmith.storage.files.tensors import read_metadata, read_tensors, write_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise, so that NaN equals NaN and -0.0 differs from 0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    packed = [t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b)]
    return torch.equal(packed[0], packed[1])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = torch.randint(0, 256, [*shape, 8], generator=generator).to(torch.uint8)
    filled = (made[..., 0] % 2).bool() if dtype == torch.bool else made.view(dtype)[..., 0]
    return filled.t() if filled.dim() == 2 and draw(st.booleans()) else filled


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.dictionaries(st.text(max_size=8).filter(lambda s: s != "__metadata__"), tensors(), max_size=4),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_the_library_reads_what_is_written(
    tmp_path: Path, content: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path / "t.safetensors"
    digest = write_tensors(path, content, metadata)
    assert digest == digest_file(path)
    for found in (load_file(path), read_tensors(path, sha256=digest.sha256)):
        assert found.keys() == content.keys()
        assert all(_same(found[name], content[name]) for name in content)
    assert read_metadata(path) == metadata


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    content = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int8)}
    save_file(content, path, metadata={"format": "pt"})
    found = read_tensors(path)
    assert all(_same(found[name], content[name]) for name in content)
    assert read_metadata(path) == {"format": "pt"}


def test_same_content_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    names = [f"layer.{i}" for i in range(20)]
    content = {name: torch.full((3,), float(i)) for i, name in enumerate(names)}
    notes = {name: name for name in names}
    first = write_tensors(tmp_path / "a", content, notes)
    second = write_tensors(tmp_path / "b", dict(reversed(content.items())), dict(reversed(notes.items())))
    assert first.sha256 == second.sha256


def test_large_tensor_is_written_in_pieces(tmp_path: Path) -> None:
    content = {"w": torch.arange(CHUNK // 4 + 3, dtype=torch.float32)}
    write_tensors(tmp_path / "w", content)
    assert _same(read_tensors(tmp_path / "w")["w"], content["w"])


def test_gradients_and_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    write_tensors(tmp_path / "v", {"every second": base[:, ::2], "broadcast": base[:1].expand(2, 4)})
    found = read_tensors(tmp_path / "v")
    assert torch.equal(found["every second"], base.detach()[:, ::2])
    assert torch.equal(found["broadcast"], base.detach()[:1].expand(2, 4))


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    content = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(3), "c": torch.ones(1, dtype=torch.float64)}
    write_tensors(tmp_path / "f", content)
    data = (tmp_path / "f").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert all(header[name]["data_offsets"][0] % content[name].element_size() == 0 for name in content)


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "header"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t"
    digest = write_tensors(path, {"a": torch.arange(8.0)})
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    elif damage == "cut":
        del data[-4:]
    elif damage == "grow":
        data += b"\x00"
    else:
        data[0] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed or damaged"):
        read_tensors(path, sha256=digest.sha256)
    if damage != "flip":  # which only the digest can notice
        with pytest.raises(IntegrityError, match="not a whole"):
            read_tensors(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"s": torch.eye(3).to_sparse()}, "sparse"),
        ({"m": torch.empty(3, device="meta")}, "no data"),
        ({"c": torch.zeros(2, dtype=torch.complex64)}, "cannot be stored"),
        ({"__metadata__": torch.zeros(2)}, "taken by the format"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_writing(
    tmp_path: Path, content: dict[str, torch.Tensor], part: str
) -> None:
    with pytest.raises(InputError, match=part):
        write_tensors(tmp_path / "t", content)
    assert not (tmp_path / "t").exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        read_tensors(tmp_path / "none")
