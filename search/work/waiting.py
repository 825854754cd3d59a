"""Waiting for a database and what is to be worked on in it to appear, where all processes are launched together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import duration
from alphasmith.search.interruption import leave
from alphasmith.search.progress import Progress
from alphasmith.storage.database.connection import Database, open_existing

T = TypeVar("T")

#: Seconds between two looks.
POLL = 1.0


def appeared(
    url: str,
    find: Callable[[Database], T],
    *,
    what: str,
    wait: float,
    progress: Progress,
    stop: Callable[[], bool],
    sleep: Callable[[float], None],
) -> tuple[Database, T]:
    """The database, open, and what is looked for in it, once both are there.

    Args:
        url: Its address.
        find: Finds it; an input error says that it is not there yet.
        what: What people call it.
        wait: Seconds after which it is given up.
        progress: Is told that it is waited for.
        stop: Polled.
        sleep: Waits a number of seconds.

    Raises:
        InputError: It did not appear.
        Interrupted: ``stop`` said so.
    """
    waited = 0.0
    while True:
        try:
            database = open_existing(url)
            try:
                return database, find(database)
            except InputError:
                database.close()
                raise
        except InputError:
            leave(stop)
            if waited >= wait:
                raise
        if not waited:
            progress.note(f"waiting up to {duration(wait)} for {what}")
        sleep(POLL)
        waited += POLL
