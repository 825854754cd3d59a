"""Candidates evaluated on this machine: in this process or in worker processes.

- ``_child_process``: one worker process as its driver sees it: start, orders, answers, end
- ``_packing``: work and results as bytes: tensors travel as numpy arrays
- ``_shared_race``: a race of candidate models whose candidates are shared out among workers
- ``in_process``: the in-process engine: searches run in the calling process, one after the other
- ``processes``: worker processes on one machine, one per GPU or as many as are asked for
- ``worker_loop``: the worker's side of ``processes``: orders come in over one pipe, answers go out over the same
- ``worker_process``: entry of a worker process, run as a script: ``worker_process.py PIPE PARENT NICE NAME``
"""

__all__ = ["in_process", "processes", "worker_loop", "worker_process"]
