"""TOML files and ``section.field=value`` overrides as nested values that a configuration is made from."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import path_problem, read_text, usable_path, value_problem

_MOST_TOML = 2**20


def read_toml(
    path: Path | str, paths: Iterable[tuple[str | None, str]], overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Values of a TOML file, then ``a.b=c`` overrides over them.

    Args:
        path: The file.
        paths: (section or None, field) of what is a path: relative ones are relative to the file.
        overrides: What is set over it.

    Raises:
        InputError: Field ``CONFIG``: it cannot be read or is no TOML; field ``--set``: an override is not of that form.
    """
    path = usable_path("CONFIG", path)
    text = read_text(path, field="CONFIG", remedy="give the path of a TOML file", most=_MOST_TOML)
    try:
        values = _plain_toml(text)
    except ValueError as error:
        raise InputError("CONFIG", f"{path} is not valid TOML ({error})", "correct that line") from error
    _anchor_paths(values, path.parent, paths)
    return apply_overrides(values, overrides)


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of nested ``values`` with every ``"a.b=c"`` set; c is a TOML value, or else a string.

    Raises:
        InputError: An override without ``=`` or through a value that is not a table.
    """
    result: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if override.splitlines() != [override]:
            raise InputError("--set", f"{override[:100]!r} has a line break", "give one value; repeat --set for more")
        if not equals or not key.strip():
            raise InputError("--set", f"{override!r} has no '='", "write it as section.field=value")
        *sections, last = key.strip().split(".")
        table = result
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise InputError("--set", f"{section!r} in {key!r} is not a section", "write it as section.field=value")
        table[last] = _toml_value(text.strip())
    return result


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes`` on top, field by field also within sections."""
    both = {
        name: {**values[name], **change}
        if isinstance(change, Mapping) and isinstance(values.get(name), Mapping)
        else change
        for name, change in changes.items()
    }
    return {**values, **both}


def _toml_value(text: str) -> Any:
    try:
        return _plain_toml(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    except ValueError as error:
        raise InputError("--set", f"{text[:60]!r} {error}", "write a TOML value") from error


def _plain_toml(text: str) -> dict[str, Any]:
    """TOML as values.

    Raises:
        ValueError: It is not TOML, or nothing that a configuration can hold; says what is wrong.
    """
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    problem = value_problem(values)
    if problem:
        raise ValueError(problem)
    return values


def _anchor_paths(values: dict[str, Any], folder: Path, paths: Iterable[tuple[str | None, str]]) -> None:
    for section, key in paths:
        table = values if section is None else values.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            given = table[key]
            if not path_problem(given):  # else the field says what is wrong with it
                table[key] = str(folder / Path(given).expanduser())
