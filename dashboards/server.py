"""The dashboard server: Optuna's dashboard on our storage, behind the guard, on a threaded server."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna_dashboard
import waitress
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage, get_storage
from waitress import wasyncore

from alphasmith.dashboards.connections import LIMITS, ConnectionKeeper, Limits
from alphasmith.dashboards.guard import Guard, new_token
from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.connection import initialise, open_database, optuna_storage

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

_LOG = logging.getLogger(__name__)
#: Largest request body [bytes]: artifacts when writing is allowed, else nothing that matters.
_BODY = {True: 128 * 2**20, False: 2**20}


def application(
    storage: BaseStorage,
    *,
    hosts: Iterable[str] = (),
    allow_write: bool = False,
    artifacts: Path | None = None,
    token: str | None = None,
) -> WSGIApplication:
    """Optuna's dashboard as a WSGI application, guarded.

    Args:
        storage: Optuna storage; a bare relational one gets Optuna's cache around it (polls are eight times cheaper).
        hosts: Host names to answer besides localhost, without port.
        allow_write: Also let callers write notes, tell trials, create studies and handle artifacts. The dashboard has no
            users and no passwords: everybody who reaches it may. Studies are never renamed or deleted.
        artifacts: Folder of an Optuna file system artifact store to show.
        token: What requests must carry; None: nothing. Anything but loopback needs one, see :func:`serve`.

    Returns:
        The application, for waitress or any other server.

    Raises:
        InputError: A host is not a host name, the token is too short, or the artifact folder does not exist.
    """
    store = None
    if artifacts is not None:
        if not artifacts.is_dir():
            raise InputError("artifacts", f"{artifacts} is not a folder", "give the folder of the artifact store")
        store = FileSystemArtifactStore(artifacts)
    return Guard(
        optuna_dashboard.wsgi(get_storage(storage), artifact_store=store),
        hosts=hosts,
        allow_write=allow_write,
        token=token,
    )


class DashboardServer:
    """A bound, not yet serving server. :meth:`run` serves until :meth:`close` or Ctrl-C.

    Args:
        served: What to serve.
        host: Address or name to bind.
        port: TCP port; 0 takes any free one.
        body: Largest request body [bytes].
        limits: Of connections.
        bound: The socket, where ``host`` and ``port`` are bound already; closed with the server.

    Raises:
        InputError: The port is out of range, in use or not allowed, or the host cannot be bound.
    """

    def __init__(
        self,
        served: WSGIApplication,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        body: int = 2**20,
        limits: Limits = LIMITS,
        bound: socket.socket | None = None,
    ) -> None:
        bound = bound or _bind(host, port)
        self._host = host
        self._port = int(bound.getsockname()[1])
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._serving = False
        self._sockets: dict[int, Any] = {}
        self._server: Any = waitress.create_server(
            served,
            map=self._sockets,
            sockets=[bound],
            threads=8,
            ident=None,
            max_request_body_size=body,
            # Above what is kept: a new connection is accepted, and an old one makes room.
            connection_limit=limits.together + 100,
            clear_untrusted_proxy_headers=True,
        )

        self._keeper = ConnectionKeeper(self._server, limits)

    @property
    def url(self) -> str:
        """Address to open in a browser on this machine."""
        wildcard = self._host in {"0.0.0.0", "::", ""}
        name = "localhost" if wildcard else f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{name}:{self._port}/dashboard/"

    def run(self) -> None:
        """Serve requests; returns after :meth:`close` (from another thread) or Ctrl-C, with the port free again."""
        with self._lock:
            if self._stop.is_set():
                return
            self._serving = True
        try:
            while not self._stop.is_set():
                wasyncore.loop(timeout=1.0, use_poll=True, map=self._sockets, count=1)
                self._keeper.enforce()
        except KeyboardInterrupt:
            _LOG.info("interrupted")
        finally:
            with self._lock:
                self._serving = False
                self._stop.set()
                self._release()

    def close(self) -> None:
        """Stop serving and free the port; any thread, any number of times."""
        with self._lock:
            self._stop.set()
            if self._serving:
                # Sockets are closed by the thread that waits on them; closing them under it makes its wait fail.
                self._server.pull_trigger()
            else:
                self._release()

    def _release(self) -> None:
        self._server.task_dispatcher.shutdown()
        wasyncore.close_all(self._sockets)


def serve(
    storage_url: str,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    hosts: Iterable[str] = (),
    allow_write: bool = False,
    artifacts: Path | None = None,
    token: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Open a database and serve its dashboard until Ctrl-C.

    Args:
        storage_url: ``sqlite:///FILE``, ``postgresql://...`` or ``mysql://...``.
        host: Address to bind. On anything but loopback requests must carry a token.
        port: TCP port; 0 takes any free one.
        hosts: Further host names that requests may carry, e.g. behind a proxy.
        allow_write: See :func:`application`.
        artifacts: See :func:`application`.
        token: What requests must carry; None: nothing on loopback, a new random one elsewhere.
        ready: Called once with the address, the token in it, after the port is bound.

    Raises:
        InputError: The storage cannot be opened, the host or port cannot be bound, or the token is too short.
    """
    database = open_database(storage_url)
    try:
        initialise(database)
        # A wildcard address is where to listen, not a name that a browser sends.
        names = [*hosts] if host in {"0.0.0.0", "::", ""} else [*hosts, host]
        storage = optuna_storage(database)
        bound = _bind(host, port)
        try:
            if token is None and not _is_loopback(bound):
                token = new_token()
            served = application(storage, hosts=names, allow_write=allow_write, artifacts=artifacts, token=token)
        except BaseException:
            bound.close()
            raise
        server = DashboardServer(served, host=host, body=_BODY[allow_write], bound=bound)
        try:
            if ready is not None:
                ready(server.url if token is None else f"{server.url}?token={token}")
            server.run()
        finally:
            server.close()
    finally:
        database.close()


def _is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches a socket: by the address it is bound to, whatever name led there."""
    return ipaddress.ip_address(str(bound.getsockname()[0])).is_loopback


def _bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; every way this fails has its own remedy."""
    if not 0 <= port <= 65535:
        raise InputError("port", f"{port} is not a port", "use a number from 1024 to 65535, or 0 for any free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(
            "host", f"{host!r} cannot be resolved", "use 127.0.0.1, or an address of this machine"
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Two servers can bind a port as long as neither listens; only listening decides.
        bound.listen(64)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                "port", f"{port} is in use", "choose another with --port, or 0 for any free one"
            ) from error
        if error.errno == errno.EACCES:
            raise InputError("port", f"{port} needs more rights", "use a number from 1024 to 65535") from error
        raise InputError("host", f"{host!r} is not an address of this machine", "use 127.0.0.1 or 0.0.0.0") from error
    return bound
