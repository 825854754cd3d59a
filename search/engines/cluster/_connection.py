"""Finds a Ray cluster, or starts one."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from typing import Any

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.extras import require_extra
from alphasmith.objectives.text import one_line
from alphasmith.search.config import WorkersConfig

#: Object store of a cluster started here: this share of the memory, at most so much [bytes].
_STORE_SHARE, _STORE = 0.2, 4 * 2**30
#: How long a cluster may take to accept a connection [s].
_REACH = 10.0


def import_ray() -> Any:
    """Ray, which is an extra.

    Raises:
        InputError: It is not installed.
    """
    require_extra("engine", "ray")
    return importlib.import_module("ray")


def connect(ray: Any, workers: WorkersConfig) -> bool:
    """Connect to a cluster, or start one on this machine. What a program is connected to already is used.

    Args:
        ray: The module.
        workers: Address, and how large a new cluster must be.

    Returns:
        Whether it was done here, and so is to be undone here.

    Raises:
        InputError: No cluster that can be used answers at the address.
        AlphasmithError: Ray does not start.
    """
    address = workers.address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise InputError(
            "workers.address",
            "is one of Ray Client, through which Tune does not run",
            "start the run on the cluster with 'ray job submit', or give host:6379",
        )
    if address == "local":
        address = None
    if address and address != "auto":
        _reach(address)
    if ray.is_initialized():
        return False
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        # What Ray reads from the environment of the processes it starts; the user's own settings stay.
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "RAY_worker_niceness": "0",  # as other worker processes; with Ray's 15 anything else on the machine goes first
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }.items():
            os.environ.setdefault(name, value)
        cores = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        settings |= {
            "num_cpus": max(cores, workers.count * (workers.threads or 1)),
            "object_store_memory": int(min(_STORE, _STORE_SHARE * memory)),
            "include_dashboard": False,
        }
    try:
        ray.init(address=address or "local", **settings)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = one_line(error, 200)
        if address:
            raise InputError(
                "workers.address", f"no Ray cluster that can be used answers at {address} ({why})", "check the address"
            ) from error
        raise AlphasmithError(f"Ray does not start on this machine: {why}") from error
    return True


def _reach(address: str) -> None:
    """Refuse an address that nobody listens at; Ray itself would try for minutes and fill the terminal."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not host or "/" in host:
        raise InputError(
            "workers.address", f"{address!r} is not of the form host:port", "give e.g. 10.0.0.1:6379, or auto"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_REACH).close()
    except OSError as error:
        raise InputError(
            "workers.address", f"no Ray cluster answers at {address} ({error})", "start it, or check the address"
        ) from error
