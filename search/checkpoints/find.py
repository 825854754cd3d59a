"""Where the result of a run or a training is: by its id in a database, or by its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.reading import usable_path
from alphasmith.search.config import DEFAULT_STORAGE
from alphasmith.storage.database.connection import opened
from alphasmith.storage.output.manifest import FILE_NAME
from alphasmith.storage.output.result_folder import ResultFolder
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.runs.trainings import TrainingStore, is_training_id


@contextmanager
def as_written() -> Iterator[None]:
    """Around the reading of a result: one that is not as it was written is refused like everything else that the user can mend.

    Raises:
        InputError: Field ``RUN``: a file has changed.
    """
    try:
        yield
    except IntegrityError as error:
        raise InputError("RUN", str(error), "restore the folder, or run again") from error


def find_result(source: Path | str, storage: str | None) -> ResultFolder:
    """The result of a run or a training.

    Args:
        source: An id, or the beginning of one, or an output folder.
        storage: Address of the database that ids are looked up in; None: the usual one.

    Raises:
        InputError: Field ``RUN``: no such run or folder, one that is not finished, or a folder that holds no result.
        IntegrityError: The manifest is a link, or names a file twice.
    """
    folder = _folder_of(source, storage)
    if not (folder / FILE_NAME).is_file():
        raise InputError("RUN", f"{folder} is no result: it has no {FILE_NAME}", "give the output folder of a run")
    return ResultFolder(folder)


def _folder_of(source: Path | str, storage: str | None) -> Path:
    """The output folder that a source names, or that the run has which it names."""
    path = usable_path("RUN", source)
    if path.is_dir():
        return path
    if isinstance(source, Path) or path.exists() or "/" in source or os.sep in source:
        raise InputError("RUN", f"{source} is no folder", "give a run id, or the output folder of a run")
    kind = "training" if is_training_id(source) else "run"
    with opened(storage or DEFAULT_STORAGE) as database:
        record = (TrainingStore(database) if kind == "training" else RunStore(database)).get(source)
    if record.status != "finished":
        told = f"{kind} {record.id} is {record.status}, not finished"
        raise InputError("RUN", told, f"alphasmith resume {record.id}")
    if not record.folder or not Path(record.folder).is_dir():
        told = f"the output folder of {kind} {record.id}, {record.folder}, is not here"
        raise InputError("RUN", told, "give the folder where it is now")
    return Path(record.folder)
