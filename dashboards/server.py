"""The dashboard server: Optuna's dashboard on our storage, behind the guard, on a threaded server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna_dashboard
import waitress
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage, get_storage
from waitress import wasyncore

from alphasmith.dashboards.access import new_token
from alphasmith.dashboards.connections import LIMITS, ConnectionKeeper, Limits, channels
from alphasmith.dashboards.guard import Guard
from alphasmith.dashboards.listening import Listener
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
        listener: The socket, where ``host`` and ``port`` are bound already; closed with the server.

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
        listener: Listener | None = None,
    ) -> None:
        listener = listener or Listener(host, port)
        self._url = f"{listener.url}/dashboard/"
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._serving = False
        self._sockets: dict[int, Any] = {}
        self._server: Any = waitress.create_server(
            served,
            map=self._sockets,
            sockets=[listener.socket],
            threads=8,
            ident=None,
            max_request_body_size=body,
            # Above what is kept: a new connection is accepted, and an old one makes room.
            connection_limit=limits.together + 100,
            clear_untrusted_proxy_headers=True,
        )

        self._keeper = ConnectionKeeper(limits)

    @property
    def url(self) -> str:
        """Address to open in a browser on this machine."""
        return self._url

    def run(self) -> None:
        """Serve requests; returns after :meth:`close` (from another thread) or Ctrl-C, with the port free again."""
        with self._lock:
            if self._stop.is_set():
                return
            self._serving = True
        try:
            while not self._stop.is_set():
                wasyncore.loop(timeout=1.0, use_poll=True, map=self._sockets, count=1)
                self._keeper.enforce(channels(self._server))
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
        storage = optuna_storage(database)
        listener = Listener(host, port)
        try:
            if token is None and not listener.is_loopback:
                token = new_token()
            names = [*hosts, *listener.names]
            served = application(storage, hosts=names, allow_write=allow_write, artifacts=artifacts, token=token)
        except BaseException:
            listener.close()
            raise
        server = DashboardServer(served, body=_BODY[allow_write], listener=listener)
        try:
            if ready is not None:
                ready(server.url if token is None else f"{server.url}?token={token}")
            server.run()
        finally:
            server.close()
    finally:
        database.close()
