"""Indices under a canonical Huffman code, in blocks that are read side by side. Source: formula fB10; Huffman 1952.

Every block of 1024 indices begins with a byte of its own, and the bytes of each block are stored: all blocks are then decoded in
step, one index of each at a time, by a table of code prefixes. That costs about 0.02 bits per index.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.codebook._packing import Bytes, Indices

#: Indices of a block.
BLOCK = 1024
#: Longest code [bits]: a table of all prefixes stays small, and the bytes of a block fit 16 bits.
MOST_BITS = 16
#: Blocks that are encoded at a time.
_BLOCKS = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class HuffmanIndices:
    """Indices as they are stored.

    Attributes:
        lengths: (K,) bits of the code of every index, 0 where it does not occur; the code follows from them.
        blocks: (ceil(n / 1024),) bytes of every block.
        data: The blocks one after the other.
    """

    lengths: Bytes
    blocks: NDArray[np.uint16]
    data: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.lengths.nbytes + self.blocks.nbytes + self.data.nbytes


def huffman_size(indices: NDArray[np.integer], entries: int) -> int:
    """Bytes that :func:`huffman_encode` makes of indices, without encoding them."""
    lengths = _code_lengths(np.bincount(indices, minlength=entries))
    bits = np.add.reduceat(lengths[indices].astype(np.int64), np.arange(0, indices.size, BLOCK))
    return int(((bits + 7) // 8).sum()) + 2 * bits.size + entries


def huffman_encode(indices: NDArray[np.integer], entries: int) -> HuffmanIndices:
    """Encode indices by their frequencies.

    Args:
        indices: (n,) each from 0 to ``entries`` - 1; n at least 1.
        entries: K, at most 65536.

    Raises:
        InputError: There is no index, or one is out of range.
    """
    if not indices.size or int(indices.min()) < 0 or int(indices.max()) >= entries or entries > 1 << MOST_BITS:
        raise InputError("indices", f"do not lie between 0 and {entries - 1}", "match them with their own table")
    lengths = _code_lengths(np.bincount(indices, minlength=entries))
    codes = _canonical(lengths)
    parts, blocks = [], []
    for begin in range(0, indices.size, BLOCK * _BLOCKS):
        part = indices[begin : begin + BLOCK * _BLOCKS]
        sizes = lengths[part].astype(np.int64)
        starts = np.arange(0, part.size, BLOCK)
        taken = (np.add.reduceat(sizes, starts) + 7) // 8
        ends = np.cumsum(sizes)
        # A block begins with its own byte: what went before in it, counted from its first bit.
        inside = ends - sizes - np.repeat((ends - sizes)[starts], np.diff(np.append(starts, part.size)))
        first = np.repeat((np.cumsum(taken) - taken) * 8, np.diff(np.append(starts, part.size))) + inside
        bits = np.zeros(int(taken.sum()) * 8, dtype=np.uint8)
        words = codes[part]
        for place in range(int(lengths.max())):
            has = sizes > place
            bits[first[has] + place] = (words[has] >> (sizes[has] - 1 - place)) & 1
        parts.append(np.packbits(bits))
        blocks.append(taken.astype(np.uint16))
    return HuffmanIndices(lengths=lengths, blocks=np.concatenate(blocks), data=np.concatenate(parts))


def huffman_decode(coded: HuffmanIndices, count: int) -> Indices:
    """The inverse of :func:`huffman_encode`.

    Args:
        coded: The stored indices.
        count: Their number n, at least 1.

    Returns:
        (n,) uint16.

    Raises:
        InputError: The parts do not fit each other, or a block does not end where its last code does.
    """
    longest = int(coded.lengths.max(initial=0))
    kraft = int((1 << (MOST_BITS - coded.lengths[coded.lengths > 0].astype(np.int64).clip(max=MOST_BITS))).sum())
    lanes = (count + BLOCK - 1) // BLOCK
    if not 0 < longest <= MOST_BITS or kraft > 1 << MOST_BITS:
        raise _corrupt("the code lengths make no code")
    if count < 1 or coded.blocks.shape != (lanes,) or int(coded.blocks.sum(dtype=np.int64)) != coded.data.size:
        raise _corrupt(f"{coded.blocks.size} blocks of {coded.data.size} bytes do not hold {count} indices")
    symbols, sizes = _prefixes(coded.lengths, longest)
    data = np.concatenate((coded.data, np.zeros(3, dtype=np.uint8))).astype(np.int64)
    stops = np.cumsum(coded.blocks, dtype=np.int64) * 8
    at = stops - coded.blocks.astype(np.int64) * 8
    left = np.full(lanes, BLOCK)
    left[-1] = count - BLOCK * (lanes - 1)
    found = np.zeros((lanes, BLOCK), dtype=np.uint16)
    for step in range(min(BLOCK, count)):
        live = slice(None) if step < left[-1] else slice(0, lanes - 1)
        byte = np.minimum(at[live] >> 3, data.size - 3)
        window = (data[byte] << 16) | (data[byte + 1] << 8) | data[byte + 2]
        prefix = (window >> (24 - longest - (at[live] & 7))) & ((1 << longest) - 1)
        found[live, step] = symbols[prefix]
        at[live] += sizes[prefix]
        if not bool(sizes[prefix].all()):
            raise _corrupt("a code is unknown")
    if bool(((stops - at < 0) | (stops - at > 7)).any()):
        raise _corrupt("a block does not end with a code")
    return found.reshape(-1)[:count]


def _corrupt(problem: str) -> InputError:
    return InputError("indices", problem, "export the codebook again")


def _code_lengths(counts: NDArray[np.int64]) -> Bytes:
    """Bits of every symbol's Huffman code; counts are evened out until no code is longer than ``MOST_BITS``, as bzip2 does."""
    counts = counts.copy()
    while True:
        lengths = _tree_depths(counts)
        if int(lengths.max()) <= MOST_BITS:
            return lengths.astype(np.uint8)
        counts = np.where(counts > 0, counts // 2 + 1, 0)


def _tree_depths(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    depths = np.zeros(counts.size, dtype=np.int64)
    used = np.flatnonzero(counts)
    if used.size == 1:
        depths[used] = 1
        return depths
    # Nodes are numbered in the order in which they are made; equal counts: the older one first, so that depths are the same everywhere.
    heap = [(int(counts[symbol]), number) for number, symbol in enumerate(used)]
    heapq.heapify(heap)
    parents = np.zeros(2 * used.size - 1, dtype=np.int64)
    for made in range(used.size, 2 * used.size - 1):
        (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
        parents[[left, right]] = made
        heapq.heappush(heap, (a + b, made))
    depth = np.zeros(2 * used.size - 1, dtype=np.int64)
    for node in range(2 * used.size - 3, -1, -1):
        depth[node] = depth[parents[node]] + 1
    depths[used] = depth[: used.size]
    return depths


def _canonical(lengths: Bytes) -> NDArray[np.int64]:
    """Code of every symbol: shorter codes come first, equally long ones in the order of the symbols."""
    codes = np.zeros(lengths.size, dtype=np.int64)
    code, before = 0, 0
    for symbol in _order(lengths):
        length = int(lengths[symbol])
        code <<= length - before
        codes[symbol] = code
        code, before = code + 1, length
    return codes


def _order(lengths: Bytes) -> NDArray[np.int64]:
    used = np.flatnonzero(lengths)
    return used[np.argsort(lengths[used], kind="stable")]


def _prefixes(lengths: Bytes, longest: int) -> tuple[Indices, NDArray[np.int64]]:
    """Symbol and code length of every prefix of ``longest`` bits; length 0 where no code begins so."""
    order = _order(lengths)
    spans = 1 << (longest - lengths[order].astype(np.int64))
    symbols, sizes = np.zeros(1 << longest, dtype=np.uint16), np.zeros(1 << longest, dtype=np.int64)
    filled = int(spans.sum())
    symbols[:filled] = np.repeat(order, spans)
    sizes[:filled] = np.repeat(lengths[order].astype(np.int64), spans)
    return symbols, sizes
