"""A process that has imported everything and forks one child per command, since importing torch takes longer than a scene.

Reads one JSON object per line: ``{"key", "argv" or "call", "cwd", "environment", "spoils", "log"}``; writes ``{"key", "pid"}``
when the child runs and ``{"key", "code",
"seconds"}`` when it has ended. A child is an ordinary process in a session of its own: its memory,
its connections and its death are nobody else's. When standard input ends, all children are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import select
import signal
import sys
import tempfile
import threading
from typing import Any, NoReturn

from tests.chaos.spoils import Spoil, arm


def main() -> None:
    """Import, then fork on demand."""
    _warm()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _say({"ready": os.getpid()})
    keys: dict[int, int] = {}
    text = b""
    while True:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(keys)
        if 0 not in ready:
            continue
        data = os.read(0, 65536)
        if not data:
            break
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.close(wake_read)
                os.close(wake_write)
                _child(order)
            keys[pid] = order["key"]
            _say({"key": order["key"], "pid": pid})
    for pid in keys:
        os.kill(pid, signal.SIGKILL)


def _warm() -> None:
    """One whole run: much is imported only when it is needed, and would be by every child."""
    import psycopg  # noqa: F401

    from alphasmith.search.cli.main import main as alphasmith
    from tests.chaos.subject import options

    with tempfile.TemporaryDirectory() as folder:
        there = ["--storage", f"sqlite:///{folder}/a.db", "--out", f"{folder}/out"]
        try:
            with (
                open(os.devnull, "w") as nothing,
                contextlib.redirect_stdout(nothing),
                contextlib.redirect_stderr(nothing),
            ):
                alphasmith(["run", *options(), *there])
        except SystemExit as end:
            if end.code:
                raise
    _undrawn()
    if threading.active_count() > 1:
        raise RuntimeError(f"threads are left that no fork would copy: {threading.enumerate()}")


def _undrawn() -> None:
    """Figures are drawn empty: drawing them takes half of a scene, and whatever is in them is written all the same."""
    import plotly.graph_objects as go

    from alphasmith.dashboards import report, study_views

    for module in (report, study_views):
        drawn = (
            "alpha_heatmap",
            "alphas_by_group",
            "gain_by_site",
            "loss_against_cost",
            "losses_by_site",
            "shares_of_output",
            "trial_history",
        )
        for name in drawn:
            if hasattr(module, name):
                setattr(module, name, lambda *arguments, **keywords: go.Figure())
    study_views._card = lambda figure: figure


def _reap(keys: dict[int, int]) -> None:
    while keys:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            return
        seconds = used.ru_utime + used.ru_stime
        _say({"key": keys.pop(pid), "code": os.waitstatus_to_exitcode(status), "seconds": seconds})


def _child(order: dict[str, Any]) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for here, there in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(here, there)
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    arm([Spoil(**values) for values in order["spoils"]])
    if call := order.get("call"):
        pkgutil.resolve_name(call)(*order["argv"])
        sys.exit(0)
    from alphasmith.search.cli.main import main as alphasmith

    alphasmith(order["argv"])


def _say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
