"""Cost of one candidate at a site, in units of one float32 product of the same size on the same threads.

    python -m benchmarks.candidate_cost [--repeats 5] [--out]

The product, candidates alone and eight at a time, and the noise model take turns, so that other work on the machine meets all of
them alike; medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing, smoothing_scales
from benchmarks.timing import machine, median, parser, publish, table, torch_threads

#: Input channels, outputs, rows.
SIZES = ((768, 768, 4096), (768, 3072, 4096), (2048, 2048, 2048))
THREADS = (1, 2)
TOGETHER = 8
PREDICTED = 21  # candidates per call of the noise model: a grid of single alphas


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of candidate, and what it may cost at most [products]; None: no bound was set."""

    name: str
    scheme: str
    shifted: bool = False
    most: float | None = None


CASES = (
    Case(name="int8 channel, static", scheme="w8a8-channel-static", most=1.4),
    Case(name="int8 channel, static, shift", scheme="w8a8-channel-static", shifted=True, most=1.4),
    Case(name="int8 channel, token", scheme="w8a8-channel-token", most=1.8),
    Case(name="int8 tensor, static", scheme="w8a8-tensor-static"),
    Case(name="int4 channel, static", scheme="w4a8-channel-static"),
)


def layer(channels: int, outputs: int, rows: int) -> SiteData:
    """Log-normal channels with a mean of their own."""
    generator = torch.Generator().manual_seed(channels + outputs)
    x = torch.randn(rows, channels, generator=generator) + torch.randn(channels, generator=generator)
    x *= torch.randn(channels, generator=generator).exp()
    return linear_site_data(x, 0.02 * torch.randn(outputs, channels, generator=generator))


def candidates(data: SiteData, case: Case) -> list[Smoothing]:
    """As many as are scored together, each with an alpha of its own."""
    shift = data.input_range.middle(data.ties) if case.shifted else None
    a, w = data.magnitudes("absmax", shift), data.weight_absmax
    return [Smoothing(scales=smoothing_scales(a, w, i / TOGETHER, data.ties), shift=shift) for i in range(TOGETHER)]


def measure(data: SiteData, case: Case, repeats: int) -> tuple[float, tuple[float, float, float]]:
    """Median time of a product [s], and that of a candidate alone, one of eight and a predicted one, in products."""
    scheme, part = Scheme.parse(case.scheme), data.parts[0]
    objective = SiteObjective(data, scheme)
    all_of_them = candidates(data, case)
    model = NoiseModel(data, scheme, shift=all_of_them[0].shift, energy=objective.reference_energy)
    alphas = torch.linspace(0, 1, PREDICTED).tolist()
    a = data.magnitudes("absmax", all_of_them[0].shift)
    scales = torch.stack([smoothing_scales(a, data.weight_absmax, alpha, data.ties) for alpha in alphas])
    output = part.x.new_empty(part.x.shape[0], part.weight.shape[0])
    works: tuple[Callable[[], object], ...] = (
        lambda: torch.mm(part.x, part.weight.t(), out=output),
        lambda: objective.batch(all_of_them[:1]).advance(objective.rows),
        lambda: objective.batch(all_of_them).advance(objective.rows),
        lambda: model.losses(scales),
    )
    taken: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for work, times in zip(works, taken, strict=True):
            start = time.perf_counter()
            work()
            if repeat:  # the first round warms up
                times.append(time.perf_counter() - start)
    product, alone, together, predicted = (median(times) for times in taken)
    return product, (alone / product, together / product / TOGETHER, predicted / product / PREDICTED)


def rows(repeats: int) -> Iterator[tuple[object, ...]]:
    """One line of the table after another."""
    for channels, outputs, count in SIZES:
        data = layer(channels, outputs, count)
        for threads in THREADS:
            with torch_threads(threads):
                for case in CASES:
                    product, costs = measure(data, case, repeats)
                    most = "" if case.most is None else f"{case.most}"
                    size = f"{channels} x {outputs}, T={count}"
                    cells = (f"{cost:.3f}" for cost in costs)
                    yield (size, threads, case.name, f"{product * 1e3:.1f}", *cells, most)


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=3, help="rounds per line")
    arguments = made.parse_args()
    where = machine()
    header = ("site", "threads", "candidate", "product [ms]", "exact, alone", f"exact, one of {TOGETHER}")
    lines = []
    for line in rows(arguments.repeats):
        lines.append(line)
        print(*line, sep="  ", flush=True)
    text = table((*header, f"noise model, one of {PREDICTED}", "exact at most"), lines)
    publish("CANDIDATE_COST", f"{where}\n\n{text}", arguments.out)


if __name__ == "__main__":
    main()
