"""``alphasmith recipe``: the script that gives ``smoothed/`` to another tool's own quantizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import RecipeTool
from alphasmith.objectives.reading import usable_path
from alphasmith.search.checkpoints.find import as_written, find_result
from alphasmith.search.exports.recipes import _ctranslate2, _llm_compressor, _modelopt, _neural_compressor, _torchao
from alphasmith.search.exports.recipes._facts import RecipeFacts, read_facts

TOOLS: tuple[RecipeTool, ...] = get_args(RecipeTool)

_SCRIPTS: Mapping[RecipeTool, Callable[[RecipeFacts], str]] = {
    "llm-compressor": _llm_compressor.script,
    "modelopt": _modelopt.script,
    "inc": _neural_compressor.script,
    "torchao": _torchao.script,
    "ctranslate2": _ctranslate2.script,
}


def recipe(tool: str, source: Path | str, out: Path | str | None = None, *, storage: str | None = None) -> str:
    """The script with which a tool quantizes ``smoothed/`` of a run, its own smoothing switched off.

    Where the tool's interface takes scales, static input scales and divisions at run time are those of the run. The script names the folder
    as it is seen from the working directory, writes beside it, and needs the tool, not Alphasmith.

    Args:
        tool: ``llm-compressor``, ``modelopt``, ``inc``, ``torchao`` or ``ctranslate2``.
        source: Id of the run, or the beginning of one, or its output folder.
        out: File that the script is written to; None: none.
        storage: Address of the database that ids are looked up in; None: the usual one.

    Raises:
        InputError: An unknown tool, no such run, a scheme or a division at run time that the tool has no place for (named), or a file
            that cannot be written.
    """
    for known in TOOLS:
        if known == tool:
            script = _SCRIPTS[known]
            break
    else:
        raise InputError("TOOL", f"{tool!r} is unknown", f"give one of {', '.join(TOOLS)}")
    with as_written():
        result = find_result(source, storage)
        text = script(read_facts(result, _near(result.path)))
    if out is not None:
        _write(usable_path("--out", out), text)
    return text


def _near(folder: Path) -> Path:
    """A folder relative to the working directory, where it lies below."""
    found, here = folder.resolve(), Path.cwd().resolve()
    return found.relative_to(here) if found.is_relative_to(here) else found


def _write(file: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    beside = file.with_name(f".{file.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError("--out", f"{file} cannot be written ({error.strerror})", "choose another file") from error
