"""What strangers wrote: paths, files and JSON, read within bounds, refused in one line.

A path is resolved before it is used, a file is opened only where it is one (a FIFO would wait for a writer for ever), text has a
size, JSON a depth, and whatever a library raises about a stranger's file is one ``InputError`` with the library's own words.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.text import error_line, one_line

#: Levels of nesting that anything of ours or of transformers has; code that walks a value may call itself so often.
MOST_LEVELS = 64
#: Largest JSON or TOML file [bytes]: tokenizers of large vocabularies have some 40 MB, manifests of the largest models some 200.
MOST_BYTES = 2**29
#: Longest part of a path and longest path [bytes], as Linux has them.
_PART, _PATH = 255, 4095


def usable_path(field: str, path: Path | str) -> Path:
    """A path from a user, absolute, ``~`` and links followed; nothing needs to be there.

    Args:
        field: What to call it in errors.
        path: As it was given.

    Raises:
        InputError: No file can have this name, it leads round in a circle, or a home folder is unknown.
    """
    problem = path_problem(path)
    if problem:
        raise InputError(field, f"{str(path)[:100]!r} {problem}", "give another path")
    try:
        found = Path(path).expanduser().resolve()
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        return found
    except OSError as error:
        raise InputError(field, f"{path} cannot be used ({error.strerror})", "give another path") from error
    except RuntimeError as error:  # a link that leads to itself, or no home folder
        raise InputError(field, f"{path} cannot be used ({error_line(error, 100)})", "give another path") from error
    return found


def path_problem(path: Path | str) -> str:
    """Why no file can have this path, whatever lies on the disk; empty where one can."""
    text = str(path)
    if "\0" in text:
        return "holds a zero byte"
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if len(data) > _PATH or any(len(part) > _PART for part in data.split(b"/")):
        return f"is too long ({len(data)} bytes)"
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            return "names a home folder that is not known"
    return ""


def is_regular(path: Path) -> bool:
    """Whether a path leads to a plain file: no folder, FIFO, device or socket, and nothing that cannot be looked at."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_text(file: Path, *, field: str, remedy: str, most: int = MOST_BYTES) -> str:
    """The UTF-8 text of a plain file; it is not opened unless it is one.

    Args:
        file: The file.
        field: What to call it in errors.
        remedy: What to do about it.
        most: Largest file that is read [bytes].

    Raises:
        InputError: It is missing, no plain file, too large, unreadable, or not UTF-8.
    """
    try:
        # Without O_NONBLOCK the opening of a FIFO waits for its other end.
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise InputError(field, f"{file} is not a plain file", remedy)
            data = stream.read(most + 1)
    except FileNotFoundError:
        raise InputError(field, f"no file {file}", remedy) from None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise InputError(field, f"{file} cannot be read ({problem})", remedy) from error
    if len(data) > most:
        raise InputError(field, f"{file} has more than {most} bytes", remedy)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(field, f"{file} is not UTF-8 text", remedy) from error


def parse_json(text: str | bytes, *, field: str, what: str, remedy: str) -> Any:
    """JSON as Python values, of bounded depth and storable text.

    Args:
        text: The JSON.
        field: What to call it in errors.
        what: What it is, e.g. the file.
        remedy: What to do about it.

    Raises:
        InputError: It is not JSON, is nested deeper than ``MOST_LEVELS``, or holds half a surrogate pair.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(field, f"{what} is nested too deep", remedy) from None
    except ValueError as error:
        told = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error, 120)
        raise InputError(field, f"{what} is not JSON ({told})", remedy) from error
    problem = value_problem(value)
    if problem:
        raise InputError(field, f"{what} {problem}", remedy)
    return value


def read_object(file: Path, *, field: str, remedy: str = "repair it") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        file: The file.
        field: What to call it in errors.
        remedy: What to do about it.

    Raises:
        InputError: As ``read_text`` and ``parse_json``, or the JSON is no object.
    """
    value = parse_json(read_text(file, field=field, remedy=remedy), field=field, what=str(file), remedy=remedy)
    if not isinstance(value, dict):
        raise InputError(field, f"{file} holds no JSON object", remedy)
    return value


def value_problem(value: Any) -> str:
    """What makes nested plain values unusable, depth or text that has no UTF-8; empty where nothing does."""
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, (list, tuple)):
                inner += item
            elif isinstance(item, str) and not is_text(item):
                return "holds half a surrogate pair"
        level = inner
    if any(isinstance(item, (Mapping, list, tuple)) for item in level):
        return f"is nested too deep (more than {MOST_LEVELS} levels)"
    return "" if all(is_text(item) for item in level if isinstance(item, str)) else "holds half a surrogate pair"


def is_text(value: str) -> bool:
    """Whether a string has a UTF-8 form: JSON and names of files can carry half a surrogate pair, which has none."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def refusing(field: str, problem: str, remedy: str) -> Iterator[None]:
    """A library works on what a stranger wrote: whatever it raises becomes one line with its own words.

    Only for blocks that call the library and nothing of ours: a defect of ours must keep its traceback.

    Args:
        field: What is at fault.
        problem: What could not be done, e.g. ``the tokenizer in X cannot be loaded``.
        remedy: What to do about it.

    Raises:
        InputError: The block raised anything but an error of ours.
    """
    try:
        yield
    except AlphasmithError:
        raise
    except Exception as error:  # which ones libraries raise on hostile values is no contract of theirs
        raise InputError(field, f"{problem} ({error_line(error, 300)})", remedy) from error
