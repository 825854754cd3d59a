"""Tensors that nobody trains, bit by bit in fewer bytes: tables of sines and filters that a model computes its features with."""

from __future__ import annotations

import lzma
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from alphasmith.objectives.errors import InputError

#: Types that are squeezed, by the names that are stored.
SqueezedType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in SqueezedType.__args__}  # type: ignore[attr-defined]
#: Bytes below which nothing is won, and what the JSON of one takes.
_LEAST, _ENTRY = 256, 80
#: Of larger tensors a sample is tried first; it must become smaller by a tenth.
_SAMPLE = 1 << 20


class SqueezedEntry(BaseModel):
    """What is stored of a squeezed tensor beside its bytes, as JSON.

    Attributes:
        shape: Of the tensor.
        dtype: Of its elements.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(strict=False)  # JSON has lists
    dtype: SqueezedType = "float32"


def squeeze(value: Tensor) -> tuple[SqueezedEntry, Tensor] | None:
    """A tensor as LZMA2 of its bytes, uint8 on the CPU; None where that saves nothing.

    Args:
        value: Any.
    """
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES or value.nbytes < _LEAST:
        return None
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    filters = _filters(value.element_size())
    if len(raw) > 2 * _SAMPLE and len(_packed(raw[:_SAMPLE], filters)) > 0.9 * _SAMPLE:
        return None
    data = _packed(raw, filters)
    if len(data) + _ENTRY >= len(raw):
        return None
    return SqueezedEntry(shape=tuple(value.shape), dtype=name), torch.frombuffer(bytearray(data), dtype=torch.uint8)  # type: ignore[arg-type]  # one of those known


def expand(name: str, entry: SqueezedEntry, data: Tensor) -> Tensor:
    """The tensor that was squeezed, bit by bit; never more memory than its shape says.

    Args:
        name: What to call it in errors.
        entry: What was stored as JSON.
        data: (n,) uint8.

    Raises:
        InputError: The bytes are corrupt.
    """
    dtype = _DTYPES[entry.dtype]
    size = dtype.itemsize
    for length in entry.shape:
        size *= length
    try:
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise ValueError(f"{data.dtype} of {data.dim()} axes in place of bytes")
        reader = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_filters(dtype.itemsize))
        raw = reader.decompress(data.numpy().tobytes(), max_length=size + 1)
        if len(raw) != size:
            raise ValueError(f"{len(raw)} bytes in place of {size}")
    except (lzma.LZMAError, ValueError, EOFError, MemoryError) as error:
        raise InputError(name, f"its squeezed bytes are corrupt ({error})", "take an intact copy") from error
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(entry.shape)


def _packed(raw: bytes, filters: list[dict[str, Any]]) -> bytes:
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=filters)


def _filters(size: int) -> list[dict[str, Any]]:
    """Numbers of ``size`` bytes: which byte of a number comes next says more than the one before it."""
    axis = {1: 0, 2: 1, 4: 2, 8: 3}[size]
    own = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 22}
    return [{**own, "lc": 3 if axis == 0 else 0, "lp": axis, "pb": axis}]
