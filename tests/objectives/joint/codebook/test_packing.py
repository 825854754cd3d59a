"""Packed indices come back, in the bytes that the formula says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.codebook._packing import index_bits, pack, packed_size, unpack
from tests.support.site_cases import relaxed

#: Bits, and indices that fit them.
cases = st.integers(0, 16).flatmap(
    lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=70))
)


@relaxed
@given(cases)
def test_indices_come_back(case: tuple[int, list[int]]) -> None:
    bits, values = case
    data = pack(np.array(values, dtype=np.uint16), bits)
    assert data.size == packed_size(len(values), bits) == math.ceil(len(values) * bits / 8)
    assert unpack(data, bits, len(values)).tolist() == values


@relaxed
@given(cases)
def test_bits_follow_each_other(case: tuple[int, list[int]]) -> None:
    bits, values = case
    text = "".join(f"{value:0{bits}b}" for value in values) if bits else ""
    data = pack(np.array(values, dtype=np.uint16), bits)
    assert "".join(f"{byte:08b}" for byte in data)[: len(text)] == text


@pytest.mark.parametrize("bits", [3, 5, 8, 11])
def test_long_rows_come_back(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, 300_001, dtype=np.uint16)
    assert np.array_equal(unpack(pack(values, bits), bits, values.size), values)


@pytest.mark.parametrize(("entries", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (32, 5), (33, 6), (65536, 16)])
def test_bits_of_an_index(entries: int, bits: int) -> None:
    assert index_bits(entries) == bits


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="4 does not fit 2 bits"):
        pack(np.array([0, 4]), 2)
    with pytest.raises(InputError, match="17 bits"):
        pack(np.array([0]), 17)
    with pytest.raises(InputError, match="3 bytes in place of 2"):
        unpack(np.zeros(3, dtype=np.uint8), 3, 5)
