"""Slow senders and many connections keep nobody out, and what is read of waitress is there."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import waitress
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser

from alphasmith.dashboards.connections import LIMITS, ConnectionKeeper, Limits, channels
from alphasmith.dashboards.server import DashboardServer
from tests.support.dashboards import running

HALF = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


def hello(environ: dict[str, Any], start: Any) -> list[bytes]:
    """The smallest application."""
    start("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"hello"]


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read() == b"hello"
    finally:
        connection.close()


@contextmanager
def serving(limits: Limits) -> Iterator[int]:
    with running(DashboardServer(hello, port=0, limits=limits)) as port:
        yield port


def is_closed(connection: socket.socket) -> bool:
    """Whether the server hangs up within a while."""
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("start", [HALF, b"", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nx"])
def test_a_crowd_that_sends_nothing_keeps_nobody_out(start: bytes) -> None:
    # The heads have longer than the answer is waited for: an answer means that nobody waited for them.
    with serving(Limits(per_client=8, head=600.0)) as port, ExitStack() as stack:
        for _ in range(120):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall(start)
        assert answers(port)


def test_a_head_has_a_time_whatever_trickles_in() -> None:
    with serving(Limits(head=0.5)) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(HALF)
        with pytest.raises(OSError, match=r"(?i)reset|broken"):
            trickle(connection)
        assert answers(port)


def trickle(connection: socket.socket) -> None:
    """A byte now and then, for ten seconds."""
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.1)


def test_idle_connections_and_bodies_have_a_time() -> None:
    with serving(Limits(idle=0.3, body=0.3)) as port, ExitStack() as stack:
        for start in (b"", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall(start)
            assert is_closed(connection)


def test_a_browser_within_the_limits_keeps_its_connection() -> None:
    with serving(LIMITS) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.connect()
        first = connection.sock
        for _ in range(5):
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"hello"
        assert connection.sock is first
        connection.close()


class Requests:
    """A clock and connections of our own making."""

    def __init__(self, limits: Limits) -> None:
        self.now = 0.0
        self._server = SimpleNamespace(active_channels={})
        self._keeper = ConnectionKeeper(limits, clock=lambda: self.now)

    def enforce(self) -> None:
        self._keeper.enforce(channels(self._server))

    def connect(self, address: str, **state: Any) -> Any:
        at = {"requests": [], "total_outbufs_len": 0, "request": None, "will_close": False, "creation_time": self.now}
        channel = _Channel(addr=(address, 1), **{**at, **state})
        self._server.active_channels[len(self._server.active_channels)] = channel
        return channel


class _Channel(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def test_what_is_being_answered_is_never_closed() -> None:
    made = Requests(Limits(per_client=2, together=3, sending=5))
    busy = [made.connect("10.0.0.1", requests=[object()]) for _ in range(5)]
    slow = made.connect("10.0.0.2", total_outbufs_len=9)
    made.enforce()
    assert slow.will_close  # the only one that could make room
    made.now = 1e6
    made.enforce()
    assert not any(channel.will_close for channel in busy)


def test_the_oldest_of_the_one_with_most_goes_first() -> None:
    made = Requests(Limits(per_client=2, together=100))
    other = made.connect("10.0.0.2")
    mine = []
    for _ in range(4):
        made.now += 1
        mine.append(made.connect("10.0.0.1"))
    made.enforce()
    assert [channel.will_close for channel in mine] == [True, True, False, False]
    assert not other.will_close


def test_a_network_of_the_sixth_version_is_one_client() -> None:
    made = Requests(Limits(per_client=2))
    mine = [made.connect(f"2001:db8::{i}") for i in range(5)]
    mapped = [made.connect(f"::ffff:10.0.0.{i}") for i in range(5)]
    made.enforce()
    assert sum(channel.will_close for channel in mine) == 3
    assert not any(channel.will_close for channel in mapped)


def test_a_new_request_on_a_connection_has_its_own_time() -> None:
    made = Requests(Limits(head=10))
    channel = made.connect("10.0.0.1", request=SimpleNamespace(headers_finished=False))
    for made.now in (0.0, 6.0):
        made.enforce()
    channel.request = SimpleNamespace(headers_finished=False, next=True)
    for made.now in (7.0, 12.0, 16.0):
        made.enforce()
        assert not channel.will_close
    made.now = 18.0
    made.enforce()
    assert channel.will_close


def test_what_is_read_of_waitress_is_there() -> None:
    """It is documented nowhere: another waitress that names it otherwise must fail here."""
    assert (HTTPChannel.request, HTTPChannel.will_close, HTTPChannel.total_outbufs_len) == (None, False, 0)
    assert HTTPRequestParser.headers_finished is False
    server = waitress.create_server(hello, listen="127.0.0.1:0", map={})
    try:
        assert server.active_channels == {}
        ours, theirs = socket.socketpair()
        channel = HTTPChannel(server, ours, ("10.0.0.1", 1), server.adj, map={})
        assert (channel.requests, channel.addr) == ([], ("10.0.0.1", 1))
        assert channel.creation_time > 0
        assert list(server.active_channels.values()) == [channel]
        channel.received(HALF)
        assert channel.request is not None
        assert not channel.request.headers_finished
        channel.will_close = True
        assert channel.writable()
        channel.handle_write()
        assert theirs.recv(1) == b""
        theirs.close()
    finally:
        server.task_dispatcher.shutdown()
        server.close()
