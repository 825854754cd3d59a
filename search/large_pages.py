"""Memory pages of large tensors; to be settled before torch is imported, so nothing here imports it.

The kernel hands out and clears memory page by page, 4 KiB each: for weights of a large model, which come and go with every candidate, that
took longer than the arithmetic on them. torch asks for pages of 2 MiB for tensors of that size and more where it is told to. Results are the
same either way; a system without such pages (Linux calls them transparent huge pages) ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What torch reads when it makes its first tensor.
_NAME = "THP_MEM_ALLOC_ENABLE"


def large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that let torch ask for large pages; empty where the environment says already what it does.

    Args:
        environment: Of the process that will import torch.
    """
    return {} if _NAME in environment else {_NAME: "1"}
