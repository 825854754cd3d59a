"""Huffman codes: what is encoded comes back, no code of the same frequencies is shorter, and damage is noticed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.codebook._entropy import (
    BLOCK,
    MOST_BITS,
    HuffmanIndices,
    huffman_decode,
    huffman_encode,
    huffman_size,
)
from tests.support.site_cases import relaxed

symbols = st.integers(1, 300).flatmap(
    lambda entries: st.tuples(st.just(entries), st.lists(st.integers(0, entries - 1), min_size=1, max_size=60))
)


@relaxed
@given(symbols)
def test_indices_come_back(case: tuple[int, list[int]]) -> None:
    entries, values = case
    coded = huffman_encode(np.array(values), entries)
    assert huffman_decode(coded, len(values)).tolist() == values
    assert coded.nbytes == huffman_size(np.array(values), entries)


@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 257 * BLOCK + 7])
def test_blocks_come_back(count: int) -> None:
    generator = np.random.default_rng(count)
    values = np.minimum(generator.geometric(0.3, count), 31)
    coded = huffman_encode(values, 32)
    assert np.array_equal(huffman_decode(coded, count), values)
    assert coded.blocks.size == math.ceil(count / BLOCK)


@relaxed
@given(symbols)
def test_no_prefix_is_a_code_and_the_length_is_near_the_entropy(case: tuple[int, list[int]]) -> None:
    entries, values = case
    lengths = huffman_encode(np.array(values), entries).lengths.astype(np.int64)
    counts = np.bincount(values, minlength=entries)
    used = counts > 0
    assert np.array_equal(lengths > 0, used)
    if used.sum() > 1:
        assert (2.0 ** -lengths[used]).sum() == 1.0, "a shorter code would exist"
        share = counts[used] / counts.sum()
        entropy = -(share * np.log2(share)).sum()
        assert entropy - 1e-9 <= (share * lengths[used]).sum() < entropy + 1


def test_codes_stay_short_enough_for_the_table() -> None:
    counts = [int(1.7**i) + 1 for i in range(26)]  # their tree would be 25 deep
    values = np.repeat(np.arange(26), counts)[::7]
    coded = huffman_encode(values, 26)
    assert int(coded.lengths.max()) == MOST_BITS
    assert np.array_equal(huffman_decode(coded, values.size), values)


def spoilt(coded: HuffmanIndices, **changes: object) -> HuffmanIndices:
    return dataclasses.replace(coded, **changes)  # type: ignore[arg-type]


def test_damage_is_noticed() -> None:
    values = np.random.default_rng(0).integers(0, 5, 3000)
    coded = huffman_encode(values, 5)
    long = coded.lengths.copy()
    long[0] = 20
    none = np.zeros_like(coded.lengths)
    sparse = coded.lengths.copy()
    sparse[sparse == 3] = 0
    moved = coded.blocks.copy()
    moved[:2] += np.array([5, -5], dtype=np.int64).astype(np.uint16)
    damaged = (
        (spoilt(coded, lengths=long), 3000), (spoilt(coded, lengths=none), 3000), (spoilt(coded, blocks=moved), 3000),
        (spoilt(coded, lengths=sparse), 3000), (spoilt(coded, lengths=np.ones_like(none)), 3000),
        (spoilt(coded, data=coded.data[:-1]), 3000), (coded, 5000), (coded, 2500), (coded, 0),
    )  # fmt: skip
    for case, count in damaged:
        with pytest.raises(InputError, match="export the codebook again"):
            huffman_decode(case, count)


@pytest.mark.parametrize(("values", "entries"), [([], 4), ([4], 4), ([-1], 4), ([0], 65537)])
def test_indices_outside_their_table_are_refused(values: list[int], entries: int) -> None:
    with pytest.raises(InputError, match="do not lie between"):
        huffman_encode(np.array(values, dtype=np.int64), entries)
