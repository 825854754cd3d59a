"""Reading an output folder: only files that its manifest names, only as they were written, never through links."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from alphasmith.objectives.errors import IntegrityError
from alphasmith.storage.output._named_files import NamedFiles, refuse_linked_manifest
from alphasmith.storage.output.checkpoint import INDEX, SINGLE
from alphasmith.storage.output.manifest import FILE_NAME, Manifest, read_manifest


class ResultFolder(NamedFiles):
    """The files of one result. Whatever decides what is computed is read through this, and nothing else is.

    Attributes:
        manifest: That of the folder.

    Args:
        path: Output folder of a run.

    Raises:
        InputError: It holds no readable manifest.
        IntegrityError: The manifest is a link, or names a file twice.
    """

    def __init__(self, path: Path | str) -> None:
        refuse_linked_manifest(Path(path))
        self.manifest: Manifest = read_manifest(Path(path))
        super().__init__(Path(path), self.manifest.artifacts)

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
            self.place(name)
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
