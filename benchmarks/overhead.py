"""Where the wall time of a stored study goes: exact evaluator, noise model, and everything else.

    python -m benchmarks.overhead [--size TxCxO] [--trials N] [--repeats N] [--threads N] [--out]

One site of 768 x 768 with T = 4096 rows, 24 trials that may not stop early, kept in a SQLite file through the writer thread as in a
run; the clock runs until everything is in the file. "Everything else" is Optuna, the storage, grouping and Python.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.judge import site_objective
from alphasmith.objectives.noise import model as noise
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.config import RunConfig
from alphasmith.search.site.search import search_data
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.study_record import StoredLog
from alphasmith.search.study.writer import Writer
from alphasmith.storage.database.connection import open_optuna
from benchmarks.grids import parse_size
from benchmarks.layers import REPORTING_SEEDS, layer_data, layers
from benchmarks.searching import settings, thinned
from benchmarks.timing import machine, median, parser, publish, table, torch_threads, with_threads

#: Classes that are the evaluator and the noise model, by the name their time goes under.
_TIMED = {
    "exact": (site_objective.SiteObjective, site_objective.CandidateBatch),
    "noise model": (noise.NoiseModel,),
}


@dataclass
class Stopwatch:
    """Seconds by name; a timed call inside another counts once, for the outer one."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_TIMED, 0.0))
    running: bool = False

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work`` with its time kept under ``name``."""

        @functools.wraps(work)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return work(*args, **kwargs)
            self.running, start = True, time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.running = False

        return wrapper

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time every method of the classes in ``_TIMED`` inside the block."""
        with ExitStack() as stack:
            for name, classes in _TIMED.items():
                for owner in classes:
                    methods = {n: m for n, m in vars(owner).items() if inspect.isfunction(m)}
                    for method, work in methods.items():
                        stack.enter_context(patch.object(owner, method, self.timed(name, work)))
            yield


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Seconds of one study, and its number of trials."""

    wall: float
    exact: float
    noise: float
    trials: int

    @property
    def rest(self) -> float:
        """Share of the wall time outside evaluator and noise model."""
        return 1 - (self.exact + self.noise) / self.wall


def measure(data: SiteData, held_out: SiteData, scheme: Scheme, config: RunConfig, *, stored: bool) -> Shares:
    """One search, in a SQLite file or in memory."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        # The tables exist before the first study of a run.
        storage = open_optuna(f"sqlite:///{Path(folder) / 'trials.db'}") if stored else None
        with watch.watching():
            start = time.perf_counter()
            with Writer() as writer:
                result = search_data(
                    data,
                    held_out,
                    SiteSettings(scheme=scheme, groups=config.groups, search=config.search),
                    log=None if storage is None else StoredLog(storage, "overhead", writer=writer),
                    study_name="overhead",
                )
            wall = time.perf_counter() - start
    return Shares(
        wall=wall, exact=watch.seconds["exact"], noise=watch.seconds["noise model"], trials=len(result.results)
    )


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("--size", default="4096x768x768")
    arguments_of.add_argument("--trials", type=int, default=24)
    arguments_of.add_argument("--repeats", type=int, default=5)
    arguments = arguments_of.parse_args()
    (layer,) = layers(REPORTING_SEEDS[0], ("peer",), size=parse_size(arguments.size))
    data, fresh = layer_data(layer)
    rows = []
    with torch_threads(arguments.threads):
        where = machine()
        for name in ("w8a8-channel-static", "w8a8-channel-token"):
            for k in (4, 8):
                never = {"trials": arguments.trials, "patience": arguments.trials, "tolerance": 0.0}
                config = settings(groups={"k": k}, search=never)
                for stored in (True, False):
                    runs = [
                        measure(data, thinned(fresh, 3), Scheme.parse(name), config, stored=stored)
                        for _ in range(arguments.repeats)
                    ]
                    rows.append(row((name, str(k), "SQLite" if stored else "memory"), runs))
                    print(" | ".join(rows[-1]), flush=True)
    header = (
        "scheme",
        "K",
        "kept in",
        "trials",
        "wall [s]",
        "exact evaluator [s]",
        "noise model [s]",
        "everything else [s]",
        "everything else, share",
        "most",
    )
    publish("OVERHEAD", f"{where} Site {arguments.size} (T x C x O).\n\n{table(header, rows)}", arguments.out)


def row(where: tuple[str, ...], runs: list[Shares]) -> tuple[str, ...]:
    """One line of the table, medians over repeats."""
    return (
        *where,
        f"{median([r.trials for r in runs]):.0f}",
        f"{median([r.wall for r in runs]):.2f}",
        f"{median([r.exact for r in runs]):.2f}",
        f"{median([r.noise for r in runs]):.2f}",
        f"{median([r.wall * r.rest for r in runs]):.2f}",
        f"{median([r.rest for r in runs]):.1%}",
        f"{max(r.rest for r in runs):.1%}",
    )


if __name__ == "__main__":
    main()
