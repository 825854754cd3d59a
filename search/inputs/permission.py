"""Code that a record names: it runs only where whoever starts the process names it, too.

A run's record, and a manifest, name functions, and folders that hold code or are handed to these functions. Whoever can write a
row, or a file, must not be able to run code as everybody who goes on with it. A configuration of the user's own needs no such
permission: naming a function there is the permission.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import usable_path
from alphasmith.search.config import RunConfig

_FUNCTIONS = ("model.factory", "data.factory", "data.metric")
_FOLDERS = ("model.factory_path", "model.path")


class CodeNotAllowedError(InputError):
    """A record names code that nobody allowed."""


def code_named(config: RunConfig, replaced: Collection[str] = ()) -> dict[str, str]:
    """Field -> function or folder, for everything in a configuration that leads to code.

    Args:
        config: The configuration.
        replaced: Of ``model``, ``batches`` and ``metric``: what a script gives in its place.
    """
    model, data = config.model, config.data
    functions = {
        "model.factory": None if "model" in replaced else model.factory,
        "data.factory": None if "batches" in replaced else data.factory,
        "data.metric": None if "metric" in replaced else data.metric,
    }
    found = {field: name for field, name in functions.items() if name is not None}
    remote = model.trust_remote_code and "model" not in replaced
    # What a function is imported from, and what it is called with: a pickle in a folder is code as well.
    if found and model.factory_path is not None:
        found["model.factory_path"] = str(model.factory_path)
    if (found or remote) and model.path is not None:
        found["model.path"] = str(model.path)
    return found


def check_code(config: RunConfig, allowed: Collection[str | Path], whose: str, replaced: Collection[str] = ()) -> None:
    """Refuse a recorded configuration that names code which the caller did not name.

    Args:
        config: As it was recorded.
        allowed: Functions ``module:function`` and folders that the caller named.
        whose: What named the code, e.g. ``run r-20261121-1f9c3a``.
        replaced: As of :func:`code_named`.

    Raises:
        CodeNotAllowedError: Some of it is not allowed; the remedy has every option that is missing.
    """
    check_named(code_named(config, replaced), allowed, whose)


def check_named(named: Mapping[str, str], allowed: Collection[str | Path], whose: str) -> None:
    """Refuse recorded code that the caller did not name.

    Args:
        named: Field -> function or folder; folders are those whose field ends with ``path``.
        allowed: As of :func:`check_code`.
        whose: Likewise.

    Raises:
        CodeNotAllowedError: Some of it is not allowed; the remedy has every option that is missing.
    """
    functions = {str(name) for name in allowed}
    folders = {usable_path("--allow-code", name) for name in allowed}
    missing = {
        field: name
        for field, name in named.items()
        if not (usable_path(field, name) in folders if field.endswith("path") else name in functions)
    }
    if missing:
        told = ", ".join(f"{field} = {name!r}" for field, name in missing.items())
        options = " ".join(f"--allow-code {shlex.quote(name)}" for name in missing.values())
        raise CodeNotAllowedError(
            "--allow-code", f"{whose} names code that would run here: {told}", f"if you trust it, add {options}"
        )


def named_in(changes: Mapping[str, Any]) -> list[str]:
    """Functions and folders that the caller's own changes of a configuration name.

    Args:
        changes: Sections with fields.
    """
    found = []
    for field in (*_FUNCTIONS, *_FOLDERS):
        section, _, name = field.partition(".")
        given = changes.get(section)
        value = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
        found += [] if value is None else [str(value)]
    return found
