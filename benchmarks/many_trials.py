"""How quickly 10,000 trials in one database are listed, shown and opened in the dashboard.

    python -m benchmarks.many_trials [--backend NAME] [--sites N] [--trials N] [--repeats N] [--keep URL] [--out docs/scaling.md]

One run of 300 sites with 10,000 trials in all and three small runs, their studies annotated as runs annotate them. ``list`` and
``show`` are timed as commands, interpreter and imports included, and in process. The dashboard is a real server; its first page is
loaded over HTTP with every file it names and the calls that it makes for a list of studies, then for one study, and, where there is a
Chromium, in that browser. Goals: list and show below 1 s in process, the first page below 3 s.
"""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import optuna

from alphasmith.dashboards.server import DashboardServer, application
from alphasmith.dashboards.study_views import annotate_study, study_note
from alphasmith.search.cli import answers, commands, tables
from alphasmith.storage.database.connection import initialise, open_database, optuna_storage
from alphasmith.storage.runs.data_frames import sites_frame, trials_frame
from alphasmith.storage.runs.run_store import RunStore
from benchmarks.databases import BACKENDS, fresh_database
from benchmarks.timing import machine, median, parser, publish, table
from tests.support.dashboards import running
from tests.support.stored_records import record_study, run_spec, site_record, study_trials

_GROUPS = 4
#: (sites, trials) of the small runs beside the large one.
_SMALL = ((4, 60), (8, 120), (12, 200))
_GOALS = {"list, in process": 1.0, "show, in process": 1.0, "first page, all requests": 3.0}


@dataclass(frozen=True)
class Timing:
    """One thing that was timed, with its size in bytes where it has one."""

    what: str
    seconds: tuple[float, ...]
    size: int | None = None

    def row(self) -> tuple[str, ...]:
        """One line of the table."""
        goal = _GOALS.get(self.what)
        met = "" if goal is None else f"{goal:g} s, {'met' if median(self.seconds) < goal else 'MISSED'}"
        size = "" if self.size is None else f"{self.size / 1e6:.2f}"
        return self.what, f"{self.seconds[0]:.2f}", f"{median(self.seconds):.2f}", size, met


def build(url: str, sites: int, trials: int) -> str:
    """A database with one large run and three small ones; returns the id of the large run."""
    database = open_database(url)
    initialise(database)
    store, storage = RunStore(database), optuna_storage(database)
    generator = np.random.default_rng(0)
    made = ""
    for count, total in (*_SMALL, (sites, trials)):
        made = store.create(run_spec(f"{count} sites")).id
        store.start(made)
        for position in range(count):
            per_site = total // count + (position < total % count)
            record = site_record(made, position, groups=_GROUPS, trials=per_site, generator=generator)
            record_study(database, str(record.study), study_trials(per_site, groups=_GROUPS, generator=generator))
            store.add_site(made, record)
        table = sites_frame(store.sites(made))
        for name, of_site in trials_frame(store.trials(made)).groupby("site"):
            shown = table[table["site"] == name]
            study = optuna.load_study(study_name=f"{made}/{name}", storage=storage)
            study.set_user_attr("device", "cpu")
            annotate_study(study, sites=shown, trials=of_site, note=study_note(str(name), shown, {"run": made}))
        store.conclude(made, space_hash="", folder="/nowhere")
        store.finish(made)
    database.close()
    return made


def timed(what: str, work: Callable[[], int | None], repeats: int) -> Timing:
    """``work`` repeated, the first time apart: nothing is warm then."""
    taken, size = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        size = work()
        taken.append(time.perf_counter() - start)
    return Timing(what, tuple(taken), size)


def command(*arguments: str) -> int:
    """Run ``alphasmith`` in a process of its own; returns the size of its answer."""
    called = [sys.executable, "-m", "alphasmith.search.cli.main", *arguments]
    return len(subprocess.run(called, check=True, capture_output=True).stdout)


def listing(url: str) -> int:
    """What ``alphasmith list`` does."""
    return len(answers.runs_table(commands.list_runs(url)))


def showing(run: str, url: str) -> int:
    """What ``alphasmith show`` does."""
    return len(tables.run_text(commands.show_run(run, url)))


@contextmanager
def dashboard(url: str) -> Iterator[int]:
    """A real dashboard server on ``url``; gives its port."""
    database = open_database(url)
    try:
        with running(DashboardServer(application(optuna_storage(database)), port=0)) as port:
            yield port
    finally:
        database.close()


def fetch(port: int, path: str) -> bytes:
    """One request as a browser makes it, refused unless it succeeds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", path, headers={"Accept-Encoding": "gzip"})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ConnectionError(f"{path}: {response.status} {response.reason}")
    return body


def page(port: int, *calls: str) -> int:
    """The page, the files it names, and the calls it makes, one after the other; returns bytes on the wire."""
    html = fetch(port, "/dashboard")
    files = re.findall(r'(?:src|href)="(/[^"]+)"', html.decode())
    return len(html) + sum(len(fetch(port, path)) for path in (*files, *calls))


def browser_seconds(address: str, ready: str, deadline: float = 60.0) -> float | None:
    """Seconds from the start of a Chromium until its page holds ``ready``; None without Chromium or after ``deadline``."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
        start = time.perf_counter()
        called = [program, *flags, "--virtual-time-budget=10000", address]
        shown = subprocess.run(called, check=False, capture_output=True, text=True, timeout=deadline)
        taken = time.perf_counter() - start
    return taken if ready in shown.stdout else None


def measure(url: str, run: str, repeats: int) -> list[Timing]:
    """Everything, on a database that was built before."""
    found = [
        timed("list, as a process", lambda: command("list", "--storage", url), repeats),
        timed("show, as a process", lambda: command("show", run, "--storage", url), repeats),
        timed("--version, as a process", lambda: command("--version"), repeats),
        timed("list, in process", lambda: listing(url), repeats),
        timed("show, in process", lambda: showing(run, url), repeats),
    ]
    with dashboard(url) as port:
        studies = "/api/studies"
        found.append(timed("first page, all requests", lambda: page(port, "/api/meta", studies), 1))
        found.append(timed("list of studies, again", lambda: len(fetch(port, studies)), repeats))
        one = "/api/studies/1"
        calls = ("/api/meta", f"{one}?after=0", f"{one}/param_importances")
        found.append(timed("page of one study, all requests", lambda: page(port, *calls), repeats))
        found.append(timed("poll of one study", lambda: len(fetch(port, f"{one}?after=30")), repeats))
        shown = browser_seconds(f"http://127.0.0.1:{port}/dashboard", run)
        empty = browser_seconds("about:blank", "<html>")
        if shown is not None and empty is not None:
            found.append(Timing("first page, Chromium from its start", (shown,)))
            found.append(Timing("an empty page, Chromium from its start", (empty,)))
    return found


@contextmanager
def database_of(backend: str, keep: str | None) -> Iterator[str | None]:
    """A database of its own, or the one named by ``keep``."""
    if keep is not None:
        yield keep
        return
    with fresh_database(backend) as url:
        yield url


def main(given: Sequence[str] | None = None) -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--backend", choices=BACKENDS, default="sqlite")
    arguments_of.add_argument("--sites", type=int, default=300)
    arguments_of.add_argument("--trials", type=int, default=10_000, help="trials of the large run")
    arguments_of.add_argument("--repeats", type=int, default=3)
    arguments_of.add_argument(
        "--keep", metavar="URL", help="build in this database, or take it as it is where it holds runs"
    )
    arguments = arguments_of.parse_args(given)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = machine()
    with database_of(arguments.backend, arguments.keep) as url:
        if url is None:
            print(f"no {arguments.backend} server")
            return
        database = open_database(url)
        initialise(database)
        known = RunStore(database).runs()
        database.close()
        start = time.perf_counter()
        run = known[0].id if known else build(url, arguments.sites, arguments.trials)
        print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
        rows = [found.row() for found in measure(url, run, arguments.repeats)]
    words = f"{where} {arguments.trials} trials over {arguments.sites} sites and three small runs, {arguments.backend}."
    header = ("what", "first [s]", "median [s]", "MB", "goal")
    publish("MANY_TRIALS", f"{words}\n\n{table(header, rows)}", arguments.out)


if __name__ == "__main__":
    main()
