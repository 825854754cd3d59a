"""What a block is called with beside the hidden state: the tensors in it, and everything around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError

#: What stands for a tensor is a name of this form in a batch.
LEAF = "leaf{}"
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Slot:
    """In the place of a tensor.

    Attributes:
        index: Which.
        shared: Whether it is the same for every sample: it then has a first dimension more in a batch, to be cut like the others. A
            batch of one sample does not tell, so slots are compared without it.
    """

    index: int
    shared: bool = field(compare=False)


def taken_out(value: Any, leaves: list[Tensor], samples: int, places: int) -> Any:
    """Arguments with slots in the place of their tensors.

    Args:
        value: Tensors and plain values, in tuples, lists and mappings.
        leaves: The tensors of a call so far, each once; those of ``value`` are added.
        samples: Samples of the batch.
        places: Second dimension of the hidden state.

    Raises:
        InputError: Field ``memory.mode``: there is something else in it, such as a cache.
    """
    if isinstance(value, Tensor):
        index = next((i for i, leaf in enumerate(leaves) if leaf is value), len(leaves))
        if index == len(leaves):
            leaves.append(value)
        of_samples = value.dim() > 0 and value.shape[0] == samples and (value.dim() > 1 or samples != places)
        return Slot(index, shared=not of_samples)
    if isinstance(value, Mapping):
        return {name: taken_out(item, leaves, samples, places) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([taken_out(item, leaves, samples, places) for item in value])
    if isinstance(value, _PLAIN):
        return value
    raise InputError("memory.mode", f"its blocks are called with a {type(value).__name__}", "use 'resident'")


def put_back(value: Any, leaves: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`taken_out`, from the tensors of a batch by the names of their slots."""
    if isinstance(value, Slot):
        tensor = leaves[LEAF.format(value.index)]
        return tensor[0] if value.shared else tensor
    if isinstance(value, Mapping):
        return {name: put_back(item, leaves) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([put_back(item, leaves) for item in value])
    return value


def slots(value: Any) -> list[Slot]:
    """All slots in it, each index once."""
    if isinstance(value, Slot):
        return [value]
    inside: Sequence[Any] = ()
    if isinstance(value, Mapping):
        inside = tuple(value.values())
    elif isinstance(value, (tuple, list)):
        inside = value
    return list({slot.index: slot for item in inside for slot in slots(item)}.values())
