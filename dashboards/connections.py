"""How long and how many connections the dashboard keeps: whoever sends slowly, or opens many, must keep nobody else out.

waitress closes a connection only after a time without any byte, and stops accepting at its limit. Here a whole head of a
request, a whole body and a whole answer have a time each, and where one client or all together have too many connections, the
oldest that no request is being answered on makes room for the new one. What waitress promises nowhere is read in this file
alone, and ``tests/dashboards/test_connections.py`` holds it to that.
"""

from __future__ import annotations

import ipaddress
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

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


class ConnectionKeeper:
    """Closes connections that are beyond the limits. Called by the thread that serves them.

    Args:
        server: A server of waitress.
        limits: The limits.
        clock: Seconds, monotonic.
    """

    def __init__(self, server: Any, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._limits = limits
        self._clock = clock
        self._seen: dict[Any, _Seen] = {}

    def enforce(self) -> None:
        """Look at all connections; those that are to go are closed by the next turn of the server's loop."""
        now = self._clock()
        channels = [channel for channel in list(self._server.active_channels.values()) if not channel.will_close]
        self._seen = {channel: self._look(channel, now) for channel in channels}
        kept = [channel for channel in channels if not self._is_late(self._seen[channel], now)]
        clients = defaultdict(list)
        for channel in kept:
            clients[_client(channel)].append(channel)
        for mine in clients.values():
            self._make_room(mine, self._limits.per_client)
        self._make_room(kept, self._limits.together)
        for channel in set(channels).difference(kept):
            channel.will_close = True

    def _look(self, channel: Any, now: float) -> _Seen:
        stage, request = _stage(channel), channel.request
        before = self._seen.get(channel)
        # Between two looks one request may end and the next begin: the time is that of this one.
        if before is not None and (before.stage, before.request) == (stage, request):
            return before
        return _Seen(stage=stage, request=request, since=now)

    def _is_late(self, seen: _Seen, now: float) -> bool:
        return seen.stage != "answering" and now - seen.since > float(getattr(self._limits, seen.stage))

    def _make_room(self, channels: Iterable[Any], most: int) -> None:
        """Close the oldest of those that nothing is being answered on, down to the limit."""
        open_ones = [channel for channel in channels if not channel.will_close]
        spare = [channel for channel in open_ones if self._seen[channel].stage != "answering"]
        spare.sort(key=lambda channel: channel.creation_time)
        for channel in spare[: max(0, len(open_ones) - most)]:
            channel.will_close = True


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A connection as it was first seen at a stage of a request."""

    stage: Stage
    request: Any
    since: float


def _stage(channel: Any) -> Stage:
    if channel.requests:
        return "answering"
    if channel.total_outbufs_len:
        return "sending"
    if channel.request is None:
        return "idle"
    return "body" if channel.request.headers_finished else "head"


def _client(channel: Any) -> str:
    """Address of a client; of IPv6 the network, of which one machine may have any number of addresses."""
    try:
        address = ipaddress.ip_address(str(channel.addr[0]))
    except (ValueError, IndexError, TypeError):
        return str(channel.addr)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
