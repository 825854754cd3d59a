"""A run with default settings against exact 21-point grids and a sweep of 10 alphas, on a real model, in one process.

    python -m benchmarks.real_grid [--models MiniLM ...] [--scheme NAME] [--home FOLDER] [--threads N] [--out]

The grid run is the same job on the same data, made by configuration alone (see benchmarks/whole_model.py): 21 exact losses at every
site in place of the noise model, one group, abs-max ranges, no shifts, no refinement; the sweep of ten alphas for the whole model and the
guard at the output stay. Three ways to score the points of the grid:

- on our evaluator: the grid run as it is;
- one product each: the seconds of its evaluations are replaced by those of 21 candidates for every site as other tools make them: fresh
  copies, requantization and one fp32 product;
- at the output: to them is added what it takes to judge every point where our search judges, by the loss of the model's output on the
  samples that tune. Computed from the seconds of some candidates that change one site, which reuse everything before it.

Seconds are of CPU, since other work may run. Losses are those at the output on the run's held-out samples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import RunConfig, run
from alphasmith.search.inputs.preparation import prepare, survey
from alphasmith.search.inputs.task import load_task
from alphasmith.search.model.search import ModelScales
from alphasmith.search.progress import Silent
from alphasmith.storage.output.entries import OutputEntry
from benchmarks.grid_methods import plain_seconds, single_alpha_grid
from benchmarks.real_data import Arguments
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.shared_sites import sites_of
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads
from benchmarks.whole_model import GRID

_POINTS = 21
#: Sites whose candidates are timed at the output, spread over the model.
_TIMED = 6


@dataclass(frozen=True)
class Timed:
    """CPU seconds of a run, its sites, and what it says of the output."""

    seconds: float
    sites: int
    output: OutputEntry

    @property
    def kept(self) -> float | None:
        """Held-out loss of what it wrote."""
        kept = self.output.kept
        value: float | None = getattr(self.output, {"alpha_0.5": "alpha_half", "identity": "naive"}.get(kept, kept))
        return value


def timed(config: RunConfig, batches: Sequence[Arguments] | None, sections: Mapping[str, Mapping[str, Any]]) -> Timed:
    """The main job on the data of a configuration, with other settings."""
    dumped = config.model_dump()
    with tempfile.TemporaryDirectory() as folder:
        changed = {
            **dumped,
            **{name: {**dumped[name], **section} for name, section in sections.items()},
            "data": {n: v for n, v in dumped["data"].items() if not n.startswith("metric")},
            "storage": f"sqlite:///{folder}/trials.db",
            "out": f"{folder}/out",
        }
        start = time.process_time()
        result = run(RunConfig.build(changed), batches=batches)
        return Timed(time.process_time() - start, len(result.sites), result.manifest.output)


def grid_seconds(config: RunConfig, batches: Sequence[Arguments] | None, scheme: Scheme) -> tuple[float, float]:
    """CPU seconds of all grids on our evaluator, and of as many candidates with one fp32 product and fresh copies each."""
    task = load_task(config, batches=batches)
    ours = plain = 0.0
    for site in sites_of(prepare(config, task, survey(config, task), Silent())):
        start = time.process_time()
        outcome = single_alpha_grid(site.data, scheme, _POINTS)
        ours += time.process_time() - start
        plain += plain_seconds(site.data, outcome.smoothing, scheme, clock=time.process_time) * _POINTS
    return ours, plain


def output_seconds(config: RunConfig, batches: Sequence[Arguments] | None) -> float:
    """CPU seconds of judging 21 candidates for every site at the output."""
    candidate, of_sites, task = candidates(config, batches)
    scales = ModelScales(of_sites)
    judge = ModelObjective(candidate, list(task.judging))
    plain = dict(scales.single(0.5))
    other = scales.single(0.8)
    judge.loss(plain)
    names = list(plain)
    chosen = names[:: max(1, len(names) // _TIMED)]
    start = time.process_time()
    for name in chosen:
        judge.loss({**plain, name: other[name]})
    return (time.process_time() - start) / len(chosen) * len(names) * _POINTS


HEADER = (
    "model",
    "sites",
    "ours [s]",
    "grid run [s]",
    "with one product each [s]",
    "judged at the output [s]",
    "ratios to ours",
    "held-out loss: ours",
    "of the grid run",
    "best single per site, by its grid",
    "one alpha",
)


def row(model: str, scheme: str, home: Path, work: Path) -> tuple[str, ...]:
    """One line of the table.

    Raises:
        AbsentError: Model or data are not here.
    """
    folder = model_folder(model, home)
    request = Request(model=model, scheme=scheme, seed=0, short=False, sweep=False, home=home)
    config, batches = configured(request, folder, work)
    ours = timed(config, batches, {})
    print(f"{model}: ours {ours.seconds:.1f} s", flush=True)
    grid = timed(config, batches, GRID)
    print(f"{model}: grid run {grid.seconds:.1f} s", flush=True)
    evaluated, plain = grid_seconds(config, batches, Scheme.parse(scheme))
    one_product = grid.seconds - evaluated + plain
    at_output = one_product + output_seconds(config, batches)
    losses = (ours.kept, grid.kept, grid.output.best_single, grid.output.one_alpha)
    return (
        model,
        str(ours.sites),
        f"{ours.seconds:.0f}",
        f"{grid.seconds:.0f}",
        f"{one_product:.0f}",
        f"{at_output:.0f}",
        " / ".join(f"{seconds / ours.seconds:.2f}" for seconds in (grid.seconds, one_product, at_output)),
        *("-" if loss is None else f"{loss:.5f}" for loss in losses),
    )


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("--home", type=Path, default=home_folder())
    arguments_of.add_argument("--models", nargs="*", default=["MiniLM"])
    arguments_of.add_argument("--scheme", default="w8a8-channel-static")
    arguments = arguments_of.parse_args()
    rows = []
    with torch_threads(arguments.threads):
        where = machine()
        for model in arguments.models:
            try:
                with tempfile.TemporaryDirectory() as work:
                    rows.append(row(model, arguments.scheme, arguments.home, Path(work)))
                print(" | ".join(rows[-1]), flush=True)
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    publish("REAL_GRID", f"{where} Scheme {arguments.scheme}.\n\n{table(HEADER, rows)}", arguments.out)


if __name__ == "__main__":
    main()
