"""What samples stand for, as data sets say it: a folder for each class, a text beside each file, a table with a column.

A table may also say which files there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media._records import TABLES, Record, read_records
from alphasmith.objectives.media._source import METADATA, SUFFIXES, MediaSource, TargetKind
from alphasmith.objectives.media.batches import FolderName
from alphasmith.objectives.reading import is_regular, read_text, usable_path

#: Columns that are looked at when none is named, the likelier first.
COLUMNS: Mapping[TargetKind, tuple[str, ...]] = {
    "class": ("label", "labels", "class", "category", "target"),
    "text": ("target", "summary", "translation", "output", "response", "completion", "answer"),
}
#: Columns of a table beside media files that hold what is said or seen in them.
_SPOKEN = ("transcription", "transcript", "text", "sentence", "caption")
_FILES = ("file_name", "file", "path")
_NAME_IT = "name the column that holds the paths of media files"


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

    A table that lists the files says it; else a table ``metadata`` in the folder comes first; else a class is the name of a file's folder, and a text the file beside it
    that differs in its ending only.

    Args:
        source: What the user asked for.
        files: Media files.

    Raises:
        InputError: A table or a text cannot be read, or has no such column.
    """
    if source.targets is None or source.label == "none":
        return ()
    if source.files is not None:
        table = _listing(source)
        return tuple(table.get(file) for file in files)
    table = _metadata(source)
    if table:
        return tuple(table.get(file.resolve()) for file in files)
    if source.label != "auto":
        problem = f"no table lies in {source.path} that could have a column {source.label!r}"
        raise InputError("data.label", problem, f"leave it out, or add {METADATA}.csv with {_FILES[0]} and that column")
    if source.targets == "text":
        return tuple(_beside(file) for file in files)
    alone = source.path.is_file()
    return tuple(None if alone or file.parent == source.path else FolderName(file.parent.name) for file in files)


def _listing(source: MediaSource) -> dict[Path, Any]:
    names = COLUMNS["class"] if source.targets == "class" else (*_SPOKEN, *COLUMNS["text"])
    found: dict[Path, Any] = {}
    for file, record in listed_records(source):
        column = target_column(record, source, names)
        target = None if column is None else record.fields[column]
        if found.setdefault(file, target) != target:
            problem = f"{record.where} calls {file.name} {target!r}, an earlier one {found[file]!r}"
            raise InputError("data.label", problem[:300], "keep one record of each file")
    return found


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


def listed_records(source: MediaSource) -> Iterator[tuple[Path, Record]]:
    """Every record of a table with the file it names; relative paths are relative to the table.

    Args:
        source: Its ``path`` is the table, its ``files`` the column.

    Raises:
        InputError: No table, no such column, or a record without the name of a file.
    """
    table, column = usable_path("data.path", source.path), str(source.files)
    if table.suffix.lower() not in TABLES or not is_regular(table):
        raise InputError("data.path", f"{table} is no table of files", f"give one of: {', '.join(sorted(TABLES))}")
    for record in read_records(table):
        if column not in record.fields:
            problem = f"{record.where} has no field {column!r} (it has {record.names})"
            raise InputError("data.files", problem, _NAME_IT)
        name = record.fields[column]
        if not isinstance(name, str) or not name.strip():
            raise InputError("data.files", f"{record.where} names no file in {column!r}", _NAME_IT)
        yield usable_path("data.files", table.parent / Path(name).expanduser()), record


def listed_files(source: MediaSource) -> tuple[MediaKind, list[Path]]:
    """The kind of the files that a table lists, and the files, in its order, each once.

    Args:
        source: As of :func:`listed_records`.

    Raises:
        InputError: As :func:`listed_records`; or a file is missing, of no known kind, or of another kind than the others.
    """
    kinds: dict[Path, MediaKind] = {}
    for file, record in listed_records(source):
        ending = file.suffix.lower()
        found = next((kind for kind, endings in SUFFIXES.items() if ending in endings and kind != "text"), None)
        wanted = source.kind if source.kind != "auto" else next(iter(kinds.values()), found)
        if found is None or found != wanted:
            what = f"{wanted} file" if wanted else "media file"
            raise InputError("data.files", f"{record.where} names {file.name!r}, no {what}", "list files of one kind")
        if not is_regular(file):
            raise InputError("data.files", f"{record.where} names {file}, which is no file", "correct the path")
        kinds[file] = found
    if not kinds:
        raise InputError("data.path", f"{source.path} lists no file", "give a table with a record for each file")
    return next(iter(kinds.values())), list(kinds)
