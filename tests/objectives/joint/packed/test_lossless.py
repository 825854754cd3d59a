"""Constants in fewer bytes without losing a bit, and what is no longer whole is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.packed._lossless import SqueezedEntry, expand, squeeze
from alphasmith.objectives.joint.packed.packing import PackedSettings, model_bytes, pack, read_packed
from alphasmith.objectives.joint.packed.restoring import restore
from alphasmith.storage.files.tensors import read_tensors, write_tensors
from tests.support.site_cases import relaxed


def sines(size: int) -> Tensor:
    return torch.cos(torch.outer(torch.arange(size), torch.arange(size)) * (2 * torch.pi / size))


@relaxed
@given(
    dtype=st.sampled_from(
        [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8]
    ),
    shape=st.lists(st.integers(0, 40), max_size=3),
    values=st.integers(1, 6),
)
def test_every_bit_comes_back(dtype: torch.dtype, shape: list[int], values: int) -> None:
    generator = torch.Generator().manual_seed(values)
    value = torch.randint(0, values, shape, generator=generator).to(dtype)
    made = squeeze(value)
    if made is not None:
        entry, data = made
        again = expand("constant", SqueezedEntry.model_validate_json(entry.model_dump_json()), data)
        assert again.dtype == value.dtype
        assert torch.equal(again, value)
        assert data.nbytes < value.nbytes


def test_special_numbers_keep_their_bits() -> None:
    value = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).repeat(200)
    entry, data = squeeze(value) or pytest.fail("it has five different numbers")
    assert torch.equal(expand("constant", entry, data).view(torch.int32), value.view(torch.int32))


def test_noise_and_small_tensors_stay_as_they_are() -> None:
    noise = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert squeeze(noise) is None
    assert squeeze(torch.zeros(3)) is None
    assert squeeze(torch.zeros(400, dtype=torch.complex64)) is None


@pytest.mark.parametrize("damage", ["cut", "changed", "none", "longer", "floats"])
def test_damaged_bytes_are_named(damage: str) -> None:
    entry, data = squeeze(sines(32)) or pytest.fail("sines repeat")
    spoiled = {
        "cut": data[: len(data) // 2],
        "changed": torch.cat([data[:1] ^ 0x7F, data[1:]]),
        "none": data[:0],
        "longer": data,
        "floats": data.float(),
    }[damage]
    shape = (32, 31) if damage == "longer" else entry.shape
    with pytest.raises(InputError, match=r"front\.window: its squeezed bytes are corrupt"):
        expand("front.window", entry.model_copy(update={"shape": shape}), spoiled)


class Front(nn.Module):
    """Features by a table of sines, then a layer."""

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(48, 48) if empty else sines(48))
        self.out = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 48) -> (B, 4)."""
        return torch.as_tensor(self.out(x @ torch.as_tensor(self.table)))


@pytest.mark.parametrize("float16", [False, True])
def test_constants_of_a_model_come_back_bit_by_bit_through_files(float16: bool, tmp_path: Path) -> None:
    model = Front(empty=False).eval()
    packed = pack(model, PackedSettings(float16=float16))
    (told,) = [one for one in packed.report if one.name == "table"]
    assert (told.stored, told.sqnr) == ("squeezed", None)
    assert told.stored_bytes < 48 * 48 * 2, "in less than float16 would take"
    assert packed.stored_bytes < model_bytes(model)
    write_tensors(tmp_path / "packed.safetensors", packed.tensors)
    read = read_packed(packed.structure.to_json(), read_tensors(tmp_path / "packed.safetensors"))
    again = restore(Front(empty=True), read)
    assert torch.equal(torch.as_tensor(again.table), torch.as_tensor(model.table))
    assert "squeezed/table" not in pack(model, PackedSettings(squeeze=False)).tensors


def test_squeezed_tensors_that_are_gone_or_nobody_names_are_refused() -> None:
    packed = pack(Front(empty=False), PackedSettings())
    without = {name: value for name, value in packed.tensors.items() if name != "squeezed/table"}
    with pytest.raises(InputError, match="table: is not among the stored tensors"):
        restore(Front(empty=True), read_packed(packed.structure.to_json(), without))
    other = {**packed.tensors, "squeezed/other": packed.tensors["squeezed/table"]}
    with pytest.raises(InputError, match="squeezed/other: is a tensor that the structure does not name"):
        restore(Front(empty=True), read_packed(packed.structure.to_json(), other))
