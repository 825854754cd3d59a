"""How idle threads of the numeric libraries wait; to be settled before torch is imported, so nothing here imports it.

OpenMP's threads wait for their next piece of work in a loop, by default. On a machine that others work on, they take the
processor from the thread they wait for: a forward pass took 5 to 14 s where one thread took 2 to 3 s. Sleeping, two threads took
as long as one, or less. Results are the same either way.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What the OpenMP of GNU, and those of LLVM and Intel, read when they are loaded.
_PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
#: Whoever sets one of these has decided.
_DECIDED = (*_PASSIVE, "GOMP_SPINCOUNT")


def passive_waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that let idle threads sleep; empty where the environment already says how they wait.

    Args:
        environment: Of the process that will import torch.
    """
    return {} if any(name in environment for name in _DECIDED) else dict(_PASSIVE)
