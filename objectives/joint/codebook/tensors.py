"""Weights as a table and packed indices: made, measured in bytes, stored and read back. Source: claim B-6, formulas fB9, fB10."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.codebook._compensation import compensated
from alphasmith.objectives.joint.codebook._entropy import HuffmanIndices, huffman_decode, huffman_encode, huffman_size
from alphasmith.objectives.joint.codebook._packing import MOST_BITS, index_bits, pack, packed_size, unpack
from alphasmith.objectives.joint.codebook.clustering import MOST_ENTRIES, Clustering, cluster, match
from alphasmith.objectives.literals import CodebookStart, IndexCoding
from alphasmith.objectives.text import error_line

#: Types of weights that are restored as they were.
WeightType = Literal["float32", "float64", "float16", "bfloat16"]
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Tensors of a codebook and their types; the last two belong to a Huffman code.
_STORED = {
    "table": torch.float32, "sizes": torch.int32, "indices": torch.uint8, "lengths": torch.uint8, "blocks": torch.uint16,
}  # fmt: skip
_HUFFMAN = frozenset({"lengths", "blocks"})


@dataclass(frozen=True, kw_only=True)
class CodebookSettings:
    """How weights are clustered and their indices stored.

    Attributes:
        k: Entries of a table, 2 to 65536.
        start: Where the clustering starts from, see :func:`~alphasmith.objectives.joint.codebook.clustering.cluster`.
        keep_zero: Hold one entry at 0; None: where a tenth of the weights is zero.
        channels: Output channels (rows of the first axis) that share a table, the last table taking what is left; None: one table.
        coding: How indices are stored.
        iterations: Most steps of Lloyd's iteration.
        seed: Of the drawn start.
        half_tables: Round the entries to float16 where that is fine enough for them; two that become equal are one.
    """

    k: int = 32
    start: CodebookStart = "optimal"
    keep_zero: bool | None = None
    channels: int | None = None
    coding: IndexCoding = "packed"
    iterations: int = 1000
    seed: int = 0
    half_tables: bool = False


class CodebookEntry(BaseModel):
    """What is stored of a weight beside its tensors, as JSON.

    Attributes:
        shape: Shape of the weight.
        dtype: Type it is restored in.
        channels: Rows of the first axis that share a table; None: one table.
        bits: Bits of a packed index.
        coding: How indices are stored.
        digest: SHA-256 over all this and the tensors, 64 hexadecimal digits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(strict=False)  # JSON has lists
    dtype: WeightType = "float32"
    channels: int | None = Field(default=None, ge=1)
    bits: int = Field(ge=0, le=MOST_BITS)
    coding: IndexCoding = "packed"
    digest: str


@dataclass(frozen=True, eq=False, kw_only=True)
class CodebookWeight:
    """One weight as tables and indices.

    Attributes:
        entry: What is stored as JSON.
        tensors: What is stored as tensors: ``table`` (all tables one after the other, float32 or float16), ``sizes`` (entries of each,
            int32), ``indices`` (bytes), and under a Huffman code ``lengths`` and ``blocks``.
        packed_bytes: Bytes of tables and packed indices, whichever way they are stored.
        huffman_bytes: Bytes of tables and Huffman-coded indices, likewise.
        float_bytes: Bytes of the weight itself.
        error: Sum of squared differences between the weight and its entries.
        notes: What the clustering has to say.
    """

    entry: CodebookEntry
    tensors: Mapping[str, Tensor]
    packed_bytes: int
    huffman_bytes: int
    float_bytes: int
    error: float
    notes: tuple[str, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored."""
        return self.packed_bytes if self.entry.coding == "packed" else self.huffman_bytes

    def in_coding(self, coding: IndexCoding) -> CodebookWeight:
        """The same weight with its indices stored in this way."""
        if coding == self.entry.coding:
            return self
        tables = self.tensors["sizes"].long()
        indices = _stored_indices(self.entry, self.tensors, math.prod(self.entry.shape))
        tensors = {name: self.tensors[name] for name in ("table", "sizes")}
        tensors |= _coded(indices, coding, self.entry.bits, int(tables.max()))
        entry = self.entry.model_copy(update={"coding": coding, "digest": ""})
        entry = entry.model_copy(update={"digest": stored_digest(entry, tensors)})
        return replace(self, entry=entry, tensors=tensors)


@dataclass(frozen=True, eq=False, kw_only=True)
class Codebooks:
    """All weights of a model after clustering.

    Attributes:
        weights: Name -> tables and indices, in the order of the model.
        aliases: Name of a tied weight -> the name that it is stored under.
        kept: Name -> why the tensor stays as it is.
    """

    weights: Mapping[str, CodebookWeight]
    aliases: Mapping[str, str]
    kept: Mapping[str, str]


def encode_weights(weights: Mapping[str, Tensor], settings: CodebookSettings) -> Codebooks:
    """Cluster every weight for which that saves bytes. Source: claims B-6, B-7.

    Args:
        weights: Floating tensors by name; tensors on the same memory in the same shape are stored once.
        settings: How.

    Raises:
        InputError: A setting is out of range.
        NonFiniteError: A weight is NaN or infinite.
    """
    found: dict[str, CodebookWeight] = {}
    aliases: dict[str, str] = {}
    kept: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, weight in weights.items():
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.device)
        if weight.numel() and first.setdefault(key, name) != name:
            if first[key] in found:
                aliases[name] = first[key]
            else:
                kept[name] = kept[first[key]]
            continue
        reason = _refused(weight, settings)
        if not reason:
            found[name] = encode_weight(weight, settings, name=name)
            if found[name].stored_bytes >= found[name].float_bytes:
                made = found.pop(name)
                reason = f"its codebook takes {made.stored_bytes} bytes in place of {made.float_bytes}"
        if reason:
            kept[name] = reason
    return Codebooks(weights=found, aliases=aliases, kept=kept)


def encode_weight(
    weight: Tensor, settings: CodebookSettings, *, covariance: Tensor | None = None, name: str = "weight"
) -> CodebookWeight:
    """Cluster one weight and store it as tables and indices, whether or not that saves bytes. Source: claim B-6, fB9, fB12.

    Args:
        weight: (O, ...) floating, at least one element.
        settings: How.
        covariance: (D, D) mean of x x^T over the rows that the weight (O, D) is multiplied with: indices make up for each other's errors.
            None: every weight takes the nearest entry.
        name: What to call it in errors and notes.

    Raises:
        InputError: A setting is out of range, the covariance is of another size, or the weight has no elements, or no floating type of 16
            bits or more.
        NonFiniteError: It holds NaN or infinity.
    """
    _check(weight, settings, name)
    values = weight.detach().to("cpu", torch.float32)
    parts = [values] if settings.channels is None else list(values.split(settings.channels))
    made = [_clustered(part, settings, name) for part in parts]
    rounded = _halved([one.table for one in made]) if settings.half_tables else None
    stored = rounded or [one.table for one in made]
    found = [_matched(part, table.float(), covariance) for part, table in zip(parts, stored, strict=True)]
    indices = np.concatenate([one.reshape(-1).numpy().astype(np.uint16) for one in found])
    entries = max(table.numel() for table in stored)
    bits = index_bits(entries)
    tensors = {
        "table": torch.cat(stored),
        "sizes": torch.tensor([table.numel() for table in stored], dtype=torch.int32),
    }
    error = sum(one.error for one in made)
    if rounded or covariance is not None:
        pairs = zip(parts, stored, found, strict=True)
        error = sum(float((part - table.float()[one]).double().square().sum()) for part, table, one in pairs)
    tables = sum(tensor.nbytes for tensor in tensors.values())
    tensors |= _coded(indices, settings.coding, bits, entries)
    entry = CodebookEntry(
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # one of those that _check lets pass
        channels=settings.channels,
        bits=bits,
        coding=settings.coding,
        digest="",
    )
    return CodebookWeight(
        entry=entry.model_copy(update={"digest": stored_digest(entry, tensors)}),
        tensors=tensors,
        packed_bytes=tables + packed_size(indices.size, bits),
        huffman_bytes=tables + huffman_size(indices, entries),
        float_bytes=weight.numel() * weight.element_size(),
        error=error,
        notes=tuple(dict.fromkeys(note for one in made for note in one.notes)),
    )


def decode_weight(name: str, entry: Mapping[str, Any] | CodebookEntry, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that was stored, every element an entry of its table: bit-identical wherever it is read. Source: claim B-6.

    Args:
        name: What to call it in errors.
        entry: What was stored as JSON.
        tensors: What was stored as tensors.

    Returns:
        The weight in the shape and type it had, on the CPU.

    Raises:
        InputError: Something is missing, the digest is another one, or the parts do not fit each other.
    """
    try:
        known = entry if isinstance(entry, CodebookEntry) else CodebookEntry.model_validate(entry)
    except ValidationError as error:
        raise _corrupt(name, f"its codebook cannot be read ({error_line(error, 120)})") from error
    expected = {key: dtype for key, dtype in _STORED.items() if known.coding == "huffman" or key not in _HUFFMAN}
    types = {key: value.dtype for key, value in tensors.items()}
    if types.get("table") == torch.float16:
        expected["table"] = torch.float16
    if types != expected or any(t.dim() != 1 for t in tensors.values()):
        found = ", ".join(f"{key} of {value.dtype}" for key, value in sorted(tensors.items()))
        raise _corrupt(
            name, f"its codebook holds {found or 'nothing'}, not {', '.join(sorted(expected))} as they are made"
        )
    digest = stored_digest(known, tensors)
    if digest != known.digest:
        raise _corrupt(name, f"its codebook has the digest {digest}, {known.digest} is recorded")
    return tensors["table"][indices_of(name, known, tensors)].to(_DTYPES[known.dtype])


def indices_of(name: str, entry: CodebookEntry, tensors: Mapping[str, Tensor]) -> Tensor:
    """Place of every element's entry in ``table``, tables one after the other.

    Args:
        name: What to call the weight in errors.
        entry: What was stored as JSON.
        tensors: What was stored as tensors; the digest is not compared, see :func:`decode_weight`.

    Returns:
        int64 in the shape of the weight.

    Raises:
        InputError: The parts do not fit each other.
    """
    try:
        indices = _stored_indices(entry, tensors, math.prod(entry.shape))
    except InputError as error:
        raise _corrupt(name, f"its indices are corrupt ({error.problem})") from error
    sizes = tensors["sizes"].long()
    rows = entry.shape[0] if entry.shape else 1
    tables = 1 if entry.channels is None else -(-rows // entry.channels)
    if sizes.shape != (tables,) or int(sizes.min()) < 1 or int(sizes.sum()) != tensors["table"].numel():
        raise _corrupt(name, f"{tensors['table'].numel()} entries do not make {tables} tables")
    of_rows = torch.arange(rows) // (entry.channels or rows)
    local = torch.from_numpy(indices.astype(np.int64)).reshape(rows, -1)
    if bool((local >= sizes[of_rows].unsqueeze(1)).any()):
        raise _corrupt(name, "an index lies beyond its table")
    starts = torch.cumsum(sizes, 0) - sizes
    return (local + starts[of_rows].unsqueeze(1)).reshape(entry.shape)


def with_table(
    entry: CodebookEntry, tensors: Mapping[str, Tensor], table: Tensor
) -> tuple[CodebookEntry, dict[str, Tensor]]:
    """The same codebook with other entries in its tables, under a digest of its own.

    Args:
        entry: What was stored as JSON.
        tensors: What was stored as tensors.
        table: In the shape of the present one; stored in its type.

    Raises:
        InputError: The table has another shape.
        NonFiniteError: It holds NaN or infinity, or numbers too large for its type.
    """
    if table.shape != tensors["table"].shape:
        raise InputError("table", f"has shape {tuple(table.shape)}", f"give {tuple(tensors['table'].shape)}")
    stored = table.detach().to("cpu", tensors["table"].dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NonFiniteError("an entry of a table is not finite")
    found = dict(tensors) | {"table": stored.clone()}
    return entry.model_copy(update={"digest": stored_digest(entry, found)}), found


def _coded(indices: NDArray[np.uint16], coding: IndexCoding, bits: int, entries: int) -> dict[str, Tensor]:
    """Indices as they are stored."""
    if coding == "packed":
        return {"indices": torch.from_numpy(pack(indices, bits))}
    coded = huffman_encode(indices, entries)
    return {
        "indices": torch.from_numpy(coded.data),
        "lengths": torch.from_numpy(coded.lengths),
        "blocks": torch.from_numpy(coded.blocks),
    }


def _halved(tables: Sequence[Tensor]) -> list[Tensor] | None:
    """Tables in float16, or None where one of them is too large or too small for that."""
    found = [torch.unique(table.half()) for table in tables]
    for table in tables:
        rounded = table.half().float()
        if not float((rounded - table).norm()) <= torch.finfo(torch.float16).eps * float(table.norm()):
            return None
    return found


def stored_digest(entry: BaseModel, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what is stored, 64 hexadecimal digits.

    Args:
        entry: All its fields but ``digest`` count.
        tensors: Names, types, shapes and bytes count, the order does not.
    """
    digest = hashlib.sha256(json.dumps(entry.model_dump(exclude={"digest"}), sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)};".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stored_indices(entry: CodebookEntry, tensors: Mapping[str, Tensor], count: int) -> NDArray[np.uint16]:
    data = tensors["indices"].numpy()
    if entry.coding == "packed":
        return unpack(data, entry.bits, count)
    coded = HuffmanIndices(lengths=tensors["lengths"].numpy(), blocks=tensors["blocks"].numpy(), data=data)
    return huffman_decode(coded, count)


def _corrupt(name: str, problem: str) -> InputError:
    return InputError(name, problem, "export the model again, or take an intact copy")


def _matched(part: Tensor, table: Tensor, covariance: Tensor | None) -> Tensor:
    return match(part, table) if covariance is None else compensated(part, table, covariance)


def _clustered(part: Tensor, settings: CodebookSettings, name: str) -> Clustering:
    return cluster(
        part, settings.k, start=settings.start, keep_zero=settings.keep_zero, iterations=settings.iterations,
        seed=settings.seed, name=name,
    )  # fmt: skip


def _refused(weight: Tensor, settings: CodebookSettings) -> str:
    """Why a tensor is not worth clustering, as far as its size tells; empty where it may be."""
    if not weight.numel():
        return "it is empty"
    if str(weight.dtype).removeprefix("torch.") not in _DTYPES:
        return f"{weight.dtype} is no floating type of 16 bits or more"
    if weight.dim() < 2:
        return "it is no matrix"
    return ""


def _check(weight: Tensor, settings: CodebookSettings, name: str) -> None:
    if settings.channels is not None and settings.channels < 1:
        raise InputError("cluster.channels", f"{settings.channels} channels share a table", "use 1 or more")
    if settings.channels is not None and weight.dim() == 0:
        raise InputError(name, "is a single number without channels", "use one table")
    if not 2 <= settings.k <= MOST_ENTRIES:
        raise InputError("cluster.k", f"{settings.k} entries make no table", f"use 2 to {MOST_ENTRIES}")
    if str(weight.dtype).removeprefix("torch.") not in _DTYPES:
        raise InputError(name, f"is {weight.dtype}", "give a floating tensor of 16 bits or more")
