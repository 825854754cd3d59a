"""Entry of a worker process, run as a script: ``worker_process.py PIPE PARENT NAME``.

Only the standard library is imported at the top: signals are settled and the process is tied to its parent before the
seconds that torch takes to import. What it does then is in ``worker_loop``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
#: Longest name of a process on Linux [characters].
_NAME_LENGTH = 15


def main() -> None:
    """Settle this process, then work until the pipe ends."""
    pipe, parent = (int(argument) for argument in sys.argv[1:3])
    # A terminal and Slurm signal every process of a job; the driver decides what that means for a search.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _tie_to_parent(parent, sys.argv[3])
    os.set_inheritable(pipe, False)
    connection = Connection(pipe)
    try:
        # What the driver can import, this process can.
        sys.path[:] = json.loads(connection.recv_bytes())
    except (EOFError, OSError):
        sys.exit(1)
    from alphasmith.search.engines.local.worker_loop import serve

    serve(connection)


def _tie_to_parent(parent: int, name: str) -> None:
    """Be killed with the process ``parent``, and be called ``name`` in process lists, where this is Linux."""
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(_PR_SET_NAME, name.replace("worker ", "")[:_NAME_LENGTH].encode(), 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be tied to
        sys.exit(1)


if __name__ == "__main__":
    main()
