"""Calibration rows with weights in units of the model's output, for ``search.objective = "output"``. Formula fA10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from alphasmith.objectives.calibration.calibrate import Calibration
from alphasmith.objectives.judge.memory import MemoryPlan
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sensitivity.row_weights import unweighed, weighed
from alphasmith.objectives.sites.types import Site
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import search_device
from alphasmith.search.interruption import leave
from alphasmith.search.progress import Progress


def weigh_rows(
    config: RunConfig,
    model: nn.Module,
    sites: Sequence[Site],
    splits: Sequence[tuple[Calibration, Sequence[Batch], int]],
    plan: MemoryPlan,
    progress: Progress,
    stop: Callable[[], bool],
) -> tuple[Calibration, Calibration]:
    """Weigh the rows to search on and the held-out ones; a site has weights in both or in none.

    Args:
        config: The run's configuration.
        model: The float model.
        sites: Sites that were calibrated.
        splits: Both calibrations, each with its batches and the seed of its rows.
        plan: Memory of the run, which is kept to.
        progress: Receives stages and notes.
        stop: Polled; returns True to stop.

    Raises:
        Interrupted: ``stop`` said so.
    """
    device = search_device(config)
    progress.stage("weights of the output", sum(batch.size for _, batches, _ in splits for batch in batches))

    def step() -> None:
        leave(stop)
        progress.advance()

    found: list[Calibration] = []
    for calibration, batches, seed in splits:
        moved = [batch.to(device) for batch in batches]
        made = weighed(calibration, model, sites, moved, seed=seed, memory=plan.working_set, step=step)
        if made.reason:
            progress.note(f"warning: search.objective = 'output' does not reach every site: {made.reason}")
        found.append(made.calibration)
    known = [{name for name, record in made.sites.items() if record.parts[0].row_weight is not None} for made in found]
    search, held_out = (
        replace(made, sites={n: r if n in known[0] & known[1] else unweighed(r) for n, r in made.sites.items()})
        for made in found
    )
    return search, held_out
