from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage

from alphasmith.dashboards.server import DashboardServer, application, serve
from alphasmith.objectives.errors import InputError
from tests.support.dashboards import running


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_real_server_answers_guards_and_stops() -> None:
    study = optuna.create_study(study_name="seen", storage=InMemoryStorage())
    with running(DashboardServer(application(study._storage), port=0)) as port:
        status, body = get(port, "/api/studies")
        assert (status, json.loads(body)["study_summaries"][0]["study_name"]) == (200, "seen")
        assert get(port, "/api/studies", Host="evil.example")[0] == 403
        assert get(port, "/%ffapi/studies")[0] == 400
    with pytest.raises(OSError, match="refused"):
        get(port, "/")


def test_a_port_in_use_is_an_input_error() -> None:
    served = application(InMemoryStorage())
    first = DashboardServer(served, port=0)
    port = int(re.findall(r":(\d+)/", first.url)[0])
    try:
        with pytest.raises(InputError, match=rf"^port: {port} is in use; choose another"):
            DashboardServer(served, port=port)
    finally:
        first.close()
    DashboardServer(served, port=port).close()


def test_closing_and_starting_in_any_order_leaves_nothing_behind() -> None:
    served = application(InMemoryStorage())
    unused = DashboardServer(served, port=0)
    unused.close()
    unused.close()
    unused.run()
    for _ in range(20):
        # The connection stays open (keep-alive) while the server goes away under it.
        server = DashboardServer(served, port=0)
        with running(server) as port:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/api/meta")
            assert connection.getresponse().read()
        connection.close()
        DashboardServer(served, port=port).close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_an_input_error(port: int) -> None:
    with pytest.raises(InputError, match="port:"):
        DashboardServer(application(InMemoryStorage()), port=port)


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1", "x" * 300])
def test_a_host_that_cannot_be_bound_is_an_input_error(host: str) -> None:
    with pytest.raises(InputError, match="host:"):
        DashboardServer(application(InMemoryStorage()), host=host, port=0)


def test_the_address_is_one_that_a_browser_can_open() -> None:
    served = application(InMemoryStorage())
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost")):
        server = DashboardServer(served, host=host, port=0)
        assert re.fullmatch(rf"http://{re.escape(shown)}:[1-9]\d*/dashboard/", server.url)
        server.close()


def test_a_bad_storage_is_an_input_error_before_anything_is_bound() -> None:
    with pytest.raises(InputError, match="storage:"):
        serve("nonsense", port=0, ready=lambda url: pytest.fail("was served"))


def test_serve_opens_a_database_and_ends_on_interrupt(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom alphasmith.dashboards.server import serve\n"
        "try:\n    serve(sys.argv[1], port=0, ready=lambda url: print(url, flush=True))\n"
        "except KeyboardInterrupt:\n    pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, f"sqlite:///{tmp_path}/runs.db"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline()
        port = int(re.findall(r":(\d+)/", url)[0])
        assert get(port, "/api/studies") == (200, b'{"study_summaries": []}')
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, "Traceback" in errors) == (0, False)


@pytest.mark.parametrize(
    ("host", "demanded"),
    [
        ("127.0.0.1", False),
        ("localhost", False),
        ("127.8.8.8", False),
        ("0.0.0.0", True),
        ("", True),
        ("::", True),
        ("::1", False),
    ],
)
def test_any_address_but_loopback_demands_a_token(host: str, demanded: bool, tmp_path: Path) -> None:
    class Ready(Exception):
        pass

    told: list[str] = []

    def ready(url: str) -> None:
        told.append(url)
        raise Ready

    for given in (None, "a-token-of-mine-1234"):
        with pytest.raises(Ready):
            serve(f"sqlite:///{tmp_path}/runs.db", host, port=0, token=given, ready=ready)
        (carried,) = re.findall(r"\?token=([\w-]+)$", told[-1]) or [None]
        assert (carried is not None) == (demanded or given is not None)
        assert given in (None, carried)
        assert carried is None or len(carried) >= 16


def test_a_name_that_leads_elsewhere_demands_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: lookup("0.0.0.0", *rest, **more))

    def ready(url: str) -> None:
        assert "?token=" in url
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(f"sqlite:///{tmp_path}/runs.db", "localhost", port=0, ready=ready)


def test_a_token_opens_by_address_cookie_and_header() -> None:
    token = "t" * 20
    with running(DashboardServer(application(InMemoryStorage(), token=token), port=0)) as port:
        assert get(port, "/api/studies")[0] == 401
        assert get(port, "/api/studies?token=wrong")[0] == 401
        assert get(port, "/api/studies", Authorization=f"Bearer {token}x")[0] == 401
        assert get(port, "/api/studies", Authorization=f"Bearer {token}")[0] == 200
        assert get(port, "/api/studies", Cookie=f"a=b; alphasmith-token={token}")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", f"/dashboard/?a=b&token={token}")
        response = connection.getresponse()
        assert (response.status, response.getheader("Location")) == (303, "/dashboard/?a=b")
        cookie = str(response.getheader("Set-Cookie"))
        assert cookie.startswith(f"alphasmith-token={token};")
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        connection.close()
        assert get(port, f"/api/studies?token={token}", Host="evil.example")[0] == 403


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "with blanks in it 12345", "x" * 20 + "\r\nSet-Cookie: a"])
def test_a_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(InputError, match=r"^token: "):
        application(InMemoryStorage(), token=token)
