"""What a compression works with: its configuration, the model and its task, stages and space; begun anew, or as its record says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.ports import JointTask
from alphasmith.objectives.reading import usable_path
from alphasmith.search.compression._cache import StageCache
from alphasmith.search.compression._space import Space
from alphasmith.search.compression._stages import ModelStages
from alphasmith.search.compression._study import directions
from alphasmith.search.compression._task import CompressedTask, condition_of, open_task
from alphasmith.search.compression.config import CompressConfig
from alphasmith.search.devices import usable_device
from alphasmith.search.inputs.permission import check_named
from alphasmith.search.progress import Progress
from alphasmith.search.toml_values import merged
from alphasmith.storage.runs.compressions import CompressionRecord, CompressionSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Launch:
    """A compression open for work in this process.

    Attributes:
        config: The configuration.
        given: Model and task, where a script gave them.
        opened: Model and task.
        stages: Makes and measures models.
        space: What is chosen from.
        progress: Receives stages and notes.
        stop: Polled.
    """

    config: CompressConfig
    given: tuple[nn.Module, JointTask] | None
    opened: CompressedTask
    stages: ModelStages
    space: Space
    progress: Progress
    stop: Callable[[], bool]


def recorded(
    record: CompressionRecord,
    changes: Mapping[str, Any],
    model: nn.Module | None,
    task: JointTask | None,
    allow_code: Collection[str | Path] | None,
    progress: Progress,
    stop: Callable[[], bool],
) -> Launch:
    """What a record asks for; its model and task must be what they were.

    Args:
        record: The compression.
        changes: Fields that may differ from what was asked for.
        model: From a script.
        task: Likewise.
        allow_code: Function and folders that the record may lead to; None: whoever started this process has seen to that.
        progress: Receives stages and notes.
        stop: Polled.

    Raises:
        InputError: The model is not what it was, code is not allowed, or a change makes another compression of it.
        Interrupted: ``stop`` said so.
    """
    if record.scripted and model is None:  # before another model is opened, and trained perhaps
        remedy = "go on with it from that script: compress(model, task, ...) continues it"
        raise InputError("task", f"model and task of {record.id} were given by a script", remedy)
    given = dict(merged(record.config, changes))
    config = CompressConfig.build(merged(given, {"out": record.folder}))
    code = ("factory", "factory_path", "path")
    named = {f"task.{name}": str(getattr(config.task, name)) for name in code if getattr(config.task, name) is not None}
    if model is None and allow_code is not None:
        check_named(named, allow_code, f"compression {record.id}")
    launch = begun(config, model, task, progress, stop)
    if launch.stages.digest != record.model_digest:
        told = f"changed since {record.id} began"
        raise InputError("task", told, "restore model and data, or begin a new compression")
    if digest_of(config) != record.config_digest:
        raise InputError("--set", f"changes what {record.id} searches", "change study.trials alone, or begin a new one")
    return launch


def begun(
    config: CompressConfig,
    model: nn.Module | None,
    task: JointTask | None,
    progress: Progress,
    stop: Callable[[], bool],
) -> Launch:
    """Model, task and condition, read and checked.

    Args:
        config: The configuration.
        model: From a script.
        task: Likewise.
        progress: Receives stages and notes.
        stop: Polled.

    Raises:
        InputError: Anything the user can mend.
        Interrupted: ``stop`` said so.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line per trial would break into the progress display
    progress.stage("loading model and task")
    device = usable_device(config.device, "device")
    folder = config.study.cache or config.folder_of("x").parent / ".stages"
    cache = StageCache(usable_path("study.cache", folder), lease=config.workers.lease)
    found = open_task(config.task, config.study.seed, model, task, cache=cache, told=progress.note, stop=stop)
    stages = ModelStages(
        found.model.to(device),
        found.task,
        condition_of(config.drop, tuple(found.task.metrics)),
        config,
        cache,
        stop=stop,
        told=progress.note,
    )
    for note in stages.baseline.notes:
        progress.note(note)
    space = stages.space()
    given = None if model is None or task is None else (model, task)
    return Launch(config=config, given=given, opened=found, stages=stages, space=space, progress=progress, stop=stop)


def digest_of(config: CompressConfig) -> str:
    """sha256 over what decides the result.

    Args:
        config: The configuration.
    """
    return hashlib.sha256(json.dumps(config.deciding(), sort_keys=True).encode()).hexdigest()


def spec_of(launch: Launch) -> CompressionSpec:
    """What is known of a compression before it is on record.

    Args:
        launch: It, begun.
    """
    config = launch.config
    values = config.model_dump(mode="json", exclude={"storage", "out"})
    own = (("task", "model"), ("task", "data"), ("task", "path"), ("task", "factory_path"), ("study", "cache"))
    for section, name in own:
        given = values[section][name]
        values[section][name] = None if given is None else str(usable_path(f"{section}.{name}", Path(given)))
    return CompressionSpec(
        config=values,
        config_digest=digest_of(config),
        model_digest=launch.stages.digest,
        folder=str(usable_path("out", config.folder_of("{id}"))),
        directions=tuple(directions(config.study.latency)),
        scripted=launch.given is not None,
    )
