"""A compressed model, and what explains it, out of its output folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.joint.packed.restoring import restore
from alphasmith.storage.output.compressed_folder import CompressedFolder
from alphasmith.storage.output.compression_manifest import CompressionManifest, read_compression_manifest


def manifest_of(folder: Path | str) -> CompressionManifest:
    """What explains a compressed model; the digests of the other files are not compared.

    Args:
        folder: Output folder of a joint compression.

    Raises:
        InputError: It is none.
    """
    return read_compression_manifest(Path(folder))


def load_compressed(folder: Path | str, architecture: nn.Module) -> nn.Module:
    """The compressed model of a joint compression, ready to run; its parameters and outputs have the bits they had when it was written.

    Args:
        folder: Output folder of a joint compression; its digests are checked.
        architecture: The float model before compression, with any weights. Copied.

    Returns:
        The model in evaluation mode, in the form it was stored in: factored layers run in two steps, recurrent layers that were taken
        apart in a cell of Python.

    Raises:
        InputError: Not the output folder of a compression, or another architecture: the tensor and the shapes are named.
        IntegrityError: A file has changed since it was written, is gone, or is named by nobody; of a codebook the tensor and its digests
            are named.
    """
    if not isinstance(architecture, nn.Module):
        raise InputError("architecture", f"is {type(architecture).__name__}, no module", "pass the float model")
    result = CompressedFolder(folder)
    packed = result.packed()
    try:
        return restore(architecture, packed)
    except InputError as error:
        if error.field == "model":
            raise
        # Digests of the files fit, so they were written like this.
        raise IntegrityError(f"{result.path}: {error.field} {error.problem}") from error
