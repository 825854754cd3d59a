"""A packed model out of the float architecture, bit by bit. Source: claim B-6."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.codebook.tensors import decode_weight
from alphasmith.objectives.joint.packed._layout import rebuild
from alphasmith.objectives.joint.packed._lossless import expand
from alphasmith.objectives.joint.packed.packing import PackedModel
from alphasmith.objectives.model.private_copy import private_copy

_REMEDY = "pass the architecture that was packed"


def restore(architecture: nn.Module, packed: PackedModel) -> nn.Module:
    """The model that was packed, with the weights that are stored.

    Args:
        architecture: The float model before any stage, with any weights; not modified.
        packed: What is stored.

    Returns:
        A model in evaluation mode; its parameters have the bits of :func:`load_packed` into the model that was packed.

    Raises:
        InputError: The architecture is another one (the tensor and the shapes are named), or a stored tensor is missing or corrupt.
    """
    shell = private_copy(architecture).eval()
    decoded = unpack(packed)
    aliased = {name: decoded[of] for name, of in packed.structure.aliases.items()}
    rebuild(shell, packed.structure.layout, decoded | aliased)
    _load(shell, decoded, packed.structure.aliases)
    return shell.eval()


def load_packed(model: nn.Module, packed: PackedModel) -> None:
    """Put the stored weights into the model that was packed, or into one of the same modules.

    Args:
        model: Changed in place; tied parameters become one again.
        packed: What is stored.

    Raises:
        InputError: The model has other tensors (named, with their shapes), or a stored tensor is missing or corrupt.
    """
    _load(model, unpack(packed), packed.structure.aliases)


def unpack(packed: PackedModel) -> dict[str, Tensor]:
    """All stored tensors as the model has them, tied ones once.

    Raises:
        InputError: One is missing, corrupt (named, with its digests), or described by nobody.
    """
    structure = packed.structure
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in structure.codebooks}
    found: dict[str, Tensor] = {}
    for key, value in packed.tensors.items():
        kind, _, rest = key.partition("/")
        name, _, part = rest.rpartition("/")
        if kind == "codebook" and name in parts:
            parts[name][part] = value
        elif kind == "squeezed" and rest in structure.squeezed and rest not in parts:
            found[rest] = expand(rest, structure.squeezed[rest], value)
        elif kind == "plain" and rest and rest not in parts and rest not in structure.squeezed:
            found[rest] = value
        else:
            raise InputError(key, "is a tensor that the structure does not name", "take an intact copy")
    for name, entry in structure.codebooks.items():
        found[name] = decode_weight(name, entry, parts[name])
    for name in (*structure.squeezed, *structure.halves, *structure.strides, *structure.aliases.values()):
        if name not in found:
            raise InputError(name, "is not among the stored tensors", "take an intact copy")
    for name in structure.halves:
        found[name] = found[name].float()
    for name, strides in structure.strides.items():
        found[name] = _strided(name, found[name], strides)
    return found


def _strided(name: str, value: Tensor, strides: tuple[int, ...]) -> Tensor:
    last = sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=False))
    if len(strides) != value.dim() or min(strides) < 0 or last != value.numel() - 1:
        raise InputError(
            name, f"has shape {tuple(value.shape)}, which strides {strides} do not fit", "take an intact copy"
        )
    return torch.empty_strided(tuple(value.shape), strides, dtype=value.dtype).copy_(value)


def _load(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    present: dict[str, Tensor] = model.state_dict(keep_vars=True)
    stored = {**{name: tensors[name] for name in tensors}, **{name: tensors[of] for name, of in aliases.items()}}
    for name, value in present.items():
        if name not in stored:
            raise InputError("model", f"has a tensor {name} {_shape(value)}, which is not stored", _REMEDY)
        if value.shape != stored[name].shape:
            problem = f"{name} has shape {_shape(value)}, {_shape(stored[name])} is stored"
            raise InputError("model", problem, _REMEDY)
    for name, value in stored.items():
        if name not in present:
            raise InputError("model", f"has no tensor {name} {_shape(value)}, which is stored", _REMEDY)
    made: dict[str, Tensor] = {}
    for name, value in present.items():
        owner = aliases.get(name, name)
        if owner not in made:
            # Codes of a table are nobody else's already, but a plain tensor is that of the packed model.
            copied = tensors[owner].to(value.device, copy=True)
            made[owner] = (
                nn.Parameter(copied, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else copied
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[owner])


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "of one number"
