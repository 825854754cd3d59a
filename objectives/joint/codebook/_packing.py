"""Indices packed at a fixed number of bits, the most significant first. Source: claim B-6, formulas fB9, fB10."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alphasmith.objectives.errors import InputError

Bytes = NDArray[np.uint8]
Indices = NDArray[np.uint16]

#: Widest index [bits].
MOST_BITS = 16
#: Indices that are worked on at a time, a multiple of 8 so that every part ends with a byte.
_PART = 1 << 17


def index_bits(entries: int) -> int:
    """Bits that tell ``entries`` indices apart: ceil(log2 K), 0 for one."""
    return (entries - 1).bit_length()


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` packed indices of ``bits`` bits."""
    return (count * bits + 7) // 8


def pack(indices: NDArray[np.integer], bits: int) -> Bytes:
    """Pack indices one after the other, without gaps; the last byte is filled up with zeros.

    Args:
        indices: (n,) each from 0 to 2^bits - 1.
        bits: Bits per index, 0 to 16.

    Returns:
        (ceil(n bits / 8),) bytes.

    Raises:
        InputError: An index does not fit, or ``bits`` is out of range.
    """
    _check_bits(bits)
    if indices.size and (int(indices.max()) >> bits or int(indices.min()) < 0):
        raise InputError("indices", f"{int(indices.max())} does not fit {bits} bits", "use more bits")
    if bits == 8:
        return indices.astype(np.uint8)
    places = np.arange(bits - 1, -1, -1, dtype=np.uint16)
    parts = [
        np.packbits(((indices[i : i + _PART, None].astype(np.uint16) >> places) & 1).astype(np.uint8))
        for i in range(0, indices.size, _PART)
    ]
    return np.concatenate(parts) if parts and bits else np.zeros(0, dtype=np.uint8)


def unpack(data: Bytes, bits: int, count: int) -> Indices:
    """The inverse of :func:`pack`.

    Args:
        data: What ``pack`` returned.
        bits: Bits per index, 0 to 16.
        count: Number of indices n.

    Returns:
        (n,) uint16.

    Raises:
        InputError: ``data`` is not as long as ``count`` indices take.
    """
    _check_bits(bits)
    if data.size != packed_size(count, bits):
        problem = f"{data.size} bytes in place of {packed_size(count, bits)}"
        raise InputError("indices", problem, "give the data that was packed, whole")
    if bits == 8:
        return data.astype(np.uint16)
    found = np.zeros(count, dtype=np.uint16)
    for begin in range(0, count if bits else 0, _PART):
        end = min(begin + _PART, count)
        part = data[begin * bits // 8 : packed_size(end, bits)]
        columns = np.unpackbits(part, count=(end - begin) * bits).reshape(-1, bits)
        for column in range(bits):
            found[begin:end] = (found[begin:end] << 1) | columns[:, column]
    return found


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= MOST_BITS:
        raise InputError("bits", f"{bits} bits per index", f"use 0 to {MOST_BITS}")
