"""A compressed model, and what explains it, out of its output folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.joint.packed.forms import LayerForm, Timer, apply_forms, choose_forms, least_time
from alphasmith.objectives.joint.packed.restoring import restore, unpack
from alphasmith.objectives.media.batch import Batch
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


def verify_compressed(folder: Path | str) -> dict[str, Any]:
    """Compare everything in a compressed model's folder with its digest, and read every tensor back.

    Args:
        folder: Output folder of a joint compression.

    Returns:
        ``artifacts`` and ``tensors`` checked, and the ``compression`` they are of.

    Raises:
        InputError: It is none.
        IntegrityError: A file has changed since it was written, is gone, or is named by nobody.
    """
    result = CompressedFolder(folder)
    try:
        tensors = unpack(result.packed())
    except InputError as error:
        raise IntegrityError(f"{folder}: {error}") from error
    return {
        "compression": result.manifest.run.id,
        "artifacts": len(result.manifest.artifacts),
        "tensors": len(tensors),
    }


def load_compressed(
    folder: Path | str,
    architecture: nn.Module,
    *,
    batch: Batch | None = None,
    timer: Timer = least_time,
    on_form: Callable[[LayerForm], None] = lambda form: None,
) -> nn.Module:
    """The compressed model of a joint compression, ready to run; its parameters and outputs have the bits they had when it was written.

    Args:
        folder: Output folder of a joint compression; its digests are checked.
        architecture: The float model before compression, with any weights. Copied.
        batch: What the model will be called with: every layer runs in the form that is fastest on it here, which changes outputs by float
            rounding. None: in the form it was stored in, that is factored layers in two steps, and recurrent layers that were taken apart
            in a cell of Python.
        timer: Seconds of one call.
        on_form: Receives the form of every layer that has two, and why.

    Returns:
        The model in evaluation mode.

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
        model = restore(architecture, packed)
    except InputError as error:
        if error.field == "model":
            raise
        # Digests of the files fit, so they were written like this.
        raise IntegrityError(f"{result.path}: {error.field} {error.problem}") from error
    if batch is not None:
        forms = choose_forms(model, batch, timer=timer)
        apply_forms(model, forms)
        for form in forms:
            on_form(form)
    return model
