"""The task of a run: a float model, three disjoint splits of data, and a task metric if there is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from alphasmith.objectives.demo import load_demo
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.literals import ModelKind
from alphasmith.objectives.media import MediaBatches, MediaSource, data_digest, in_memory, load_media, split_batches
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import as_media
from alphasmith.objectives.media.in_memory import Arguments
from alphasmith.objectives.model.decoding import reads_its_own_text, with_decoder_inputs
from alphasmith.objectives.model.factory import load_batches, load_metric
from alphasmith.objectives.model.labels import are_classes, is_classifier, with_labels
from alphasmith.objectives.model.loading import LoadedModel, load_model, wrap_module
from alphasmith.objectives.model.metrics import accuracy, is_written, perplexity
from alphasmith.objectives.quantization.candidate_model import bits_digest
from alphasmith.objectives.quantization.plan import named_tensors
from alphasmith.search.config import DataConfig, RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.interruption import Interrupted, never
from alphasmith.search.progress import Progress, Silent

_T = TypeVar("_T")


@dataclass(frozen=True)
class Metric:
    """A task metric.

    Attributes:
        name: E.g. ``accuracy``.
        higher_is_better: Direction.
        score: Model -> number; NonFiniteError when it is not finite.
        on_batches: The same of a model and the batches it is scored on; None: it has data of its own.
    """

    name: str
    higher_is_better: bool
    score: Callable[[nn.Module], float]
    on_batches: Callable[[nn.Module, Sequence[Batch]], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything a run needs of the outside world.

    Attributes:
        name: Display name of the model, without any path.
        loaded: The float model and where it came from; never changed.
        kind: Origin, for the manifest.
        calibration: Batches that statistics, ranges and rows come from.
        tuning: Batches on which choices at the model's output are made; empty where there are too few samples.
        held_out: Batches that judge winners.
        proof: Batches on which float equivalence is proven, used for nothing else.
        metric: Task metric, or None.
        data_digest: sha256 over all samples.
        notes: What people should know, e.g. that the demo's outliers are synthetic.
        companions: Tokenizer or processor files that belong beside a checkpoint, by name, when they lie in no folder.
        part: Whether the model is a part of the run's: patterns of names may match none of it.
    """

    name: str
    loaded: LoadedModel
    kind: ModelKind
    calibration: Sequence[Batch]
    tuning: Sequence[Batch]
    held_out: Sequence[Batch]
    proof: Sequence[Batch]
    metric: Metric | None
    data_digest: str
    notes: tuple[str, ...] = ()
    companions: Mapping[str, str] = field(default_factory=dict)
    part: bool = False

    @property
    def judging(self) -> Sequence[Batch]:
        """Batches that candidate models are judged on in a search: ``tuning``, or ``calibration`` where that is empty."""
        return self.tuning or self.calibration


def score_float(model: nn.Module, metric: Metric | None, progress: Progress) -> float | None:
    """The task metric before quantization: asked for first, so that a metric that does not work stops the run early.

    Raises:
        InputError: The metric fails, is not finite for the float model, or writes to the model's tensors.
    """
    if metric is None:
        return None
    progress.stage("metric of the float model", 1)
    tensors = named_tensors(model)
    before = {name: bits_digest(tensor) for name, tensor in tensors.items()}
    try:
        value = metric.score(model)
    except NonFiniteError as error:
        raise InputError(
            "data.metric", f"{error}, before any quantization", "return a finite number for the float model"
        ) from error
    changed = [name for name, tensor in tensors.items() if bits_digest(tensor) != before[name]]
    if changed:
        raise InputError(
            "data.metric", f"{changed[0]} changed while the metric scored the model", "leave weights alone in metrics"
        )
    progress.advance()
    return value


def load_task(
    config: RunConfig,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
    loaded: LoadedModel | None = None,
) -> Task:
    """Gather model, data and metric from the configuration or from a launch script.

    Args:
        config: The run's configuration.
        model: A module in place of ``config.model``.
        batches: Batches in place of ``config.data``: tensors, tuples, dicts or ``Batch``.
        metric: A function of the model in place of ``config.data.metric``.
        progress: Receives stages; None: silent.
        stop: Asked whether to leave.
        loaded: The model of ``config.model``, where it is there already; None: it is loaded.

    Raises:
        Interrupted: ``stop`` said so.
        InputError: Something is missing, contradictory or unusable; names the field.
    """
    chosen = config.model
    if model is None and batches is None and chosen.path is None and chosen.factory is None:
        return _demo(config)
    kind: ModelKind = "module"
    if model is not None:
        loaded = wrap_module(model)
        name = type(loaded.model).__name__
    else:
        loaded = loaded or load_model(
            path=chosen.path,
            factory=chosen.factory,
            factory_path=chosen.factory_path,
            trust_remote_code=chosen.trust_remote_code,
        )
        name = chosen.path.name if chosen.path is not None else str(chosen.factory)
        kind = loaded.kind
    media = _answered(config, loaded, _batches(config, loaded, batches), progress or Silent(), stop)
    return _split(config, loaded, name, kind, media, metric)


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
        tuning=demo.tuning,
        held_out=demo.held_out,
        proof=demo.proof,
        metric=Metric(demo.metric_name, demo.higher_is_better, demo.metric),
        data_digest=data_digest([*demo.calibration, *demo.tuning, *demo.held_out, *demo.proof]),
        notes=(demo.description,),
        companions=demo.files,
    )


def _batches(config: RunConfig, loaded: LoadedModel, given: Iterable[Any] | None) -> MediaBatches:
    data = config.data
    wanted = data.samples + data.tuned + data.held_out + data.proof
    arguments = Arguments.of(loaded.model)
    if given is not None:
        return as_media(in_memory(given, limit=wanted, arguments=arguments))
    if data.factory is not None:
        where, folder = config.model.path, config.model.factory_path
        made = load_batches(data.factory, path=where, factory_path=folder, limit=wanted, arguments=arguments)
        return as_media(made)
    if data.path is None:
        raise InputError("data.path", "is missing", "give calibration media, e.g. --data texts.txt or a folder")
    source = MediaSource(
        targets="class" if is_classifier(loaded.model) else "text" if reads_its_own_text(loaded.model) else None,
        label=data.label,
        files=data.files,
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


def _answered(
    config: RunConfig, loaded: LoadedModel, media: MediaBatches, progress: Progress, stop: Callable[[], bool]
) -> MediaBatches:
    """Samples with the class or the text that the model shall answer with, where the model is one that does."""
    if is_classifier(loaded.model):
        return with_labels(media, loaded.model.config)
    if not reads_its_own_text(loaded.model):
        return media
    progress.stage("texts for the decoder", media.samples)
    done = 0

    def told(count: int) -> None:
        nonlocal done
        if stop():
            raise Interrupted("interrupted before the search; the same command starts it again")
        for _ in range(count - done):
            progress.advance()
        done = count

    return with_decoder_inputs(
        loaded.model,
        media,
        folder=loaded.folder,
        longest=config.data.max_length,
        device=search_device(config),
        on_sample=told,
    )


def _split(
    config: RunConfig,
    loaded: LoadedModel,
    name: str,
    kind: ModelKind,
    batches: MediaBatches,
    metric: Callable[[nn.Module], float] | None,
) -> Task:
    data = config.data
    total = batches.samples
    wanted = data.samples + data.tuned + data.held_out + data.proof
    notes = (*loaded.notes, *batches.notes)
    held_out, proof, tuning = float(data.held_out), float(data.proof), float(data.tuned)
    if total < wanted:
        # Fewer samples than asked for: keep the proportions.
        held_out, proof, tuning = held_out / wanted, proof / wanted, tuning / wanted
        notes += (f"{total} samples instead of {wanted}: splits keep their proportions",)
    splits = split_batches(batches, held_out, proof, tuning=tuning, size=data.batch_size, seed=config.search.seed)
    # Tuning, held-out and proof batches are read several times.
    reserve = list(splits.held_out)
    return Task(
        name=name,
        loaded=loaded,
        kind=kind,
        calibration=splits.calibration,
        tuning=list(splits.tuning),
        held_out=reserve,
        proof=list(splits.proof),
        metric=_metric(config, loaded, metric, reserve),
        data_digest=data_digest(batches.one_by_one()),
        notes=notes,
    )


def _metric(
    config: RunConfig, loaded: LoadedModel, given: Callable[[nn.Module], float] | None, held_out: Sequence[Batch]
) -> Metric | None:
    data = config.data
    if given is not None:
        if not callable(given):
            raise InputError("metric", f"is a {type(given).__name__}", "give a function of the model")
        return Metric(data.metric_name or "metric", data.metric_goal == "max", _checked(_in_float32(given)))
    if data.metric is not None:
        function = load_metric(data.metric, path=config.model.path, factory_path=config.model.factory_path)
        score = _one_of(_in_float32(function), data)
        return Metric(data.metric_name or "metric", data.metric_goal == "max", score)
    if is_classifier(loaded.model) and are_classes(held_out, loaded.model.config):
        return Metric("accuracy", True, _checked(lambda model: accuracy(model, held_out)), accuracy)
    if _is_causal(loaded) or all(is_written(batch) for batch in held_out):
        return Metric("perplexity", False, _checked(lambda model: perplexity(model, held_out)), perplexity)
    return None


def _in_float32(function: Callable[[nn.Module], _T]) -> Callable[[nn.Module], _T]:
    """A user's metric whose own batches follow the model: it runs in float32 here, whatever type it was handed over in."""

    def follow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = Batch(args=args, kwargs=kwargs).to(dtype=torch.float32)
        return batch.args, dict(batch.kwargs)

    def score(model: nn.Module) -> _T:
        handle = model.register_forward_pre_hook(follow, prepend=True, with_kwargs=True)
        try:
            return function(model)
        finally:
            handle.remove()

    return score


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
            answer = function(model)
        try:
            value = float(answer)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError("metric", f"returned a {type(answer).__name__}", "return a number") from error
        if not math.isfinite(value):
            raise NonFiniteError(f"the metric is {value}")
        return value

    return score


def _is_causal(loaded: LoadedModel) -> bool:
    """Whether the model says of itself that it predicts the next token."""
    architectures = getattr(loaded.config, "architectures", None) or ()
    return any(str(name).endswith("ForCausalLM") for name in architectures)
