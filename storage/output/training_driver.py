"""Who works on a training: the process that has reserved the place of its result."""

from __future__ import annotations

from pathlib import Path

from alphasmith.storage.database.connection import Database
from alphasmith.storage.output.reservation import holder
from alphasmith.storage.runs.trainings import TrainingRecord


def training_driver(database: Database, training: TrainingRecord) -> str | None:
    """What people call the process that works on a training; None: nobody does.

    Who works on a training reserves the place of its result. Where that place is not seen from here and the database serves several
    machines, a training that is marked as running counts as worked on.

    Args:
        database: Its database.
        training: Its record.
    """
    place = Path(training.folder)
    if training.status == "finished":
        return None
    if training.status == "running" and database.backend != "sqlite" and not place.parent.is_dir():
        return f"a process on another machine, as far as is known here: only there is {place.parent} seen"
    return holder(place, training.id)
