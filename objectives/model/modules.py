"""Modules of a model: the one of an operator, the weight that one owns, and another in its place."""

from __future__ import annotations

from torch import nn

from alphasmith.objectives.errors import InputError


def weight_parameter(module: nn.Module, name: str | None = None) -> nn.Parameter:
    """The weight a module owns.

    Args:
        module: An operator's module.
        name: What to call it in the error; None: its class.

    Raises:
        InputError: It owns none, e.g. because a parametrization computes it.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise InputError(
            name or type(module).__name__,
            "owns no weight parameter",
            "skip this operator, or remove its parametrization first",
        )
    return weight


def operator_module(model: nn.Module, name: str) -> nn.Module:
    """The module an operator was found in.

    Raises:
        InputError: The model has no module of this name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(
            name, "the model has no such operator", "use the model its sites were discovered in"
        ) from error


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` by ``new`` wherever ``model`` registers it (one module may stand under several names)."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
