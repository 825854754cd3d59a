"""Tables and records: jsonl, csv and parquet files, a record at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import parse_json, refusing

#: Endings of files that hold records.
TABLES = frozenset({".jsonl", ".ndjson", ".parquet", ".csv", ".tsv"})
#: Longest line of a file and longest field of a table [characters].
_LONGEST = 2**24


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        where: File and line or row, for errors.
        fields: Name -> value, None where it is null.
    """

    where: str
    fields: Mapping[str, Any]

    @property
    def names(self) -> str:
        """The fields it has, for errors."""
        return ", ".join(sorted(map(str, self.fields))) or "no fields"


def read_records(file: Path, wanted: Sequence[str] | None = None) -> Iterator[Record]:
    """Records of a file, in order.

    Args:
        file: Its ending is one of :data:`TABLES`.
        wanted: Columns of a parquet file that are read, where it has them, each whole; None: all. Others are named, but None.

    Raises:
        InputError: It cannot be read, or is not what its ending says.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet(file, wanted)
    return _delimited(file) if suffix in (".csv", ".tsv") else _jsonl(file)


def _jsonl(file: Path) -> Iterator[Record]:
    with _opened(file) as stream:
        for number, line in enumerate(_lines(stream, file), 1):
            if line.strip():
                where = f"{file} line {number}"
                value = parse_json(line, field="data.path", what=where, remedy="repair the line")
                yield Record(where, value if isinstance(value, dict) else {})


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file of UTF-8 text, with or without a byte order mark; what its reading raises names it."""
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise InputError("data.path", f"{file} is not UTF-8 text", "convert it to UTF-8") from error
    except OSError as error:
        raise InputError("data.path", f"{file} cannot be read ({error.strerror})", "give a readable file") from error


def _lines(stream: TextIO, file: Path) -> Iterator[str]:
    """Lines of bounded length: a file without line breaks is not read whole."""
    while line := stream.readline(_LONGEST + 1):
        if len(line) > _LONGEST:
            raise InputError("data.path", f"{file} has a line of more than {_LONGEST} characters", "break it up")
        yield line


def _delimited(file: Path) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST)
    try:
        with _opened(file, newline="") as stream:
            head = stream.readline(_LONGEST)
            stream.seek(0)
            mark = "\t" if file.suffix.lower() == ".tsv" else max(",;\t|", key=head.count)
            reader = csv.reader(_lines(stream, file), delimiter=mark)
            names = next(reader, [])
            for row in reader:
                if len(row) > len(names):
                    raise InputError(
                        "data.path",
                        f"{file} line {reader.line_num} has {len(row)} cells, its first line {len(names)}",
                        "quote cells that hold the delimiter",
                    )
                cells: list[str | None] = [cell or None for cell in row]
                if any(cells):
                    fields = {**dict.fromkeys(names), **dict(zip(names, cells, strict=False))}
                    yield Record(f"{file} line {reader.line_num}", fields)
    except csv.Error as error:
        raise InputError("data.path", f"{file} is not a readable table ({error})", "repair it") from error


def _parquet(file: Path, wanted: Sequence[str] | None) -> Iterator[Record]:
    from pyarrow import parquet

    with refusing("data.path", f"{file} is not a readable parquet file", "repair it"):
        table = parquet.ParquetFile(file)
    with table:
        names = table.schema_arrow.names
        columns = [name for name in names if wanted is None or name in wanted]
        if not columns:
            if names:
                yield Record(f"{file}", dict.fromkeys(names))
            return
        others = dict.fromkeys(names)
        number = 0
        with refusing("data.path", f"{file} cannot be read to its end", "repair it, texts as UTF-8"):
            for rows in table.iter_batches(batch_size=1024, columns=columns):
                for fields in rows.to_pylist():
                    number += 1
                    yield Record(f"{file} row {number}", {**others, **fields})
