"""Where candidates are evaluated: in this process, in worker processes, on a Ray cluster. One interface, see ``types``.

- ``choose``: the engine a configuration asks for
- ``cluster``: candidates evaluated on a Ray cluster
- ``local``: candidates evaluated on this machine: in this process or in worker processes
- ``perform``: the search of one site, wherever it runs: the one function every engine calls
- ``types``: the interface of an engine, and the messages between the process that records a run
"""

__all__ = ["choose", "cluster", "local", "perform", "types"]
