"""A private copy of the user's module, without what wraps it: compilers and parallel runners.

Private names of ``torch.compile`` live here: ``_orig_mod`` of its wrapper and ``_torchdynamo_orig_callable`` of its functions.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def private_copy(module: nn.Module, field: str = "model") -> nn.Module:
    """A copy that shares nothing with ``module`` and runs without a compiler or parallel runner around any part of it.

    Args:
        module: Left as it is. Parts that are wrapped by ``torch.compile``, ``nn.DataParallel`` or DistributedDataParallel
            stand in the copy without their wrapper, so that names of parameters lose ``_orig_mod.`` and ``module.``.
        field: What to call it in errors.

    Raises:
        InputError: It is no module, or a part of it is TorchScript or an exported program.
    """
    plain = _checked(module, field)
    known: dict[int, Any] = {}
    for part in plain.modules():
        # Old parametrizations keep what they computed as a plain attribute, which torch refuses to copy.
        known.update(
            (id(v), v.detach().clone()) for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf
        )
    return without_wrappers(copy.deepcopy(plain, known), field)


def without_wrappers(module: nn.Module, field: str = "model") -> nn.Module:
    """What :func:`private_copy` returns, of a module that nobody else holds: its parts are exchanged in place.

    Args:
        module: Changed, unless it is wrapped itself.
        field: What to call it in errors.

    Raises:
        InputError: As :func:`private_copy`.
    """
    plain = _checked(module, field)
    for part in list(plain.modules()):
        # A compiled method stays bound to the user's module: the copy goes back to that of its class.
        if _compiled(vars(part).get("forward")) is not None:
            del vars(part)["forward"]
        for name, child in part._modules.items():
            if child is not None:
                part._modules[name] = _unwrapped(child)
    return plain


def wrappers(module: nn.Module) -> tuple[str, ...]:
    """Names of the classes that :func:`private_copy` takes away from around parts of ``module``, each once, sorted."""
    found = {type(part).__name__ for part in module.modules() if _inside(part) is not None}
    return tuple(sorted(found))


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for any other module."""
    inner = module.module if isinstance(module, _PARALLEL) else None
    if type(module).__name__ == "OptimizedModule":
        inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def _unwrapped(module: nn.Module) -> nn.Module:
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _checked(module: object, field: str) -> nn.Module:
    """What is inside the wrappers around all of it, if every part can be exchanged."""
    if not isinstance(module, nn.Module):
        raise InputError(field, f"is a {type(module).__name__}", "give an nn.Module: an instance, not exported")
    plain = _unwrapped(module)
    for name, part in plain.named_modules():
        _refuse_compiled(field, name, part)
    return plain


def _refuse_compiled(field: str, name: str, part: nn.Module) -> None:
    if _inside(part) is not None:
        return
    where = f"its part {name} is" if name else "is"
    if isinstance(part, torch.jit.ScriptModule):
        remedy = "give the nn.Module that it was scripted or traced from, with its weights loaded"
        raise InputError(field, f"{where} a TorchScript module, whose operators cannot be exchanged", remedy)
    if isinstance(part, torch.fx.GraphModule) and "eval" in vars(part):  # torch.export takes train() and eval() away
        remedy = "give the nn.Module that it was exported from, with its weights loaded"
        raise InputError(field, f"{where} an exported program, whose operators cannot be exchanged", remedy)
    method = _compiled(vars(part).get("forward"))
    if method is not None and getattr(method, "__func__", method) is not type(part).forward:
        raise InputError(field, f"{where} run by a compiled function that is not its class's own", "give it uncompiled")


def _compiled(function: object) -> object:
    """What ``torch.compile`` made a function of; None for any other."""
    return inspect.unwrap(function) if callable(function) and hasattr(function, "_torchdynamo_orig_callable") else None
