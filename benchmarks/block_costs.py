"""What the stages of a run block by block cost, in units that another size and another processor have: passes over weights, and products.

    python -m benchmarks.block_costs [--costs FILE.json] [--work DIR] [--hidden 960 960 1920] [--lengths 64 256 64] [--layers 3]

LLaMA-shaped models of random weights (``benchmarks.blockwise.write_llama``) of two widths, on samples of two lengths, one CPU thread,
4 trials a site.
Processor time of every stage of a block, the first block left out, is fitted (no coefficient below 0, relative errors) by

    seconds = fixed + passes * bytes of the weights / memory rate + products * FLOP counted for the stage / product rate

``fixed`` is what neither grows with: Python, Optuna, the database. ``memory rate`` is that of a copy (bytes read and written), ``product
rate`` that of a float32 product, both measured before and after. What is counted for a stage stands in ``benchmarks.block_simulation``.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from alphasmith.search import RunConfig, run
from alphasmith.search.progress import Silent
from benchmarks.block_simulation import (
    FITTED_TRIALS,
    STAGES,
    BlockShape,
    Part,
    Processor,
    Samples,
    StageCost,
    StageName,
    counted,
)
from benchmarks.blockwise import BATCH, GROUPS, HEADS, SPLITS, VOCABULARY, write_llama
from benchmarks.costs import COSTS, Cost, save_costs
from benchmarks.timing import machine, parser, seconds_of, table, torch_threads

#: Stage of a run -> what it is called here.
_NAMES: dict[str, StageName] = {
    "proving random folds": "folds",
    "calibrating": "calibration",
    "held-out rows": "held_out",
    "searching sites": "search",
    "passing states on": "pass_on",
    "quantizing": "quantizing",
    "proving equivalence": "proof",
}


@dataclass(frozen=True)
class Point:
    """One run: its sizes, and the processor seconds of every stage of a block."""

    part: Part
    samples: Samples
    seconds: dict[StageName, float]


class _StageTimes(Silent):
    """Processor seconds of every stage of every block."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._name, self._since = "", time.process_time()

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins."""
        now = time.process_time()
        _, _, stage = self._name.partition(": ")
        if stage and not self._name.startswith("around"):
            self.seconds[stage].append(now - self._since)
        self._name, self._since = name, now


def measure(work: Path, *, hidden: int, length: int, layers: int) -> Point:
    """One run in this process, with rows that grow with the samples."""
    intermediate = hidden * 8 // 3
    shape = BlockShape(
        blocks=layers, hidden=hidden, intermediate=intermediate, heads=HEADS, groups=GROUPS, vocabulary=VOCABULARY
    )
    samples = Samples(
        length=length,
        calibration=SPLITS["samples"],
        held_out=SPLITS["held_out"],
        proof=SPLITS["proof"],
        batch=BATCH,
        rows=2 * length,
    )
    model = work / f"model-{hidden}"
    if not model.exists():
        write_llama(model, layers, hidden, intermediate)
    name = f"{hidden}-{length}"
    ids = torch.randint(0, VOCABULARY, (sum(SPLITS.values()), length), generator=torch.Generator().manual_seed(1))
    search = {"trials": FITTED_TRIALS, "rows": samples.rows, "refine": False, "guard": "site", "shift": "none"}
    values: dict[str, Any] = {
        "model": {"path": model},
        "memory": {"mode": "blockwise"},
        "storage": f"sqlite:///{work}/{name}.db",
        "out": work / name,
        "data": {**SPLITS, "batch_size": BATCH},
        "search": {**search, "reuse": False},
    }
    times = _StageTimes()
    run(RunConfig.build(values), batches=[{"input_ids": ids}], progress=times)
    times.stage("end")
    seconds = {_NAMES[stage]: float(np.mean(taken[1:])) for stage, taken in times.seconds.items() if stage in _NAMES}
    print(f"width {hidden}, samples of {length} tokens: {seconds}", flush=True)
    return Point(shape.block, samples, seconds)


def rates() -> tuple[float, float]:
    """Bytes per second of a copy, and FLOP per second of a float32 product, of one thread."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 5, clock=time.process_time)
    left, right = torch.randn(512, 2560), torch.randn(2560, 2560)
    product = 2 * 512 * 2560**2 / seconds_of(lambda: left @ right, 5, clock=time.process_time)
    return copied, product


def fitted(points: Sequence[Point], stage: StageName, memory: float, product: float) -> tuple[float, float, float]:
    """``fixed`` [s], ``passes`` and ``products`` of a stage."""
    taken = np.array([point.seconds[stage] for point in points])
    rows = [
        (1.0, point.part.weight_bytes / memory, counted(stage, point.part, point.samples) / product) for point in points
    ]
    found, _ = nnls(np.array(rows) / taken[:, None], np.ones(len(points)))
    return float(found[0]), float(found[1]), float(found[2])


def block_costs(points: Sequence[Point], memory: float, product: float, source: str) -> dict[str, Cost]:
    """Costs by name, as they are kept."""
    return {
        "block.memory_rate": Cost(memory, "bytes/s", source),
        "block.product_rate": Cost(product, "FLOP/s", source),
        **{f"block.{stage}": Cost(fitted(points, stage, memory, product), "s, 1, 1", source) for stage in STAGES},
    }


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--costs", type=Path, default=COSTS, help="file to put the costs into")
    arguments_of.add_argument("--work", type=Path)
    arguments_of.add_argument("--hidden", type=int, nargs="+", default=(960, 960, 1920), help="width, a run each")
    arguments_of.add_argument("--lengths", type=int, nargs="+", default=(64, 256, 64), help="tokens, a run each")
    arguments_of.add_argument("--layers", type=int, default=3)
    arguments = arguments_of.parse_args()
    with torch_threads(1), tempfile.TemporaryDirectory(dir=arguments.work, prefix="block-costs-") as made:
        where = machine()
        first = rates()
        points = [
            measure(Path(made), hidden=hidden, length=length, layers=arguments.layers)
            for hidden, length in zip(arguments.hidden, arguments.lengths, strict=True)
        ]
        second = rates()
    memory, product = ((a + b) / 2 for a, b in zip(first, second, strict=True))
    source = f"benchmarks.block_costs, {len(points)} runs. {where}"
    save_costs(block_costs(points, memory, product, source), arguments.costs)
    processor = Processor(memory=memory, product=product)
    rows = []
    for stage in STAGES:
        cost = StageCost(*fitted(points, stage, memory, product))
        off = [
            processor.seconds(cost, point.part.weight_bytes, counted(stage, point.part, point.samples))
            / point.seconds[stage]
            for point in points
        ]
        shown = (cost.fixed, cost.passes, cost.products)
        rows.append((stage, *(f"{value:.3g}" for value in shown), ", ".join(f"{value:.2f}" for value in off)))
    print(table(("stage", "fixed [s]", "passes", "products", "fitted / measured"), rows))


if __name__ == "__main__":
    main()
