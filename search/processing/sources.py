"""Items out of what a command line names: files, folders, patterns, lists, tables, texts and standard input."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media import NamedBytes
from alphasmith.objectives.media.items import ItemLimits, articled, files_of, is_table, kind_of, texts_of
from alphasmith.objectives.reading import is_regular, path_problem
from alphasmith.search.processing.classifier import NamedItem, Refused

#: Stands for standard input.
STANDARD_INPUT = "-"


@dataclass(frozen=True, kw_only=True)
class ItemSource:
    """What shall be classified, in order: texts, then files, then what the list names.

    Attributes:
        texts: Texts.
        places: Files, folders, patterns such as ``photos/*.png``, and ``-`` for standard input.
        listed: File with one of these a line; ``-``: standard input; None: there is no such list.
        column: Field of a table that holds the text.
        lines: Whether every line of a text file is an item of its own; those of standard input are anyway.
    """

    texts: Sequence[str] = ()
    places: Sequence[str] = ()
    listed: str | None = None
    column: str = "text"
    lines: bool = False

    def check(self) -> None:
        """Look, before a model is loaded, whether there is something to classify and whether all that was named is there.

        Raises:
            InputError: It is not, or standard input is named twice.
        """
        if not self.texts and not self.places and self.listed is None:
            raise InputError(
                "FILES", "there is nothing to classify", "give files, folders, --text, or - for standard input"
            )
        if [*self.places, self.listed].count(STANDARD_INPUT) > 1:
            raise InputError("FILES", "standard input is named twice", "name it once")
        for place in self.places:
            if place != STANDARD_INPUT:
                _found(place)
        if self.listed not in (None, STANDARD_INPUT) and not is_regular(Path(str(self.listed))):
            raise InputError("--files-from", f"no file {self.listed}", "give a file with one path a line")

    def check_kind(self, kind: MediaKind) -> None:
        """Refuse what was named and is plainly of another kind than the model takes; folders are searched for their kind.

        Args:
            kind: What the model takes.

        Raises:
            InputError: It is.
        """
        if self.texts and kind != "text":
            raise InputError("--text", f"is given, and the model takes {articled(kind)}", "give files")
        for place in self.places:
            path = Path(place).expanduser()
            other = kind_of(path) if place != STANDARD_INPUT and is_regular(path) else kind
            if other not in (None, kind):
                problem = f"{place} is {articled(other)}, and the model takes {articled(kind)}"
                raise InputError("FILES", problem, f"give {articled(kind)}")

    def items(self, kind: MediaKind, limits: ItemLimits, stdin: BinaryIO) -> Iterator[NamedItem | Refused]:
        """The items, one at a time, read no further than they are asked for.

        Args:
            kind: What the model takes.
            limits: What an item may ask for.
            stdin: Standard input.

        Raises:
            InputError: A table has no such column.
        """
        for number, text in enumerate(self.texts, 1):
            yield NamedItem(name=f"text {number}", item=text)
        yield from self._of_places(self.places, kind, limits, stdin)
        if self.listed == STANDARD_INPUT:
            yield from self._of_places(_lines(stdin, limits), kind, limits, stdin)
        elif self.listed is not None:
            with Path(self.listed).open("rb") as stream:
                yield from self._of_places(_lines(stream, limits), kind, limits, stdin)

    def _of_places(
        self, places: Iterable[str], kind: MediaKind, limits: ItemLimits, stdin: BinaryIO
    ) -> Iterator[NamedItem | Refused]:
        for place in places:
            if place == STANDARD_INPUT:
                yield from _of_input(stdin, kind, limits)
                continue
            try:
                files = _found(place)
            except InputError as error:
                yield Refused(name=place, error=error)
                continue
            for file in files:
                yield from self._of_path(file, kind, limits)

    def _of_path(self, path: Path, kind: MediaKind, limits: ItemLimits) -> Iterator[NamedItem | Refused]:
        try:
            if path.is_dir():
                empty = True
                for file in files_of(path, kind):
                    empty = False
                    yield from self._of_path(file, kind, limits)
                if empty:
                    raise InputError("item", f"{path} holds no {kind} file", f"give a folder with {kind} files")
            elif kind == "text" and is_table(path):
                for where, text in texts_of(path, self.column):
                    yield NamedItem(name=where, item=text or "")
            elif kind == "text" and self.lines:
                with path.open("rb") as stream:
                    yield from _texts(stream, f"{path} line", limits)
            else:
                yield NamedItem(name=str(path), item=path)
        except InputError as error:
            if error.field == "--column":
                raise
            yield Refused(name=str(path), error=error)
        except OSError as error:
            told = InputError("item", f"{path} cannot be read ({error.strerror})", "give a readable file")
            yield Refused(name=str(path), error=told)


def _found(place: str) -> Sequence[Path]:
    """A file or folder, or what a pattern matches, in order.

    Raises:
        InputError: Nothing is there.
    """
    problem = path_problem(place)
    if problem:
        raise InputError("FILES", f"{place[:100]!r} {problem}", "give another path")
    path = Path(place).expanduser()
    if path.exists():
        return [path]
    matched = _matched(str(path)) if glob.has_magic(place) else []
    if not matched:
        what = "no file matches" if glob.has_magic(place) else "no file or folder"
        raise InputError("FILES", f"{what} {place}", "give files that are there; a text goes with --text")
    return [Path(name) for name in matched]


def _matched(pattern: str) -> list[str]:
    """What a pattern matches, sorted; what ``**`` finds again through links counts once, under its shortest name."""
    found = glob.glob(pattern, recursive=True)
    if "**" in pattern:
        found = list({os.path.realpath(name): name for name in sorted(found, key=lambda n: (-len(n), n))}.values())
    return sorted(found)


def _of_input(stdin: BinaryIO, kind: MediaKind, limits: ItemLimits) -> Iterator[NamedItem | Refused]:
    """Every line of standard input, or, of a model that takes no text, all of it as one file."""
    if kind == "text":
        yield from _texts(stdin, "line", limits)
    else:
        yield NamedItem(name="standard input", item=NamedBytes("standard input", stdin.read(limits.bytes + 1)))


def _texts(stream: BinaryIO, name: str, limits: ItemLimits) -> Iterator[NamedItem | Refused]:
    number = 0
    while line := stream.readline(limits.bytes + 1):
        number += 1
        where = f"{name} {number}"
        if len(line) > limits.bytes:
            told = InputError("item", f"{where} has more than {limits.bytes} bytes", "break it up")
            yield Refused(name=where, error=told)
            while line and not line.endswith(b"\n"):
                line = stream.readline(limits.bytes + 1)
        elif line.strip():
            try:
                yield NamedItem(name=where, item=line.decode().rstrip("\r\n"))
            except UnicodeDecodeError:
                yield Refused(name=where, error=InputError("item", f"{where} is not UTF-8 text", "convert it to UTF-8"))


def _lines(stream: BinaryIO, limits: ItemLimits) -> Iterator[str]:
    """Paths in a list; one that is no text is left to be found missing."""
    while line := stream.readline(limits.bytes + 1):
        if line.strip():
            yield line.decode(errors="replace").strip("\r\n")
