"""What workers on Ray do in the tests, beside what ``engine_scripts`` has."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import ray

from alphasmith.search.engines.types import SearchEnd, SiteWork
from alphasmith.search.study.study_record import StudyLog, StudyMessage, StudyNote, StudyPast, StudyTrials
from tests.support import engine_scripts
from tests.support.engine_scripts import PATIENCE

PERFORM = "tests.support.ray_scripts:perform"


class DeadlyLog:
    """Kills the process once the first batch of trials was told, unless the file is there already."""

    def __init__(self, log: StudyLog, marker: Path) -> None:
        self._log = log
        self._marker = marker

    @property
    def past(self) -> StudyPast:
        """As the log has it."""
        return self._log.past

    @past.setter
    def past(self, past: StudyPast) -> None:
        self._log.past = past

    def tell(self, message: StudyMessage) -> None:
        """Tell, then perhaps die."""
        self._log.tell(message)
        if isinstance(message, StudyTrials) and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def perform(work: SiteWork, log: StudyLog, *, device: str | None, stop: Callable[[], bool]) -> SearchEnd:
    """As ``engine_scripts.perform``, and what ``study_name`` asks for beyond that.

    ``pid``: tell the process id, and end. ``fragile FILE``: the real search, whose first worker dies in the middle; the file
    remembers it. ``hold FILE``: tell the node, wait for the file, then search.
    """
    name, _, file = work.study_name.partition(" ")
    if work.study_name == "script pid":
        log.tell(StudyNote(name="pid", value=os.getpid()))
        return SearchEnd(site=work.site, reason="told")
    if name == "fragile":
        log = DeadlyLog(log, Path(file))
    if name == "hold":
        log.tell(StudyNote(name=f"began {time.time_ns()}", value=ray.get_runtime_context().get_node_id()))
        deadline = time.monotonic() + PATIENCE
        while not Path(file).exists():
            if time.monotonic() > deadline:
                return SearchEnd(site=work.site, reason="nobody let it go on")
            time.sleep(0.05)
    return engine_scripts.perform(work, log, device=device, stop=stop)
