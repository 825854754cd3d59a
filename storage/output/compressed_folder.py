"""The output folder of a joint compression: written once, read only as it was written."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.joint.packed.packing import PackedModel, read_packed
from alphasmith.objectives.joint.packed.restoring import unpack
from alphasmith.storage.files.tensors import read_tensors
from alphasmith.storage.output._named_files import NamedFiles, refuse_linked_manifest
from alphasmith.storage.output.compression_manifest import CompressionManifest, read_compression_manifest
from alphasmith.storage.output.manifest import FILE_NAME
from alphasmith.storage.output.output_folder import OutputFolder

#: Files of a compressed model: its tensors, and how they make a model again.
TENSORS, STRUCTURE = "compressed.safetensors", "structure.json"


def write_compressed(folder: OutputFolder, packed: PackedModel, manifest: CompressionManifest) -> CompressionManifest:
    """Write a compressed model and its manifest; whatever else belongs to the result is written before.

    Args:
        folder: The output folder, which is published when its block ends.
        packed: What is stored.
        manifest: Without files.

    Returns:
        The manifest as it is written, with all files of the folder.

    Raises:
        InputError: As ``OutputFolder.write_text``.
    """
    folder.write_tensors(TENSORS, packed.tensors)
    folder.write_text(STRUCTURE, packed.structure.to_json())
    whole = manifest.with_artifacts(folder.written)
    folder.write_text(FILE_NAME, whole.to_json())
    return whole


def compression_in(folder: Path) -> str | None:
    """Id of the compression whose result a folder holds; None where it holds none that can be read."""
    if not (folder / FILE_NAME).is_file():
        return None
    try:
        return read_compression_manifest(folder).run.id
    except InputError:
        return None


def is_compressed(folder: Path) -> bool:
    """Whether a folder says of itself that it is the result of a joint compression, whole or not.

    Args:
        folder: Any.
    """
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("kind") == "compression"


class CompressedFolder(NamedFiles):
    """The files of one compressed model.

    Attributes:
        manifest: That of the folder.

    Args:
        path: Output folder of a joint compression.

    Raises:
        InputError: It holds no readable manifest of a compression.
        IntegrityError: The manifest is a link, or names a file twice.
    """

    def __init__(self, path: Path | str) -> None:
        refuse_linked_manifest(Path(path))
        self.manifest: CompressionManifest = read_compression_manifest(Path(path))
        super().__init__(Path(path), self.manifest.artifacts)

    def packed(self) -> PackedModel:
        """The packed model, after everything in the folder was compared with its digest.

        Raises:
            IntegrityError: A file is missing, changed, or named by nobody; of a changed codebook the tensor and both digests are named.
        """
        self.check_names()
        for name in self.names():
            if name != TENSORS:
                self.file(name)
        structure = self.read_bytes(STRUCTURE)
        tensors = self._tensors(structure)
        try:
            return read_packed(structure, tensors)
        except InputError as error:
            raise IntegrityError(f"{self.path / STRUCTURE} {error.problem}") from error

    def check_names(self) -> None:
        """Compare the files that are there with those that the manifest names.

        Raises:
            IntegrityError: One is missing or too many; all are named.
        """
        there = {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if not file.is_dir()}
        named = {*self.names(), FILE_NAME}
        told = [f"{name} is missing" for name in sorted(named - there)]
        told += [f"{name} is named by nobody" for name in sorted(there - named)]
        if told:
            raise IntegrityError(f"{self.path}: {', '.join(told)}")
        for name in (TENSORS, STRUCTURE):
            if not self.has(name):
                raise IntegrityError(f"{self.path / FILE_NAME} does not name {name}")

    def _tensors(self, structure: bytes) -> dict[str, Tensor]:
        file = self.place(TENSORS)
        try:
            return self.read_tensors(TENSORS)
        except IntegrityError as error:
            # The digest of the file is another one: digests of single codebooks tell which of them was changed.
            try:
                unpack(read_packed(structure, read_tensors(file)))
            except (InputError, IntegrityError) as inner:
                raise IntegrityError(f"{file}: {inner}") from error
            raise
