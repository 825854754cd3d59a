"""Connections of uvicorn under the rules that the dashboard's have, see :mod:`alphasmith.dashboards.connections`.

uvicorn gives a request no time to send its head, and an answer none to be taken away. What it promises nowhere is read in this
file alone, and ``tests/search/processing/service/test_connections.py`` holds it to that.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from alphasmith.dashboards.connections import Connection, Stage


class TimedProtocol(H11Protocol):
    """The protocol of uvicorn, with the time at which its connection was opened."""

    opened = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        self.opened = time.monotonic()
        super().connection_made(transport)


@dataclass(frozen=True)
class _Held:
    """A connection of uvicorn."""

    protocol: TimedProtocol

    @property
    def stage(self) -> Stage:
        cycle: Any = self.protocol.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                return "sending"
            return "body" if cycle.more_body else "answering"
        if self.protocol.transport.get_write_buffer_size():
            return "sending"
        if cycle is not None and cycle.more_body:
            return "body"  # of a request that was refused before it had come
        return "head" if self.protocol.conn.trailing_data[0] else "idle"

    @property
    def request(self) -> object:
        return self.protocol.cycle

    @property
    def address(self) -> str:
        return self.protocol.client[0] if self.protocol.client else ""

    @property
    def opened(self) -> float:
        return self.protocol.opened

    def close(self) -> None:
        """At once: a client that does not read would keep what is still to be sent."""
        self.protocol.transport.abort()


def held(protocols: Any) -> list[Connection]:
    """Open connections of a server of uvicorn.

    Args:
        protocols: Its connections, made by :class:`TimedProtocol`.
    """
    return [_Held(protocol) for protocol in list(protocols) if not protocol.transport.is_closing()]
