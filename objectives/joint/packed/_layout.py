"""How a model's modules differ from those of the architecture it was made of, and the way there without data."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.branch.layers import BranchModule, branch_module
from alphasmith.objectives.joint.branch.stored import BranchEntry
from alphasmith.objectives.joint.low_rank.decomposition import Factors
from alphasmith.objectives.joint.low_rank.factored import (
    FactoredConv,
    FactoredLinear,
    LowRankProduct,
    conv_matrices,
    low_rank_product,
)
from alphasmith.objectives.joint.structure import CONVOLUTIONS
from alphasmith.objectives.literals import ConvForm
from alphasmith.objectives.model.plain_operators import TakenApart, rewrite_like, taken_apart_modules

_PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_REMEDY = "pass the architecture that was packed"


class FactoredLayout(BaseModel):
    """A layer in factored form.

    Attributes:
        kind: ``linear`` and ``conv`` run in two steps, ``product`` multiplies its factors at every call.
        rank: Of every group's factors.
        form: How the kernel became a matrix.
        groups: Matrices of the weight, a convolution's groups.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["linear", "conv", "product"]
    rank: int = Field(ge=1)
    form: ConvForm = "channel"
    groups: int = Field(default=1, ge=1)


class ModelLayout(BaseModel):
    """What was done to the modules of an architecture.

    Attributes:
        recurrent: Recurrent layers that were taken apart into linear ones.
        attention: Attention modules, likewise.
        folded: Modules that are ``nn.Identity``: normalizations that became part of the layer before them.
        factored: Layer -> its form.
        branches: Layer -> its entry, where it is a branch beside a quantized residual.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recurrent: tuple[str, ...] = Field(default=(), strict=False)
    attention: tuple[str, ...] = Field(default=(), strict=False)
    folded: tuple[str, ...] = Field(default=(), strict=False)
    factored: dict[Annotated[str, Field(min_length=1)], FactoredLayout] = {}
    branches: dict[Annotated[str, Field(min_length=1)], BranchEntry] = {}


def read_layout(model: nn.Module) -> ModelLayout:
    """The layout of a model, as its modules tell it."""
    apart = taken_apart_modules(model)
    factored: dict[str, FactoredLayout] = {}
    branches: dict[str, BranchEntry] = {}
    folded: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Identity) and name:
            folded.append(name)
        elif isinstance(module, BranchModule):
            branches[name] = module.entry
        elif isinstance(module, FactoredLinear):
            factored[name] = FactoredLayout(kind="linear", rank=module.left.shape[1])
        elif isinstance(module, FactoredConv):
            factored[name] = FactoredLayout(
                kind="conv", rank=module.left.shape[1], form=module.form, groups=module.groups
            )
        elif (product := low_rank_product(module)) is not None:
            factored[name] = FactoredLayout(kind="product", rank=product.rank, form=product.form, groups=product.groups)
    return ModelLayout(
        recurrent=apart.recurrent, attention=apart.attention, folded=tuple(folded), factored=factored, branches=branches
    )


def rebuild(shell: nn.Module, layout: ModelLayout, tensors: Mapping[str, Tensor]) -> None:
    """Give a private copy of the architecture the modules of a layout; but for branches, its tensors are those of nobody yet.

    Args:
        shell: In evaluation mode; changed in place.
        layout: What to make of it.
        tensors: Those that it is to have, under all their names; weights among them that it computes are baked, biases it lacks made.

    Raises:
        InputError: A module is missing, or is of another kind than the one that was changed, or a branch is corrupt.
    """
    plain = _Plain(tensors, layout)
    rewrite_like(shell, TakenApart(recurrent=layout.recurrent, attention=layout.attention), plain)
    for name in layout.folded:
        _replace(shell, name, nn.Identity().train(_module(shell, name).training))
    done: dict[int, nn.Module] = {}
    if layout.folded:  # a normalization that becomes part of a layer leaves a bias there
        _make_biases(shell, layout, tensors)
    for name, form in layout.factored.items():
        layer = _module(shell, name)
        if id(layer) not in done:
            done[id(layer)] = _factored(name, layer, form)
        if done[id(layer)] is not layer:
            _replace(shell, name, done[id(layer)].train(layer.training))
    for name, entry in layout.branches.items():
        layer = _module(shell, name)
        if id(layer) not in done:
            done[id(layer)] = _branch(name, layer, entry, tensors)
        _replace(shell, name, done[id(layer)])


def _make_biases(shell: nn.Module, layout: ModelLayout, names: Container[str]) -> None:
    apart = tuple(f"{name}." for name in (*layout.recurrent, *layout.attention))
    for name, module in shell.named_modules(remove_duplicate=False):
        layer = isinstance(module, (nn.Linear, *CONVOLUTIONS)) and not name.startswith(apart)
        if layer and module.bias is None and f"{name}.bias" in names:
            size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(torch.zeros(size, dtype=module.weight.dtype))


class _Plain(Container[str]):
    """Names of weights that are plain in the packed model, or were before they became factors."""

    def __init__(self, names: Container[str], layout: ModelLayout) -> None:
        self._names = names
        self._factored = {f"{name}.weight" for name in (*layout.factored, *layout.branches)}

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self._factored


def _factored(name: str, layer: nn.Module, form: FactoredLayout) -> nn.Module:
    """A layer in a factored form whose factors are zero."""
    known = nn.Linear if form.kind == "linear" else _PLAIN_CONVOLUTIONS if form.kind == "conv" else None
    if (known is not None and not isinstance(layer, known)) or not isinstance(getattr(layer, "weight", None), Tensor):
        raise InputError("model", f"{name} is {type(layer).__name__} and has no factored form {form.kind}", _REMEDY)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = getattr(layer, "groups", 1)
    if groups != form.groups or (form.form == "spatial" and weight.dim() != 4):
        problem = (
            f"{name} has {groups} groups and a weight {tuple(weight.shape)}, not {form.groups} in {form.form} form"
        )
        raise InputError("model", problem, _REMEDY)
    factors = [_zeros(matrix, form.rank) for matrix in conv_matrices(weight, groups, form.form)]
    if isinstance(layer, nn.Linear) and form.kind == "linear":
        return FactoredLinear(factors[0], layer.bias)
    if isinstance(layer, _PLAIN_CONVOLUTIONS) and form.kind == "conv":
        return FactoredConv(layer, factors, form.form)
    parametrize.register_parametrization(layer, "weight", LowRankProduct(factors, weight.shape, form.form))
    return layer


def _branch(name: str, layer: nn.Module, entry: BranchEntry, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A layer as branch and residual, with the tensors that are stored of it."""
    if not isinstance(layer, (nn.Linear, *_PLAIN_CONVOLUTIONS)):
        raise InputError("model", f"{name} is {type(layer).__name__} and becomes no branch", _REMEDY)
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    own.pop("bias", None)
    return branch_module(layer, entry, own, name=name)


def _zeros(matrix: Tensor, rank: int) -> Factors:
    rows, columns = matrix.shape
    return Factors(
        left=matrix.new_zeros(rows, rank),
        right=matrix.new_zeros(rank, columns),
        singular=matrix.new_zeros(min(rows, columns)),
        kept=math.nan,
    )


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError("model", f"has no module {name}", _REMEDY) from None


def _replace(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, made)
