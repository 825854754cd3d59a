"""What samples stand for, as data sets say it: a folder for each class, a text beside each file, a table with a column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media._records import TABLES, Record, read_records
from alphasmith.objectives.media._source import METADATA, MediaSource, TargetKind
from alphasmith.objectives.media.batches import FolderName
from alphasmith.objectives.reading import is_regular, read_text

#: Columns that are looked at when none is named, the likelier first.
COLUMNS: Mapping[TargetKind, tuple[str, ...]] = {
    "class": ("label", "labels", "class", "category", "target"),
    "text": ("target", "summary", "translation", "output", "response", "completion", "answer"),
}
#: Columns of a table beside media files that hold what is said or seen in them.
_SPOKEN = ("transcription", "transcript", "text", "sentence", "caption")
_FILES = ("file_name", "file", "path")


def target_column(record: Record, source: MediaSource, names: tuple[str, ...]) -> str | None:
    """The field that holds what a record stands for; None: it has none, or nothing is asked for.

    Args:
        record: Any record of the file.
        source: What the user asked for.
        names: Fields to look at when none is named.

    Raises:
        InputError: The named one is missing.
    """
    if source.targets is None or source.label == "none":
        return None
    if source.label == "auto":
        return next((name for name in names if name in record.fields and name != source.column), None)
    if source.label not in record.fields:
        problem = f"{record.where} has no field {source.label!r} (it has {record.names})"
        raise InputError("data.label", problem, "name the field that holds the label, or 'none'")
    return source.label


def file_targets(source: MediaSource, files: list[Path]) -> tuple[Any, ...]:
    """What each file stands for, None where nothing says so; empty where nothing is asked for.

    A table ``metadata`` in the folder comes first; else a class is the name of a file's folder, and a text the file beside it
    that differs in its ending only.

    Args:
        source: What the user asked for.
        files: Media files.

    Raises:
        InputError: A table or a text cannot be read, or has no such column.
    """
    if source.targets is None or source.label == "none":
        return ()
    table = _metadata(source)
    if table:
        return tuple(table.get(file.resolve()) for file in files)
    if source.targets == "text":
        return tuple(_beside(file) for file in files)
    alone = source.path.is_file()
    return tuple(None if alone or file.parent == source.path else FolderName(file.parent.name) for file in files)


def _metadata(source: MediaSource) -> dict[Path, Any]:
    folder = source.path if source.path.is_dir() else source.path.parent
    found: dict[Path, Any] = {}
    for file in sorted(folder.glob(f"{METADATA}.*")):
        if file.suffix.lower() not in TABLES or not is_regular(file):
            continue
        for record in read_records(file):
            name = next((n for n in _FILES if isinstance(record.fields.get(n), str)), None)
            names = COLUMNS["class"] if source.targets == "class" else (*_SPOKEN, *COLUMNS["text"])
            column = target_column(record, source, names)
            if name is None or (source.label == "auto" and column is None):
                problem = f"{record.where} names no file, or not what it stands for (it has {record.names})"
                raise InputError("data.label", problem, f"give the columns {_FILES[0]} and {names[0]}, or set 'none'")
            found[(folder / record.fields[name]).resolve()] = record.fields[column or source.label]
    return found


def _beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    if not is_regular(text):
        return None
    return read_text(text, field="data.path", remedy="give plain UTF-8 text").removeprefix("\ufeff").strip()
