"""The example of a Ray job, for real: a cluster of two nodes on this machine, and a run submitted to it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="ray is not installed")

EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_job"
BIN = Path(sys.executable).parent
#: What ray[default] brings and ray[tune] does not.
_DASHBOARD = ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client", "smart_open")
_PATIENCE = 120.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def node(log: Path, *arguments: str, environment: dict[str, str]) -> Iterator[None]:
    """A node of a Ray cluster that says how it does in ``log``; all its processes end with the block."""
    fixed = [
        "--block",
        "--num-cpus=1",
        "--object-store-memory=100000000",
        "--disable-usage-stats",
        f"--dashboard-agent-listen-port={_free_port()}",
        f"--dashboard-agent-grpc-port={_free_port()}",
        f"--metrics-export-port={_free_port()}",
        f"--runtime-env-agent-port={_free_port()}",
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [BIN / "ray", "start", *fixed, *arguments], stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for member in family[1:]:
            if isinstance(member, psutil.Process) and member.is_running():
                member.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which jobs can be submitted."""
    missing = [name for name in _DASHBOARD if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"ray job submit needs ray[default]; not installed: {', '.join(missing)}")
    if not (BIN / "alphasmith").exists():
        pytest.skip("the command line is not installed beside this Python")
    port, dashboard, client = _free_port(), _free_port(), _free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "disabled",  # else it depends on whether this user has a token
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    # Paths of sockets must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        head = [
            "--head",
            f"--port={port}",
            f"--temp-dir={folder}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
        ]
        stack.enter_context(node(tmp_path / "head.log", *head, environment=environment))
        _until_open(dashboard)
        stack.enter_context(node(tmp_path / "node.log", f"--address=127.0.0.1:{port}", environment=environment))
        yield environment


def _until_open(port: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the cluster does not start"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_runs_as_a_job(cluster: dict[str, str], tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'alphasmith.db'}"
    out = tmp_path / "out"
    submit = [
        "sh",
        str(EXAMPLE / "submit.sh"),
        storage,
        str(out),
        "--set",
        "search.trials=6",
    ]
    done = subprocess.run(submit, env=cluster, capture_output=True, text=True, timeout=800, check=False)
    nodes = [(tmp_path / name).read_text()[-1000:] for name in ("head.log", "node.log")]
    assert done.returncode == 0, "\n".join([done.stdout[-3000:], done.stderr[-3000:], *nodes])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sites"]
    listed = subprocess.run(
        [BIN / "alphasmith", "list", "--storage", storage, "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=cluster,
    )
    (run,) = json.loads(listed.stdout)
    assert run["status"] == "finished"
