"""A whole language model from calibration to export: default settings against an exact 21-point grid at every site.

    python -m benchmarks.whole_model [SHARED_DATA] [--hidden N] [--layers N] [--threads N] [--out]

Models: stories260k and its outlier twin where SHARED_DATA is given (see benchmarks/shared_models.py), and a wider random model of
LLaMA shape with function-preserving outlier channels. Both runs are the main job with the same data and the same evaluator.

The grid run is made by configuration alone: no noise model, so the best single alpha comes from 21 exact losses per site; no shift,
no offsets, abs-max ranges, one group, no refinement, and 4 trials, the fewest a study may have: the three baselines, which
include the grid's winner, and one of the sampler. What it keeps is the best single alpha or better.

"Grid, one fp32 product each" is the same run with the seconds of its 21 evaluations replaced by those of 21 candidates made as other
tools make them: fresh copies, requantization and one fp32 product per candidate. It is computed from seconds measured in this run.

Held-out losses are compared site by site, on pristine weights, as paired differences of squared errors per row: "above" counts the
sites where ours is higher at all, and the worst excess is the largest difference in paired standard errors.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import RunConfig, run
from benchmarks.demos import StageClock
from benchmarks.grid_methods import plain_seconds, single_alpha_grid
from benchmarks.llama import llama, token_batches
from benchmarks.searching import searched
from benchmarks.shared_sites import ModelSite, model_sites, shared_model
from benchmarks.timing import machine, median, parser, publish, table, torch_threads, with_threads

SCHEME = Scheme.parse("w8a8-channel-static")
_POINTS = 21
OURS: Mapping[str, Mapping[str, Any]] = {}
GRID: Mapping[str, Mapping[str, Any]] = {
    "groups": {"k": 1, "offsets": False, "ranges": "wide"},
    "search": {
        "noise_model": False,
        "single_alphas": _POINTS,
        "trials": 4,
        "shift": "none",
        "range": "absmax",
        "refine": False,
    },
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a run, and of its stage that searches the sites."""

    total: float
    sites: float


@dataclass(frozen=True)
class Difference:
    """Ours minus the grid at one site: held-out losses and their paired difference in standard errors (0 where equal)."""

    ours: float
    grid: float
    deviations: float


def timed_run(model: nn.Module, batches: Sequence[Any], sections: Mapping[str, Mapping[str, Any]]) -> Timing:
    """The main job, from a model in memory to files on disk."""
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.build({**sections, "storage": f"sqlite:///{folder}/trials.db", "out": f"{folder}/out"})
        clock = StageClock()
        start = time.perf_counter()
        run(config, model=model, batches=batches, progress=clock)
        total = time.perf_counter() - start
        clock.stage("end")
    print({stage: round(seconds, 2) for stage, seconds in clock.seconds.items() if stage}, flush=True)
    return Timing(total, clock.seconds["searching sites"])


def difference(site: ModelSite) -> Difference:
    """Both searches at one site, judged on its held-out rows."""
    configs = (RunConfig.build(sections) for sections in (OURS, GRID))
    ours, grid = (
        searched(site.data, site.held_out, SCHEME, config, shiftable=site.shiftable).smoothing for config in configs
    )
    judge = SiteObjective(site.held_out, SCHEME)
    batch = judge.batch([ours, grid])
    batch.advance(judge.rows)
    mean, deviation = batch.paired(0, 1)
    return Difference(batch.loss(0) or 0.0, batch.loss(1) or 0.0, mean / deviation if deviation else 0.0)


def grid_seconds(sites: Sequence[ModelSite]) -> tuple[float, float]:
    """Seconds of all grids on our evaluator, and of as many candidates with one fp32 product and fresh copies each."""
    ours = plain = 0.0
    for site in sites:
        outcome = single_alpha_grid(site.data, SCHEME, _POINTS)
        ours += outcome.seconds
        plain += plain_seconds(site.data, outcome.smoothing, SCHEME) * _POINTS
    return ours, plain


HEADER = (
    "model",
    "sites",
    "ours [s]",
    "of it searching sites",
    "grid [s]",
    "of it searching sites",
    "ratio end to end",
    "ratio of the searches",
    "ratio to grid, one fp32 product each",
    "ours lower or equal",
    "ours / grid, median",
    "worst excess [standard errors]",
)


def row(name: str, model: nn.Module, batches: Sequence[Any]) -> tuple[str, ...]:
    """Both runs and all sites of one model."""
    grid = timed_run(model, batches, GRID)
    ours = timed_run(model, batches, OURS)
    sites = model_sites(model, list(batches))
    found = [difference(site) for site in sites]
    on_ours, plain = grid_seconds(sites)
    kept = sum(d.ours <= d.grid for d in found)
    return (
        name,
        str(len(sites)),
        f"{ours.total:.1f}",
        f"{ours.sites:.1f}",
        f"{grid.total:.1f}",
        f"{grid.sites:.1f}",
        f"{grid.total / ours.total:.2f}",
        f"{grid.sites / ours.sites:.2f}",
        f"{(grid.total - on_ours + plain) / ours.total:.2f}",
        f"{kept}/{len(found)} ({kept / len(found):.0%})",
        f"{median([d.ours / d.grid for d in found if d.grid]):.3f}",
        f"{max(d.deviations for d in found):.1f}",
    )


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("data", type=Path, nargs="?")
    arguments_of.add_argument("--models", nargs="*", default=["stories260k", "stories260k_outlier"])
    arguments_of.add_argument("--hidden", type=int, default=256)
    arguments_of.add_argument("--layers", type=int, default=4)
    arguments = arguments_of.parse_args()
    rows = []
    with torch_threads(arguments.threads):
        where = machine()
        for name in arguments.models if arguments.data else ():
            rows.append(row(name, *shared_model(arguments.data / name)))
            print(" | ".join(rows[-1]), flush=True)
        model = llama(hidden=arguments.hidden, layers=arguments.layers)
        rows.append(row(f"LLaMA shape, hidden {arguments.hidden}", model, token_batches(16)))
    publish("WHOLE_MODEL", f"{where} Scheme {SCHEME.name}.\n\n{table(HEADER, rows)}", arguments.out)


if __name__ == "__main__":
    main()
