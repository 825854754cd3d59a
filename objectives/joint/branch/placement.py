"""The layers of a model as branch and residual wherever that has fewer bytes. Source: formula fB11."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.branch.encoding import BranchWeight, branch_layer, check_rank
from alphasmith.objectives.joint.branch.layers import BranchModule, branch_module
from alphasmith.objectives.joint.branch.rows import CONVOLUTIONS, LayerRows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.model.modules import replace_module
from alphasmith.objectives.text import matches

_PLAIN = frozenset(kind.forward for kind in (nn.Linear, *CONVOLUTIONS))


@dataclass(frozen=True, kw_only=True)
class BranchedLayer:
    """What became of one layer.

    Attributes:
        name: Its dotted name.
        shape: Of its weight.
        rank: Of its branch; 0 where it has none or stays as it is.
        error: Squared error of its output over its squares, on its rows; 0 where it stays as it is.
        stored_bytes: Bytes of its weight now, scales included.
        float_bytes: Bytes of its weight before.
        reason: Why it stays as it is; empty where it does not.
        notes: What people should know, a line each.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    error: float
    stored_bytes: int
    float_bytes: int
    reason: str = ""
    notes: tuple[str, ...] = ()


def branch_layers(
    model: nn.Module,
    rows: Mapping[str, LayerRows],
    settings: BranchSettings,
    *,
    own: Mapping[str, BranchSettings] | None = None,
    why: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (),
) -> tuple[BranchedLayer, ...]:
    """Put branch and residual into the place of linear layers and convolutions, where they have fewer bytes. Source: formula fB11.

    Recurrent layers have their matrices where nothing else can stand; let
    :func:`~alphasmith.objectives.model.plain_operators.rewrite` take them apart first.

    Args:
        model: Changed in place, so give a private copy. Nothing is changed when an error is raised.
        rows: Layer -> what it reads, see :func:`~alphasmith.objectives.joint.branch.rows.collect_rows`.
        settings: Of every layer that has none of its own.
        own: Layer -> its settings.
        why: Layer -> why it becomes a branch, e.g. from
            :func:`~alphasmith.objectives.joint.low_rank.spectrum.fallback_layers`; only these do. None: all.
        exclude: ``fnmatch`` patterns of layers that stay as they are.

    Returns:
        Every linear layer and convolution, in the order of the model.

    Raises:
        InputError: Rows do not fit a layer, a name is unknown, or singular values do not converge.
        NonFiniteError: A weight or a row holds NaN or infinity.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, *CONVOLUTIONS))}
    for name in (*(own or ()), *(why or ())):
        if name not in found:
            raise InputError(name, "is no linear layer or convolution", f"use one of {', '.join(found)}")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)):
            owners.setdefault(id(module.weight), []).append(name)
    layers: list[BranchedLayer] = []
    placed: list[tuple[nn.Module, BranchModule]] = []
    for name, module in found.items():
        chosen = (own or {}).get(name, settings)
        reason = f"{name} is excluded" if matches(name, exclude) else _refused(name, module, owners)
        if not reason and why is not None and name not in why:
            reason = "it was not asked for"
        if not reason and name not in rows:
            reason = "no row of the data reaches it"
        made, reason = (None, reason) if reason else _made(name, module, rows[name], chosen)
        layers.append(_layer(name, module, made, reason, (why or {}).get(name, "")))
        if made is not None:
            placed.append((module, branch_module(module, made.entry, made.tensors, name=name)))
    for module, branch in placed:
        replace_module(model, module, branch)
    return tuple(layers)


def _made(name: str, module: nn.Module, rows: LayerRows, settings: BranchSettings) -> tuple[BranchWeight | None, str]:
    """The weight as branch and residual, or why it stays as it is."""
    weight = module.get_parameter("weight")
    try:
        check_rank(weight, settings, name)
    except InputError as error:
        return None, f"rank {error.problem}"
    made = branch_layer(weight, rows, settings, name=name)
    if made.stored_bytes >= made.float_bytes:
        return None, f"branch and residual take {made.stored_bytes} bytes in place of {made.float_bytes}"
    return made, ""


def _refused(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> str:
    if parametrize.is_parametrized(module):
        return "its weight is computed"
    if type(module).forward not in _PLAIN or "forward" in vars(module):
        return "its own forward does more than the product"
    if isinstance(module, CONVOLUTIONS) and module.groups != 1:
        return f"it is a convolution of {module.groups} groups"
    shared = [other for other in owners[id(module.weight)] if other != name]
    return f"its weight is that of {shared[0]}" if shared else ""


def _layer(name: str, module: nn.Module, made: BranchWeight | None, reason: str, why: str) -> BranchedLayer:
    weight: Tensor = module.weight  # type: ignore[assignment]
    size = weight.numel() * weight.element_size()
    if made is None:
        return BranchedLayer(
            name=name, shape=tuple(weight.shape), rank=0, error=0.0, stored_bytes=size, float_bytes=size, reason=reason
        )
    return BranchedLayer(
        name=name,
        shape=tuple(weight.shape),
        rank=made.entry.rank,
        error=made.error,
        stored_bytes=made.stored_bytes,
        float_bytes=size,
        notes=(*((why,) if why else ()), *made.notes),
    )
