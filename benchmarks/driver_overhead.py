"""What a driver costs a run of many sites, beside the searches: preparing, claiming, recording, accepting.

    python -m benchmarks.driver_overhead [--sites 300] [--backends sqlite postgresql mysql] [--out docs/scaling.md]

A chain of small layers is searched from end to end in one process, on one thread. The time from the first claim to the last accepted
result, less the time inside the searches themselves, is what the driver made them wait for. Telling a trial counts as waiting. The
thread that writes works while the next search runs; its processor time is the driver's, too. The goal is for both together.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from alphasmith.search import RunConfig, run
from alphasmith.search.engines.local import in_process
from alphasmith.search.engines.perform import perform
from alphasmith.search.engines.types import SearchEnd, SiteWork
from alphasmith.search.study.study_record import StudyLog, StudyMessage
from alphasmith.search.study.writer import Writer
from alphasmith.storage.database.connection import open_existing
from alphasmith.storage.queue.board import Board
from benchmarks.databases import BACKENDS, fresh_database
from benchmarks.timing import machine, parser, publish, table, torch_threads

_WIDTH = 16
_GOAL = 0.050


@dataclass
class TimeSplit:
    """Seconds of a whole run by what they were spent on; ``writing`` is processor time."""

    searching: float = 0.0
    telling: float = 0.0
    writing: float = 0.0


class _Timed:
    """A log whose own time is kept apart from the search's."""

    def __init__(self, log: StudyLog, spent: TimeSplit) -> None:
        self._log = log
        self._spent = spent
        self.past = log.past

    def tell(self, message: StudyMessage) -> None:
        began = time.perf_counter()
        self._log.tell(message)
        self.past = self._log.past
        self._spent.telling += time.perf_counter() - began


def chain(sites: int) -> nn.Module:
    """As many linear layers as sites, a norm before each: every one can be folded on its own."""
    torch.manual_seed(0)
    norms = [nn.LayerNorm(_WIDTH) for _ in range(sites)]
    with torch.no_grad():
        for norm in norms:
            norm.weight[:2] *= 30.0
    return nn.Sequential(*(layer for norm in norms for layer in (norm, nn.Linear(_WIDTH, _WIDTH)))).eval()


def overhead(url: str, sites: int, trials: int) -> tuple[float, TimeSplit, int]:
    """(seconds from the first claim to the last result, what they were spent on, sites) of one run."""
    spent = TimeSplit()

    def timed(work: SiteWork, log: StudyLog, **keywords: Any) -> SearchEnd:
        began, told = time.perf_counter(), spent.telling
        ended = real(work, _Timed(log, spent), **keywords)
        spent.searching += time.perf_counter() - began - (spent.telling - told)
        return ended

    def write(self: Writer, job: Callable[..., object], *arguments: Any) -> None:
        began = time.thread_time()
        writes(self, job, *arguments)
        spent.writing += time.thread_time() - began

    real, writes = perform, Writer._run
    batches = [(torch.randn(8, _WIDTH),) for _ in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "storage": url,
            "out": Path(folder) / "out",
            "artifacts": str(Path(folder) / "artifacts"),
            "data": {"samples": 64, "held_out": 16, "proof": 8},
            "search": {"trials": trials, "rows": 64, "refine": False, "reuse": False, "threads": 1},
        }
        with patch.object(in_process, "perform", timed), patch.object(Writer, "_run", write):
            result = run(RunConfig.build(values), model=chain(sites), batches=batches)
        database = open_existing(url)
        tickets = Board(database, result.id, role="driver").tickets()
        database.close()
    began = min(t.started for t in tickets if t.started is not None)
    ended = max(t.ended for t in tickets if t.ended is not None)
    return (ended - began).total_seconds(), spent, len(tickets)


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--sites", type=int, default=300)
    arguments_of.add_argument("--trials", type=int, default=8)
    arguments_of.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    arguments = arguments_of.parse_args()
    where = machine()
    lines = []
    with torch_threads(1):
        for backend in arguments.backends:
            with fresh_database(backend) as url:
                if url is None:
                    continue
                seconds, spent, sites = overhead(url, arguments.sites, arguments.trials)
            waited = (seconds - spent.searching) / sites
            wrote = spent.writing / sites
            verdict = "met" if waited + wrote < _GOAL else "missed"
            each = (seconds / sites, spent.searching / sites, waited, wrote)
            lines.append(
                (backend, sites, *(f"{1000 * value:.1f}" for value in each), f"{1000 * _GOAL:.0f} ms, {verdict}")
            )
            print(lines[-1], flush=True)
    head = (
        "database",
        "sites",
        "wall [ms]",
        "searching [ms]",
        "waiting for the driver [ms]",
        "writer thread, CPU [ms]",
        "goal",
    )
    title = f"{arguments.trials} trials of the sampler a site at most, per site:"
    publish("DRIVER_OVERHEAD", f"{where} {title}\n\n{table(head, lines)}", arguments.out)


if __name__ == "__main__":
    main()
