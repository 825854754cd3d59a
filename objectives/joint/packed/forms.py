"""In which form the layers of a restored model run: what is faster on the machine and the data at hand. Source: claim B-5.

Factors have fewer numbers and fewer operations than their product, but two calls in place of one; a recurrent layer that was taken apart
runs step by step in Python. Neither is faster by itself, so both forms are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.branch.layers import BranchModule
from alphasmith.objectives.joint.low_rank.factored import FactoredConv, FactoredLinear, low_rank_product
from alphasmith.objectives.media.batch import Batch, call, data_errors
from alphasmith.objectives.model.plain_operators import bake_plain, fuse, taken_apart_modules
from alphasmith.objectives.model.private_copy import private_copy

#: How a layer runs: its factors one after the other, their product, step by step in Python, or torch's own recurrent layer.
RunsAs = Literal["factored", "dense", "cell", "fused"]
#: Seconds of one call of something.
Timer = Callable[[Callable[[], object]], float]
#: Calls that are timed, after one that is not.
_CALLS = 5
_SMALL = (FactoredLinear, FactoredConv)


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """The form of one layer.

    Attributes:
        layer: Its dotted name.
        runs: How it is to run.
        seconds: Form -> time of one call on the batch [s]; empty where nothing was timed.
        reason: Why, in words.
    """

    layer: str
    runs: RunsAs
    seconds: Mapping[str, float] = field(default_factory=dict)
    reason: str


def least_time(work: Callable[[], object]) -> float:
    """Shortest wall-clock time of some calls, after one that is not timed [s]."""
    work()
    found = []
    for _ in range(_CALLS):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found)


def choose_forms(model: nn.Module, batch: Batch, *, timer: Timer = least_time) -> tuple[LayerForm, ...]:
    """The faster form of every layer that has two, timed on what a batch makes it read.

    Args:
        model: Of :func:`~alphasmith.objectives.joint.packed.restoring.restore`, in evaluation mode; not modified.
        batch: What the model will be called with, of the size that it will have.
        timer: Seconds of one call.

    Returns:
        Factored layers (``factored`` or ``dense``) and recurrent layers that were taken apart (``cell`` or ``fused``), in the order of the
        model; what is inside a recurrent layer that is to be fused is not among them.

    Raises:
        InputError: The model cannot be called with the batch.
    """
    recurrent = set(taken_apart_modules(model).recurrent)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if name in recurrent or isinstance(module, _SMALL) or low_rank_product(module) is not None
    }
    read = _inputs(model, candidates, batch)
    forms: list[LayerForm] = []
    fused: list[str] = []
    with torch.no_grad():
        for name, module in candidates.items():
            if name.startswith(tuple(fused)) and fused:
                continue
            form = _form(name, module, read.get(name), timer, recurrent=name in recurrent)
            forms.append(form)
            fused += [f"{name}."] * (form.runs == "fused")
    return tuple(forms)


def apply_forms(model: nn.Module, forms: Sequence[LayerForm]) -> None:
    """Give the layers of a model their forms; it computes the same up to float rounding.

    Args:
        model: Changed in place; what becomes dense or fused no longer has factors.
        forms: See :func:`choose_forms`.

    Raises:
        InputError: A layer is not in the model, or has no such form.
    """
    made: dict[nn.Module, nn.Module] = {}
    for form in forms:
        try:
            module = model.get_submodule(form.layer)
        except AttributeError:
            raise InputError("forms", f"the model has no {form.layer}", "choose the forms of this model") from None
        if form.runs == "dense" and low_rank_product(module) is not None:
            bake_plain(model, {f"{form.layer}.weight": torch.empty(0)})
        elif form.runs in ("dense", "fused"):
            made[module] = _dense(module) if form.runs == "dense" else _fused(module)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made[module].train(module.training))


def _inputs(
    model: nn.Module, candidates: Mapping[str, nn.Module], batch: Batch
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Layer -> arguments of its first call."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(name, (args, kwargs))

        return hook

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in candidates.items()]
    try:
        with torch.no_grad(), data_errors():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _form(
    name: str, module: nn.Module, read: tuple[tuple[Any, ...], dict[str, Any]] | None, timer: Timer, *, recurrent: bool
) -> LayerForm:
    if low_rank_product(module) is not None:
        return LayerForm(layer=name, runs="dense", reason="its factors would be multiplied at every call")
    if any(isinstance(inner, BranchModule) for inner in module.modules()):
        return LayerForm(layer=name, runs="cell", reason="its layers are branches, which quantize what they read")
    small: RunsAs = "cell" if recurrent else "factored"
    large: RunsAs = "fused" if recurrent else "dense"
    if read is None:
        return LayerForm(layer=name, runs=small, reason="the batch does not reach it")
    args, kwargs = read
    try:
        other = _fused(private_copy(module)) if recurrent else _dense(module)
    except InputError as error:  # what is inside is neither linear nor factored
        return LayerForm(layer=name, runs=small, reason=error.problem)
    other.train(module.training)
    seconds: dict[str, float] = {
        small: timer(lambda: module(*args, **kwargs)),
        large: timer(lambda: other(*args, **kwargs)),
    }
    runs = small if seconds[small] < seconds[large] else large
    slower = large if runs == small else small
    told = f"{seconds[runs] * 1e3:.3g} ms a call, {slower} {seconds[slower] * 1e3:.3g} ms"
    return LayerForm(layer=name, runs=runs, seconds=seconds, reason=told)


def _dense(module: nn.Module) -> nn.Module:
    if not isinstance(module, _SMALL):
        raise InputError("forms", f"{type(module).__name__} has no dense form", "choose the forms of this model")
    return module.dense_layer()


def _fused(module: nn.Module) -> nn.Module:
    """Torch's own recurrent layer in place of one that was taken apart, whose inner layers become dense."""
    for name, inner in list(module.named_modules()):
        if isinstance(inner, _SMALL):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, inner.dense_layer())
    return fuse(module)
