"""How long and how many connections a server keeps: whoever sends slowly, or opens many, must keep nobody else out.

Servers close a connection only after a time without any byte, if at all, and stop accepting at their limit. Here a whole head of
a request, a whole body and a whole answer have a time each, and where one client or all together have too many connections, the
oldest that no request is being answered on makes room for the new one. The rules are for any server whose connections can be
told as a :class:`Connection`. What waitress promises nowhere is read in this file alone, and
``tests/dashboards/test_connections.py`` holds it to that.
"""

from __future__ import annotations

import ipaddress
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

#: What a connection is at: no byte of a request yet, a request whose head or body is on its way, one that is being answered, an
#: answer on its way.
Stage = Literal["idle", "head", "body", "answering", "sending"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of connections.

    Attributes:
        idle: Longest time without a request [s].
        head: Longest time from the first byte of a request to the end of its head [s].
        body: Longest time of its body [s].
        sending: Longest time that an answer takes on its way [s].
        per_client: Connections of one address.
        together: Connections of all.
    """

    idle: float = 60.0
    head: float = 10.0
    body: float = 120.0
    sending: float = 120.0
    per_client: int = 32
    together: int = 256


#: Far above what browsers open, far below what a process can hold.
LIMITS = Limits()


class Connection(Protocol):
    """A connection of a server as the rules see it; equal to itself at every look, and hashable."""

    @property
    def stage(self) -> Stage:
        """What it is at."""

    @property
    def request(self) -> object:
        """The request that it is at: another object for another request."""

    @property
    def address(self) -> str:
        """Address of the client."""

    @property
    def opened(self) -> float:
        """When it was opened, by any clock that all connections of the server share."""

    def close(self) -> None:
        """Close it soon; it is not looked at again."""


class ConnectionKeeper:
    """Closes connections that are beyond the limits. Called by the thread that serves them.

    Args:
        limits: The limits.
        clock: Seconds, monotonic.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._seen: dict[Connection, _Seen] = {}

    def enforce(self, connections: Iterable[Connection]) -> None:
        """Look at all open connections, and close those that are to go."""
        now = self._clock()
        every = list(connections)
        self._seen = {connection: self._look(connection, now) for connection in every}
        late = [connection for connection in every if self._is_late(self._seen[connection], now)]
        kept = set(every).difference(late)
        clients = defaultdict(list)
        for connection in kept:
            clients[_client(connection.address)].append(connection)
        for mine in clients.values():
            kept -= self._room(mine, self._limits.per_client)
        kept -= self._room(kept, self._limits.together)
        for connection in set(every) - kept:
            connection.close()

    def _look(self, connection: Connection, now: float) -> _Seen:
        stage, request = connection.stage, connection.request
        before = self._seen.get(connection)
        # Between two looks one request may end and the next begin: the time is that of this one.
        if before is not None and (before.stage, before.request) == (stage, request):
            return before
        return _Seen(stage=stage, request=request, since=now)

    def _is_late(self, seen: _Seen, now: float) -> bool:
        return seen.stage != "answering" and now - seen.since > float(getattr(self._limits, seen.stage))

    def _room(self, connections: Collection[Connection], most: int) -> set[Connection]:
        """The oldest of those that nothing is being answered on, as many as there are too many."""
        spare = [connection for connection in connections if self._seen[connection].stage != "answering"]
        spare.sort(key=lambda connection: connection.opened)
        return set(spare[: max(0, len(connections) - most)])


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A connection as it was first seen at a stage of a request."""

    stage: Stage
    request: Any
    since: float


@dataclass(frozen=True)
class _Channel:
    """A connection of waitress."""

    channel: Any

    @property
    def stage(self) -> Stage:
        if self.channel.requests:
            return "answering"
        if self.channel.total_outbufs_len:
            return "sending"
        if self.channel.request is None:
            return "idle"
        return "body" if self.channel.request.headers_finished else "head"

    @property
    def request(self) -> object:
        return self.channel.request

    @property
    def address(self) -> str:
        try:
            return str(self.channel.addr[0])
        except (IndexError, TypeError):
            return str(self.channel.addr)

    @property
    def opened(self) -> float:
        return float(self.channel.creation_time)

    def close(self) -> None:
        """The next turn of the server's loop closes it."""
        self.channel.will_close = True


def channels(server: Any) -> list[Connection]:
    """Open connections of a server of waitress."""
    return [_Channel(channel) for channel in list(server.active_channels.values()) if not channel.will_close]


def _client(address: str) -> str:
    """Whose connection it is: the address; of IPv6 the network, of which one machine may have any number of addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
