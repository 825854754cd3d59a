"""Time of our own integer module over that of the float module: deployed sites alone, and whole models.

    python -m benchmarks.operator_speed [--models MiniLM SmolLM2 DINOv2] [--threads 1] [--most 1.4] [--out docs/serving.md]

CPU time, a block of calls of each in turn, lower quartile of the blocks; models: least of five. ``in float32``: as where integer units do not pay,
the same integers from float32 products. Weights are kept in float32 there, as what serves a model keeps them. A whole model above ``--most``
ends the benchmark with exit code 1.
"""

from __future__ import annotations

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
SCHEMES = ("w8a8-channel-static", "w8au8-channel-static", "w8a8-channel-token")
_BLOCKS = 11
_BLOCK_SECONDS = 0.03


@contextmanager
def without_units() -> Iterator[None]:
    """Integer products in float32, as where integer units do not pay."""
    pays = integer_product.integer_gemm_pays
    integer_product.integer_gemm_pays = lambda *_: False
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
    works: list[Callable[[], object]] = [partial(linear, x)]
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        edges = {"low": x.amin(), "high": x.amax()} if scheme.static else {}
        tensors = OperatorTensors(weight=linear.weight.detach().clone(), **edges)
        inner = nn.Linear(inputs, outputs).requires_grad_(False)
        operator = QuantizedOperator.quantize(inner, tensors, scheme=scheme, kind="linear", transposed=False)
        operator.keep_codes = True  # as what serves a model opens it
        works += [partial(operator, x), partial(_in_floats, operator, x)]
    plain, *ours = interleaved(works)
    return (f"{inputs} x {outputs}, {rows}", f"{1000 * plain:.3f}", *(f"{seconds / plain:.2f}" for seconds in ours))


def _in_floats(operator: nn.Module, x: torch.Tensor) -> object:
    with without_units():
        return operator(x)


def whole(model: str, home: Path, work: Path) -> tuple[tuple[str, ...], float]:
    """One line of the table of models, and the largest ratio of ours in it.

    Raises:
        AbsentError: Model or data are not here.
    """
    request = Request(model=model, scheme=SCHEMES[0], seed=0, short=True, sweep=False, home=home)
    config, batches = configured(request, model_folder(model, home), work)
    candidate, _, task = candidates(config, batches)
    batch = task.held_out[0]
    taken: dict[str, list[float]] = {}

    def timed(name: str) -> None:
        candidate(*batch.args, **batch.kwargs)
        start = time.process_time()
        candidate(*batch.args, **batch.kwargs)
        taken.setdefault(name, []).append(time.process_time() - start)

    # One model becomes the other and back, so that they take turns.
    with candidate.restored():
        for _ in range(5):
            candidate.reset()
            timed("float")
            candidate.apply({})
            for module in candidate.operators:
                if isinstance(module, QuantizedOperator):
                    module.keep_codes = True
            timed("ours")
            with without_units():
                timed("in floats")
    plain, *ours = (min(taken[name]) for name in ("float", "ours", "in floats"))
    ratios = [seconds / plain for seconds in ours]
    rows = f"{batch.size} samples"
    return (model, rows, f"{1000 * plain:.0f}", *(f"{ratio:.2f}" for ratio in ratios)), max(ratios)


def main() -> None:
    made = with_threads(parser(__doc__))
    made.add_argument("--home", type=Path, default=home_folder())
    made.add_argument("--models", nargs="*", default=["MiniLM", "SmolLM2", "DINOv2"])
    made.add_argument("--most", type=float, default=1.4, help="ratio that no whole model may exceed")
    given = made.parse_args()
    largest = 0.0
    with torch_threads(given.threads), torch.no_grad():
        where = machine()
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
    kinds = [f"{name}{where}" for name in ("int8", "uint8", "int8 per token") for where in ("", " in float32")]
    head = ("inputs x outputs, rows", "float [ms]", *kinds)
    text = table(head, sites)
    if models:
        text += f"\n\n{table(('model', 'batch', 'float [ms]', 'int8', 'int8 in float32'), models)}"
    publish("OPERATOR_SPEED", f"{where}\n\n{text}", given.out)
    if largest > given.most:
        raise SystemExit(f"a whole model takes {largest:.2f} of float, more than {given.most}")


if __name__ == "__main__":
    main()
