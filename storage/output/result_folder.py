"""Reading an output folder: only files that its manifest names, only as they were written, never through links."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.reading import MOST_BYTES, parse_json
from alphasmith.storage.files.durable import ArtifactDigest, verify_file
from alphasmith.storage.files.tensors import read_tensors
from alphasmith.storage.output.checkpoint import INDEX, SINGLE
from alphasmith.storage.output.entries import ArtifactEntry
from alphasmith.storage.output.manifest import FILE_NAME, Manifest, read_manifest


class ResultFolder:
    """The files of one result. Whatever decides what is computed is read through this, and nothing else is.

    Attributes:
        path: The folder.
        manifest: Its manifest.

    Args:
        path: Output folder of a run.

    Raises:
        InputError: It holds no readable manifest.
        IntegrityError: The manifest is a link, or names a file twice.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if (self.path / FILE_NAME).is_symlink():
            raise IntegrityError(f"{self.path / FILE_NAME} is a symbolic link; a result holds its own files")
        self.manifest: Manifest = read_manifest(self.path)
        self._entries: dict[str, ArtifactEntry] = {entry.path: entry for entry in self.manifest.artifacts}
        if len(self._entries) != len(self.manifest.artifacts):
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
        path = self._plain(name)
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
        path = self._plain(name)
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

    def weight_files(self, below: str) -> tuple[str, ...]:
        """The files of a checkpoint, one or several with an index, all of them named by the manifest.

        Args:
            below: Its folder, e.g. ``smoothed``.

        Raises:
            IntegrityError: One is not named; or the index is not as it was written, or is none.
        """
        index = f"{below}/{INDEX}"
        if not self.has(index):
            found: tuple[str, ...] = (f"{below}/{SINGLE}",)
        else:
            places = self.read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
                raise IntegrityError(f"{self.path / index} is no index of shards")
            found = tuple(f"{below}/{shard}" for shard in sorted(set(places.values())))
        for name in found:
            self._plain(name)
        return found

    def read_checkpoint(self, below: str) -> dict[str, Tensor]:
        """All tensors of a checkpoint.

        Args:
            below: Its folder, e.g. ``smoothed``.

        Raises:
            IntegrityError: As for ``weight_files`` and ``file``.
        """
        return {name: value for file in self.weight_files(below) for name, value in self.read_tensors(file).items()}

    @contextmanager
    def only_named(self, below: str) -> Iterator[Path]:
        """A folder of the result for a library that reads what it finds: it finds what the manifest names, nothing else.

        Args:
            below: The folder, e.g. ``smoothed``.

        Yields:
            A temporary folder with links to the files, whose digests were compared.

        Raises:
            IntegrityError: As for ``file``; or the manifest names nothing there.
        """
        names = self.names(below)
        if not names:
            raise IntegrityError(f"{self.path / FILE_NAME} names no file of {below}/")
        with tempfile.TemporaryDirectory(prefix="alphasmith-") as made:
            top = Path(made)
            for name in names:
                link = top / Path(name).relative_to(below)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(self.file(name).resolve())
            yield top

    def _plain(self, name: str) -> Path:
        """Where a named file is, no part of the way inside the folder being a link."""
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
