"""Bytes on disk: canonical JSON, digests, durable writes. No tensors here, so that pages can be served without torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError, IntegrityError, NonFiniteError

#: Bytes hashed or copied per step; bounds the memory of every file operation.
CHUNK = 1 << 20

#: Operating-system errors that mean "there is no room": device full, quota used up, file-size limit reached.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, kw_only=True)
class ArtifactDigest:
    """What identifies a file that was written.

    Attributes:
        path: As given by whoever wrote it; relative and with ``/`` when it belongs to an output folder.
        sha256: 64 hexadecimal digits over the content.
        bytes: Size [bytes].
    """

    path: str
    sha256: str
    bytes: int


def artifact_kind(path: str) -> str:
    """Kind of a file in an output folder: its first folder, or its name without ending."""
    return path.split("/")[0].split(".")[0]


def canonical_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text that depends on the content only: keys sorted, one newline at the end.

    Args:
        value: Mappings with text keys, lists, tuples, text, numbers, booleans, None.
        indent: Spaces per level, or None for one line.

    Raises:
        NonFiniteError: A number is NaN or infinite.
        InputError: Something JSON cannot hold.
    """
    _refuse_odd_keys(value)
    separators = (",", ":") if indent is None else None
    try:
        text = json.dumps(
            value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False
        )
    except ValueError as error:
        raise NonFiniteError(f"a value to be stored as JSON is not finite or refers to itself: {error}") from error
    except TypeError as error:
        raise InputError("json", str(error), "give text, numbers, booleans, lists and mappings only") from error
    return text + "\n"


def digest_file(path: Path, *, name: str | None = None) -> ArtifactDigest:
    """Hash a file in bounded memory.

    Args:
        path: The file.
        name: Path to put into the digest; ``path`` itself by default.

    Raises:
        InputError: The file cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise InputError(
            str(path), f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error
    return ArtifactDigest(path=str(path) if name is None else name, sha256=digest.hexdigest(), bytes=size)


def verify_file(path: Path, sha256: str) -> ArtifactDigest:
    """Hash a file and compare.

    Raises:
        IntegrityError: The content is not what was recorded.
        InputError: The file cannot be read.
    """
    digest = digest_file(path)
    if digest.sha256 != sha256.lower():
        raise IntegrityError(
            f"{path}: sha256 is {digest.sha256}, recorded was {sha256}; the file was changed or damaged"
        )
    return digest


def sync_file(path: Path) -> None:
    """Force a file's content to the device, so that a rename after it cannot expose an empty file."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the device. Does nothing where folders cannot be opened."""
    if hasattr(os, "O_DIRECTORY"):
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def is_no_space(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that the device is full.

    Writers outside Python report it as text: safetensors raises ``SafetensorError`` with the system's message.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_SPACE:
            return True
        if any(f"os error {code})" in str(seen) for code in NO_SPACE):
            return True
        seen = seen.__cause__
    return False


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_odd_keys(value: Any) -> None:
    # json.dumps turns 1, True and None into text keys silently, which breaks round trips.
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError("json", f"key {key!r} is not text", "use text keys")
            _refuse_odd_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_odd_keys(item)
