"""Servers, clusters and devices of our own, to be broken without harm to others."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from sqlalchemy import create_engine, text

#: Durability is not what is tested: no machine loses its power here.
_FAST = ("fsync=off", "synchronous_commit=on", "full_page_writes=off", "max_connections=80", "shared_buffers=64MB")


#: On a busy machine a node that is merely slow must not be taken for dead: it would take its driver along.
_RAY = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_niceness": "0",
}
#: What a node runs beside searches: without its agents a node is dead, and the mailbox is the driver's.
_NO_SEARCH = ("IDLE", "Mailbox", "Agent")


class Missing(Exception):
    """This machine lacks what a scene needs; the scene is skipped for this reason."""


class PostgreSql:
    """A cluster in a temporary folder on a free port; used as a context.

    Raises:
        Missing: The server's programs are not installed, or they cannot be run as another user than root.
    """

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [
            Path(program) for program in [shutil.which("initdb")] if program
        ]
        if not found:
            raise Missing("PostgreSQL's server programs (initdb, pg_ctl) are not installed")
        self._programs = found[-1].parent
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-pg-"))
        self._as: tuple[str, ...] = ()
        if os.getuid() == 0:  # the server refuses to run as root
            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                raise Missing("PostgreSQL cannot run as root, and there is no user postgres") from None
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
        self._data = self._folder / "data"
        self._port = _free_port()

    def __enter__(self) -> Self:
        self._call("initdb", "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8")
        settings = (
            *_FAST,
            f"port={self._port}",
            "listen_addresses='127.0.0.1'",
            f"unix_socket_directories='{self._folder}'",
        )
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{setting}\n" for setting in settings)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def address(self, name: str) -> str:
        """URL of a database of this server."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/{name}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._call("pg_ctl", "start", "--wait", "--silent", f"--log={self._folder / 'log'}")

    def stop(self) -> None:
        """Stop it as a crash would: connections break, what was not committed is gone."""
        self._call("pg_ctl", "stop", "--wait", "--silent", "--mode=immediate")

    def cut(self, name: str) -> int:
        """Cut every connection to a database; how many there were."""
        query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = :name"
        return int(self.sql(query + " AND pid <> pg_backend_pid()", name=name)[0][0])

    def create(self, name: str, template: str = "") -> str:
        """Make a database; its URL."""
        self.sql(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        return self.address(name)

    def drop(self, name: str) -> None:
        """Remove a database with whoever uses it."""
        self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def sql(self, statement: str, **values: object) -> Sequence[tuple[Any, ...]]:
        """Run one statement on the server itself."""
        address = self.address("postgres").replace("postgresql:", "postgresql+psycopg:")
        engine = create_engine(address, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                found = connection.execute(text(statement), values)
                return [tuple(row) for row in found] if found.returns_rows else []
        finally:
            engine.dispose()

    def _call(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(self._programs / program), *arguments, f"--pgdata={self._data}"]
        # A server that is started holds on to what it was given as output: no pipe.
        with (self._folder / "commands.log").open("ab") as log:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, check=False
            )
        if done.returncode:
            told = (self._folder / "commands.log").read_text(errors="replace")[-1000:]
            raise Missing(f"{program} ended with code {done.returncode}: {told}")


class RayCluster:
    """Two Ray nodes of one CPU each on this machine; used as a context.

    Raises:
        Missing: Ray is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise Missing("ray is not installed")

    def __enter__(self) -> Self:
        from ray.cluster_utils import Cluster

        os.environ.update(_RAY)
        self._node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=self._node)
        self._second: Any = self._cluster.add_node(**self._node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        """What drivers connect to."""
        return str(self._cluster.address)

    def searching(self) -> list[psutil.Process]:
        """Processes of the cluster that hold a search at this moment."""
        found = []
        for node in (self._cluster.head_node, self._second):
            raylet = node.all_processes["raylet"][0].process.pid
            for process in psutil.Process(raylet).children():
                with suppress(psutil.Error):
                    name = " ".join(process.cmdline())
                    if name.startswith("ray::") and not any(word in name for word in _NO_SEARCH):
                        found.append(process)
        return found

    def lose_node(self) -> None:
        """kill -9 of everything on the second node; another one joins."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(**self._node)


#: The wall clock, and nothing else, runs ahead by the seconds in a file. (libfaketime also moves sleeps on the monotonic clock.)
_CLOCK = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long ahead(void) {
    const char *name = getenv("CHAOS_CLOCK");
    char text[32] = {0};
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    return size > 0 ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed && now) now->tv_sec += ahead();
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


def clock_library(folder: Path) -> Path:
    """A library to preload: it moves the wall clock of a process by the seconds in the file named ``CHAOS_CLOCK``.

    Raises:
        Missing: There is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Missing("there is no C compiler to make the clock that jumps")
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(_CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    return library


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TinyDisk:
    """A device of a few megabytes; used as a context.

    Args:
        size: Bytes.

    Raises:
        Missing: This process may not mount one.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.path = Path(tempfile.mkdtemp(prefix="chaos-disk-"))

    def __enter__(self) -> Self:
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size}", "chaos", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.path.rmdir()
            raise Missing(f"a small device cannot be mounted: {done.stderr.strip()}")
        return self

    def grow(self, size: int) -> None:
        """Make room."""
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=False)
        shutil.rmtree(self.path, ignore_errors=True)
