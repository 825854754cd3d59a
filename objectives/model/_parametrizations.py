"""Weights that are computed from other tensors at every forward pass (weight norm and its like), baked into plain ones.

Both forms of torch are known: the new one (``torch.nn.utils.parametrize``) and the old one, which computes the weight in a
hook (``torch.nn.utils.weight_norm``, ``spectral_norm``, pruning).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm


@dataclass(frozen=True, kw_only=True)
class BakedWeight:
    """One weight that was computed from others.

    Attributes:
        name: Full name of the plain weight, e.g. ``conv.weight``.
        kind: What computed it, e.g. ``WeightNorm``.
        originals: For weight norm, the full names of magnitude and direction in the user's model; empty where a plain weight
            cannot be taken apart again.
        magnitude: Shape of the magnitude; its axes of one are those that the norm is taken over.
    """

    name: str
    kind: str
    originals: tuple[str, ...] = ()
    magnitude: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A computed weight of one module, and how it is computed and made plain."""

    record: BakedWeight
    module: nn.Module
    leaf: str
    sources: tuple[Tensor, ...]
    compute: Callable[[], Tensor]
    remove: Callable[[], object]


def baked_weights(model: nn.Module) -> tuple[BakedWeight, ...]:
    """The computed weights of a model, under every name they have."""
    return tuple(found.record for found in _computed(model))


def bake(model: nn.Module, only: Container[str] | None = None) -> tuple[BakedWeight, ...]:
    """Replace computed weights by what they compute now.

    Args:
        model: A private copy in evaluation mode, changed in place.
        only: Full names of the plain weights to make; None: all.

    Returns:
        What was baked, under every name it has.
    """
    found = [f for f in _computed(model) if only is None or f.record.name in only]
    values: dict[tuple[object, ...], nn.Parameter] = {}
    made: dict[tuple[int, str], nn.Parameter] = {}
    with torch.no_grad():
        for item in found:  # all are computed before any is exchanged: some share what they are computed from
            key = (item.record.kind, item.leaf, *map(id, item.sources))
            if key not in values:
                trained = any(source.requires_grad for source in item.sources)
                values[key] = nn.Parameter(item.compute().detach().clone(), requires_grad=trained)
            made[id(item.module), item.leaf] = values[key]
        done: set[tuple[int, str]] = set()
        for item in found:
            place = (id(item.module), item.leaf)
            if place not in done:
                done.add(place)
                item.remove()
                item.module._parameters[item.leaf] = made[place]
    return tuple(item.record for item in found)


def joined(tensors: dict[str, Tensor], baked: BakedWeight) -> None:
    """Replace magnitude and direction in ``tensors`` by the plain weight that they make."""
    if baked.originals and set(baked.originals) <= tensors.keys():
        magnitude, direction = (tensors.pop(name) for name in baked.originals)
        norm = _norm(direction, baked.magnitude)
        tensors[baked.name] = direction * (magnitude / norm)


def taken_apart(tensors: dict[str, Tensor], baked: BakedWeight) -> None:
    """Replace a plain weight in ``tensors`` by the magnitude and direction that make it, where it came from such."""
    if baked.originals and baked.name in tensors:
        weight = tensors.pop(baked.name)
        norm = _norm(weight, baked.magnitude)
        # Where there is no direction, any does: the magnitude is 0.
        direction = torch.where(norm == 0, torch.ones_like(weight), weight)
        tensors |= dict(zip(baked.originals, (norm, direction), strict=True))


def _norm(weight: Tensor, magnitude: tuple[int, ...]) -> Tensor:
    exact = weight.double()
    if not magnitude:
        return torch.as_tensor(torch.linalg.vector_norm(exact), dtype=weight.dtype)
    axes = [axis for axis, size in enumerate(magnitude) if size == 1]
    norm: Tensor = torch.linalg.vector_norm(exact, dim=axes, keepdim=True) if axes else exact.abs()
    return norm.to(weight.dtype)


def _computed(model: nn.Module) -> Iterator[_Found]:
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            yield from _new_form(prefix, module)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm, prune.BasePruningMethod)):
                yield _old_form(prefix, module, hook)


def _new_form(prefix: str, module: nn.Module) -> Iterator[_Found]:
    lists = module.parametrizations
    if not isinstance(lists, nn.ModuleDict):
        return
    for leaf, steps in lists.items():
        if not list(steps.parameters(recurse=False)):
            continue  # a buffer
        sources = dict(steps.named_parameters(recurse=False)) | dict(steps.named_buffers(recurse=False))
        kinds = [type(step).__name__.strip("_") for step in steps]  # type: ignore[attr-defined]
        originals: tuple[str, ...] = ()
        magnitude: tuple[int, ...] = ()
        if kinds == ["WeightNorm"] and set(sources) == {"original0", "original1"}:
            originals = tuple(f"{prefix}parametrizations.{leaf}.{name}" for name in ("original0", "original1"))
            magnitude = tuple(sources["original0"].shape)
        record = BakedWeight(
            name=f"{prefix}{leaf}", kind=" of ".join(reversed(kinds)), originals=originals, magnitude=magnitude
        )
        yield _Found(
            record,
            module,
            leaf,
            tuple(sources.values()),
            partial(getattr, module, leaf),
            partial(_remove, module, leaf),
        )


def _remove(module: nn.Module, leaf: str) -> None:
    """Take one parametrization from a module.

    ``remove_parametrizations`` takes the property from the class, which copies of a module share with it: the user's would lose
    its weight.
    """
    plain, lists = parametrize.type_before_parametrizations(module), module._modules["parametrizations"]
    if not isinstance(lists, nn.ModuleDict):
        return
    del lists[leaf]
    if len(lists):
        rest = {n: v for n, v in vars(type(module)).items() if n not in (leaf, "__dict__", "__weakref__")}
        module.__class__ = type(type(module).__name__, (plain,), rest)
    else:
        del module._modules["parametrizations"]
        module.__class__ = plain


def _remove_spectral_norm(module: nn.Module, leaf: str) -> None:
    """torch's own leaves the hook behind by which a state dict is read, which then asks for what is no longer there."""
    remove_spectral_norm(module, leaf)
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        if isinstance(hook, SpectralNormLoadStateDictPreHook) and hook.fn.name == leaf:
            del hooks[key]


def _old_form(prefix: str, module: nn.Module, hook: WeightNorm | SpectralNorm | prune.BasePruningMethod) -> _Found:
    kind = type(hook).__name__
    suffixes: tuple[str, ...] = ("_orig",)  # of the parameters that the weight is computed from
    compute: Callable[[], Tensor]
    remove: Callable[[], object]
    if isinstance(hook, WeightNorm):
        leaf, suffixes = hook.name, ("_g", "_v")
        compute, remove = partial(hook.compute_weight, module), partial(remove_weight_norm, module, leaf)
    elif isinstance(hook, SpectralNorm):
        leaf = hook.name
        compute = partial(hook.compute_weight, module, do_power_iteration=False)
        remove = partial(_remove_spectral_norm, module, leaf)
    else:
        leaf = str(hook._tensor_name)
        compute, remove = partial(hook.apply_mask, module), partial(prune.remove, module, leaf)
    sources = [t for t in (module._parameters[leaf + suffix] for suffix in suffixes) if t is not None]
    apart = isinstance(hook, WeightNorm)
    record = BakedWeight(
        name=f"{prefix}{leaf}",
        kind=kind,
        originals=tuple(f"{prefix}{leaf}{suffix}" for suffix in suffixes) if apart else (),
        magnitude=tuple(sources[0].shape) if apart else (),
    )
    return _Found(record, module, leaf, tuple(sources), compute, remove)
