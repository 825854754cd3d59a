"""The types a model's tensors came in: it is searched in float32, and kept in its own type again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

#: What is kept as it came; wider types are kept as float32.
_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
#: What rounding every weight may change of the output, in roundings of the type: layers add their shares up.
_ROUNDINGS = 64


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))


def half_types(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Name -> type of the tensors that are bfloat16 or float16.

    Args:
        tensors: By name, e.g. a ``state_dict``.
    """
    return {
        name: value.dtype
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.dtype in _HALVES.values()
    }


def checkpoint_types(files: Sequence[Path], model: nn.Module) -> dict[str, torch.dtype]:
    """The same for a model that was loaded as float32, from the headers of its checkpoint.

    A model may name its tensors otherwise than its checkpoint does: where all of that are of one type, all of the model are; else
    those count whose names agree, and the others stay float32, which loses nothing.

    Args:
        files: The safetensors files of the checkpoint.
        model: What was loaded from them.
    """
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    floating = {name: kind for name, kind in found.items() if kind.startswith(("F", "BF"))}
    kinds = set(floating.values())
    names = floating_names(model.state_dict())
    if len(kinds) == 1 and (only := _HALVES.get(kinds.pop())) is not None:
        return dict.fromkeys(names, only)
    return {name: _HALVES[floating[name]] for name in names if floating.get(name) in _HALVES}


def misfit(tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> str:
    """The first tensor that its type cannot hold: too large for it, or so small that rounding loses it; empty: all fit.

    Args:
        tensors: Float tensors by name.
        types: Name -> type; the others stay as they are.
    """
    for name, kind in types.items():
        value = tensors[name].detach()
        rounded = value.to(kind).to(value.dtype)
        lost = float((rounded - value).norm())
        if not lost <= torch.finfo(kind).eps * float(value.norm()):
            return name
    return ""


def round_to(tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> None:
    """Round tensors, in place, to what their types hold; they keep the type they have.

    Args:
        tensors: By name.
        types: Name -> type; the others stay as they are.
    """
    with torch.no_grad():
        for name, kind in types.items():
            tensors[name].copy_(tensors[name].to(kind))


def cast_to(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Give parameters and buffers of a model their types, in place; tied ones stay tied.

    Args:
        model: The model.
        types: Name -> type; the others stay as they are.
    """
    named: Iterable[tuple[str, Tensor]] = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for name, value in named:
        if name in types:
            value.data = value.data.to(types[name])


def rounding_limit(types: Mapping[str, torch.dtype]) -> float:
    """Largest relative output error that rounding to these types may make."""
    return _ROUNDINGS * max((torch.finfo(kind).eps for kind in types.values()), default=0.0)


def floating_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold fractions."""
    return [name for name, value in tensors.items() if isinstance(value, Tensor) and value.is_floating_point()]


def told(types: Mapping[str, torch.dtype], names: Iterable[str]) -> str:
    """What tensors are of, for people: ``float32``, ``bfloat16``, ``float16``, or several of them.

    Args:
        types: Name -> type; the others are float32.
        names: All floating tensors.
    """
    found = {str(types.get(name, torch.float32)).removeprefix("torch.") for name in names}
    return ", ".join(sorted(found)) or "float32"
