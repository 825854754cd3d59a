"""How much of the model a run has in memory: all of it, or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import psutil
from torch import nn

from alphasmith.objectives.blocks.stored_weights import StoredWeights
from alphasmith.objectives.blocks.streamed_model import StreamedModel
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MemoryMode
from alphasmith.objectives.model.decoding import reads_its_own_text
from alphasmith.objectives.model.hf_folder import weight_files
from alphasmith.objectives.text import size_text
from alphasmith.search.budget import BudgetConfig
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.inputs.task import Task, load_task
from alphasmith.search.progress import Progress

#: Bytes that a run takes for each parameter of a model that is in memory as a whole: float32, the quantized weights, what is made of
#: them while candidates are built.
_RESIDENT_BYTES = 6
#: Samples that show how the model calls its blocks.
_PROBED = 2


def open_task(
    config: RunConfig,
    *,
    model: nn.Module | None,
    batches: Iterable[Any] | None,
    metric: Callable[[nn.Module], float] | None,
    progress: Progress,
    stop: Callable[[], bool],
) -> tuple[RunConfig, Task, StreamedModel | None]:
    """Model and data, with as much of the model in memory as ``memory.mode`` wants.

    Args:
        config: The run's configuration.
        model: As of ``load_task``.
        batches: As of ``load_task``.
        metric: As of ``load_task``.
        progress: Receives stages and notes.
        stop: Polled; returns True to stop.

    Returns:
        The configuration with the mode that was chosen; the task; and where it is ``blockwise`` the model to be read part by part: that
        of the task has no weights then. A model that cannot be taken apart is resident, and a note says why.

    Raises:
        InputError: As ``load_task``.
    """
    given = {"model": model, "batches": batches, "metric": metric, "progress": progress, "stop": stop}
    streamed = _streamed(config, model is not None, progress)
    if streamed is not None:
        task = load_task(config, **given, loaded=streamed.loaded())  # type: ignore[arg-type]  # as named above
        device = search_device(config)
        try:
            streamed.check(task.calibration[0].narrow(0, _PROBED).to(device), device)
        except InputError as error:
            _resident(error, progress)
        else:
            return _with_mode(config, "blockwise"), task, streamed
    task = load_task(config, **given)  # type: ignore[arg-type]  # likewise
    return _with_mode(config, "resident"), task, None


def _streamed(config: RunConfig, handed_over: bool, progress: Progress) -> StreamedModel | None:
    """The model to be read part by part; None where it is to be in memory as a whole."""
    mode = config.memory.mode
    source = config.model
    folder = source.path
    if mode == "resident" or folder is None or source.factory or source.trust_remote_code or handed_over:
        if mode == "blockwise":
            progress.note("memory.mode: resident, since the model is not a plain Hugging Face folder")
        return None
    try:
        if mode == "auto" and not _too_large(config):
            return None
        if config.search.scope == "model" or config.search.objective == "output":
            raise InputError(
                "memory.mode", "the search needs the whole model at once", "use scope and objective 'site'"
            )
        if config.sites.formats or config.budget != BudgetConfig():
            raise InputError("memory.mode", "formats of sites are chosen with the whole model", "use 'resident'")
        streamed = StreamedModel(folder)
        if reads_its_own_text(streamed.skeleton):
            raise InputError("memory.mode", "the model has an encoder and a decoder", "use 'resident'")
        return streamed
    except InputError as error:
        _resident(error, progress)
        return None


def _resident(error: InputError, progress: Progress) -> None:
    """Say why a model is in memory as a whole; any other error is the user's to mend."""
    if error.field != "memory.mode":
        raise error
    progress.note(f"memory.mode: resident, since {error.problem}")


def _too_large(config: RunConfig) -> bool:
    """Whether the whole model would take more than the memory of the search."""
    if config.model.path is None or not config.model.path.is_dir():
        return False  # loading it says what is wrong
    weights = StoredWeights(weight_files(config.model.path))
    count = sum(_count(tensor.shape) for tensor in weights.tensors.values())
    budget = config.hardware.search_memory or int(psutil.virtual_memory().available)
    return _RESIDENT_BYTES * count > budget


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _with_mode(config: RunConfig, mode: MemoryMode) -> RunConfig:
    return config.model_copy(update={"memory": config.memory.model_copy(update={"mode": mode})})


def memory_told(streamed: StreamedModel) -> str:
    """How the model is read, in one line."""
    sizes = f"{size_text(streamed.block_bytes())} each as float32, {size_text(streamed.around_bytes())} around them"
    return f"block by block: {streamed.blocks} of {streamed.block_class} in {streamed.path}, {sizes}"
