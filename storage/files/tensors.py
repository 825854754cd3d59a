"""Tensors on disk as safetensors: same content, same bytes; every read can be checked against a digest.

The writer is our own because a digest is only useful when it is reproducible, and because a full device must be reported
as what it is: tensors are laid out by name, metadata is sorted, and one tensor at a time is copied to the CPU, hashed and
written. The files are plain safetensors; the library reads them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.storage.files.durable import CHUNK, ArtifactDigest, sync_file, verify_file

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> ArtifactDigest:
    """Write tensors to one safetensors file, forced to the device before this returns.

    Tensors that share memory are written once each: tied weights are the caller's to remove.

    Args:
        path: File to write; replaced if it exists.
        tensors: Dense tensors by name, any device, any strides.
        metadata: Text by name, kept in the header.

    Returns:
        Digest with ``path`` as given.

    Raises:
        InputError: A tensor is sparse or without data, or has a type safetensors does not know.
        OSError: The file cannot be written.
    """
    _check(tensors)
    order = _layout(tensors)
    header = _header(tensors, order, metadata)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        size += _put(file, digest, header)
        for name in order:
            for piece in _pieces(tensors[name]):
                size += _put(file, digest, piece)
    sync_file(path)
    return ArtifactDigest(path=str(path), sha256=digest.hexdigest(), bytes=size)


def read_tensors(path: Path, *, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.
        sha256: Digest recorded when it was written; None skips the check.

    Raises:
        IntegrityError: The digest differs, or the file is not a whole safetensors file.
        InputError: The file cannot be read.
    """
    _checked(path, sha256)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise IntegrityError(f"{path}: not a whole safetensors file ({error})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the text kept in the header of a safetensors file.

    Raises:
        IntegrityError: It is not a whole safetensors file.
        InputError: The file cannot be read.
    """
    _checked(path, None)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise IntegrityError(f"{path}: not a whole safetensors file ({error})") from error


def _checked(path: Path, sha256: str | None) -> None:
    if not path.is_file():
        raise InputError(str(path), "is not a file", "check the path")
    if sha256 is not None:
        verify_file(path, sha256)


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise InputError("tensors", "the name '__metadata__' is taken by the format", "rename the tensor")
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise InputError(f"tensor {name}", "is sparse or holds no data", "make it dense and load it first")
        if tensor.dtype not in _NAMES:
            raise InputError(f"tensor {name}", f"type {tensor.dtype} cannot be stored", "convert it to a real type")


def _layout(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    # Widest types first keeps every tensor aligned to its own element size.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, torch.Tensor], order: list[str], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(tensor: torch.Tensor) -> Iterator[bytes]:
    flat = tensor.detach().to("cpu").resolve_neg().reshape(-1)
    if flat.stride(0) != 1:  # also of one element or none, where any stride counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8)
    for start in range(0, data.numel(), CHUNK):
        yield data[start : start + CHUNK].numpy().tobytes()


def _put(file: BinaryIO, digest: hashlib._Hash, data: bytes) -> int:
    file.write(data)
    digest.update(data)
    return len(data)
