"""What workers do in the tests of engines: search for real, or what the name of the study asks for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from alphasmith.objectives.judge.site_objective import linear_site_data
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.config import GroupsConfig, SearchConfig
from alphasmith.search.engines import perform as real
from alphasmith.search.engines.types import SearchEnd, SiteWork
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.study_record import StudyLog, StudyNote

PERFORM = "tests.support.engine_scripts:perform"
#: Facts that the script ``die`` tells before it dies.
FACTS = tuple(f"fact_{number}" for number in range(50))
#: Nothing is waited for longer than this [seconds]: then the test fails.
PATIENCE = 240.0


def site_work(site: str, *, seed: int = 0, trials: int = 6, value: float | None = None) -> SiteWork:
    """A small site; ``value`` spoils its weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(48, 12, generator=generator) * torch.exp(torch.randn(12, generator=generator))
    w = torch.randn(8, 12, generator=generator)
    if value is not None:
        w[0, 0] = value
    data = linear_site_data(x[:32], w)
    held_out = replace(
        linear_site_data(x[32:], w), activation_statistics=data.activation_statistics, input_range=data.input_range
    )
    return SiteWork(
        site=site,
        study_name=f"study of {site}",
        data=data,
        held_out=held_out,
        settings=SiteSettings(scheme=Scheme(), groups=GroupsConfig(k=2), search=SearchConfig(trials=trials, seed=seed)),
    )


def script(name: str, site: str = "site") -> SiteWork:
    """Work that makes a worker follow a script of :func:`perform`."""
    return replace(site_work(site), study_name=f"script {name}")


def perform(work: SiteWork, log: StudyLog, *, device: str | None, stop: Callable[[], bool]) -> SearchEnd:
    """The real search, or what ``study_name`` asks for.

    ``wait``: tell the process id, then wait to be stopped. ``door``: likewise, or until the file ``site`` is gone. ``die``: tell ``FACTS``, then be killed. ``exit``, ``raise``: leave
    in other ways. ``facts``: tell the number of threads and the device, and end.
    """
    match work.study_name.removeprefix("script "):
        case "wait" | "door" as kind:
            log.tell(StudyNote(name="pid", value=os.getpid()))
            deadline = time.monotonic() + PATIENCE
            while not stop() and time.monotonic() < deadline:
                if kind == "door" and not Path(work.site).exists():
                    return SearchEnd(site=work.site, reason="the file is gone")
                time.sleep(0.01)
            return SearchEnd(site=work.site, stopped=stop(), reason="" if stop() else "never stopped")
        case "die":
            for name in FACTS:
                if name not in log.past.notes:
                    log.tell(StudyNote(name=name, value="x" * 10_000))
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            raise SystemExit(3)
        case "raise":
            raise ValueError("two\nlines")
        case "facts":
            log.tell(StudyNote(name="threads", value=torch.get_num_threads()))
            log.tell(StudyNote(name="environment", value=os.environ["OMP_NUM_THREADS"]))
            log.tell(StudyNote(name="device", value=device))
            log.tell(StudyNote(name="group", value=os.getpgrp() == os.getpid()))
            return SearchEnd(site=work.site, reason="told")
    return real.perform(work, log, device=device, stop=stop)


class Fatal:
    """A task metric that kills the process at its first ``deaths`` calls, counted in a file; then it is 0.25."""

    def __init__(self, file: Path, deaths: int) -> None:
        self.file = file
        self.deaths = deaths

    def __call__(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """Die, or score."""
        with self.file.open("a") as stream:
            stream.write("x")
        if self.file.stat().st_size <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.25


def broken_metric(model: nn.Module, batches: Sequence[Batch]) -> float:
    """A task metric that fails."""
    raise ValueError("no labels")
