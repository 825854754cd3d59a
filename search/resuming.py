"""Which run a launch goes on with, and whether it still is the same: model, data and configuration by digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError
from alphasmith.search.config import RunConfig
from alphasmith.search.task import Task
from alphasmith.storage.record_types import RunRecord
from alphasmith.storage.urls import mask

#: Fields that change where or how fast a run is made, or where its inputs lie (their content has digests of its own).
_PLACES = frozenset(
    {
        "name",
        "storage",
        "out",
        "engine",
        "artifacts",
        "workers",
        "model.path",
        "model.factory_path",
        "data.path",
        "search.device",
        "search.threads",
    }
)
#: Differences that are named in an error; the rest is counted.
_NAMED = 4


def config_digest(config: RunConfig) -> str:
    """sha256 over the part of a configuration that decides the result."""
    return hashlib.sha256(json.dumps(_deciding(config.model_dump(mode="json")), sort_keys=True).encode()).hexdigest()


def stored_values(config: RunConfig) -> dict[str, Any]:
    """A configuration as it is recorded: passwords masked, paths absolute, so that it can be resumed from anywhere."""
    values = config.model_dump(mode="json")
    values["storage"] = mask(config.storage) if config.storage else None
    for section, key in (("model", "path"), ("model", "factory_path"), ("data", "path"), (None, "out")):
        table = values if section is None else values[section]
        if table[key] is not None:
            table[key] = str(Path(table[key]).expanduser().resolve())
    return values


def stored_config(record: RunRecord, storage: str) -> RunConfig:
    """The configuration of a recorded run, with the places it goes on with now.

    Args:
        record: The run.
        storage: Address of the database it was read from; the recorded one has no password.

    Raises:
        InputError: It was recorded by a version with other fields.
    """
    # Both may have been changed since the configuration was recorded.
    places = {"out": record.folder, "artifacts": record.artifacts}
    told = {name: place for name, place in places.items() if place}
    return RunConfig.build({**dict(record.config), **told, "storage": storage})


def check_same(record: RunRecord, config: RunConfig, task: Task) -> None:
    """Refuse to go on with a run whose model, data or configuration is not what it was.

    Raises:
        InputError: Names what changed.
    """
    new_run = "start a new run"
    if record.model_digest != task.loaded.digest:
        told = "" if task.kind != "demo" else "; a model given from Python is resumed by resume(..., model=...)"
        raise InputError(
            "model", _changed(record, record.model_digest, task.loaded.digest), f"restore it, or {new_run}{told}"
        )
    if record.data_digest != task.data_digest:
        raise InputError("data", _changed(record, record.data_digest, task.data_digest), f"restore it, or {new_run}")
    then, now = (dict(_flat(_deciding(c))) for c in (record.config, config.model_dump(mode="json")))
    fields = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if fields:
        told = ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in fields[:_NAMED])
        more = f" and {len(fields) - _NAMED} more" if len(fields) > _NAMED else ""
        raise InputError("config", f"not that of run {record.id}: {told}{more}", f"restore it, or {new_run}")


def _changed(record: RunRecord, then: str, now: str) -> str:
    return f"changed since run {record.id} began (sha256 {then[:12]} then, {now[:12]} now)"


def _deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: value for name, value in values.items() if name not in _PLACES}
    return {
        name: {key: v for key, v in value.items() if f"{name}.{key}" not in _PLACES}
        if isinstance(value, Mapping)
        else value
        for name, value in sections.items()
    }


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value
