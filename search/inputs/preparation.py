"""From a task to searchable sites: discovery, memory plan, calibration, hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import psutil
import torch
from torch import nn

from alphasmith.objectives.calibration.calibrate import Calibration, calibrate
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.answers import check_repeatable, silent_outputs
from alphasmith.objectives.judge.early_proof import proven_sites
from alphasmith.objectives.judge.equivalence import FLOAT64_LIMIT
from alphasmith.objectives.judge.memory import (
    MemoryDemand,
    MemoryPlan,
    activation_bytes,
    fit_rows,
    resident_bytes,
    resident_model_bytes,
)
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.media.batches import largest
from alphasmith.objectives.model.plain_operators import Rewriting
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.sites.coverage import Coverage, coverage
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Discovery, Site, Weight
from alphasmith.objectives.text import listed, matches, size_text
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.inputs._plain_model import float_output, plain_model, with_stacks_that_answer
from alphasmith.search.inputs._weighed_rows import weigh_rows
from alphasmith.search.inputs.calibration_cache import CalibrationCache
from alphasmith.search.inputs.hardware import Scarcity, required_budget, scarcity, target_budget
from alphasmith.search.inputs.kernel_probe import kernel_notes
from alphasmith.search.inputs.task import Task, score_float
from alphasmith.search.interruption import Interrupted, leave, never
from alphasmith.search.progress import Progress
from alphasmith.storage.artifacts.run_artifacts import RunArtifacts

#: Samples of each batch that the model is tried out on.
_PROBED = 2
#: Batches of the calibration data that it is tried out on.
_PROBES = 4


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The run's model, its sites, and what the target hardware makes of it. No data has been seen.

    Attributes:
        model: The task's float model, or a copy of it where something had to be rewritten as plain operators, on the search
            device. Candidates are applied to it in place and taken back; at the end of a run it is folded.
        rewriting: How its tensors relate to those of the user's model.
        sites: All sites, with the configuration's exclusions applied.
        weights: Every parameter of two or more dimensions, with the reason where it cannot be quantized.
        scarcity: rho and why.
        example: One sample.
        notes: What a reader should know of the model's outputs.
    """

    model: nn.Module
    rewriting: Rewriting
    sites: tuple[Site, ...]
    weights: tuple[Weight, ...]
    scarcity: Scarcity
    example: Batch
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A survey with calibration data.

    Attributes:
        survey: The sites.
        plan: Predicted memory; its rows were used.
        calibration: Rows and statistics to search on.
        held_out: Rows that judge winners.
        sites: All sites; those without data are ``left``.
        order: Names of the sites that can be smoothed, those that write into other sites' weights first.
        coverage: What becomes of every weight of the model.
        skip: Patterns of operator names to leave in float.
    """

    survey: Survey
    plan: MemoryPlan
    calibration: Calibration
    held_out: Calibration
    sites: tuple[Site, ...]
    order: tuple[str, ...]
    coverage: Coverage
    skip: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of the model: outputs that carry nothing, weights that stay float."""
        return (*self.survey.notes, *((self.coverage.account(),) if self.coverage.left else ()))


def survey(config: RunConfig, task: Task) -> Survey:
    """Find the model's sites and judge the target hardware.

    Raises:
        InputError: No linear or convolution operator, nothing to run the model on, data it cannot be called with, or a
            model that answers the same batch in two ways, or all batches in one.
    """
    device = search_device(config)
    example = task.calibration[0].narrow(0, 1).to(device)
    model, rewriting, told = plain_model(task.loaded.model.eval(), example, device)
    probes = _probes(task, device)
    check_repeatable(model, probes, config.proof.tolerance)
    notes = silent_outputs(model, probes)
    found = discover(model, example, experts=config.sites.experts, exclude=config.sites.exclude)
    found = with_stacks_that_answer(model, example, found)
    sites = tuple(_as_configured(site, config) for site in found.sites)
    schemes = site_schemes(config, sites, part=task.part)
    required = required_budget(
        sites,
        schemes=schemes,
        parameters=task.loaded.parameter_count,
        activation_bytes=activation_bytes(model, example),
        forwards_per_second=config.hardware.forwards_per_second,
    )
    return Survey(
        model=model,
        rewriting=rewriting,
        sites=sites,
        weights=found.weights,
        scarcity=scarcity(target_budget(config.hardware), required),
        example=example,
        notes=(*told, *notes, *_weights_alone(found, config), *kernel_notes(schemes, config.target)),
    )


def proven(config: RunConfig, task: Task, found: Survey, progress: Progress) -> Survey:
    """The survey with those sites left alone whose fold is not what the traced call promised.

    Raises:
        EquivalenceError: No fold can be proven within ``proof.tolerance``.
    """
    # Copies for the trial come and go before rows are kept, so they may take what the rows will.
    room = min(FLOAT64_LIMIT, _budget(found, config) // 4)
    progress.stage("proving random folds", 1)
    try:
        sites = proven_sites(
            found.model,
            found.sites,
            _probes(task, search_device(config)),
            tolerance=config.proof.tolerance,
            shift=any(statistic != "none" for statistic in config.search.shift),
            seed=config.search.seed,
            float64_bytes=room,
            part_bytes=room,
        )
    except NonFiniteError:
        sites = found.sites  # calibration tells where it comes from
    progress.advance()
    changed = [site for before, site in zip(found.sites, sites, strict=True) if site.mode != before.mode]
    for reason in dict.fromkeys(site.reason for site in changed):
        progress.note(f"warning: {listed([s.name for s in changed if s.reason == reason])} left alone: {reason}")
    return replace(found, sites=sites)


def _budget(found: Survey, config: RunConfig) -> int:
    """Memory of the search, the model's own included [bytes]."""
    # The model is there already, so it is not part of what is still available.
    available = int(psutil.virtual_memory().available) + resident_model_bytes(found.model)
    return config.hardware.search_memory or available


def _weights_alone(found: Discovery, config: RunConfig) -> tuple[str, ...]:
    """One line on stacks of matrices, whose inputs nobody sees; none where inputs stay float anyway."""
    quantized = [site for site in found.sites if config.scheme.of(site.name).activations != "none"]
    names = [operator.weight for site in quantized for operator in site.operators if operator.stacked]
    if not names:
        return ()
    return (f"of matrices stacked in one tensor only the weights are quantized, not their inputs: {listed(names, 3)}",)


def _probes(task: Task, device: torch.device) -> list[Batch]:
    """A few samples of different batches, to see how the model behaves before anything is measured."""
    last = len(task.calibration) - 1
    numbers = sorted({last * part // max(_PROBES - 1, 1) for part in range(_PROBES)})
    batches = [*(task.calibration[number] for number in numbers), task.held_out[0]]
    return [batch.narrow(0, _PROBED).to(device) for batch in batches]


def check_output(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> None:
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
) -> PreparedModel:
    """Check the memory plan, then calibrate twice: rows to search on, rows to judge on.

    Args:
        config: The run's configuration.
        task: Model and data.
        found: Its sites.
        progress: Called after each batch.
        known: Calibrations on record; None: nothing is remembered.
        stop: Asked after every batch whether to leave.

    Raises:
        Interrupted: ``stop`` said so.
        InputError: Not enough memory, data without a real position, non-finite activations or outputs, or nothing to
            search in scope ``model``.
    """
    search = config.search
    budget = _budget(found, config)
    watched = _watched(found)
    plan = plan_memory(config, task, found)
    progress.note(f"memory: {plan} predicted, {size_text(budget)} available; {plan.rows} rows per site")

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
        if search.objective == "output" and search.scope == "site":
            splits = ((calibration, task.calibration, search.seed), (held_out, task.held_out, search.seed + 1))
            calibration, held_out = weigh_rows(config, found.model, watched, splits, plan, progress, stop)
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
    check_output(found.model, chain(task.held_out, task.proof), search_device(config))
    return PreparedModel(
        survey=found,
        plan=plan,
        calibration=calibration,
        held_out=held_out,
        sites=sites,
        order=tuple(s.name for s in producers_first(active)),
        coverage=coverage(found.weights, sites, _floats(sites, calibration, config), names=found.rewriting.names),
        skip=config.sites.skip,
    )


def site_schemes(config: RunConfig, sites: Sequence[Site], *, part: bool = False) -> SiteSchemes:
    """The scheme of every site of a run, or of a part of its model."""
    return config.scheme.by_site((site.name for site in sites), part=part)


def plan_memory(config: RunConfig, task: Task, found: Survey) -> MemoryPlan:
    """Predict the memory of a run.

    Args:
        config: The run's configuration.
        task: Its data.
        found: Its model and sites.

    Raises:
        InputError: Field ``hardware.search_memory``: not even the fewest rows fit.
    """
    search = config.search
    demand = MemoryDemand(
        batch=found.example,
        batch_size=max(largest(task.calibration), largest(task.held_out)),
        proof_size=largest(task.proof),
        schemes=site_schemes(config, found.sites, part=task.part),
        percentiles="percentile" in search.statistic,
        outputs=_output_bytes(found, task, config),
        float64_limit=FLOAT64_LIMIT,
        remembered=sum(batch.size for batch in task.judging) if search.refine and search.scope == "site" else 0,
        stacked=sum(
            found.model.get_parameter(o.weight).numel() for site in found.sites for o in site.operators if o.stacked
        ),
    )
    return fit_rows(found.model, _watched(found), rows=search.rows, budget=_budget(found, config), demand=demand)


def _watched(found: Survey) -> list[Site]:
    """Sites with something to quantize whose input is seen."""
    return [s for s in found.sites if any(not o.raw for o in s.operators)]


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
    judging = task.judging if config.search.scope == "model" or config.search.refine else ()
    sizes = [batch.size for batch in chain(task.held_out, judging)]
    return one * (sum(sizes) + 4 * max(sizes))


def _as_configured(site: Site, config: RunConfig) -> Site:
    if site.mode != "left" and all(o.raw for o in site.operators):
        what = "only weights are" if any(o.stacked for o in site.operators) else "nothing is"
        return replace(site, mode="left", reason=f"its weights are used by functional calls, so {what} quantized here")
    if site.mode == "explicit" and config.sites.explicit == "never":
        return replace(site, mode="left", reason=f"{site.reason}; explicit scaling is off")
    return site


def _floats(sites: Sequence[Site], calibration: Calibration, config: RunConfig) -> dict[str, str]:
    """Operator -> why it stays float although it could be quantized."""
    floats: dict[str, str] = {}
    for site in sites:
        for operator in site.operators:
            if matches(operator.name, config.sites.skip):
                floats[operator.name] = "sites.skip names it"
            elif config.scheme.of(site.name).is_float:
                floats[operator.name] = "the scheme of its site is float"
            elif site.name not in calibration.sites and not operator.stacked:
                alone = "no unpadded calibration row reached it" if len(site.operators) == 1 else ""
                floats[operator.name] = alone or calibration.missing.get(site.name, site.reason)
    return floats


def _all_skipped(site: Site, config: RunConfig) -> bool:
    return config.scheme.of(site.name).is_float or all(matches(o.name, config.sites.skip) for o in site.operators)


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run needs before its first search: checked and calibrated, nothing on record yet.

    Attributes:
        prepared: Sites and calibration.
        calibrations: Keeps the calibration once the run is on record.
        float_metric: Task metric of the float model; None where there is none.
        baseline: Memory of the libraries, the model left out [bytes].
    """

    prepared: PreparedModel
    calibrations: CalibrationCache
    float_metric: float | None
    baseline: int


def begin(
    config: RunConfig,
    task: Task,
    found_sites: Survey,
    progress: Progress,
    stop: Callable[[], bool],
    kept: RunArtifacts | None = None,
    others: RunArtifacts | None = None,
) -> RunInputs:
    """Measure and calibrate. Everything that can be wrong with model and data shows here, before anything is on record.

    Args:
        config: The run's configuration.
        task: Model and data.
        found_sites: Its sites.
        progress: Receives stages and notes.
        stop: Polled; returns True to stop.
        kept: Objects of the run; None: it is not on record yet.
        others: Objects of other runs, to be looked through until it is; None: there are none.

    Raises:
        InputError: The float metric is not finite; or as ``prepare``.
        Interrupted: ``stop`` said so.
    """
    float_metric = score_float(found_sites.model, task.metric, progress)
    found_sites = proven(config, task, found_sites, progress)
    # The prediction starts with the libraries: the model is part of it.
    baseline = resident_bytes() - resident_model_bytes(found_sites.model)
    calibrations = CalibrationCache(config, task, kept, others=others)
    try:
        leave(stop)
        prepared = prepare(config, task, found_sites, progress, calibrations, stop)
    except Interrupted as error:
        if kept is not None:
            raise
        raise Interrupted("interrupted before anything was on record; the same command starts it again") from error
    return RunInputs(prepared=prepared, calibrations=calibrations, float_metric=float_metric, baseline=baseline)
