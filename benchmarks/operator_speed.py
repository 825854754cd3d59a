"""Time of our own integer module over that of the float module: deployed sites alone, and whole models.

    python -m benchmarks.operator_speed [--models MiniLM SmolLM2 DINOv2] [--threads 1] [--most 1.4] [--out docs/serving.md]

CPU time, a block of calls of each in turn, lower quartile of the blocks. ``always units`` multiplies on integer units whatever that costs, as the module did before
it asked whether they pay. Run it again with ``ONEDNN_MAX_CPU_ISA=AVX2`` to see a processor without 8-bit dot products: oneDNN then takes the
slow substitute. A whole model above ``--most`` ends the benchmark with exit code 1.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import quantiles

import torch
from torch import nn

from alphasmith.objectives.quantization import integer_product
from alphasmith.objectives.quantization.operator import OperatorTensors, QuantizedOperator
from alphasmith.objectives.quantization.scheme import Scheme
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

#: Inputs, outputs, rows: those of the sites of MiniLM, of a ViT of its size, and of a LLaMA-like model.
SHAPES = (
    *((64, 64, 64), (384, 384, 128), (384, 1536, 128), (1536, 384, 128), (768, 768, 1), (768, 768, 128)),
    *((768, 3072, 1), (768, 3072, 128), (2048, 2048, 1), (2048, 2048, 128)),
)
_BLOCKS = 15
_BLOCK_SECONDS = 0.03


@contextmanager
def always_units() -> Iterator[None]:
    """Integer products on integer units, whether that pays or not."""
    pays = integer_product.integer_gemm_pays
    integer_product.integer_gemm_pays = lambda device_type, *_: integer_product.integer_gemm_works(device_type)
    try:
        yield
    finally:
        integer_product.integer_gemm_pays = pays


def interleaved(works: list[Callable[[], object]], blocks: int = _BLOCKS) -> list[float]:
    """CPU seconds of one call of each, in turns."""
    counts = []
    for work in works:
        work()
        start = time.process_time()
        work()
        counts.append(max(1, round(_BLOCK_SECONDS / max(time.process_time() - start, 1e-6))))
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(blocks):
        for work, count, times in zip(works, counts, taken, strict=True):
            start = time.process_time()
            for _ in range(count):
                work()
            times.append((time.process_time() - start) / count)
    return [quantiles(times, n=4)[0] for times in taken]


def site(inputs: int, outputs: int, rows: int) -> tuple[str, ...]:
    """One line of the table of sites."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    cells = [f"{inputs} x {outputs}, {rows}"]
    for name in ("w8a8-channel-static", "w8au8-channel-static", "w8a8-channel-token"):
        scheme = Scheme.parse(name)
        edges = {"low": x.amin(), "high": x.amax()} if scheme.static else {}
        tensors = OperatorTensors(weight=linear.weight.detach().clone(), **edges)
        inner = nn.Linear(inputs, outputs).requires_grad_(False)
        operator = QuantizedOperator.quantize(inner, tensors, scheme=scheme, kind="linear", transposed=False)

        def units(operator: nn.Module = operator) -> object:
            with always_units():
                return operator(x)

        plain, ours, forced = interleaved([partial(linear, x), partial(operator, x), units])
        if name == "w8a8-channel-static":
            cells += [f"{1000 * plain:.3f}", f"{forced / plain:.2f}"]
        cells.append(f"{ours / plain:.2f}")
    return tuple(cells)


def whole(model: str, home: Path, work: Path) -> tuple[tuple[str, ...], float]:
    """One line of the table of models, and the largest ratio of ours in it.

    Raises:
        AbsentError: Model or data are not here.
    """
    request = Request(model=model, scheme="w8a8-channel-static", seed=0, short=True, sweep=False, home=home)
    config, batches = configured(request, model_folder(model, home), work)
    candidate, _, task = candidates(config, batches)
    batch = task.held_out[0]
    candidate.reset()
    # The candidate exchanges modules of one model, so they take turns by exchange.
    taken: dict[str, list[float]] = {}

    def timed(name: str) -> None:
        candidate.model(*batch.args, **batch.kwargs)
        start = time.process_time()
        candidate.model(*batch.args, **batch.kwargs)
        taken.setdefault(name, []).append(time.process_time() - start)

    with torch.no_grad(), candidate.restored():
        for _ in range(5):
            candidate.reset()
            timed("float")
            candidate.apply({})
            timed("ours")
            with always_units():
                timed("units")
    plain, ours, forced = (min(taken[name]) for name in ("float", "ours", "units"))
    return (model, f"{1000 * plain:.0f}", f"{forced / plain:.2f}", f"{ours / plain:.2f}"), ours / plain


def main() -> None:
    made = with_threads(parser(__doc__))
    made.add_argument("--home", type=Path, default=home_folder())
    made.add_argument("--models", nargs="*", default=["MiniLM", "SmolLM2", "DINOv2"])
    made.add_argument("--most", type=float, default=1.4, help="ratio that no whole model may exceed")
    given = made.parse_args()
    largest = 0.0
    with torch_threads(given.threads), torch.no_grad():
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
        where = machine() + (f" ONEDNN_MAX_CPU_ISA={limit}." if limit else "")
        sites = [site(*shape) for shape in SHAPES]
        models = []
        for model in given.models:
            try:
                with tempfile.TemporaryDirectory() as work:
                    line, ratio = whole(model, given.home.resolve(), Path(work))
                models.append(line)
                largest = max(largest, ratio)
                print(" | ".join(line), flush=True)
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    head = ("inputs x outputs, rows", "float [ms]", "always units", "int8 static", "uint8 static", "int8 per token")
    text = table(head, sites)
    if models:
        text += f"\n\n{table(('model', 'float [ms]', 'always units', 'int8 static'), models)}"
    publish("OPERATOR_SPEED" + (f"_{limit}" if limit else ""), f"{where}\n\n{text}", given.out)
    if largest > given.most:
        raise SystemExit(f"a whole model takes {largest:.2f} of float, more than {given.most}")


if __name__ == "__main__":
    main()
