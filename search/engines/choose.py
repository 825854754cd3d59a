"""The engine a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from alphasmith.search.config import EngineName, RunConfig, WorkersConfig
from alphasmith.search.devices import search_device
from alphasmith.search.engines.local.in_process import InProcess
from alphasmith.search.engines.local.processes import Processes, default_workers
from alphasmith.search.engines.types import Engine

if TYPE_CHECKING:
    from alphasmith.search.engines.cluster.engine import RayTune


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


@contextmanager
def make_workers(
    name: EngineName, workers: WorkersConfig, *, device: str | None, perform: str
) -> Iterator[Processes | RayTune]:
    """Workers for work of any kind, ended whatever happens.

    Args:
        name: Where they are.
        workers: How many; with ``local`` at least one.
        device: Torch device that was asked for.
        perform: Dotted name ``module:function`` of what does a piece of work.

    Raises:
        InputError: As :func:`make_engine`; or no workers are asked for.
    """
    engine: Processes | RayTune
    if name == "ray":
        from alphasmith.search.engines.cluster.engine import RayTune  # an extra, and slow to import

        engine = RayTune(workers, device=device, perform=perform)
    else:
        _, devices = default_workers(workers, gpus=torch.cuda.device_count(), device=device)
        engine = Processes(workers.count, threads=workers.threads, devices=devices, perform=perform)
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
