"""Loading of models: a Hugging Face folder, the user's factory, or a module from a launch script.

Loading never touches a network, never unpickles, and never runs code of the folder unless that is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import ModelKind
from alphasmith.objectives.model.factory import call_factory
from alphasmith.objectives.model.hf_folder import build_architecture, read_folder, unloaded_architecture, weight_files
from alphasmith.objectives.model.private_copy import private_copy, without_wrappers, wrappers
from alphasmith.objectives.stored_types import checkpoint_types, half_types
from alphasmith.objectives.text import listed

_PROCESSOR_FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    "processor": ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A float model, ready to be traced.

    Attributes:
        model: In evaluation mode, on the CPU.
        kind: Where it came from: Hugging Face folder, user's factory, or a module handed over.
        folder: Folder it was loaded from; None for modules, and for factories without a path.
        config: The transformers configuration, what the factory returned beside the model, or None.
        processors: Which of ``tokenizer`` and ``processor`` the folder holds.
        digest: SHA-256 over all parameters and persistent buffers, see ``parameters_digest``.
        parameter_count: Number of parameters, shared ones counted once.
        unexpected: Tensors of the checkpoint that the architecture has no place for.
        types: Name of a tensor -> type that it came in, where that is bfloat16 or float16.
        notes: What people should know about how it was taken, e.g. that a compiler around it was left out.
    """

    model: nn.Module
    kind: ModelKind
    folder: Path | None
    config: Any
    processors: frozenset[str]
    digest: str
    parameter_count: int
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    types: Mapping[str, torch.dtype] = field(default_factory=dict)


def load_model(
    *,
    path: Path | None = None,
    factory: str | None = None,
    factory_path: Path | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a float model, in float32.

    With ``factory``, the user's function builds it; otherwise ``path`` is a Hugging Face folder with ``config.json`` and
    safetensors, whose architecture class comes from the configuration. Attention and experts run in their eager form,
    so that a trace sees plain products; key-value caching is off.

    Args:
        path: Model folder; with a factory, what the factory is called with.
        factory: ``module:function``, an explicit opt-in to run that function.
        factory_path: Folder the factory's module is imported from.
        trust_remote_code: Run Python code that lies in the folder.

    Returns:
        The model in evaluation mode with its configuration and digest.

    Raises:
        InputError: Nothing to load from, a missing folder or file, a pickle-only or quantized checkpoint, remote code
            without permission, an unknown architecture, unreadable, missing or non-finite weights (named).
    """
    if factory is not None:
        if path is not None and not path.exists():
            raise InputError("model.path", f"{path} does not exist", "give the path the factory shall load")
        model, config = call_factory(factory, path=path, factory_path=factory_path)
        folder = path if path is not None and path.is_dir() else None
        notes = _wrapper_notes(model)
        plain = without_wrappers(model, "model.factory")
        types = half_types(plain.state_dict())
        return _finish(plain.to("cpu", torch.float32), "factory", folder, config, notes=notes, types=types)
    if path is None:
        raise InputError("model.path", "is missing", "give a Hugging Face folder, or a factory as module:function")
    model, unexpected = read_folder(path, trust_remote_code=trust_remote_code)
    types = checkpoint_types(weight_files(path), model)
    return _finish(model, "hf", path, getattr(model, "config", None), unexpected, types=types)


def load_skeleton(path: Path) -> nn.Module:
    """The architecture that a folder's ``config.json`` describes, with random weights, for a checkpoint to be put on top.

    Args:
        path: Folder with ``config.json``.

    Raises:
        InputError: No readable configuration, remote code, or an unknown architecture.
    """
    model = build_architecture(path)
    _plain(model)
    return model.eval()


def load_empty(path: Path) -> nn.Module:
    """The architecture of a folder, prepared as :func:`load_model` prepares a model, with parameters on the device ``meta``.

    Args:
        path: Folder with ``config.json``.

    Raises:
        InputError: As :func:`load_skeleton`.
    """
    model = unloaded_architecture(path)
    _plain(model)
    return model.eval()


def wrap_module(module: nn.Module) -> LoadedModel:
    """Take a module from a launch script, in float32. It is copied: the caller's keeps its mode, type and weights.

    Args:
        module: Any module; compilers and parallel runners around it or its parts are left out. Its attribute ``config``,
            where there is one, tells how media are loaded for it.

    Raises:
        InputError: It is no module, is TorchScript or an exported program, has no parameters, or non-finite ones (named).
    """
    copied = private_copy(module)
    types = half_types(copied.state_dict())
    copied = copied.to("cpu", torch.float32)
    return _finish(copied, "module", None, getattr(copied, "config", None), notes=_wrapper_notes(module), types=types)


def parameters_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and persistent buffers, by name.

    Returns:
        64 hexadecimal digits, equal for equal models whatever order their modules were made in.
    """
    return tensors_digest(sorted(model.state_dict().items()))


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """:func:`parameters_digest` of tensors that are made one by one as they are asked for.

    Args:
        tensors: (name, tensor), by name.
    """
    digest = hashlib.sha256()
    for name, value in tensors:
        if not isinstance(value, torch.Tensor):
            continue
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)};".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Refuse a model that has already gone wrong.

    Args:
        model: Its parameters and running statistics must be finite; other buffers must hold no NaN, but may hold
            infinity, as causal masks do.

    Raises:
        InputError: Some tensors hold NaN or infinity; the first of them are named.
    """
    running = ("running_mean", "running_var")
    bad = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    for name, value in model.named_buffers():
        wrong = ~torch.isfinite(value) if name.endswith(running) else torch.isnan(value)
        if bool(wrong.any()):
            bad.append(name)
    if bad:
        raise InputError("model.path", f"NaN or infinity in {listed(bad)}", "give a checkpoint with finite weights")


def _finish(
    model: nn.Module,
    kind: ModelKind,
    folder: Path | None,
    config: Any,
    unexpected: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    types: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> LoadedModel:
    _plain(model)
    model.eval()
    if any(is_lazy(p) for p in model.parameters()):
        raise InputError("model", "has parameters without a shape", "call it once on a sample, so that they get one")
    count = sum(p.numel() for p in model.parameters())
    if not count:
        raise InputError("model", "has no parameters", "give a trained model")
    check_finite(model)
    return LoadedModel(
        model=model,
        kind=kind,
        folder=folder,
        config=config,
        processors=processors_in(folder),
        digest=parameters_digest(model),
        parameter_count=count,
        unexpected=unexpected,
        notes=notes,
        types=types,
    )


def processors_in(folder: Path | None) -> frozenset[str]:
    """Which of ``tokenizer`` and ``processor`` a folder holds.

    Args:
        folder: Of a model; None: it came from none.
    """
    return frozenset(
        kind
        for kind, names in _PROCESSOR_FILES.items()
        if folder is not None and any((folder / name).is_file() for name in names)
    )


def _wrapper_notes(model: nn.Module) -> tuple[str, ...]:
    found = wrappers(model)
    if not found:
        return ()
    return (f"{listed(found)} around parts of the model is left out; names of weights are those inside it",)


def _plain(model: Any) -> None:
    """Products a trace can see: eager attention, experts one by one, no key-value cache, which would only cost memory."""
    if getattr(model, "_can_set_attn_implementation", bool)():
        model.set_attn_implementation("eager")
    if getattr(model, "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("eager")
    config: Any = getattr(model, "config", None)
    parts: tuple[Any, ...] = (config, config.get_text_config()) if hasattr(config, "get_text_config") else (config,)
    for part in parts:
        if getattr(part, "use_cache", False) is True:
            part.use_cache = False
