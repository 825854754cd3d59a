"""Parts of a model as models of their own, whose tensors have the names that they have in the whole one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alphasmith.objectives.blocks._chain import BlockCall, StandIn
from alphasmith.objectives.blocks._others import LEAF, put_back, slots
from alphasmith.objectives.media.batch import Batch

#: Name of the hidden state after the last block among the arguments of what is around the blocks.
STATES = "block_states"


class BlockPart(nn.Module):
    """One block: hidden state in, hidden state out.

    Args:
        path: Its name in the model, e.g. ``model.layers.3``.
        block: The block.
        call: How the model calls it.
    """

    def __init__(self, path: str, block: nn.Module, call: BlockCall) -> None:
        super().__init__()
        self.__dict__["_part"] = (path, call.named, call.args, call.kwargs)
        *outer, last = path.split(".")
        place: nn.Module = self
        for name in outer:
            inside = nn.Module()
            place.add_module(name, inside)
            place = inside
        place.add_module(last, block)
        self.eval()

    def forward(self, hidden: Tensor, **leaves: Tensor) -> Tensor:
        """The hidden state after the block."""
        path, named, args, kwargs = self.__dict__["_part"]
        block = self.get_submodule(path)
        others = put_back(kwargs, leaves)
        output = block(**{named: hidden}, **others) if named else block(hidden, *put_back(args, leaves), **others)
        first = output[0] if isinstance(output, tuple) else output
        return first if isinstance(first, Tensor) else hidden


def block_batch(batch: Batch, hidden: Tensor, leaves: dict[str, Tensor], call: BlockCall) -> Batch:
    """What a block is called with, samples first in every tensor.

    Args:
        batch: What the model is called with.
        hidden: The hidden state before the block.
        leaves: All other tensors of the call by name of the slot, as the model has them.
        call: How the model calls the block.
    """
    samples = hidden.shape[0]
    kwargs = {}
    for slot in {s.index: s for s in (*slots(call.args), *slots(call.kwargs))}.values():
        value = leaves[LEAF.format(slot.index)]
        kwargs[LEAF.format(slot.index)] = value.expand(samples, *value.shape) if slot.shared else value
    return Batch(args=(hidden,), kwargs=kwargs, mask=batch.mask)


def around_batch(batch: Batch, hidden: Tensor) -> Batch:
    """What the model without its blocks is called with: its batch, and what its last block returned.

    Args:
        batch: What the model is called with.
        hidden: The hidden state after the last block.
    """
    return Batch(args=batch.args, kwargs={**batch.kwargs, STATES: hidden}, mask=batch.mask, labels=batch.labels)


class StatesIn:
    """A hook before the forward of a model without its blocks: its last stand-in returns the states that the call brings.

    Holds no module and no tensor, so that a copy of the model has its own.

    Args:
        path: Name of the last stand-in.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the states out of the arguments."""
        last = model.get_submodule(self._path)
        if isinstance(last, StandIn):
            last.result = kwargs.get(STATES)
        return args, {name: value for name, value in kwargs.items() if name != STATES}


class StatesOut:
    """A hook after it: nothing of the call stays.

    Args:
        path: Name of the last stand-in.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, model: nn.Module, _: Any, __: Any) -> None:
        """Forget the states."""
        last = model.get_submodule(self._path)
        if isinstance(last, StandIn):
            last.result = None
