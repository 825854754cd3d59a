"""Loading of models from an output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.model.loading import load_model, load_skeleton
from alphasmith.objectives.model.plain_operators import bake_plain, rewrite
from alphasmith.objectives.model.private_copy import private_copy
from alphasmith.objectives.quantization.payload import restore
from alphasmith.objectives.text import error_line
from alphasmith.storage.output.result_folder import ResultFolder

#: File that says which operators of the architecture are quantized, and how.
STRUCTURE = "quantized/quantization.json"


def load_quantized(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The quantized model of a run, ready to run; its outputs have the bits they had when it was written.

    Args:
        folder: Output folder of a run; its digests are checked.
        model: The float architecture with any weights; needed where the run's model was no Hugging Face model. Copied.

    Raises:
        InputError: Not an output folder, or an architecture is needed and none was given.
        IntegrityError: A file that decides what is computed has changed since it was written, is gone, or has no digest.
    """
    result = ResultFolder(folder)
    structure = result.read_json(STRUCTURE)
    if model is not None:
        skeleton = private_copy(model)
    elif result.has("quantized/config.json"):
        with result.only_named("quantized") as checked:
            skeleton = load_skeleton(checked)
    else:
        raise InputError(
            "model", f"{folder} does not say how to build the model", "pass the float model to load_quantized"
        )
    rewrite(
        skeleton.eval(), recurrent=bool(structure.get("unrolled")), attention=bool(structure.get("split_attention"))
    )
    tensors = result.read_checkpoint("quantized")
    try:
        return restore(skeleton, tensors, structure).eval()
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # digests fit, since they were written anew
        raise IntegrityError(f"{result.path / STRUCTURE} describes no model ({error_line(error)})") from error


def load_smoothed(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The smoothed float model of a run.

    Args:
        folder: Output folder of a run; its digests are checked.
        model: The float architecture with any weights, where the run's model was no Hugging Face model. Copied.

    Raises:
        InputError: As ``load_quantized``.
        IntegrityError: A file that decides what is computed has changed since it was written, is gone, or has no digest.
    """
    result = ResultFolder(folder)
    if result.manifest.training is not None:
        told = f"{folder} holds a trained model, which has no float form"
        raise InputError("folder", told, f"give the folder of run {result.manifest.run.id}")
    result.weight_files("smoothed")
    if result.has("smoothed/config.json"):
        with result.only_named("smoothed") as checked:
            return _named(load_model(path=checked).model, result.path / "smoothed")
    if model is None:
        raise InputError(
            "model", f"{result.path / 'smoothed'} does not say how to build the model", "pass the float model"
        )
    tensors = result.read_checkpoint("smoothed")
    shell = private_copy(model).eval()
    bake_plain(shell, tensors)
    try:
        missing, unexpected = shell.load_state_dict(tensors, strict=False)
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


def _named(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the folder it is in as its name, by which transformers finds what belongs to it."""
    parts: tuple[Any, ...] = (model, getattr(model, "config", None))
    for part in parts:
        if hasattr(part, "name_or_path"):
            part.name_or_path = str(folder)
    return model
