"""The launch scripts, run as far as one machine can: the same commands, a real PostgreSQL, real processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml

from alphasmith.storage.database.connection import open_existing
from alphasmith.storage.queue.board import Board
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.upkeep.check import violations
from tests.support.servers import empty_database

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: What the examples leave to the defaults, so that the demo is a matter of seconds.
QUICK = ("trials = 12", "trials = 4\nrows = 64\nrefine = false\nnoise_model = false\nsingle_alphas = 3")


def quick(example: str) -> str:
    """An example's configuration, made quick."""
    written = (EXAMPLES / example / "run.toml").read_text()
    assert QUICK[0] in written
    return written.replace(*QUICK)


@pytest.fixture
def storage() -> Iterator[str]:
    """Address of an empty PostgreSQL database, with a password that must not be seen anywhere."""
    with empty_database("postgresql", password="s3cr3t") as url:
        yield url


def with_command(folder: Path) -> dict[str, str]:
    """An environment in which ``alphasmith`` is the one under test."""
    command = folder / "bin" / "alphasmith"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m alphasmith.search.cli.main "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What every process printed; each must end well."""
    told = []
    for process in processes:
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        told.append(out + err)
    return told


def finished_once(storage: str, name: str, workers: int) -> None:
    """One run, finished, every site searched once, by at least ``workers`` processes in all."""
    database = open_existing(storage)
    try:
        record = RunStore(database).get(name)
        assert record.status == "finished"
        assert "s3cr3t" not in str(record)
        board = Board(database, record.id, role="driver")
        assert {t.state for t in board.tickets()} == {"done"}
        assert len(board.workers()) >= workers
        assert violations(database) == []
    finally:
        database.close()


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_search_one_run_together(storage: str, tmp_path: Path) -> None:
    script = EXAMPLES / "slurm" / "array.sbatch"
    (tmp_path / "run.toml").write_text(quick("slurm"))
    environment = with_command(tmp_path) | {"ALPHASMITH_STORAGE": storage, "SLURM_ARRAY_JOB_ID": "77"}
    tasks = [
        subprocess.Popen(
            ["bash", str(script), "run.toml"],
            cwd=tmp_path,
            env=environment | {"SLURM_ARRAY_TASK_ID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(3)
    ]
    told = ended(tasks)
    assert "s3cr3t" not in "".join(told)
    finished_once(storage, "array-77", 3)
    assert (tmp_path / "array-77" / "manifest.json").is_file()


def test_the_slurm_script_says_what_it_needs(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ALPHASMITH_STORAGE"}
    told = subprocess.run(
        ["bash", str(EXAMPLES / "slurm" / "array.sbatch")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode != 0
    assert "postgresql://USER:PASSWORD@HOST/NAME" in told.stderr


def composed() -> dict[str, Any]:
    """The services of the Compose file."""
    return dict(yaml.safe_load((EXAMPLES / "compose" / "compose.yaml").read_text())["services"])


@pytest.mark.slow
def test_the_services_of_the_compose_file_finish_a_run(storage: str, tmp_path: Path) -> None:
    services = composed()
    (tmp_path / "run.toml").write_text(quick("compose"))
    environment = with_command(tmp_path) | {"STORAGE": storage}
    wanted = [services["driver"], *[services["worker"]] * int(services["worker"]["deploy"]["replicas"])]
    # What Compose does with a command: $$ stands for $, and its volume is our folder.
    commands = [s["command"].replace("$$", "$").replace("/alphasmith/", f"{tmp_path}/") for s in wanted]
    processes = [
        subprocess.Popen(
            ["sh", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    told = ended(processes)
    assert "s3cr3t" not in "".join(told)
    finished_once(storage, "composed", 3)
    assert (tmp_path / "result" / "manifest.json").is_file()
    page = "".join(p.read_text() for p in (tmp_path / "result").glob("*.html"))
    assert "s3cr3t" not in page + (tmp_path / "result" / "manifest.json").read_text()


def test_the_dashboard_of_the_compose_file_answers(storage: str, tmp_path: Path) -> None:
    service = composed()["dashboard"]
    (published,) = service["ports"]
    inside = published.rpartition(":")[2]
    assert f"--port {inside}" in service["command"]
    # As Compose does, without a shell around the command; on a port that is free here.
    command = shlex.split(service["command"].replace("$$", "$").replace(f"--port {inside}", "--port 0"))
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=with_command(tmp_path) | {"STORAGE": storage},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        told, found = "", None
        for line in process.stderr or ():
            told += line
            found = re.fullmatch(
                r"dashboard at (http://localhost:\d+/dashboard/)\?token=(\S+), Ctrl-C stops it\n", line
            )
            if found:
                break
        assert found, told
        # Nobody outside the container may come in without the token that is printed.
        with pytest.raises(HTTPError, match=r"401|403"):
            urlopen(found[1], timeout=30)
        with urlopen(Request(found[1], headers={"Authorization": f"Bearer {found[2]}"}), timeout=30) as page:
            assert page.status == 200
            assert "Optuna Dashboard" in page.read().decode()
        process.send_signal(signal.SIGINT)
        _, more = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "s3cr3t" not in told + more
    finally:
        process.kill()
        process.wait()


def test_the_image_of_the_compose_file_is_built_from_the_checkout(tmp_path: Path) -> None:
    checkout = EXAMPLES.parent
    builds = [service["build"] for name, service in composed().items() if name != "db"]
    assert len(builds) == 3
    for build in builds:
        assert (EXAMPLES / "compose" / build["context"]).resolve() == checkout
        assert (checkout / build["dockerfile"]).samefile(EXAMPLES / "compose" / "Dockerfile")
    steps = (EXAMPLES / "compose" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", steps, flags=re.MULTILINE) for name in line.split()]
    sent = re.findall(r"^!(.+)$", (EXAMPLES / "compose" / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE)
    assert sorted(copied) == sorted(sent)
    installs = re.findall(r"^RUN pip install (.+)$", steps, flags=re.MULTILINE)
    assert all("-c constraints.txt" in install for install in installs)
    assert installs[-1].endswith("'.[postgresql]'")
    # A checkout of nothing but what is copied has everything that is packaged.
    for name in copied:
        source = checkout / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, tmp_path / name)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    folders = project["tool"]["setuptools"]["package-dir"]
    for package in project["tool"]["setuptools"]["packages"]:
        top, *inner = package.split(".")
        assert (tmp_path / folders[top]).joinpath(*inner, "__init__.py").is_file()
    assert (tmp_path / "py.typed").is_file()
    assert all((tmp_path / name).is_file() for name in (project["project"]["readme"], "LICENSE"))


def test_the_compose_file_is_one(tmp_path: Path) -> None:
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    checked = subprocess.run(
        ["docker", "compose", "-f", str(EXAMPLES / "compose" / "compose.yaml"), "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not a docker command" in checked.stderr or "unknown shorthand flag" in checked.stderr:
        pytest.skip("docker has no compose command")
    assert checked.returncode == 0, checked.stderr
    assert {"db", "driver", "worker", "dashboard"} <= set(composed())
