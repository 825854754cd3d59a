"""The service of a model: its application behind the access rules, on uvicorn, until it is told to stop."""

from __future__ import annotations

import gc
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import uvicorn

from alphasmith.dashboards.access import Access, new_token
from alphasmith.dashboards.connections import ConnectionKeeper, Limits
from alphasmith.dashboards.listening import Listener
from alphasmith.search.processing.service._application import Service
from alphasmith.search.processing.service._batching import BatchSettings
from alphasmith.search.processing.service._connections import TimedProtocol, held
from alphasmith.search.processing.service._front import Front
from alphasmith.search.processing.service._types import Model, RequestLimits
from alphasmith.search.processing.service._warming import warmed

__all__ = ["BatchSettings", "ModelServer", "RequestLimits", "access_to", "serve"]

#: Beyond the times of bodies and answers, when connections are cut: whoever is late hears so first.
_GRACE = 5.0
#: Turns of uvicorn's loop of a tenth of a second between two looks at its connections.
_TURNS = 5


class ModelServer:
    """A bound, not yet serving server of a model. :meth:`run` serves until :meth:`close`, SIGTERM or Ctrl-C.

    Args:
        model: What is served; its classes are known.
        listener: Where; closed with the server.
        access: Who may ask; None: programs of this machine.
        batch: How items are taken together.
        requests: What requests may ask for.
        connections: Limits of connections; None: those that go with ``requests``.

    Raises:
        InputError: Nobody says which classes the model has.
    """

    def __init__(
        self,
        model: Model,
        listener: Listener,
        *,
        access: Access | None = None,
        batch: BatchSettings | None = None,
        requests: RequestLimits | None = None,
        connections: Limits | None = None,
    ) -> None:
        requests = requests or RequestLimits()
        self._listener = listener
        self._service = Service(model, batch=batch or BatchSettings(), requests=requests)
        front = Front(
            self._service.application,
            access=access or access_to(listener),
            metrics=self._service.metrics,
            routes=self._service.routes,
        )
        config = uvicorn.Config(
            front,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            # Idle connections are closed by the keeper, by the same rules as all others.
            timeout_keep_alive=3600,
            timeout_graceful_shutdown=round(requests.upload + requests.answer + 2 * _GRACE),
        )
        self._server = _Server(config, ConnectionKeeper(connections or _limits(requests)))

    @property
    def url(self) -> str:
        """Address of the OpenAPI page on this machine."""
        return f"{self._listener.url}/docs"

    def run(self) -> None:
        """Serve requests; returns after :meth:`close`, SIGTERM or Ctrl-C, when all that was accepted is answered."""
        try:
            with _signals_that_only_stop():
                self._server.run(sockets=[self._listener.socket])
        finally:
            self._listener.close()
            self._service.close(_GRACE)

    def close(self) -> None:
        """Stop in good order; any thread, any number of times."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """The server of uvicorn, which looks at its connections now and then."""

    def __init__(self, config: uvicorn.Config, keeper: ConnectionKeeper) -> None:
        super().__init__(config)
        self._keeper = keeper

    async def on_tick(self, counter: int) -> bool:
        if counter % _TURNS == 0:
            self._keeper.enforce(held(self.server_state.connections))
        return await super().on_tick(counter)


def serve(
    load: Callable[[], Model],
    host: str = "127.0.0.1",
    port: int = 8090,
    *,
    hosts: Iterable[str] = (),
    token: str | None = None,
    batch: BatchSettings | None = None,
    requests: RequestLimits | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C, which let it answer what it has accepted.

    Args:
        load: Loads the model; called when the port is bound.
        host: Address to bind. On anything but loopback requests must carry a token.
        port: TCP port; 0 takes any free one.
        hosts: Further host names that requests may carry, e.g. behind a proxy.
        token: What requests must carry; None: nothing on loopback, a new random one elsewhere.
        batch: How items are taken together.
        requests: What requests may ask for.
        ready: Called once with the address of the OpenAPI page, the token in it, when requests are answered.

    Raises:
        InputError: The model cannot be loaded, the host or port cannot be bound, or the token is too short.
    """
    listener = Listener(host, port)
    try:
        if token is None and not listener.is_loopback:
            token = new_token()
        access = access_to(listener, hosts=hosts, token=token)  # checked before a model is loaded
        server = ModelServer(warmed(load()), listener, access=access, batch=batch, requests=requests)
        # What is loaded stays: looking through all of torch and the model for garbage halts every request, again and again.
        gc.collect()
        gc.freeze()
    except BaseException:
        listener.close()
        raise
    try:
        if ready is not None:
            ready(server.url if token is None else f"{server.url}?token={token}")
        server.run()
    finally:
        gc.unfreeze()


def access_to(listener: Listener, *, hosts: Iterable[str] = (), token: str | None = None) -> Access:
    """The access rules of a service.

    Args:
        listener: Where it is.
        hosts: Further host names that requests may carry.
        token: What requests must carry; None: nothing.

    Raises:
        InputError: A host is no host name, or the token is none.
    """
    names = [*hosts, *listener.names]
    return Access(hosts=names, token=token, cookie="alphasmith-serve-token", command="alphasmith serve")


def _limits(requests: RequestLimits) -> Limits:
    """Limits of connections: all clients of a proxy come from one address; half of the files that may be open stay free."""
    together = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    return Limits(body=requests.upload + _GRACE, sending=30.0, per_client=together, together=together)


@contextmanager
def _signals_that_only_stop() -> Iterator[None]:
    """uvicorn raises again, in the end, the signal that stopped it: it shall not kill the process then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
