"""Where candidates are evaluated: in this process, in worker processes, on a Ray cluster. One interface, see ``types``."""
