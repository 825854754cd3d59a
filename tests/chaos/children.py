"""Processes of a scene as the harness sees them: started, signalled, waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.chaos.spoils import Spoil

ROOT = Path(__file__).resolve().parents[2]
#: Nothing is waited for longer than this [s]; a scene that needs more has hung.
PATIENCE = 180.0


class HangError(AssertionError):
    """Something that had to happen did not."""


def until(happens: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until ``happens`` answers something true, and return that.

    Raises:
        Hung: It did not within ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while not (answer := happens()):
        if time.monotonic() > deadline:
            raise HangError(f"waited {patience:.0f} s for {what}")
        time.sleep(0.02)
    return answer


@dataclass
class Child:
    """One process.

    Attributes:
        argv: Its command.
        log: File with what it said.
        pid: Its process id.
        code: Exit code, negative for a signal; None while it runs.
        seconds: Processor time it took, once it has ended.
    """

    argv: tuple[str, ...]
    log: Path
    pid: int = 0
    code: int | None = None
    seconds: float = 0.0
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    @property
    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.code is None

    def send(self, number: int) -> None:
        """Signal it, unless it has ended."""
        with self._changed:
            if self.code is None:
                os.kill(self.pid, number)

    def kill(self) -> int:
        """kill -9, and wait for its end."""
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, patience: float = PATIENCE) -> int:
        """Exit code, once it has ended.

        Raises:
            Hung: It did not end.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.code is not None, patience):
                raise HangError(f"{' '.join(self.argv)} (process {self.pid}) runs on: {self.said[-2000:]}")
        assert self.code is not None
        return self.code

    def told(self, *, pid: int | None = None, code: int | None = None, seconds: float = 0.0) -> None:
        """Note what the zygote reports."""
        with self._changed:
            self.pid = pid or self.pid
            self.code = code if code is not None else self.code
            self.seconds = seconds
            self._changed.notify_all()

    def started(self) -> Self:
        """Wait until it runs."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.pid, PATIENCE):
                raise HangError("the zygote starts nothing")
        return self


class Zygote:
    """Starts children; see ``zygote.py``. Used as a context: at its end every child is dead.

    Args:
        environment: Added to that of the zygote, e.g. LD_PRELOAD.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._children: dict[int, Child] = {}
        self._count = 0
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CHAOS_"))}
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.zygote"],
            cwd=ROOT,
            env=plain | threads | dict(environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(
        self,
        *argv: str,
        cwd: Path,
        spoils: Sequence[Spoil] = (),
        environment: Mapping[str, str] | None = None,
        call: str = "",
    ) -> Child:
        """Run ``alphasmith ARGV``, or ``call`` with these arguments, in a process of its own."""
        self._count += 1
        key = self._count
        child = Child(argv, cwd / f"process-{key}.log")
        self._children[key] = child
        order = {
            "key": key,
            "argv": argv,
            "call": call,
            "cwd": str(cwd),
            "environment": dict(environment or {}),
            "spoils": [asdict(spoil) for spoil in spoils],
            "log": str(child.log),
        }
        self._stdin.write(json.dumps(order).encode() + b"\n")
        self._stdin.flush()
        return child.started()

    def end_all(self) -> None:
        """Kill whatever still runs."""
        for child in self._children.values():
            if child.runs and child.pid:
                child.kill()
        self._children.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            child = self._children.get(message.get("key", 0))
            if child is not None:
                child.told(pid=message.get("pid"), code=message.get("code"), seconds=message.get("seconds", 0.0))
        for child in self._children.values():  # the zygote is gone: so are they
            if child.runs:
                child.told(code=-int(signal.SIGKILL))
