"""The engine a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.engines.local.in_process import InProcess
from alphasmith.search.engines.local.processes import Processes, default_workers
from alphasmith.search.engines.types import Engine


@contextmanager
def make_engine(config: RunConfig, stop: Callable[[], bool]) -> Iterator[Engine]:
    """The engine, closed at the end whatever happens.

    Args:
        config: Its ``engine`` and ``workers``.
        stop: Polled; returns True to stop. Engines with workers use :meth:`Engine.stop`.

    Raises:
        InputError: Ray is asked for and is not installed, or its cluster cannot be reached.
    """
    engine = _engine(config, stop)
    try:
        yield engine
    finally:
        engine.close()


def _engine(config: RunConfig, stop: Callable[[], bool]) -> Engine:
    if config.engine == "ray":
        from alphasmith.search.engines.cluster.engine import RayTune  # an extra, and slow to import

        return RayTune(config.workers, device=config.search.device)
    gpus = torch.cuda.device_count()
    count, devices = default_workers(config.workers, gpus=gpus, device=config.search.device)
    if not count:
        return InProcess(str(search_device(config)), stop=stop)
    return Processes(count, threads=config.workers.threads, devices=devices)
