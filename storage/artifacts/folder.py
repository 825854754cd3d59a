"""A folder of objects behind Optuna's artifact interface: every object appears whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from optuna.artifacts.exceptions import ArtifactNotFound

from alphasmith.objectives.errors import InputError
from alphasmith.storage.files.durable import CHUNK, NO_SPACE, sync_file, sync_folder

# No slash, no leading dot: neither out of the folder nor among its temporaries.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_UNFINISHED = re.compile(r"\..+\.partial")


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """One object of an artifact store.

    Attributes:
        id: Its id; of an unfinished one, what the store calls it.
        bytes: Size [bytes]; 0 where the store does not tell.
        modified: When it was written or asked for again, by the clock of the store.
    """

    id: str
    bytes: int
    modified: datetime


def check_id(artifact_id: str) -> str:
    """The id, if it names an object of a store and nothing else.

    Raises:
        InputError: It has other characters than letters, digits, ``.``, ``_`` and ``-``, or begins with a dot.
    """
    if not _ID.fullmatch(artifact_id):
        raise InputError("artifacts", f"{artifact_id!r} is not the id of an artifact", "use an id that the store gave")
    return artifact_id


class FolderBackend:
    """Objects are written beside their place under a hidden name, forced to the device and renamed.

    A process that is killed while it writes leaves a hidden file, which no reader sees and ``alphasmith db gc`` removes.
    Implements ``optuna.artifacts``' interface (``open_reader``, ``write``, ``remove``). For use from many threads and processes.

    Args:
        folder: Made with the first object.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open an object for reading.

        Raises:
            ArtifactNotFound: There is none of that id.
            InputError: It cannot be read, or the id is none.
        """
        path = self._path(artifact_id)
        with self._told("read"):
            try:
                return path.open("rb")
            except FileNotFoundError as error:
                raise ArtifactNotFound(f"no artifact {artifact_id}") from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write an object, or put another in its place.

        Raises:
            InputError: No space is left, the folder is not writable, or the id is none. Nothing is kept then.
        """
        path = self._path(artifact_id)
        with self.drafted() as draft:
            with draft.open("wb") as file:
                shutil.copyfileobj(content_body, file, CHUNK)
            sync_file(draft)
            self._publish(draft, path)

    def remove(self, artifact_id: str) -> None:
        """Remove an object.

        Raises:
            ArtifactNotFound: There is none of that id.
            InputError: The folder is not writable, or the id is none.
        """
        path = self._path(artifact_id)
        with self._told("written"):
            try:
                path.unlink()
            except FileNotFoundError as error:
                raise ArtifactNotFound(f"no artifact {artifact_id}") from error

    def size(self, artifact_id: str) -> int | None:
        """Size of an object [bytes]; None where there is none."""
        with self._told("read"):
            try:
                return self._path(artifact_id).stat().st_size
            except FileNotFoundError:
                return None

    def modified(self, artifact_id: str) -> datetime | None:
        """When an object was written or asked for again; None where there is none."""
        with self._told("read"):
            try:
                return datetime.fromtimestamp(self._path(artifact_id).stat().st_mtime, UTC)
            except FileNotFoundError:
                return None

    def touch(self, artifact_id: str) -> bool:
        """Mark an object as asked for just now. False where there is none."""
        with self._told("written"):
            try:
                os.utime(self._path(artifact_id))
            except FileNotFoundError:
                return False
            return True

    @contextmanager
    def drafted(self) -> Iterator[Path]:
        """A place in the same folder to write into; what is left there when the block ends is removed.

        Raises:
            InputError: No space is left, or the folder is not writable.
        """
        draft = self.folder / f".{secrets.token_hex(8)}.partial"
        with self._told("written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                yield draft
            finally:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)

    def adopt(self, draft: Path, artifact_id: str) -> None:
        """Turn a draft, forced to the device already, into an object."""
        with self._told("written"):
            self._publish(draft, self._path(artifact_id))

    def listed(self) -> Iterator[StoredObject]:
        """Every whole object."""
        return self._found(_ID)

    def unfinished(self) -> Iterator[StoredObject]:
        """What is being written, or was left by a process that was killed."""
        return self._found(_UNFINISHED)

    def discard(self, unfinished: StoredObject) -> None:
        """Remove something unfinished."""
        if not _UNFINISHED.fullmatch(unfinished.id) or "/" in unfinished.id:
            raise InputError("artifacts", f"{unfinished.id!r} is not unfinished", "remove it by its id")
        with self._told("written"):
            (self.folder / unfinished.id).unlink(missing_ok=True)

    def _found(self, names: re.Pattern[str]) -> Iterator[StoredObject]:
        with self._told("read"):
            if not self.folder.is_dir():
                return
            for entry in os.scandir(self.folder):
                if not names.fullmatch(entry.name):
                    continue
                with suppress(FileNotFoundError):  # another process was faster
                    if entry.is_file(follow_symlinks=False):
                        told = entry.stat(follow_symlinks=False)
                        modified = datetime.fromtimestamp(told.st_mtime, UTC)
                        yield StoredObject(id=entry.name, bytes=told.st_size, modified=modified)

    def _path(self, artifact_id: str) -> Path:
        return self.folder / check_id(artifact_id)

    def _publish(self, draft: Path, path: Path) -> None:
        os.replace(draft, path)
        sync_folder(self.folder)

    @contextmanager
    def _told(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in NO_SPACE:
                raise InputError(
                    "artifacts",
                    f"no space left in {self.folder}; nothing was kept",
                    "free space or choose another place with --set artifacts=FOLDER",
                ) from error
            reason = "a file is in the way" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror or error
            raise InputError(
                "artifacts",
                f"{self.folder} cannot be {done} ({reason})",
                "choose another folder or correct its permissions",
            ) from error
