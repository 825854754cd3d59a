"""Options that several commands take, how every command prints its answer, and how long ones show progress and are interrupted."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from alphasmith.objectives.reading import usable_path
from alphasmith.objectives.text import visible
from alphasmith.search.interruption import Interruption
from alphasmith.search.progress import Progress, TerminalBars, for_terminal

F = TypeVar("F", bound=Callable[..., Any])

#: Longest time that a command waits between two looks, or for something to appear [s]: a month.
_LONGEST_WAIT = 30 * 86_400.0


class Seconds(click.FloatRange):
    """A finite number of seconds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuse what is no number, too, which every comparison lets through."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return seconds


def seconds(least: float) -> Seconds:
    """The type of an option for a time [s].

    Args:
        least: The shortest.
    """
    return Seconds(min=least, max=_LONGEST_WAIT)


class UserPath(click.Path):
    """A path that a file can have and that leads somewhere, as it was given but for ``~``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse one that is too long or leads round in a circle, on which every look at it would fail."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        usable_path(param.opts[-1] if isinstance(param, click.Option) else (param and param.metavar) or "path", path)
        return path.expanduser()


PATH = UserPath(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
storage_option = click.option(
    "--storage", metavar="URL", help="Trial database (SQLAlchemy URL); default alphasmith.db."
)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, listed by ``--help`` in this order."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


#: Where a model that a run wrote is put, and how its architecture is built.
place_options = options(
    click.option("--device", help="Torch device; default: the first GPU, else the CPU."),
    click.option("--model", "path", type=PATH, help="The original model folder, for a factory that is called with it."),
    click.option("--factory", metavar="MODULE:FUNCTION", help="Function that builds the architecture; runs your code."),
    click.option("--factory-path", type=PATH, help="Folder put on the module search path for --factory."),
    click.option(
        "--allow-code",
        metavar="MODULE:FUNCTION|DIR",
        multiple=True,
        help="Let code that the manifest names run: this function, or what lies in this folder; repeatable.",
    ),
)


def print_answer(answer: Any, as_json: bool, text: Callable[[], str]) -> None:
    """Print an answer on standard output, as JSON or as text for a reader."""
    # What a database or a folder holds may be another's: it must not steer the terminal.
    click.echo(json.dumps(answer, indent=2, sort_keys=True, allow_nan=False) if as_json else visible(text()))


@contextmanager
def interruptible() -> Iterator[tuple[Progress, Interruption]]:
    """Progress on standard error, and a first Ctrl-C that asks to stop in good order."""
    with _progress() as progress:
        said = "stopping after the current batch; Ctrl-C again leaves at once"
        with Interruption(lambda: progress.note(said)) as stop:
            progress.stage("starting")  # seen before torch is imported, which takes seconds
            yield progress, stop


@contextmanager
def _progress() -> Iterator[Progress]:
    progress = for_terminal(sys.stderr)
    if isinstance(progress, TerminalBars):
        with progress:
            yield progress
    else:
        yield progress
