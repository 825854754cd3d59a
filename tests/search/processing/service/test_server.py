"""The service as a process: who may ask, how it stops, how it is killed and started again."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from alphasmith.dashboards.listening import Listener
from alphasmith.objectives.errors import InputError
from alphasmith.search.processing.service.server import ModelServer, serve
from tests.support.services import Spelling, as_json, ask, classify, multipart, served

TOKEN = "a-token-of-this-test"
#: Its forward calls begin with a line on standard output and wait for one on standard input.
PROGRAM = """
import sys
from alphasmith.search.processing.service.server import serve
from tests.support.services import Spelling

class Waiting(Spelling):
    def classify(self, items, *, top=None):
        print("called with", len(items), flush=True)
        sys.stdin.readline()
        return super().classify(items, top=top)

serve(lambda: Waiting(sys.argv[1]), port=int(sys.argv[2]), ready=lambda url: print(url, flush=True))
"""


class Process:
    """A service in a process of its own."""

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self.running = running
        self.port = int(re.findall(r"^http://127\.0\.0\.1:(\d+)/docs$", self.line())[0])

    def line(self) -> str:
        """The next line that it says."""
        assert self.running.stdout is not None
        return self.running.stdout.readline().strip()

    def let(self, calls: int) -> None:
        """Let forward calls end."""
        assert self.running.stdin is not None
        self.running.stdin.write("\n" * calls)
        self.running.stdin.flush()


@contextmanager
def process(folder: Path, port: int = 0, kind: str = "video") -> Iterator[Process]:
    """A service whose temporary files would go into a folder; of a video no first item is made up."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
    ) as running:
        try:
            yield Process(running)
        finally:
            running.kill()


def file_of(text: str) -> tuple[bytes, dict[str, str]]:
    return multipart([("a.mp4", text.encode())])


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return True
    return False


def accepted(port: int) -> float:
    found = re.findall(rb"^alphasmith_accepted_items (\S+)$", ask(port, path="/metrics")[2], re.MULTILINE)
    return float(found[0])


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(tmp_path: Path) -> None:
    with process(tmp_path) as service, ThreadPoolExecutor(4) as pool:
        port = service.port
        first = pool.submit(ask, port, "POST", "/v1/classify", *file_of("x"))
        assert service.line() == "called with 1"
        others = [pool.submit(ask, port, "POST", "/v1/classify", *file_of("x" * n)) for n in (2, 3)]
        while accepted(port) < 3:
            threading.Event().wait(0.01)
        service.running.send_signal(signal.SIGTERM)
        while not is_refused(port):
            threading.Event().wait(0.01)
        assert service.running.poll() is None, "it waits for what was accepted"
        service.let(3)
        answers = [future.result(60) for future in (first, *others)]
        assert [status for status, _, _ in answers] == [200, 200, 200]
        assert [answer["results"][0]["top"][0]["index"] for _, _, answer in answers] == [1, 2, 3]
        assert service.running.wait(60) == 0
        assert service.running.stderr is not None
        assert service.running.stderr.read() == ""


@pytest.mark.slow
def test_a_kill_leaves_nothing_and_the_port_is_free_again(tmp_path: Path) -> None:
    with process(tmp_path) as service, ThreadPoolExecutor(1) as pool:
        port = service.port
        lost = pool.submit(ask, port, "POST", "/v1/classify", *file_of("x" * 2**21))
        assert service.line() == "called with 1"
        service.running.kill()
        with pytest.raises(OSError, match=r"(?i)reset|closed|remote"):
            lost.result(60)
        service.running.wait(60)
    assert list(tmp_path.iterdir()) == []
    with process(tmp_path, port) as service:
        service.let(9)
        assert ask(port, "POST", "/v1/classify", *file_of("on"))[0] == 200


@pytest.mark.slow
def test_an_interrupt_ends_it_like_sigterm(tmp_path: Path) -> None:
    with process(tmp_path) as service:
        service.let(9)
        assert ask(service.port, "POST", "/v1/classify", *file_of("on"))[0] == 200
        service.running.send_signal(signal.SIGINT)
        assert service.running.wait(60) == 0
        assert service.running.stderr is not None
        assert service.running.stderr.read() == ""


def test_a_token_is_needed_where_it_was_given() -> None:
    with served(Spelling(), token=TOKEN) as port:
        status, headers, answer = ask(port)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert answer["reason"].startswith("open the address that alphasmith serve printed")
        assert ask(port, headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
        assert ask(port, headers={"Authorization": "Bearer another-token-0000"})[0] == 401
        status, headers, _ = ask(port, path=f"/docs?token={TOKEN}")
        assert (status, headers["location"]) == (303, "/docs")
        cookie = headers["set-cookie"].partition(";")[0]
        assert "HttpOnly" in headers["set-cookie"]
        assert ask(port, headers={"Cookie": cookie})[0] == 200
        for path in ("/healthz", "/metrics", "/openapi.json", "/docs"):
            assert ask(port, path=path)[0] == 401
        assert classify(port, "on")[0] == 401


def test_other_hosts_and_pages_of_other_sites_are_refused() -> None:
    with served(Spelling(), hosts=["box.example"]) as port:
        assert ask(port, headers={"Host": "evil.example"})[0] == 403
        assert ask(port, headers={"Host": "box.example:8090"})[0] == 200
        body, headers = as_json("on")
        for origin, status in (("http://evil.example", 403), (f"http://localhost:{port}", 200)):
            sent = {**headers, "Host": f"localhost:{port}", "Origin": origin}
            assert ask(port, "POST", "/v1/classify", body, sent)[0] == status
        assert ask(port, path="/%ff")[::2] == (400, {"reason": "unexpected characters in the path"})


def test_every_answer_is_hardened() -> None:
    with served(Spelling()) as port:
        for path in ("/v1/model", "/docs", "/nowhere", "/%ff"):
            headers = ask(port, path=path)[1]
            assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
            assert "server" not in headers


def test_anything_but_loopback_gets_a_token_of_its_own() -> None:
    told: list[str] = []

    class Stop(Exception):
        """In place of serving."""

    def ready(url: str) -> None:
        told.append(url)
        raise Stop

    for host, pattern in (
        ("127.0.0.1", r"http://127\.0\.0\.1:\d+/docs"),
        ("0.0.0.0", r"http://localhost:\d+/docs\?token=[\w-]{32}"),
    ):
        with pytest.raises(Stop):
            serve(Spelling, host, 0, ready=ready)
        assert re.fullmatch(pattern, told[-1])


def test_what_cannot_be_served_is_refused_and_the_port_is_free() -> None:
    def fail() -> Spelling:
        raise InputError("RUN", "is no run", "give one")

    listener = Listener("127.0.0.1", 0)
    port = int(listener.socket.getsockname()[1])
    with pytest.raises(InputError, match=rf"^port: {port} is in use"):
        serve(lambda: pytest.fail("loaded in vain"), port=port)
    listener.close()
    with pytest.raises(InputError, match=r"^RUN: is no run"):
        serve(fail, port=port)
    with pytest.raises(InputError, match=r"^token: is no token"):
        serve(Spelling, port=port, token="short")
    unnamed = Spelling("video")
    unnamed.classes = None
    with pytest.raises(InputError, match=r"^--labels: is missing"):
        serve(lambda: unnamed, port=port)
    Listener("127.0.0.1", port).close()


def test_closing_before_it_serves_leaves_nothing_behind() -> None:
    listener = Listener("127.0.0.1", 0)
    port = int(listener.socket.getsockname()[1])
    server = ModelServer(Spelling(), listener)
    server.close()
    server.run()
    assert is_refused(port)
