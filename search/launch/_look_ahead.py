"""What a run block by block sees of its model before anything is on record: sites, memory, room on the device."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from alphasmith.objectives.blocks.parts import around_batch
from alphasmith.objectives.blocks.streamed_model import Start, StreamedModel
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.memory import MemoryPlan
from alphasmith.objectives.literals import Variant
from alphasmith.objectives.media.batch import Batch, call
from alphasmith.objectives.text import size_text
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.inputs.hardware import required_budget, scarcity, target_budget
from alphasmith.search.inputs.preparation import Survey, plan_memory, site_schemes, survey
from alphasmith.search.inputs.streaming import memory_told
from alphasmith.search.inputs.task import Task
from alphasmith.search.launch._states import StreamBatches
from alphasmith.search.progress import Progress

#: Streams of held-out states through candidates. ``one_alpha`` is not among them: its sweep needs the whole model.
VARIANTS: tuple[Variant, ...] = ("identity", "alpha_0.5", "best_single", "ours")


@dataclass(frozen=True, kw_only=True)
class LookAhead:
    """What is known of a run block by block before anything of it is on record.

    Attributes:
        survey: Of the first block; its hardware is that of the whole model.
        plan: Predicted memory of the largest part.
        baseline: Memory of the libraries [bytes].
        disk: What it will write while it works and as its result [bytes].
    """

    survey: Survey
    plan: MemoryPlan
    baseline: int
    disk: int


def look_ahead(config: RunConfig, task: Task, streamed: StreamedModel, baseline: int, progress: Progress) -> LookAhead:
    """Look at the first block and at what is around the blocks, on a few samples.

    Args:
        config: The run's configuration.
        task: Its data.
        streamed: Its model.
        baseline: Memory of the libraries [bytes].
        progress: Receives notes.

    Raises:
        InputError: As ``survey`` and ``plan_memory``, of one of the two.
    """
    device = search_device(config)
    quick = light(config)
    probes = [batch.to(device) for batch in _probes(task)]
    parts: list[Survey] = []
    plans: list[MemoryPlan] = []
    with streamed.around(device) as model:
        starts = [streamed.start(model, probe) for probe in probes]
    states = [start.hidden for start in starts]

    def look(model: nn.Module, batches: list[Batch], sizes: Task) -> None:
        small = _with_batches(task, model, StreamBatches(len(batches), batches.__getitem__))
        parts.append(survey(quick, small))
        # The batches of the run are larger: only their sizes count here.
        plans.append(
            plan_memory(
                quick,
                replace(small, calibration=sizes.calibration, held_out=sizes.held_out, proof=sizes.proof),
                parts[-1],
            )
        )

    with streamed.block(0, device) as block, torch.no_grad():
        look(block, [streamed.batch(0, b, s) for b, s in zip(probes, starts, strict=True)], task)
        states = [call(block, streamed.batch(0, b, s)) for b, s in zip(probes, starts, strict=True)]
    with streamed.around(device) as model:
        look(model, [around_batch(b, h) for b, h in zip(probes, states, strict=True)], task)
    first = f"{streamed.block_name(0)}."
    sites = tuple(
        replace(site, name=f"{streamed.block_name(number)}.{site.name.removeprefix(first)}")
        for number in range(streamed.blocks)
        for site in parts[0].sites
    )
    found = scarcity(
        target_budget(config.hardware),
        required_budget(
            (*sites, *parts[1].sites),
            schemes=site_schemes(config, (*sites, *parts[1].sites)),
            parameters=task.loaded.parameter_count,
            activation_bytes=max(plan.activations for plan in plans),
            forwards_per_second=config.hardware.forwards_per_second,
        ),
    )
    plan = max(plans, key=lambda one: one.total)
    progress.note(f"memory: {memory_told(streamed)}; {plan} predicted; {plan.rows} rows per site")
    disk = _states_bytes(task, probes[0], starts[0]) + streamed.blocks * plans[0].reservoirs + plans[1].reservoirs
    return LookAhead(
        survey=replace(parts[0], scarcity=found), plan=plan, baseline=baseline, disk=disk + _result_bytes(config, task)
    )


def check_disk(ahead: LookAhead, out: Path, work: Path | None = None) -> None:
    """Refuse a device that what a run writes does not fit on.

    Args:
        ahead: What it will write.
        out: Where its result goes; the states between blocks lie beside it.
        work: What an earlier process of the run wrote already; None: nothing.

    Raises:
        InputError: Field ``out``: with the bytes that are needed and those that are free.
    """
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) if work and work.is_dir() else 0
    free = shutil.disk_usage(place).free
    if ahead.disk > free + there:
        told = f"{size_text(ahead.disk)} ({ahead.disk} bytes) are needed for the states between blocks and the result"
        raise InputError(
            "out", f"{told}, {size_text(free)} ({free} bytes) are free at {place}", "choose another device"
        )


def light(config: RunConfig) -> RunConfig:
    """The configuration of a part: nothing is refined at its output.

    Args:
        config: Of the run.
    """
    return config.model_copy(update={"search": config.search.model_copy(update={"refine": False})})


def _probes(task: Task) -> list[Batch]:
    """Two samples of two batches."""
    return [task.calibration[0].narrow(0, 2), task.held_out[0].narrow(0, 2)]


def _with_batches(task: Task, model: nn.Module, batches: StreamBatches) -> Task:
    return replace(
        task,
        loaded=replace(task.loaded, model=model),
        calibration=batches,
        tuning=(),
        held_out=batches,
        proof=batches,
        metric=None,
        part=True,
    )


def _states_bytes(task: Task, probe: Batch, start: Start) -> int:
    """States of two steps, and what the blocks are called with beside them [bytes]."""

    def numbers(batch: Batch) -> int:
        values = (*batch.args, *batch.kwargs.values())
        return next((value.numel() for value in values if isinstance(value, Tensor) and value.dim()), 1)

    held_out = sum(numbers(batch) for batch in task.held_out)
    others = sum(numbers(batch) for split in ("calibration", "proof") for batch in getattr(task, split))
    hidden = start.hidden.nbytes / numbers(probe)
    leaves = sum(leaf.nbytes for leaf in start.leaves.values()) / numbers(probe)
    return int(2 * hidden * (others + held_out * (1 + len(VARIANTS))) + leaves * (others + held_out))


def _result_bytes(config: RunConfig, task: Task) -> int:
    """Both models [bytes], as far as is known before: quantized weights at a byte each."""
    count = task.loaded.parameter_count
    half = config.dtype == "own" and len(task.loaded.types) > 0
    return count * (1 + (2 if half else 4))
