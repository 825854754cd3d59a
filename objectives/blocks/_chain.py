"""The repeated blocks of a model, found by structure: a list of modules of one class, each fed with what the one before returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.blocks._others import taken_out
from alphasmith.objectives.errors import InputError

_REMEDY = "use 'resident'"


def find_blocks(model: nn.Module) -> str | None:
    """Name of the list of repeated blocks with the most parameters; None where the model has none.

    Blocks are two or more modules of one class, whose tensors have the same names and shapes, in a ``ModuleList`` that is in no
    other such list.

    Args:
        model: Any; its parameters may be on the device ``meta``.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(module, nn.ModuleList) and _alike(module):
            found[name] = sum(parameter.numel() for parameter in module.parameters())
    return max(found, key=lambda name: found[name]) if found else None


def _alike(modules: nn.ModuleList) -> bool:
    if len(modules) < 2 or len({type(module) for module in modules}) != 1:
        return False
    shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in modules]
    distinct = {id(p) for module in modules for p in module.parameters()}
    return bool(shapes[0]) and all(s == shapes[0] for s in shapes) and len(distinct) == len(shapes) * len(shapes[0])


@dataclass(frozen=True)
class BlockCall:
    """What a block was called with.

    Attributes:
        hidden: The hidden state (samples, ...).
        named: The hidden state's name, where it was passed by name; else empty: it was the first argument.
        args: The other arguments, with slots in the place of tensors.
        kwargs: Those passed by name, likewise.
    """

    hidden: Tensor
    named: str
    args: Any
    kwargs: Any


class StandIn(nn.Module):
    """In the place of a block: hands its hidden state on, and remembers what it was called with while it is watched.

    Attributes:
        form: What the block returns: empty for a tensor, else how many things in a tuple whose first one is the tensor.
        result: What it returns in the place of its hidden state; None: that.

    Args:
        block: The block; no submodule of this.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.form = 0
        self.result: Tensor | None = None
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None

    def __getattr__(self, name: str) -> Any:
        """What models ask of their blocks, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden state, in the form in which the block returns it."""
        if self.seen is not None:
            self.seen.append((args, kwargs))
        hidden = args[0] if args else next(iter(kwargs.values()))
        if self.result is not None:
            hidden = self.result
        else:
            hidden = hidden.clone()  # so that what follows can be told from what came before
            self.__dict__["returned"] = hidden
        return (hidden, *[None] * (self.form - 1)) if self.form else hidden


@contextmanager
def watched(stand_ins: Sequence[StandIn]) -> Iterator[None]:
    """Stand-ins remember what they are called with inside, and forget it afterwards."""
    for one in stand_ins:
        one.seen = []
    try:
        yield
    finally:
        for one in stand_ins:
            one.seen = None
            one.__dict__.pop("returned", None)


def chain_of(stand_ins: Sequence[StandIn], samples: int) -> tuple[Tensor, list[Tensor], list[BlockCall]]:
    """What the blocks were called with in one call of the model, whose stand-ins were watched.

    Args:
        stand_ins: In order.
        samples: Samples of the batch.

    Returns:
        The hidden state that goes into the first one, all other tensors, each once, and each block's call.

    Raises:
        InputError: Field ``memory.mode``: one was not called once, with the very tensor that the one before returned, or with
            something that is no tensor.
    """
    calls: list[BlockCall] = []
    leaves: list[Tensor] = []
    before: Tensor | None = None
    for number, one in enumerate(stand_ins):
        if one.seen is None or len(one.seen) != 1:
            raise InputError("memory.mode", f"block {number} is not called once in a forward", _REMEDY)
        args, kwargs = one.seen[0]
        named = "" if args else next(iter(kwargs), "")
        hidden = args[0] if args else kwargs.get(named)
        if not isinstance(hidden, Tensor) or hidden.dim() < 2 or not hidden.is_floating_point():
            raise InputError("memory.mode", f"block {number} is called with no hidden state first", _REMEDY)
        if hidden.shape[0] != samples:
            raise InputError(
                "memory.mode", "the hidden state of its blocks has no sample in its first dimension", _REMEDY
            )
        if before is not None and hidden is not before:
            raise InputError("memory.mode", f"block {number} is not called with what the one before returned", _REMEDY)
        rest = {name: value for name, value in kwargs.items() if name != named}
        places = hidden.shape[1]
        calls.append(
            BlockCall(
                hidden=hidden,
                named=named,
                args=taken_out(args[1:], leaves, samples, places),
                kwargs=taken_out(rest, leaves, samples, places),
            )
        )
        before = one.__dict__.get("returned")
    returned = {id(one.__dict__.get("returned")) for one in stand_ins}
    if any(id(leaf) in returned for leaf in leaves):
        raise InputError("memory.mode", "a block is called with more than one thing that blocks returned", _REMEDY)
    return calls[0].hidden, leaves, calls


def form_of(output: Any, hidden: Tensor) -> int:
    """How a block returns its hidden state, see :class:`StandIn`.

    Args:
        output: What it returned.
        hidden: What it was called with.

    Raises:
        InputError: Field ``memory.mode``: it returned no tensor of the same shape first.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, torch.Tensor) or first.shape != hidden.shape or first.dtype != hidden.dtype:
        raise InputError("memory.mode", "its blocks do not return a hidden state like the one they are given", _REMEDY)
    return len(output) if isinstance(output, tuple) else 0
