"""Time of our own integer module over that of the float module: deployed sites alone, and whole models.

    python -m benchmarks.operator_speed [--models MiniLM DINOv2 "demo text"] [--threads 1] [--rounds 11] [--most 1.4] [--out docs/serving.md]

CPU time, a block of calls of each in turn, lower quartile of the blocks. ``in float32``: as where integer units do not pay, the same
integers from float32 products; else the way that was faster when it was tried, for every size by itself. Weights are kept as they are
multiplied, as what serves a model keeps them. A real model above ``--most`` ends the benchmark with exit code 1.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles

import torch
from torch import nn

from alphasmith.objectives.media.batch import Batch, call
from alphasmith.objectives.quantization import integer_product
from alphasmith.objectives.quantization.operator import OperatorTensors, QuantizedOperator
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import RunConfig
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

#: Inputs, outputs, rows: those of the sites of MiniLM, of a ViT of its size, and of a LLaMA-like model.
SHAPES = (
    *((64, 64, 64), (384, 384, 128), (384, 1536, 128), (1536, 384, 128), (768, 768, 1), (768, 768, 128)),
    *((768, 3072, 1), (768, 3072, 128), (2048, 2048, 1), (2048, 2048, 128)),
)
SCHEMES = ("w8a8-channel-static", "w8au8-channel-static", "w8a8-channel-token")
#: Whole models, and how many samples they are called with. Of Whisper, whose samples are 30 s each, the encoder.
SAMPLES: Mapping[str, tuple[int, ...]] = {
    "MiniLM": (1, 16),
    "DINOv2": (1, 16),
    "SmolLM2": (1,),
    "Whisper": (1,),
    "demo image": (1, 16),
    "demo text": (1, 16),
}
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
        works += [partial(operator, x), partial(_in_floats, operator, Batch(args=(x,)))]
    plain, *ours = interleaved(works)
    return (f"{inputs} x {outputs}, {rows}", f"{1000 * plain:.3f}", *(f"{seconds / plain:.2f}" for seconds in ours))


def _in_floats(module: nn.Module, batch: Batch) -> object:
    with without_units():
        return call(module, batch)


@dataclass(frozen=True, eq=False, kw_only=True)
class Deployed:
    """A whole model, in float and quantized.

    Attributes:
        plain: In float.
        ours: Quantized, its weights kept as they are multiplied.
        batch: Arguments that both are called with.
    """

    plain: nn.Module
    ours: nn.Module
    batch: Batch


def deployed(model: str, home: Path, work: Path) -> Deployed:
    """A real model, or a demo, quantized without smoothing; of Whisper the encoder.

    Raises:
        AbsentError: Model or data are not here.
    """
    if model.startswith("demo "):
        sections = {"model": {"demo": model.removeprefix("demo ")}, "storage": f"sqlite:///{work}/trials.db"}
        config, batches = RunConfig.build({**sections, "out": str(work / "out")}), None
    else:
        request = Request(model=model, scheme=SCHEMES[0], seed=0, short=True, sweep=False, home=home)
        config, batches = configured(request, model_folder(model, home), work)
        few = {"samples": 2, "tuning": 1, "held_out": 1, "proof": 1}  # which codes are multiplied changes no time
        config = RunConfig.build({**config.model_dump(), "data": {**config.data.model_dump(), **few}})
    candidate, _, task = candidates(config, batches)
    candidate.reset()
    plain = copy.deepcopy(candidate.model)
    candidate.apply({})
    ours, batch = candidate.model, task.held_out[0]
    for module in ours.modules():
        if isinstance(module, QuantizedOperator):
            module.keep_dense = module.keep_codes = True  # as what serves a model opens it
    if model == "Whisper":
        features = batch.kwargs["input_features"]
        plain, ours = (whole.get_submodule("model.encoder") for whole in (plain, ours))
        batch = Batch(args=(features,))
    return Deployed(plain=plain, ours=ours, batch=batch)


def sized(batch: Batch, samples: int) -> Batch:
    """As many samples, repeated where there are fewer."""

    def repeated(value: object) -> object:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        return value.repeat(-(-samples // len(value)), *[1] * (value.dim() - 1))[:samples]

    kwargs = {name: repeated(value) for name, value in batch.kwargs.items()}
    return Batch(args=tuple(map(repeated, batch.args)), kwargs=kwargs)


def whole(model: str, made: Deployed, samples: int, rounds: int) -> tuple[tuple[str, ...], float]:
    """One line of the table of models, and the largest ratio of ours in it."""
    batch = sized(made.batch, samples)
    works: list[Callable[[], object]] = [
        *(partial(call, module, batch) for module in (made.plain, made.ours)),
        partial(_in_floats, made.ours, batch),
    ]
    plain, *ours = interleaved(works, rounds)
    shape = next(v.shape for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, torch.Tensor) and v.dim())
    ratios = [seconds / plain for seconds in ours]
    line = (model, " x ".join(map(str, shape)), f"{1000 * plain:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    return line, max(ratios)


def main() -> None:
    made = with_threads(parser(__doc__))
    made.add_argument("--home", type=Path, default=home_folder())
    made.add_argument("--models", nargs="*", default=list(SAMPLES), choices=list(SAMPLES))
    made.add_argument("--rounds", type=int, default=_BLOCKS, help="blocks of calls of a whole model")
    made.add_argument("--most", type=float, default=1.4, help="ratio that no real model may exceed")
    given = made.parse_args()
    largest = 0.0
    with torch_threads(given.threads), torch.no_grad():
        where = machine()
        sites = [site(*shape) for shape in SHAPES]
        models = []
        for model in given.models:
            try:
                with tempfile.TemporaryDirectory() as work:
                    subject = deployed(model, given.home.resolve(), Path(work))
                for samples in SAMPLES[model]:
                    line, ratio = whole(model, subject, samples, given.rounds)
                    models.append(line)
                    largest = largest if model.startswith("demo ") else max(largest, ratio)
                    print(" | ".join(line), flush=True)
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    kinds = [f"{name}{where}" for name in ("int8", "uint8", "int8 per token") for where in ("", " in float32")]
    head = ("inputs x outputs, rows", "float [ms]", *kinds)
    text = table(head, sites)
    if models:
        text += f"\n\n{table(('model', 'input', 'float [ms]', 'int8', 'int8 in float32'), models)}"
    publish("OPERATOR_SPEED", f"{where}\n\n{text}", given.out)
    if largest > given.most:
        raise SystemExit(f"a real model takes {largest:.2f} of float, more than {given.most}")


if __name__ == "__main__":
    main()
