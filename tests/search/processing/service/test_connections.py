"""Slow senders and many connections keep nobody out, and what is read of uvicorn is there."""

from __future__ import annotations

import asyncio
import http.client
import socket
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from alphasmith.dashboards.connections import Limits
from alphasmith.search.processing.service._connections import TimedProtocol, held
from alphasmith.search.processing.service._types import RequestLimits
from tests.support.services import Spelling, as_json, ask, classify, served

#: Long enough that a test which waits for it fails by its own time limit.
NEVER = 3600.0
HALF = b"GET /v1/model HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
BODY = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def rest(connection: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def limits(**changed: Any) -> Limits:
    return Limits(**{"idle": NEVER, "head": NEVER, "body": NEVER, "sending": NEVER, **changed})


@pytest.mark.parametrize(("start", "field"), [(b"", "idle"), (HALF, "head"), (BODY + b"x", "body")])
def test_each_part_of_a_request_has_a_time(start: bytes, field: str) -> None:
    with served(Spelling(), connections=limits(**{field: 0.2})) as port, connect(port) as connection:
        connection.sendall(start)
        assert rest(connection) == b""
        assert ask(port)[0] == 200


def test_a_slow_upload_is_told_so_and_cut() -> None:
    with served(Spelling(), requests=RequestLimits(upload=0.2), connections=limits()) as port:
        with connect(port) as connection:
            connection.sendall(BODY + b'{"texts"')
            answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body took longer than 0.2 s" in answer
        assert classify(port, "four")[0] == 200


def test_an_upload_that_trickles_has_the_same_time() -> None:
    with served(Spelling(), requests=RequestLimits(upload=0.2), connections=limits()) as port:
        with connect(port) as connection:
            connection.sendall(BODY)
            connection.settimeout(0.01)
            answer = b""
            for _ in range(6000):
                try:
                    connection.sendall(b" ")
                    answer += connection.recv(65536)
                except TimeoutError:
                    continue
                except OSError:
                    break
                if answer:
                    break
            answer += rest(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_refused_body_that_goes_on_has_a_time() -> None:
    strict = RequestLimits(bytes=10)
    with served(Spelling(), requests=strict, connections=limits(body=0.2)) as port, connect(port) as connection:
        connection.sendall(BODY + b"x")
        assert rest(connection).startswith(b"HTTP/1.1 413 ")


def test_a_crowd_that_sends_nothing_keeps_nobody_out() -> None:
    with served(Spelling(), connections=limits(per_client=8, together=8)) as port, ExitStack() as stack:
        for start in (b"", HALF, BODY):
            for _ in range(40):
                stack.enter_context(connect(port)).sendall(start)
        assert classify(port, "four")[0] == 200


def test_a_client_within_the_limits_keeps_its_connection() -> None:
    with served(Spelling()) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.connect()
        first = connection.sock
        body, headers = as_json("four")
        for _ in range(20):
            connection.request("POST", "/v1/classify", body, headers)
            assert connection.getresponse().read()
        assert connection.sock is first
        connection.close()


def test_requests_one_after_the_other_without_waiting_are_answered_in_order() -> None:
    body, _ = as_json("four")
    request = BODY.replace(b"99", str(len(body)).encode()) + body
    with served(Spelling()) as port, connect(port) as connection:
        connection.sendall(request * 3)
        found = b""
        while found.count(b"HTTP/1.1 200 ") < 3 or found.count(b'"4 letters"') < 3:
            part = connection.recv(65536)
            assert part, found
            found += part


def test_what_is_no_http_is_refused() -> None:
    with served(Spelling()) as port:
        for garbage in (b"\x16\x03\x01\x02\x00" + b"\0" * 600, b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"A" * 2**20):
            with connect(port) as connection:
                try:
                    connection.sendall(garbage)
                    found = rest(connection)
                except (BrokenPipeError, ConnectionResetError):
                    continue
                assert found.startswith(b"HTTP/1.1 400 ")
        assert ask(port)[0] == 200


def test_what_is_read_of_uvicorn_is_there() -> None:
    """It is documented nowhere: another uvicorn that names it otherwise must fail here."""
    seen: list[tuple[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append((held(state.connections)[0].stage, held(state.connections)[0].request))
        await receive()
        seen.append((held(state.connections)[0].stage, None))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        seen.append((held(state.connections)[0].stage, None))
        await send({"type": "http.response.body", "body": b"x"})

    async def talk() -> None:
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def stage(wanted: str) -> Any:
            while not (found := held(state.connections)) or found[0].stage != wanted:
                await asyncio.sleep(0.005)
            return found[0]

        first = await stage("idle")
        assert (first.request, first.address, first.opened > 0) == (None, "127.0.0.1", True)
        writer.write(HALF)
        assert await stage("head") == first
        writer.write(b"\r\nContent-Length: 3\r\n\r\n")
        assert await stage("body") == first
        writer.write(b"abc")
        await reader.readuntil(b"x")
        after = await stage("idle")
        assert after == first
        assert after.request is seen[0][1]
        after.close()
        assert await reader.read() == b""

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            await talk()
        finally:
            server.should_exit = True
            await serving

    config = uvicorn.Config(application, port=0, http=TimedProtocol, lifespan="off", log_level="error", log_config=None)
    server = uvicorn.Server(config)
    state = server.server_state
    asyncio.run(run())
    assert [what for what, _ in seen] == ["body", "answering", "sending"]
