"""Tensors by content: what a run needs to go on, in a folder or a bucket that all its processes reach.

An id is the digest of its object, so the same content is kept once, and what is read is checked against it every time.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from optuna.artifacts.exceptions import ArtifactNotFound
from torch import Tensor

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.reading import usable_path
from alphasmith.storage.artifacts._bucket import BucketBackend
from alphasmith.storage.artifacts.folder import FolderBackend, StoredObject, check_id
from alphasmith.storage.database.urls import parse
from alphasmith.storage.files.durable import CHUNK, NO_SPACE, ArtifactDigest, digest_file
from alphasmith.storage.files.tensors import read_metadata, read_tensors, write_tensors

__all__ = ["ArtifactStore", "MissingArtifactError", "StoredObject", "StoredTensors", "default_address", "is_ours"]

_ENDING = ".safetensors"
_MARK = "used-by-"
_DIGITS = frozenset("0123456789abcdef")
_DEFAULT_FOLDER = "alphasmith-artifacts"
_REMEDY = "give a folder, or s3://BUCKET/PREFIX"


class MissingArtifactError(IntegrityError):
    """An artifact that was kept is not in its store any more."""


@dataclass(frozen=True, kw_only=True)
class StoredTensors:
    """What was read from a store.

    Attributes:
        tensors: By name.
        metadata: Text kept with them.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def is_ours(artifact_id: str) -> bool:
    """Whether an id is one that ``ArtifactStore.put`` gives; Optuna's uploads to the same store have others."""
    name = artifact_id.removesuffix(_ENDING)
    return artifact_id.endswith(_ENDING) and len(name) == 64 and _DIGITS.issuperset(name)


def default_address(storage_url: str) -> str:
    """Where artifacts of the runs in a database are kept by default; absolute.

    Args:
        storage_url: Address of the database. SQLite: a folder beside its file; servers: one in the working directory.

    Raises:
        InputError: Field ``storage``: not an address.
    """
    parsed = parse(storage_url)
    if parsed.get_backend_name() == "sqlite":
        return f"{parsed.database}.artifacts"
    return str(Path(_DEFAULT_FOLDER).absolute())


class ArtifactStore:
    """A store of tensors. For use from many threads; open it anew in every process.

    Attributes:
        address: Where it is: an absolute folder or ``s3://bucket/prefix``. Without credentials.
        backend: The same store as Optuna's ``upload_artifact`` and ``download_artifact`` take it.
    """

    def __init__(self, address: str, backend: FolderBackend | BucketBackend) -> None:
        self.address = address
        self.backend = backend

    @classmethod
    def open(cls, url: str) -> ArtifactStore:
        """Open a store. A folder is made with its first object, a bucket must exist.

        Args:
            url: A folder, ``file:///FOLDER`` or ``s3://bucket/prefix``.

        Raises:
            InputError: Field ``artifacts``: none of these; or the bucket cannot be used, see ``bucket``.
        """
        if not url.strip():
            raise InputError("artifacts", "is empty", _REMEDY)
        if "://" not in url:
            return cls._folder(Path(url))
        scheme, place, path = url.partition("://")[0].lower(), *_split(url)
        if scheme == "file":
            if place not in {"", "localhost"} or not path.startswith("/"):
                raise InputError("artifacts", "a file address names another machine", "use file:///FOLDER, or a folder")
            return cls._folder(Path(unquote(path)))
        if scheme != "s3":
            raise InputError("artifacts", f"{scheme}:// addresses are not supported", _REMEDY)
        if not place:
            raise InputError("artifacts", "the address names no bucket", "use s3://BUCKET/PREFIX")
        prefix = path.strip("/")
        return cls(f"s3://{place}/{prefix}".rstrip("/"), BucketBackend(place, prefix))

    def put(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> ArtifactDigest:
        """Keep tensors. The same content is kept once: a whole object of the same id is not written again.

        Args:
            tensors: Dense tensors by name, any device.
            metadata: Text by name, kept with them and part of the content.

        Returns:
            Digest; its ``path`` is the id, ``<sha256>.safetensors``.

        Raises:
            InputError: Field ``artifacts``: no space left, or the store cannot be written. Nothing is kept then. Or a tensor
                that cannot be stored.
        """
        with self._draft() as draft:
            digest = write_tensors(draft, tensors, metadata)
            digest = replace(digest, path=digest.sha256 + _ENDING)
            if not self._holds(digest):
                self._publish(draft, digest.path)
        return digest

    def read(self, artifact_id: str, *, sha256: str) -> StoredTensors:
        """Tensors with the text kept with them.

        Args:
            artifact_id: As ``put`` gave it.
            sha256: Digest that was recorded; checked at every read.

        Raises:
            MissingArtifactError: The object is gone.
            IntegrityError: Its content is not what was recorded.
            InputError: Field ``artifacts``: the store cannot be read, or the id is none.
        """
        with self._copy(artifact_id) as path:
            try:
                tensors = read_tensors(path, sha256=sha256)
                metadata = read_metadata(path)
            except IntegrityError as error:
                raise IntegrityError(self._damaged(artifact_id)) from error
            # Read into memory: a view of the file would follow what happens to it, or crash with it.
            return StoredTensors(tensors={k: v.clone() for k, v in tensors.items()}, metadata=metadata)

    def get(self, artifact_id: str, *, sha256: str) -> dict[str, Tensor]:
        """Tensors alone; see ``read``.

        Raises:
            MissingArtifactError: The object is gone.
            IntegrityError: Its content is not what was recorded.
            InputError: Field ``artifacts``: the store cannot be read, or the id is none.
        """
        return self.read(artifact_id, sha256=sha256).tensors

    def check(self, artifact_id: str, *, sha256: str | None = None) -> None:
        """Refuse an object that is gone or, where a digest is given, damaged.

        Raises:
            MissingArtifactError: The object is gone.
            IntegrityError: Its content is not what was recorded.
            InputError: Field ``artifacts``: the store cannot be read, or the id is none.
        """
        if sha256 is None:
            if self.backend.size(check_id(artifact_id)) is None:
                raise self._missing(artifact_id)
            return
        with self._copy(artifact_id) as path:
            if digest_file(path).sha256 != sha256:
                raise IntegrityError(self._damaged(artifact_id))

    def remove(self, artifact_id: str) -> None:
        """Remove an object; nothing happens where it is gone already.

        Raises:
            InputError: Field ``artifacts``: the store cannot be written, or the id is none.
        """
        try:
            self.backend.remove(artifact_id)
        except ArtifactNotFound:
            return

    def listed(self) -> Iterator[StoredObject]:
        """Every whole object, those that Optuna uploaded included (see ``is_ours``).

        Raises:
            InputError: Field ``artifacts``: the store cannot be read.
        """
        return self.backend.listed()

    def unfinished(self) -> Iterator[StoredObject]:
        """What is being written, or was left by a process that was killed; ``backend.discard`` removes it."""
        return self.backend.unfinished()

    def announce(self, database: str) -> None:
        """Note which database names objects here; ``alphasmith db gc`` spares a store that others use, too.

        Args:
            database: Its address without user and password.

        Raises:
            InputError: Field ``artifacts``: the store cannot be written.
        """
        mark = _mark(database)
        if self.backend.size(mark) is None:
            self.backend.write(mark, io.BytesIO(database.encode()))

    def others(self, database: str) -> int:
        """How many databases beside this one have announced themselves.

        Raises:
            InputError: Field ``artifacts``: the store cannot be read.
        """
        ours = _mark(database)
        return sum(item.id.startswith(_MARK) and item.id != ours for item in self.listed())

    @classmethod
    def _folder(cls, folder: Path) -> ArtifactStore:
        usable_path("artifacts", folder)
        folder = folder.expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise InputError("artifacts", f"{folder} is a file", "choose a folder")
        return cls(str(folder), FolderBackend(folder))

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        """A local file to write to; gone when the block ends."""
        if isinstance(self.backend, FolderBackend):
            with self.backend.drafted() as path:
                yield path
            return
        with _scratch() as folder:
            yield folder / "draft"

    def _publish(self, draft: Path, artifact_id: str) -> None:
        if isinstance(self.backend, FolderBackend):
            self.backend.adopt(draft, artifact_id)
            return
        with draft.open("rb") as file:
            self.backend.write(artifact_id, file)

    def _holds(self, digest: ArtifactDigest) -> bool:
        """Whether a whole object of that content is there already; it then counts as new for ``alphasmith db gc``."""
        if self.backend.size(digest.path) != digest.bytes:
            return False
        try:
            self.check(digest.path, sha256=digest.sha256)
        except IntegrityError:
            return False  # damaged or gone meanwhile: written again
        return self.backend.touch(digest.path)

    @contextmanager
    def _copy(self, artifact_id: str) -> Iterator[Path]:
        """A local file with an object's content; for a folder the object itself, which never changes."""
        if isinstance(self.backend, FolderBackend):
            path = self.backend.folder / check_id(artifact_id)
            if not path.is_file():
                raise self._missing(artifact_id)
            try:
                yield path
            except InputError as error:
                if not path.is_file():  # removed just now
                    raise self._missing(artifact_id) from error
                raise
            return
        with _scratch() as folder:
            path = folder / "copy"
            with path.open("wb", CHUNK) as file:
                try:
                    self.backend.download(artifact_id, file)
                except ArtifactNotFound as error:
                    raise self._missing(artifact_id) from error
            yield path

    def _missing(self, artifact_id: str) -> MissingArtifactError:
        return MissingArtifactError(f"{self.address}: artifact {artifact_id} is gone")

    def _damaged(self, artifact_id: str) -> str:
        return f"{self.address}: artifact {artifact_id} is not what was recorded; it was changed or damaged"


def _mark(database: str) -> str:
    return _MARK + hashlib.sha256(database.encode()).hexdigest()[:16]


@contextmanager
def _scratch() -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="alphasmith-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise InputError(
            "artifacts",
            f"no space left in {tempfile.gettempdir()}; nothing was kept",
            "free space or set TMPDIR to a larger device",
        ) from error


def _split(url: str) -> tuple[str, str]:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError("artifacts", "is not an address", _REMEDY) from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        # Not shown: what stands there may be a secret.
        raise InputError(
            "artifacts", "the address holds more than bucket and prefix", "give credentials as AWS_* variables"
        )
    return parts.netloc, parts.path
