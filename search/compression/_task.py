"""The model of a compression and what it is for: from a script, from the user's function, or the embedded one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.drop import DropCondition, Tolerance
from alphasmith.objectives.joint.metrics.scores import require
from alphasmith.objectives.joint.packed.packing import PackedModel, pack
from alphasmith.objectives.joint.packed.restoring import restore
from alphasmith.objectives.joint.ports import JointMetric, JointTask
from alphasmith.objectives.joint.rounds.regularised import train_regularised
from alphasmith.objectives.literals import ModelKind
from alphasmith.objectives.model.factory import call_function
from alphasmith.objectives.reading import usable_path
from alphasmith.search.compression._cache import AS_IT_IS, StageCache, stage_key
from alphasmith.search.compression.config import DropConfig, TaskConfig
from alphasmith.search.compression.embedded import MEASURED, TRAINING, embedded_task
from alphasmith.search.inputs.folder_task import FolderData, folder_task
from alphasmith.search.interruption import Interrupted

#: Drops that enhancement of speech stands, from published quantized models.
_SPEECH = {"si_sdr": 0.6, "stoi": 0.005}
#: Share of any other metric's value.
_OTHER = 0.01


@dataclass(frozen=True, kw_only=True, eq=False)
class CompressedTask:
    """A model and what it is for.

    Attributes:
        name: In tables and records.
        kind: Where the model comes from.
        model: Trained; in evaluation mode.
        task: What it is for.
    """

    name: str
    kind: ModelKind
    model: nn.Module
    task: JointTask


def open_task(
    config: TaskConfig,
    seed: int,
    model: nn.Module | None,
    task: JointTask | None,
    *,
    cache: StageCache,
    told: Callable[[str], None],
    stop: Callable[[], bool],
) -> CompressedTask:
    """The model and its task.

    Args:
        config: Where from, unless a script has given both.
        seed: Of the embedded task.
        model: From a script.
        task: From a script.
        cache: Where the embedded model stays once it is trained.
        told: Receives what takes long.
        stop: Polled while it is trained.

    Raises:
        InputError: Only one of both is given, or the user's function fails or returns something else.
        Interrupted: ``stop`` said so.
    """
    if (model is None) != (task is None):
        missing = "task" if task is None else "model"
        raise InputError(missing, "is missing", "give model and task, or neither")
    if model is not None and task is not None:
        _check("task", model, task)
        return CompressedTask(name=type(model).__name__, kind="module", model=model, task=task)
    if config.model is not None and config.data is not None:
        data = FolderData(path=config.data, column=config.column, label=config.label, max_length=config.max_length)
        folder = usable_path("task.model", config.model)
        model, given = folder_task(folder, data, seed)
        return CompressedTask(name=folder.name, kind="hf", model=model, task=given)
    if config.factory is None:
        return _embedded(config, seed, cache, told, stop)
    made = call_function("task.factory", config.factory, path=config.path, factory_path=config.factory_path)
    if not isinstance(made, tuple) or len(made) != 2:
        raise InputError("task.factory", f"{config.factory} returned {type(made).__name__}", "return (model, task)")
    _check("task.factory", *made)
    return CompressedTask(name=config.factory, kind="factory", model=made[0], task=made[1])


def _embedded(
    config: TaskConfig, seed: int, cache: StageCache, told: Callable[[str], None], stop: Callable[[], bool]
) -> CompressedTask:
    """The embedded model, trained once."""
    metrics = config.metrics or MEASURED
    for metric in metrics:
        require(metric)
    make, task = embedded_task(seed, metrics)
    key = stage_key("embedded", str(seed), asdict(TRAINING))

    def trained() -> tuple[PackedModel, dict[str, Any]]:
        told("training the embedded model on generated signals, about two minutes")
        found = train_regularised(make(), task, TRAINING, stop=stop)
        if found.training.ending == "interrupted":
            raise Interrupted("asked to stop")
        if found.training.ending == "diverged":
            raise NonFiniteError(found.training.trouble)
        return pack(found.model, AS_IT_IS), {}

    model = restore(make(), cache.made(key, trained, stop)[0])
    return CompressedTask(name="embedded speech enhancement", kind="demo", model=model, task=task)


def condition_of(config: DropConfig, metrics: tuple[JointMetric, ...]) -> DropCondition:
    """The performance-drop condition that was asked for, or the usual one.

    Args:
        config: What was asked for.
        metrics: Those of the task.

    Raises:
        InputError: A metric has two limits, or a limit is no number for it.
    """
    given = (
        *(Tolerance(metric=name, drop=value) for name, value in config.tolerances.items()),
        *(Tolerance(metric=name, relative=value) for name, value in config.relative.items()),
        *(Tolerance(metric=name, floor=value) for name, value in config.floors.items()),
    )
    if not given:
        usual = [Tolerance(metric=one.name, drop=_SPEECH[one.name]) for one in metrics if one.name in _SPEECH]
        given = tuple(usual) or (Tolerance(metric=metrics[0].name, relative=_OTHER),)
    return DropCondition(tolerances=given, rule=config.rule)


def _check(field: str, model: Any, task: Any) -> None:
    """Refuse what is no model or no task before anything is tried."""
    if not isinstance(model, nn.Module):
        raise InputError(field, f"its model is a {type(model).__name__}", "give an nn.Module")
    missing = [
        name for name in ("metrics", "train", "loss", "measure") if inspect.getattr_static(task, name, None) is None
    ]
    if missing:
        raise InputError(field, f"its task has no {missing[0]}", "give what JointTask asks for")
    metrics = tuple(task.metrics)
    if not metrics or not all(isinstance(metric, JointMetric) for metric in metrics):
        raise InputError(field, "its task measures nothing", "name at least one JointMetric")
    if len({metric.name for metric in metrics}) != len(metrics):
        raise InputError(field, "its task has two metrics of one name", "name each once")
    if not len(task.train):
        raise InputError(field, "its task has no sample to train on", "give some; calibration needs them, too")
