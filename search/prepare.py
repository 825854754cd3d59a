"""From a task to searchable sites: discovery, memory plan, calibration, hardware."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

from alphasmith.objectives.batch import Batch, call, main_output
from alphasmith.objectives.calibration import Calibration, calibrate
from alphasmith.objectives.equivalence import FLOAT64_LIMIT
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.memory import (
    MemoryDemand,
    MemoryPlan,
    activation_bytes,
    fit_rows,
    resident_model_bytes,
)
from alphasmith.objectives.model_objective import real_rows
from alphasmith.objectives.recurrent import unroll
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.units import readable
from alphasmith.search.config import RunConfig
from alphasmith.search.hardware import Scarcity, required_budget, scarcity, target_budget
from alphasmith.search.interruption import leave, never
from alphasmith.search.progress import Progress
from alphasmith.search.task import Task

#: What a model raises on data it was not made for.
_CALL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The run's model, its sites, and what the target hardware makes of it. No data has been seen.

    Attributes:
        model: The task's float model, or a copy of it where recurrent layers had to be unrolled, on the search device.
            Candidates are applied to it in place and taken back; at the end of a run it is folded.
        names: Parameter name of ``model`` -> name in the user's model, where they differ.
        sites: All sites, with the configuration's exclusions applied.
        skipped: (name, reason) of weights that cannot be quantized.
        scarcity: rho and why.
        example: One sample.
    """

    model: nn.Module
    names: Mapping[str, str]
    sites: tuple[Site, ...]
    skipped: tuple[tuple[str, str], ...]
    scarcity: Scarcity
    example: Batch


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A survey with calibration data.

    Attributes:
        survey: The sites.
        plan: Predicted memory; its rows were used.
        calibration: Rows and statistics to search on.
        held_out: Rows that judge winners.
        sites: All sites; those without data are ``left``.
        order: Names of the sites that can be smoothed, those that write into other sites' weights first.
    """

    survey: Survey
    plan: MemoryPlan
    calibration: Calibration
    held_out: Calibration
    sites: tuple[Site, ...]
    order: tuple[str, ...]


def search_device(config: RunConfig) -> torch.device:
    """The configured device, else the first GPU, else the CPU.

    Raises:
        InputError: The configured device does not exist.
    """
    name = config.search.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            "search.device", f"{name!r} is not usable", "use 'cpu', or 'cuda' where there is one"
        ) from error
    return device


def survey(config: RunConfig, task: Task) -> Survey:
    """Find the model's sites and judge the target hardware.

    Raises:
        InputError: No linear or convolution operator, nothing to run the model on, or data it cannot be called with.
    """
    device = search_device(config)
    model = task.loaded.model.eval()
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        model = copy.deepcopy(model)  # unrolling would change the architecture that is saved
    names = unroll(model)
    model.to(device)
    example = task.calibration[0].narrow(0, 1).to(device)
    float_output(model, example)
    found = discover(model, example, experts=config.sites.experts, exclude=config.sites.exclude)
    sites = tuple(_as_configured(site, config) for site in found.sites)
    required = required_budget(
        sites,
        scheme=config.scheme.build(),
        parameters=task.loaded.parameter_count,
        activation_bytes=activation_bytes(model, example),
        forwards_per_second=config.hardware.forwards_per_second,
    )
    return Survey(
        model=model,
        names=names,
        sites=sites,
        skipped=found.skipped,
        scarcity=scarcity(target_budget(config.hardware), required),
        example=example,
    )


def float_output(model: nn.Module, batch: Batch) -> Tensor:
    """The model's main output on real positions.

    Args:
        model: The float model.
        batch: On the model's device.

    Raises:
        InputError: The model cannot be called with the batch, or returns no floating tensor.
    """
    try:
        with torch.no_grad():
            return real_rows(main_output(call(model, batch)), batch)
    except InputError:
        raise
    except _CALL_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            "data", f"the model cannot be run on it ({type(error).__name__}: {reason})", "give what its forward takes"
        ) from error


def check_output(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> None:
    """Refuse a float model that already answers with NaN or infinity: no candidate could be compared with it.

    Raises:
        InputError: It does, or it cannot be called with a batch.
    """
    for number, batch in enumerate(batches):
        if not bool(torch.isfinite(float_output(model, batch.to(device))).all()):
            raise InputError(
                "model",
                f"returns NaN or infinity before quantization (batch {number} of the held-out and proof data)",
                "give data the model can process, or return finite values",
            )


class Calibrations(Protocol):
    """Remembers calibrations."""

    def load(self, sites: Sequence[Site], rows: int) -> tuple[Calibration, Calibration] | None:
        """Those made before from the same model, data and settings, to search on and held out; None: there are none.

        What is found needs no saving.
        """
        ...

    def save(self, sites: Sequence[Site], rows: int, calibration: Calibration, held_out: Calibration) -> None:
        """Keep them."""
        ...


def prepare(
    config: RunConfig,
    task: Task,
    found: Survey,
    progress: Progress,
    known: Calibrations | None = None,
    stop: Callable[[], bool] = never,
) -> Prepared:
    """Check the memory plan, then calibrate twice: rows to search on, rows to judge on.

    Args:
        config: The run's configuration.
        task: Model and data.
        found: Its sites.
        progress: Told after each batch.
        known: Calibrations on record; None: nothing is remembered.
        stop: Asked after every batch whether to leave.

    Raises:
        Interrupted: ``stop`` said so.
        InputError: Not enough memory, data without a real position, non-finite activations or outputs, or nothing to
            search in scope ``model``.
    """
    search = config.search
    # The model is there already, so it is not part of what is still available.
    available = int(psutil.virtual_memory().available) + resident_model_bytes(found.model)
    budget = config.hardware.search_memory or available
    watched = [s for s in found.sites if any(not o.raw for o in s.operators)]
    demand = MemoryDemand(
        batch=found.example,
        batch_size=max(b.size for b in (task.calibration[0], task.held_out[0])),
        scheme=config.scheme.build(),
        percentiles="percentile" in search.statistic,
        outputs=_output_bytes(found, task, config),
        float64_limit=FLOAT64_LIMIT,
    )
    plan = fit_rows(found.model, watched, rows=search.rows, budget=budget, demand=demand)
    progress.note(f"memory: {plan} predicted, {readable(budget)} available; {plan.rows} rows per site")

    def record(name: str, batches: Sequence[Batch], seed: int) -> Calibration:
        progress.stage(name, len(batches))
        return calibrate(
            found.model,
            watched,
            batches,
            rows=plan.rows,
            seed=seed,
            statistics=search.statistic,
            percentile=search.percentile,
            device=search_device(config),
            on_batch=done,
        )

    def done(_: int) -> None:
        progress.advance()
        leave(stop)

    before = None if known is None else known.load(watched, plan.rows)
    if before is not None:
        progress.note("calibration rows and statistics are on record and used again")
        calibration, held_out = before
    else:
        calibration = record("calibrating", task.calibration, search.seed)
        held_out = record("held-out rows", task.held_out, search.seed + 1)
        if known is not None:
            known.save(watched, plan.rows, calibration, held_out)
    missing = {**calibration.missing, **held_out.missing}
    sites = tuple(
        replace(s, mode="left", reason=missing[s.name]) if s.name in missing and s.mode != "left" else s
        for s in found.sites
    )
    active = [s for s in sites if s.mode != "left" and not _all_skipped(s, config)]
    if not active and search.scope == "model":
        raise InputError("sites", "no site is left to smooth", "loosen sites.exclude, sites.skip or sites.explicit")
    check_output(found.model, (*task.held_out, *task.proof), search_device(config))
    return Prepared(
        survey=found,
        plan=plan,
        calibration=calibration,
        held_out=held_out,
        sites=sites,
        order=tuple(s.name for s in producers_first(active)),
    )


def producers_first(sites: Sequence[Site]) -> list[Site]:
    """Sites ordered so that one which scales rows of another's weights comes before it.

    Folding the input of ``o_proj`` changes rows of ``v_proj``, and with them the statistic w_j and the integers of the
    site that feeds ``v_proj``; so that site is searched later, on the weights it will really have.
    """
    reads = {o.weight: s.name for s in sites for o in s.operators}
    before: dict[str, set[str]] = {s.name: set() for s in sites}
    for site in sites:
        for edit in site.edits:
            owner = reads.get(edit.parameter)
            if edit.power < 0 and owner not in (None, site.name):
                before[str(owner)].add(site.name)
    ordered: list[Site] = []
    placed: set[str] = set()
    waiting = list(sites)
    while waiting:
        ready = [s for s in waiting if before[s.name] <= placed]
        # A circle (weights shared across depths) has no right order: keep the forward one.
        taken = ready or waiting[:1]
        ordered += taken
        placed |= {s.name for s in taken}
        waiting = [s for s in waiting if s.name not in placed]
    return ordered


def _output_bytes(found: Survey, task: Task, config: RunConfig) -> int:
    """Float outputs that candidates are compared with, and the temporaries of one comparison [bytes]."""
    with torch.no_grad():
        one = main_output(call(found.model, found.example)).nbytes
    compared = list(task.held_out) + (
        list(task.calibration) if config.search.scope == "model" or config.search.refine else []
    )
    return one * (sum(b.size for b in compared) + 4 * max(b.size for b in compared))


def _as_configured(site: Site, config: RunConfig) -> Site:
    if site.mode != "left" and all(o.raw for o in site.operators):
        return replace(
            site, mode="left", reason="its weights are used by functional calls, so nothing is quantized here"
        )
    if site.mode == "explicit" and config.sites.explicit == "never":
        return replace(site, mode="left", reason=f"{site.reason}; explicit scaling is off")
    return site


def _all_skipped(site: Site, config: RunConfig) -> bool:
    return all(any(fnmatchcase(o.name, p) for p in config.sites.skip) for o in site.operators)
