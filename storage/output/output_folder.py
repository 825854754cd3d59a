"""The output folder of a run: appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import torch

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.reading import usable_path
from alphasmith.storage.files import tensors as artifacts
from alphasmith.storage.files.durable import (
    NO_SPACE,
    ArtifactDigest,
    canonical_json,
    digest_file,
    is_no_space,
    sync_file,
    sync_folder,
)
from alphasmith.storage.output._parents import ParentFolders
from alphasmith.storage.output.manifest import FILE_NAME, read_manifest

_REMEDY = "choose another folder or remove it"
#: In the place of a process's token: what a run that goes block by block keeps beside its folder, whoever drives it.
BLOCKS = "blocks"
#: What the name of a partial folder ends with while another process removes it.
_DISCARDED = ".discarded"


def _at_once(step: Callable[[], None]) -> None:
    step()


class OutputFolder:
    """Builds ``<out>.partial-<attempt>`` beside the target and renames it to ``<out>`` at the end of the ``with`` block.

    The target is checked when the object is made, before any work. When the block ends normally, everything under ``path``
    is forced to the device and read again: the folder is published only if it holds every file that was written or adopted,
    with its digest, and nothing else. Then it is renamed in one step. When the block ends with an error (an interrupt
    included), the partial folder and every parent folder made for it are removed. A process that is killed leaves at most the
    partial folder, never a target that looks complete.

    Example::

        with OutputFolder(out) as folder:
            folder.write_json("manifest.json", content)
            model.save_pretrained(folder.subfolder("smoothed"))
            records = folder.adopt("smoothed")

    Not for use from several threads.

    Args:
        out: Target folder: absent, or an empty folder.
        attempt: End of the partial name, this process's alone; empty: random digits.
        publish: Calls what it is given, the rename, while nobody else can come to own the target, or raises; it may call it
            again where it does not know whether that happened.

    Raises:
        InputError: Field ``out``: exists and is not an empty folder. Later: no space left, not writable, or not whole.
    """

    def __init__(
        self, out: Path, *, attempt: str = "", publish: Callable[[Callable[[], None]], None] = _at_once
    ) -> None:
        self._out = usable_path("out", out)
        if not self._out.name:
            raise InputError("out", f"{self._out} is the root of a file system", "choose a folder in it")
        self._partial = partial_folder(self._out, attempt or secrets.token_hex(4))
        self._publish_under = publish
        self._identity: tuple[int, int] | None = None
        self._published = False
        self._parents = ParentFolders()
        self._written: dict[str, ArtifactDigest] = {}
        self._refuse_used_target()

    @property
    def path(self) -> Path:
        """Folder to write into while the block runs."""
        return self._partial

    @property
    def written(self) -> tuple[ArtifactDigest, ...]:
        """Everything written or adopted so far, by relative path."""
        return tuple(self._written[name] for name in sorted(self._written))

    def __enter__(self) -> Self:
        self._refuse_used_target()
        try:
            with self._translated():
                self._parents.make(self._partial.parent)
                self._partial.mkdir()
                self._identity = _identity(self._partial)
        except InputError:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
            if not isinstance(error, InputError) and is_no_space(error) and self._is_ours(error):
                raise self._no_space() from error
            return
        try:
            with self._translated():
                self._sync_all()
                self._check_whole()
                self._publish_under(self._publish)
        finally:
            if not self._published:
                self._discard()

    def subfolder(self, relative: str) -> Path:
        """Make a folder to let others write into; call ``adopt`` afterwards.

        Raises:
            InputError: The path leaves the folder, or cannot be made.
        """
        with self._translated():
            folder = self._inside(relative)
            self._make(folder)
        return folder

    def write_text(self, relative: str, text: str) -> ArtifactDigest:
        """Write UTF-8 text.

        Raises:
            InputError: The path leaves the folder, no space is left, or the folder is not writable.
        """
        return self.write_bytes(relative, text.encode())

    def write_bytes(self, relative: str, data: bytes) -> ArtifactDigest:
        """Write bytes as they are.

        Raises:
            InputError: As ``write_text``.
        """
        return self._write(relative, lambda path: _write_bytes(path, data))

    def write_json(self, relative: str, value: Mapping[str, Any]) -> ArtifactDigest:
        """Write canonical JSON: the same content gives the same bytes.

        Raises:
            NonFiniteError: A number is NaN or infinite.
            InputError: As ``write_text``, or something JSON cannot hold.
        """
        return self.write_text(relative, canonical_json(value))

    def write_tensors(
        self, relative: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> ArtifactDigest:
        """Write a safetensors file, see ``artifacts.write_tensors``.

        Raises:
            InputError: As ``write_text``, or a tensor that cannot be stored.
        """
        return self._write(relative, lambda path: artifacts.write_tensors(path, tensors, metadata))

    def copy_file(self, source: Path, relative: str) -> ArtifactDigest:
        """Copy the content of a file.

        Raises:
            InputError: As ``write_text``, or the source is not a readable file.
        """
        if not source.is_file() or not os.access(source, os.R_OK):
            raise InputError(str(source), "is not a readable file", "check the path and its permissions")
        return self._write(relative, lambda path: shutil.copyfile(source, path))

    def adopt(self, relative: str = ".") -> tuple[ArtifactDigest, ...]:
        """Take up files that others wrote under ``path``.

        Args:
            relative: A file or a folder, searched through.

        Returns:
            Digests by relative path.

        Raises:
            InputError: Nothing is there, or a symbolic link is.
        """
        self._check_ours()
        top = self._inside(relative)
        found = [top] if top.is_file() else sorted(file for file in top.rglob("*") if not file.is_dir())
        if not found:
            raise InputError("out", f"nothing was written to {relative!r}", "write before adopting")
        return tuple(self._record(path) for path in found)

    def _write(self, relative: str, writer: Callable[[Path], object]) -> ArtifactDigest:
        with self._translated():
            path = self._inside(relative)
            self._make(path.parent)
            digest = writer(path)
        return self._record(path, digest if isinstance(digest, ArtifactDigest) else None)

    def _make(self, folder: Path) -> None:
        """Make a folder inside; never the partial folder itself, which another process may have taken away."""
        self._check_ours()
        path = self._partial
        for part in folder.relative_to(self._partial).parts:
            path /= part
            path.mkdir(exist_ok=True)

    def _check_ours(self) -> None:
        if self._identity is None or _identity(self._partial) != self._identity:
            problem = f"{self._partial} was removed or replaced while it was written"
            raise InputError("out", problem, "see what else works in that folder, then resume the run")

    def _check_whole(self) -> None:
        """Read everything again: what is published is what was written, all of it, and nothing else."""
        self._check_ours()
        found = {
            path.relative_to(self._partial).as_posix() for path in self._partial.rglob("*") if not _is_folder(path)
        }
        for name in sorted(found ^ self._written.keys()):
            problem = "is gone" if name in self._written else "was written by nobody of this process"
            raise InputError("out", f"{self._partial / name} {problem}", "see what else works in that folder")
        for name, written in self._written.items():
            if digest_file(self._partial / name, name=name) != written:
                problem = f"{self._partial / name} is not what was written"
                raise InputError("out", problem, "check the device, and what else works in that folder")
        self._check_ours()

    def _record(self, path: Path, digest: ArtifactDigest | None = None) -> ArtifactDigest:
        name = path.relative_to(self._partial).as_posix()
        if path.is_symlink():
            raise InputError("out", f"{name} is a symbolic link", "write files; a link would leave the folder")
        # Tensors were hashed on their way out; a checkpoint need not be read again.
        self._written[name] = digest_file(path, name=name) if digest is None else replace(digest, path=name)
        return self._written[name]

    def _inside(self, relative: str) -> Path:
        pure = PurePosixPath(relative)
        if pure.is_absolute() or ".." in pure.parts:
            raise InputError("out", f"{relative!r} leaves the output folder", "give a path inside it")
        return self._partial / pure

    def _refuse_used_target(self) -> None:
        if self._out.exists() and not self._out.is_dir():
            raise InputError("out", f"{self._out} already exists and is a file", _REMEDY)
        try:
            used = self._out.is_dir() and any(self._out.iterdir())
        except OSError as error:
            raise InputError("out", f"{self._out} cannot be read ({error.strerror})", _REMEDY) from error
        if used:
            raise InputError("out", f"{self._out} already exists and is not empty", _REMEDY)

    def _sync_all(self) -> None:
        for folder, _, files in os.walk(self._partial):
            for file in files:
                sync_file(Path(folder, file))
            sync_folder(Path(folder))

    def _publish(self) -> None:
        if self._published:
            return
        self._check_ours()
        self._refuse_used_target()
        os.rename(self._partial, self._out)  # replaces an empty folder; fails if someone filled it meanwhile
        self._published = True
        # The result is whole from here on; a failing device can only make it forget the new name.
        with suppress(OSError):
            sync_folder(self._out.parent)

    def _discard(self) -> None:
        if self._identity is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._parents.remove()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in NO_SPACE:
                raise self._no_space() from error
            raise InputError(
                "out", f"{self._out} is not writable ({error.strerror or error})", "choose another folder"
            ) from error

    def _no_space(self) -> InputError:
        return InputError(
            "out", f"no space left to write {self._out}; nothing was kept", "free space or choose another device"
        )

    def _is_ours(self, error: BaseException) -> bool:
        # An OSError may name a file elsewhere (a database, a cache): its device is full, not ours.
        name = getattr(error, "filename", None)
        return not isinstance(name, str) or Path(name).is_relative_to(self._partial)


def result_in(folder: Path) -> str | None:
    """Id of the run whose result a folder holds; None where it holds none that can be read."""
    if not (folder / FILE_NAME).is_file():
        return None
    try:
        return read_manifest(folder).run.id
    except AlphasmithError:
        return None


def training_in(folder: Path) -> str | None:
    """Id of the training whose result a folder holds; None where it holds none that can be read."""
    if not (folder / FILE_NAME).is_file():
        return None
    try:
        entry = read_manifest(folder).training
    except AlphasmithError:
        return None
    return None if entry is None else entry.id


def check_target(out: Path, run_id: str | None) -> None:
    """Refuse a target that is in use, before any work is done for it.

    Args:
        out: Where the result of a run is to be.
        run_id: The run, whose own result may be there: it was killed after its folder was written. None: a new one.

    Raises:
        InputError: Field ``out``: exists and is neither an empty folder nor the result of this run, or cannot be made.
    """
    found = result_in(out)
    if found is None:
        OutputFolder(out)  # refuses
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            problem = f"{out} cannot be made in {parent}"
            raise InputError("out", problem, "choose another folder or correct its permissions")
    elif found != run_id:
        raise InputError("out", f"{out} already exists and holds the result of run {found}", _REMEDY)


def partial_folder(out: Path, attempt: str) -> Path:
    """Where one attempt writes what is to become ``out``.

    Args:
        out: The target.
        attempt: See ``attempt_name``.
    """
    return out.with_name(f"{out.name}.partial-{attempt}")


def attempt_name(run_id: str, token: str) -> str:
    """The attempt of one process to write the result of a run.

    Args:
        run_id: The run.
        token: Of that process, see ``queue.leases.Identity``.
    """
    return f"{run_id}-{token}"


def partial_folders(out: Path, run_id: str, tokens: Iterable[str]) -> list[Path]:
    """What processes that drove a run left of their attempts to write ``out``. No name but theirs is looked at.

    Args:
        out: The target.
        run_id: The run.
        tokens: Of the processes.
    """
    made = [partial_folder(out, attempt_name(run_id, token)) for token in sorted(set(tokens))]
    return [path for one in made for path in (one, _discarded(one)) if _is_folder(path)]


def unfinished_folders(out: Path, owner: str) -> list[Path]:
    """What a training or a compression that has not finished left beside the place of its result: checkpoints, attempts to write it.

    Args:
        out: Where its result was to go.
        owner: Id of the training or the compression, which is in every name that is looked at.
    """
    first = partial_folder(out, owner)
    if not out.parent.is_dir():
        return []
    begin = f"{first.name}-"
    found = (path for path in out.parent.iterdir() if path.name == first.name or path.name.startswith(begin))
    return sorted(path for path in found if _is_folder(path))


def discard_partial(path: Path) -> None:
    """Remove an attempt of another process that drives no more. If that process should wake, it finds all of it gone or none.

    Args:
        path: One of ``partial_folders``.
    """
    away = path if path.name.endswith(_DISCARDED) else _discarded(path)
    with suppress(OSError):
        if path != away:
            shutil.rmtree(away, ignore_errors=True)
            os.rename(path, away)
        shutil.rmtree(away, ignore_errors=True)


def _discarded(path: Path) -> Path:
    return path.with_name(path.name + _DISCARDED)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _identity(path: Path) -> tuple[int, int] | None:
    """Which folder this is; None: there is none."""
    try:
        told = path.lstat()
    except FileNotFoundError:
        return None
    return told.st_dev, told.st_ino


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
