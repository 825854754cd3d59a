"""What a search runs on: its device, and how many CPU threads a piece of work deserves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from alphasmith.objectives.errors import InputError
from alphasmith.search.config import RunConfig

#: Multiply-adds of one candidate below which waking a second thread costs more than it saves.
_WORTH_SHARING = 2**28


@contextmanager
def thread_budget(threads: int | None) -> Iterator[None]:
    """At most ``threads`` torch threads inside the block; None: as many as the process has. Restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else min(before, threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def threads_for(multiply_adds: int) -> Iterator[None]:
    """One torch thread inside the block for small work, the process's own number for large; restored afterwards.

    Args:
        multiply_adds: Of one product inside the block.
    """
    before = torch.get_num_threads()
    if multiply_adds < _WORTH_SHARING:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def search_device(config: RunConfig) -> torch.device:
    """The configured device, else the first GPU, else the CPU.

    Raises:
        InputError: The configured device does not exist.
    """
    return usable_device(config.search.device, "search.device")


def usable_device(name: str | None, field: str) -> torch.device:
    """A device by its name.

    Args:
        name: As torch has it; None: the first GPU, else the CPU.
        field: What to call it in errors.

    Raises:
        InputError: There is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(field, f"{name!r} is not usable", "use 'cpu', or 'cuda' where there is one") from error
    return device
