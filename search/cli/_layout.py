"""Tables and sentences as a terminal holds them."""

from __future__ import annotations

import io
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from alphasmith.objectives.text import visible

#: Width where there is no terminal, and the least that is laid out for [characters].
PLAIN_WIDTH, _LEAST = 120, 60
#: Characters between two columns.
GAP = 2
#: Wide enough for what is never laid out for a terminal: rows of ``alphasmith list``.
_ANY_WIDTH = 240


def output_width() -> int:
    """Characters in a line of standard output: ``COLUMNS`` where it is set, those of the terminal, else ``PLAIN_WIDTH``."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return max(int(given), _LEAST)
    try:
        return max(os.get_terminal_size(sys.stdout.fileno()).columns or PLAIN_WIDTH, _LEAST)
    except (AttributeError, OSError, ValueError):  # no terminal, no file, or closed
        return PLAIN_WIDTH


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    width: int = _ANY_WIDTH,
    wrapped: bool = False,
    texts: Sequence[str] = (),
) -> str:
    """Lines of a table: the first column and ``texts`` begin on one edge, all others, numbers, end on one.

    Args:
        columns: Headings.
        rows: A cell per column.
        title: A line above it.
        width: Most characters of a line.
        wrapped: Whether cells of the first column may take several lines.
        texts: Headings of further columns that hold text.
    """
    made = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        title_justify="left",
        title_style="",
    )
    for i, column in enumerate(columns):
        first = i == 0
        side: Literal["left", "right"] = "left" if first or column in texts else "right"
        overflow: Literal["fold", "ellipsis"] = "fold" if first else "ellipsis"
        made.add_column(column, justify=side, no_wrap=not (first and wrapped), overflow=overflow)
    for row in rows:
        made.add_row(*map(visible, row))  # a table drops control characters instead of showing them
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, markup=False, highlight=False).print(made)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def sentences(lines: Iterable[str], width: int) -> list[str]:
    """Lines broken between words, the rest of each set in by two; a path or a name that is longer than a line stays whole.

    Args:
        lines: Of any length.
        width: Most characters of a line.
    """
    found: list[str] = []
    for line in lines:
        inset = " " * (len(line) - len(line.lstrip()) + 2)
        found += textwrap.wrap(
            line,
            width,
            subsequent_indent=inset,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        ) or [""]
    return found
