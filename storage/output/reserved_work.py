"""Who works on a training or a compression: the process that has reserved the place of its result, or is at a trial."""

from __future__ import annotations

from pathlib import Path

from alphasmith.storage.database.connection import Database
from alphasmith.storage.output.reservation import holder
from alphasmith.storage.queue.leases import named
from alphasmith.storage.queue.trial_claims import living_worker
from alphasmith.storage.runs.compressions import CompressionRecord
from alphasmith.storage.runs.trainings import TrainingRecord


def driver_of(database: Database, work: TrainingRecord | CompressionRecord) -> str | None:
    """What people call the process that works on it; None: nobody does.

    Who drives one reserves the place of its result; a compression may have workers without a driver. Where that place is not seen from here and the database serves several
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
    driver = holder(place, work.id)
    if driver is not None or isinstance(work, TrainingRecord):
        return driver
    worker = living_worker(database, work.study, lease=work.lease)
    return None if worker is None else named(worker)
