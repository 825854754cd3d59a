"""Sockets to serve on: bound before anything is loaded, with a remedy for every way that fails."""

from __future__ import annotations

import errno
import ipaddress
import socket

from alphasmith.objectives.errors import InputError

_WILDCARDS = frozenset({"0.0.0.0", "::", ""})


class Listener:
    """A listening TCP socket.

    Args:
        host: Address or name to bind; empty: every address of this machine.
        port: TCP port; 0 takes any free one.

    Attributes:
        socket: The socket; whoever serves on it closes it.

    Raises:
        InputError: The port is out of range, in use or not allowed, or the host cannot be bound.
    """

    def __init__(self, host: str, port: int) -> None:
        self.socket = _bind(host, port)
        self._host = host

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the socket: by the address it is bound to, whatever name led there."""
        return ipaddress.ip_address(str(self.socket.getsockname()[0])).is_loopback

    @property
    def names(self) -> list[str]:
        """The name that a client sends as Host; none of a wildcard address, which is where to listen and no name."""
        return [] if self._host in _WILDCARDS else [self._host]

    @property
    def url(self) -> str:
        """Address to open on this machine, without a path."""
        name = "localhost" if not self.names else f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{name}:{int(self.socket.getsockname()[1])}"

    def close(self) -> None:
        """Free the port, where nobody serves on it."""
        self.socket.close()


def _bind(host: str, port: int) -> socket.socket:
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
