"""Weights as codebooks: stored and read back bit by bit, in the bytes that the formula says, and refused when damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.codebook.clustering import cluster, match
from alphasmith.objectives.joint.codebook.tensors import (
    CodebookSettings,
    CodebookWeight,
    decode_weight,
    encode_weight,
    encode_weights,
    indices_of,
    with_table,
)
from alphasmith.objectives.literals import IndexCoding
from tests.support.site_cases import relaxed

WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


def reread(stored: CodebookWeight, name: str = "w") -> torch.Tensor:
    """Through JSON and bytes, as from a file."""
    tensors = {key: value.clone() for key, value in stored.tensors.items()}
    return decode_weight(name, json.loads(json.dumps(stored.entry.model_dump())), tensors)


@relaxed
@given(
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(2, 20),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from(["packed", "huffman"]),
    st.integers(0, 100),
)
def test_every_element_is_an_entry_of_its_table(
    dtype: torch.dtype, shape: list[int], k: int, channels: int | None, coding: IndexCoding, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    stored = encode_weight(weight, CodebookSettings(k=k, channels=channels, coding=coding))
    restored = reread(stored)
    assert restored.dtype == dtype
    assert restored.shape == weight.shape
    parts = zip(weight.split(channels or shape[0]), restored.split(channels or shape[0]), strict=True)
    for part, again in parts:
        table = cluster(part, k).table
        assert torch.equal(again, table[match(part, table)].to(dtype))


@pytest.mark.parametrize("channels", [None, 5])
def test_a_coding_is_a_way_of_storing_the_same(channels: int | None) -> None:
    packed = encode_weight(WEIGHT, CodebookSettings(k=9, channels=channels))
    coded = encode_weight(WEIGHT, CodebookSettings(k=9, channels=channels, coding="huffman"))
    again = packed.in_coding("huffman")
    assert again.entry == coded.entry
    assert all(torch.equal(again.tensors[name], value) for name, value in coded.tensors.items())
    assert again.in_coding("packed").entry == packed.entry
    assert torch.equal(reread(again), reread(packed))


def test_other_entries_in_a_table_have_a_digest_of_their_own() -> None:
    stored = encode_weight(WEIGHT, CodebookSettings(k=9, channels=5))
    places = indices_of("w", stored.entry, stored.tensors)
    assert torch.equal(stored.tensors["table"][places], reread(stored))
    table = stored.tensors["table"] * 2 + 1
    entry, tensors = with_table(stored.entry, stored.tensors, table)
    assert entry.digest != stored.entry.digest
    assert torch.equal(decode_weight("w", entry, tensors), reread(stored) * 2 + 1)
    with pytest.raises(InputError, match=r"table: has shape \(3,\)"):
        with_table(entry, tensors, torch.zeros(3))
    with pytest.raises(NonFiniteError, match="an entry of a table is not finite"):
        with_table(entry, tensors, table * float("nan"))


def test_half_tables_are_for_entries_that_they_can_hold() -> None:
    stored = encode_weight(WEIGHT, CodebookSettings(k=9, half_tables=True))
    plain = encode_weight(WEIGHT, CodebookSettings(k=9))
    assert stored.tensors["table"].dtype == torch.float16
    assert stored.packed_bytes == plain.packed_bytes - 9 * 2
    again = reread(stored)
    assert again.dtype == torch.float32
    assert torch.isin(again, stored.tensors["table"].float()).all()
    assert stored.error == pytest.approx(float((again - WEIGHT).double().square().sum()))
    for scale in (1e6, 1e-7):
        assert (
            encode_weight(WEIGHT * scale, CodebookSettings(k=9, half_tables=True)).tensors["table"].dtype
            == torch.float32
        )


def test_sizes_are_those_of_the_formula() -> None:
    n, k = WEIGHT.numel(), 16
    packed = encode_weight(WEIGHT, CodebookSettings(k=k))
    coded = encode_weight(WEIGHT, CodebookSettings(k=k, coding="huffman"))
    assert packed.stored_bytes == n * 4 // 8 + 4 * k + 4
    assert packed.float_bytes == 4 * n
    assert packed.stored_bytes == sum(tensor.nbytes for tensor in packed.tensors.values())
    assert coded.stored_bytes == sum(tensor.nbytes for tensor in coded.tensors.values())
    assert (coded.packed_bytes, coded.huffman_bytes) == (packed.packed_bytes, packed.huffman_bytes)
    assert torch.equal(reread(coded), reread(packed))
    assert packed.error == pytest.approx(float((reread(packed) - WEIGHT).double().square().sum()), rel=1e-6)


def test_sparse_weights_are_coded_in_fewer_bytes_than_packed() -> None:
    sparse = torch.where(torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.9, 0.0, 1.0)
    sparse *= torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    stored = encode_weight(sparse, CodebookSettings(k=16, coding="huffman"))
    assert stored.huffman_bytes < 0.6 * stored.packed_bytes
    assert torch.equal(reread(stored) == 0, reread(encode_weight(sparse, CodebookSettings(k=16))) == 0)
    assert not reread(stored)[sparse == 0].any()


def test_tables_of_channels_are_no_worse_than_one() -> None:
    scaled = WEIGHT * torch.logspace(-2, 1, 24).reshape(-1, 1)
    one = encode_weight(scaled, CodebookSettings(k=8))
    many = encode_weight(scaled, CodebookSettings(k=8, channels=5))
    assert many.tensors["sizes"].numel() == 5
    relative = [((reread(stored) - scaled) / scaled).abs().median() for stored in (one, many)]
    assert relative[1] < 0.7 * relative[0]
    assert many.error < one.error


def test_what_saves_nothing_stays_float() -> None:
    small = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    tensors = {
        "a": WEIGHT, "b": WEIGHT, "view": WEIGHT.T, "small": small, "again": small, "bias": torch.zeros(9),
        "ids": torch.zeros(4, 4, dtype=torch.int64), "empty": torch.zeros(0, 4),
    }  # fmt: skip
    made = encode_weights(tensors, CodebookSettings(k=16))
    assert list(made.weights) == ["a", "view"]
    assert made.aliases == {"b": "a"}
    assert made.kept == {
        "small": "its codebook takes 31 bytes in place of 24",
        "again": "its codebook takes 31 bytes in place of 24",
        "bias": "it is no matrix",
        "ids": "torch.int64 is no floating type of 16 bits or more",
        "empty": "it is empty",
    }
    assert list(encode_weights({"w": WEIGHT[:1]}, CodebookSettings(k=16)).weights) == ["w"]
    assert encode_weights({"w": WEIGHT[:1].half()}, CodebookSettings(k=16)).kept, "bytes count in its own type"


@pytest.mark.parametrize("coding", ["packed", "huffman"])
def test_damage_is_named_with_its_digest(coding: IndexCoding) -> None:
    stored = encode_weight(WEIGHT, CodebookSettings(k=16, coding=coding))
    entry = stored.entry.model_dump()
    for key in stored.tensors:
        tensors = {name: value.clone() for name, value in stored.tensors.items()}
        tensors[key].view(torch.uint8)[0] ^= 1
        with pytest.raises(
            InputError, match=rf"^layer\.w: its codebook has the digest [0-9a-f]{{64}}, {entry['digest']}"
        ):
            decode_weight("layer.w", entry, tensors)
    changes: list[dict[str, Any]] = [{"shape": (40, 24)}, {"channels": 3}, {"bits": 5}, {"dtype": "float16"}]
    for change in changes:
        with pytest.raises(InputError, match="digest"):
            decode_weight("layer.w", entry | change, stored.tensors)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shape": [24, 0]}, "cannot be read"),
        ({"bits": 17}, "cannot be read"),
        ({"coding": "zip"}, "cannot be read"),
        ({"more": 1}, "cannot be read"),
        ({"coding": "huffman"}, "not blocks, indices, lengths, sizes, table"),
    ],
)
def test_an_entry_that_is_none_is_refused(change: dict[str, Any], problem: str) -> None:
    stored = encode_weight(WEIGHT, CodebookSettings(k=16))
    with pytest.raises(InputError, match=problem):
        decode_weight("w", stored.entry.model_dump() | change, stored.tensors)


def resigned(stored: CodebookWeight, **tensors: torch.Tensor) -> CodebookWeight:
    """The same with other tensors and the digest of those: what a faulty writer would leave."""
    changed = {**stored.tensors, **tensors}
    with pytest.raises(InputError, match="digest") as caught:
        decode_weight("w", stored.entry, changed)
    digest = re.findall(r"[0-9a-f]{64}", caught.value.problem)[0]
    return dataclasses.replace(stored, entry=stored.entry.model_copy(update={"digest": digest}), tensors=changed)


def test_parts_that_do_not_fit_are_refused_whatever_the_digest_says() -> None:
    stored = encode_weight(WEIGHT, CodebookSettings(k=11))
    beyond = stored.tensors["indices"].clone()
    beyond[0] = 255
    cases = {
        "an index lies beyond its table": resigned(stored, indices=beyond),
        "its indices are corrupt": resigned(stored, indices=beyond[:-1]),
        "11 entries do not make 1 tables": resigned(stored, sizes=torch.tensor([10], dtype=torch.int32)),
    }
    for problem, case in cases.items():
        with pytest.raises(InputError, match=problem):
            decode_weight("w", case.entry, case.tensors)
    with pytest.raises(InputError, match=r"its codebook holds .*table of torch\.float64"):
        decode_weight("w", stored.entry, {**stored.tensors, "table": stored.tensors["table"].double()})


def test_wrong_weights_and_settings_are_named() -> None:
    cases: list[tuple[torch.Tensor, dict[str, Any], str]] = [
        (WEIGHT, {"k": 1}, "cluster.k"),
        (WEIGHT, {"channels": 0}, "cluster.channels"),
        (torch.tensor(1.0), {"channels": 2}, "w"),
        (torch.zeros(3, dtype=torch.int8), {}, "w"),
        (torch.zeros(0), {}, "w"),
    ]
    for weight, settings, field in cases:
        with pytest.raises(InputError) as caught:
            encode_weight(weight, CodebookSettings(**settings), name="w")
        assert caught.value.field == field
    with pytest.raises(NonFiniteError, match=r"^w: "):
        encode_weight(torch.tensor([[math.nan]]), CodebookSettings(), name="w")
