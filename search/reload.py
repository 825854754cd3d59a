"""Models out of an output folder, by one call each."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.models import load_model, load_skeleton
from alphasmith.objectives.quantized_io import restore
from alphasmith.objectives.recurrent import unroll
from alphasmith.storage.artifacts import read_tensors
from alphasmith.storage.files import verify_file
from alphasmith.storage.manifest import read_manifest


def load_quantized(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The quantized model of a run, ready to run; its outputs have the bits they had when it was written.

    Args:
        folder: Output folder of a run; its digests are checked.
        model: The float architecture with any weights; needed where the run's model was no Hugging Face model. Copied.

    Raises:
        InputError: Not an output folder, or an architecture is needed and none was given.
        IntegrityError: A file has changed since it was written.
    """
    folder = Path(folder)
    digests = {a.path: a.sha256 for a in read_manifest(folder).artifacts}
    structure: dict[str, Any] = json.loads(_text(folder / "quantized" / "quantization.json"))
    if model is not None:
        skeleton = copy.deepcopy(model)
    elif (folder / "quantized" / "config.json").is_file():
        skeleton = load_skeleton(folder / "quantized")
    else:
        raise InputError(
            "model", f"{folder} does not say how to build the model", "pass the float model to load_quantized"
        )
    if structure.get("unrolled"):
        unroll(skeleton)
    tensors = read_tensors(
        folder / "quantized" / "model.safetensors", sha256=digests.get("quantized/model.safetensors")
    )
    return restore(skeleton, tensors, structure).eval()


def load_smoothed(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The smoothed float model of a run.

    Args:
        folder: Output folder of a run.
        model: The float architecture with any weights, where the run's model was no Hugging Face model. Copied.

    Raises:
        InputError: As ``load_quantized``.
        IntegrityError: A file has changed since it was written.
    """
    folder = Path(folder)
    for artifact in read_manifest(folder).artifacts:
        if artifact.path.startswith("smoothed/"):
            verify_file(folder / artifact.path, artifact.sha256)
    folder = folder / "smoothed"
    if (folder / "config.json").is_file():
        return load_model(path=folder).model
    if model is None:
        raise InputError("model", f"{folder} does not say how to build the model", "pass the float model")
    shell = copy.deepcopy(model)
    try:
        missing, unexpected = shell.load_state_dict(read_tensors(folder / "model.safetensors"), strict=False)
    except RuntimeError as error:  # a shape differs
        raise InputError("model", "does not have the shapes of the checkpoint", "pass the run's model") from error
    # Tied tensors are stored once: what is missing must be another name of something that is there.
    state = shell.state_dict()
    loaded = {v.untyped_storage().data_ptr() for n, v in state.items() if n not in missing}
    lost = [n for n in missing if state[n].untyped_storage().data_ptr() not in loaded]
    if lost or unexpected:
        raise InputError(
            "model", f"does not fit the checkpoint ({(lost + list(unexpected))[0]})", "pass the run's model"
        )
    return shell.eval()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(str(path), "cannot be read", "give the output folder of a run") from error
