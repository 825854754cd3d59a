"""Who works on a training or a compression: the process that has reserved the place of its result."""

from __future__ import annotations

from pathlib import Path

from alphasmith.storage.database.connection import Database
from alphasmith.storage.output.reservation import holder
from alphasmith.storage.runs.compressions import CompressionRecord
from alphasmith.storage.runs.trainings import TrainingRecord


def driver_of(database: Database, work: TrainingRecord | CompressionRecord) -> str | None:
    """What people call the process that works on it; None: nobody does.

    Who works on one reserves the place of its result. Where that place is not seen from here and the database serves several
    machines, one that is marked as running counts as worked on.

    Args:
        database: Its database.
        work: Its record.
    """
    place = Path(work.folder)
    if work.status == "finished":
        return None
    if work.status == "running" and database.backend != "sqlite" and not place.parent.is_dir():
        return f"a process on another machine, as far as is known here: only there is {place.parent} seen"
    return holder(place, work.id)
