"""What a run works on: a float model, three disjoint splits of data, and a task metric if there is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from alphasmith.objectives.batch import Batch
from alphasmith.objectives.demo import load_demo
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.factory import load_batches, load_metric
from alphasmith.objectives.media import MediaSource, data_digest, in_memory, load_media, split_batches
from alphasmith.objectives.metrics import perplexity
from alphasmith.objectives.models import LoadedModel, load_model, wrap_module
from alphasmith.search.config import DataConfig, RunConfig


@dataclass(frozen=True)
class Metric:
    """A task metric.

    Attributes:
        name: E.g. ``accuracy``.
        higher_is_better: Direction.
        score: Model -> number; NonFiniteError when it is not finite.
    """

    name: str
    higher_is_better: bool
    score: Callable[[nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything a run needs of the outside world.

    Attributes:
        name: Model's name for people, without any path.
        loaded: The float model and where it came from; never changed.
        kind: Origin, for the manifest.
        calibration: Batches that statistics, rows and trials come from.
        held_out: Batches that judge winners.
        proof: Batches on which float equivalence is proven, used for nothing else.
        metric: Task metric, or None.
        data_digest: sha256 over all batches.
        notes: What people should know, e.g. that the demo's outliers are synthetic.
        companions: Tokenizer or processor files that belong beside a checkpoint, by name, when they lie in no folder.
    """

    name: str
    loaded: LoadedModel
    kind: Literal["hf", "factory", "module", "demo"]
    calibration: Sequence[Batch]
    held_out: Sequence[Batch]
    proof: Sequence[Batch]
    metric: Metric | None
    data_digest: str
    notes: tuple[str, ...] = ()
    companions: Mapping[str, str] = field(default_factory=dict)


def load_task(
    config: RunConfig,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
) -> Task:
    """Gather model, data and metric from the configuration or from a launch script.

    Args:
        config: The run's configuration.
        model: A module in place of ``config.model``.
        batches: Batches in place of ``config.data``: tensors, tuples, dicts or ``Batch``.
        metric: A function of the model in place of ``config.data.metric``.

    Raises:
        InputError: Something is missing, contradictory or unusable; names the field.
    """
    chosen = config.model
    if model is None and batches is None and chosen.path is None and chosen.factory is None:
        return _demo(config)
    kind: Literal["hf", "factory", "module", "demo"] = "module"
    if model is not None:
        loaded = wrap_module(model)
        name = type(model).__name__
    else:
        loaded = load_model(
            path=chosen.path,
            factory=chosen.factory,
            factory_path=chosen.factory_path,
            trust_remote_code=chosen.trust_remote_code,
        )
        name = chosen.path.name if chosen.path is not None else str(chosen.factory)
        kind = loaded.kind
    return _split(config, loaded, name, kind, _batches(config, loaded, batches), metric)


def _demo(config: RunConfig) -> Task:
    if config.data.path or config.data.factory:
        raise InputError("model.path", "is missing although data is given", "name the model, or drop the data")
    if config.data.metric:
        raise InputError("data.metric", "is given for a demo, which has its own", "name a model, or drop the metric")
    if config.data != DataConfig():
        raise InputError("data", "is given for a demo, which brings its own data", "name a model, or drop the section")
    demo = load_demo(config.model.demo or "image", seed=0)
    return Task(
        name=f"demo-{demo.name}",
        loaded=wrap_module(demo.model),
        kind="demo",
        calibration=demo.calibration,
        held_out=demo.held_out,
        proof=demo.proof,
        metric=Metric(demo.metric_name, demo.higher_is_better, demo.metric),
        data_digest=data_digest([*demo.calibration, *demo.held_out, *demo.proof]),
        notes=(demo.description,),
        companions=demo.files,
    )


def _batches(config: RunConfig, loaded: LoadedModel, given: Iterable[Any] | None) -> Sequence[Batch]:
    data = config.data
    wanted = data.samples + data.held_out + data.proof
    if given is not None:
        return _rebatched(in_memory(given, limit=wanted), data.batch_size)
    if data.factory is not None:
        made = load_batches(data.factory, path=config.model.path, factory_path=config.model.factory_path, limit=wanted)
        return _rebatched(made, data.batch_size)
    if data.path is None:
        raise InputError("data.path", "is missing", "give calibration media, e.g. --data texts.txt or a folder")
    source = MediaSource(
        path=data.path,
        kind=data.kind,
        column=data.column,
        samples=wanted,
        batch_size=data.batch_size,
        max_length=data.max_length,
        sampling_rate=data.sampling_rate,
        frames=data.frames,
        image_size=data.image_size,
    )
    return load_media(source, model_folder=loaded.folder, model_config=loaded.config, seed=config.search.seed)


def _rebatched(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Batches cut to at most ``size`` samples, so that one big batch can be split and bounded, too."""
    return [b.narrow(start, min(start + size, b.size)) for b in batches for start in range(0, b.size, size)]


def _split(
    config: RunConfig,
    loaded: LoadedModel,
    name: str,
    kind: Literal["hf", "factory", "module", "demo"],
    batches: Sequence[Batch],
    metric: Callable[[nn.Module], float] | None,
) -> Task:
    data = config.data
    total = sum(b.size for b in batches)
    wanted = data.samples + data.held_out + data.proof
    notes = tuple(getattr(batches, "notes", ()))
    held_out, proof = float(data.held_out), float(data.proof)
    if total < wanted:
        # Fewer samples than asked for: keep the proportions.
        held_out, proof = held_out / wanted, proof / wanted
        notes += (f"{total} samples instead of {wanted}: splits keep their proportions",)
    splits = split_batches(batches, held_out, proof, seed=config.search.seed)
    # Held-out and proof batches are read several times.
    reserve = list(splits.held_out)
    return Task(
        name=name,
        loaded=loaded,
        kind=kind,
        calibration=splits.calibration,
        held_out=reserve,
        proof=list(splits.proof),
        metric=_metric(config, loaded, metric, reserve),
        data_digest=data_digest(batches),
        notes=notes,
    )


def _metric(
    config: RunConfig, loaded: LoadedModel, given: Callable[[nn.Module], float] | None, held_out: Sequence[Batch]
) -> Metric | None:
    data = config.data
    if given is not None:
        return Metric(data.metric_name or "metric", data.metric_goal == "max", _checked(given))
    if data.metric is not None:
        function = load_metric(data.metric, path=config.model.path, factory_path=config.model.factory_path)
        return Metric(data.metric_name or "metric", data.metric_goal == "max", _one_of(function, data))
    if _is_causal(loaded):
        return Metric("perplexity", False, _checked(lambda model: perplexity(model, held_out)))
    return None


def _one_of(function: Callable[[nn.Module], Mapping[str, float]], data: DataConfig) -> Callable[[nn.Module], float]:
    def score(model: nn.Module) -> float:
        numbers = function(model)
        key = data.metric_name or next(iter(numbers))
        if key not in numbers:
            raise InputError("data.metric_name", f"{key!r} is none of {', '.join(numbers)}", "name one of them")
        return numbers[key]

    return score


def _checked(function: Callable[[nn.Module], float]) -> Callable[[nn.Module], float]:
    def score(model: nn.Module) -> float:
        with torch.no_grad():
            value = float(function(model))
        if not math.isfinite(value):
            raise NonFiniteError(f"the metric is {value}")
        return value

    return score


def _is_causal(loaded: LoadedModel) -> bool:
    """Whether the model says of itself that it predicts the next token."""
    architectures = getattr(loaded.config, "architectures", None) or ()
    return any(str(name).endswith("ForCausalLM") for name in architectures)
