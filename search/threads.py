"""How many CPU threads a piece of work deserves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
