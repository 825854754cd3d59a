"""Files of an output folder: only those that its manifest names, only as they were written, never through links."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.reading import MOST_BYTES, parse_json
from alphasmith.storage.files.durable import ArtifactDigest, verify_file
from alphasmith.storage.files.tensors import read_tensors
from alphasmith.storage.output.entries import ArtifactEntry
from alphasmith.storage.output.manifest import FILE_NAME


class NamedFiles:
    """The files of one result. Whatever decides what is computed is read through this, and nothing else is.

    Attributes:
        path: The folder.

    Args:
        path: As given.
        artifacts: What the manifest names.

    Raises:
        IntegrityError: The manifest names a file twice.
    """

    def __init__(self, path: Path, artifacts: Iterable[ArtifactEntry]) -> None:
        self.path = path
        named = tuple(artifacts)
        self._entries: dict[str, ArtifactEntry] = {entry.path: entry for entry in named}
        if len(self._entries) != len(named):
            raise IntegrityError(f"{self.path / FILE_NAME} names a file twice")

    def names(self, below: str = "") -> tuple[str, ...]:
        """Files that the manifest names, by relative path.

        Args:
            below: Only those in this folder, e.g. ``smoothed``.
        """
        inside = f"{below}/" if below else ""
        return tuple(sorted(name for name in self._entries if name.startswith(inside)))

    def has(self, name: str) -> bool:
        """Whether the manifest names a file."""
        return name in self._entries

    def file(self, name: str) -> Path:
        """A file, after its digest was compared.

        Args:
            name: Relative path.

        Raises:
            IntegrityError: The manifest does not name it, it is gone, changed, no plain file, or reached through a link.
        """
        path = self.place(name)
        try:
            verify_file(path, self._entries[name].sha256)
        except InputError as error:
            raise IntegrityError(f"{path}: {error.problem}") from error
        return path

    def check(self, below: str = "") -> tuple[ArtifactDigest, ...]:
        """Compare the digests of all files that the manifest names.

        Args:
            below: As for ``names``.

        Raises:
            IntegrityError: As for ``file``.
        """
        entries = [self._entries[name] for name in self.names(below)]
        for entry in entries:
            self.file(entry.path)
        return tuple(ArtifactDigest(path=entry.path, sha256=entry.sha256, bytes=entry.bytes) for entry in entries)

    def read_bytes(self, name: str) -> bytes:
        """The content of a small file; what is compared with the digest is what is returned.

        Raises:
            IntegrityError: As for ``file``.
        """
        path = self.place(name)
        try:
            # Whoever puts a link there between the check and this gets an error, not its target.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
            with open(descriptor, "rb") as stream:
                content = stream.read(MOST_BYTES + 1)
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read ({error.strerror})") from error
        if len(content) > MOST_BYTES:
            raise IntegrityError(f"{path} has more than {MOST_BYTES} bytes")
        if hashlib.sha256(content).hexdigest() != self._entries[name].sha256:
            raise IntegrityError(f"{path} is not what was written; the file was changed or damaged")
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            IntegrityError: As for ``file``, or it is none.
        """
        try:
            content = parse_json(self.read_bytes(name), field="artifacts", what=name, remedy="run again")
        except InputError as error:
            raise IntegrityError(f"{self.path / name} is not readable JSON ({error.problem})") from error
        if not isinstance(content, dict):
            raise IntegrityError(f"{self.path / name} holds no JSON object")
        return content

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file.

        Raises:
            IntegrityError: As for ``file``.
        """
        return read_tensors(self.file(name))

    def place(self, name: str) -> Path:
        """Where a named file is, its content unread.

        Args:
            name: Relative path.

        Raises:
            IntegrityError: The manifest does not name it, it is gone, no plain file, or reached through a link.
        """
        if name not in self._entries:
            raise IntegrityError(f"{self.path / FILE_NAME} does not name {name}, so nothing says what it should be")
        path = self.path
        for part in Path(name).parts:
            path /= part
            if path.is_symlink():
                raise IntegrityError(f"{path} is a symbolic link; a result holds its own files")
        if not path.is_file():
            raise IntegrityError(f"{path} is gone or is no file")
        return path


def refuse_linked_manifest(path: Path) -> None:
    """Raises ``IntegrityError`` where the manifest in a folder is a link."""
    if (path / FILE_NAME).is_symlink():
        raise IntegrityError(f"{path / FILE_NAME} is a symbolic link; a result holds its own files")
