"""How well shares of the output's error are predicted: Kendall's tau against single sites measured, and both sums, on real models.

    python -m benchmarks.output_shares [--models MiniLM DINOv2 SmolLM2 Whisper] [--scheme NAME] [--alpha 0.5] [--loss mse]
                                       [--numbers 8x8 8x1 ...] [--home FOLDER] [--out]

Every site is smoothed with one alpha. Predicted: :func:`output_shares`, of the samples and projections that ``--numbers`` gives (a run
takes 8x8). Measured: the loss at the output with one site quantized and no other, on the first 8 samples, at every n-th site, at most 30
of them; and with all sites quantized. Seconds are of CPU, of the prediction alone.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from alphasmith.objectives.judge.losses import divergences
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.sensitivity.output_shares import MEASURED_SAMPLES, PROJECTIONS, SAMPLES, output_shares
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.model.search import ModelScales
from benchmarks.real_folders import PACKAGES, AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

Loss = Literal["mse", "kl"]
#: Sites measured, spread over the model.
_MOST = 30


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses at the output: site -> with it alone quantized; and with all sites quantized."""

    sites: Mapping[str, float]
    together: float


def measured(
    candidate: CandidateModel, smoothings: Mapping[str, Smoothing], samples: Sequence[Batch], loss: Loss, every: int
) -> Measured:
    """Losses with single sites quantized.

    Args:
        candidate: The model; the float one afterwards.
        smoothings: Of its sites.
        samples: Batches of one sample.
        loss: At the output.
        every: Of so many sites one is measured.
    """
    operators = candidate.alone(smoothings)
    model = candidate.model.eval()
    parts = {name: operators[name] for name in list(operators)[::every]}
    sums, whole, weight = dict.fromkeys(parts, 0.0), 0.0, 0.0
    for sample in samples:
        reference = _rows(model, sample)
        weight += float(reference.square().sum(dtype=torch.float64)) if loss == "mse" else reference[..., 0].numel()
        for name, part in parts.items():
            with _in_place(model, part):
                sums[name] += _difference(_rows(model, sample), reference, loss)
        with _in_place(model, {n: q for part in operators.values() for n, q in part.items()}):
            whole += _difference(_rows(model, sample), reference, loss)
    return Measured(sites={n: value / weight for n, value in sums.items()}, together=whole / weight)


@contextmanager
def _in_place(model: nn.Module, quantized: Mapping[str, nn.Module]) -> Iterator[None]:
    def hook_of(operator: nn.Module) -> Any:
        return lambda _, args, kwargs, __: operator(*args, **kwargs)

    with ExitStack() as stack:
        for name, operator in quantized.items():
            handle = model.get_submodule(name).register_forward_hook(hook_of(operator), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _rows(model: nn.Module, sample: Batch) -> Tensor:
    with torch.no_grad():
        output = main_output(call(model, sample)).float()
    return output if sample.mask is None else output[sample.mask]


def _difference(rows: Tensor, reference: Tensor, loss: Loss) -> float:
    if loss == "kl":
        return float(divergences(rows, reference).sum(dtype=torch.float64))
    return float((rows - reference).square().sum(dtype=torch.float64))


def lines(
    model: str,
    home: Path,
    work: Path,
    *,
    scheme: str,
    alpha: float | None,
    loss: Loss,
    numbers: Sequence[tuple[int, int]],
) -> Iterator[tuple[str, ...]]:
    """One line of the table for every pair of samples and projections.

    Raises:
        AbsentError: Model or data are not here.
    """
    folder = model_folder(model, home)
    request = Request(model=model, scheme=scheme, seed=0, short=False, sweep=False, home=home)
    config, batches = configured(request, folder, work)
    candidate, sites, task = candidates(config, batches)
    smoothings = {} if alpha is None else ModelScales(sites).single(alpha)
    singles = [batch.narrow(i, i + 1) for batch in task.calibration for i in range(batch.size)]
    every = math.ceil(len(sites) / _MOST)
    truth = measured(candidate, smoothings, singles[:MEASURED_SAMPLES], loss, every)
    for samples, projections in numbers:
        start = time.process_time()
        found = output_shares(
            candidate, smoothings, task.calibration, loss=loss, samples=samples, projections=projections, measured=0
        )
        seconds = time.process_time() - start
        predicted = {name: found.sites[name].predicted for name in truth.sites}
        known = {name: value for name, value in predicted.items() if value is not None}
        tau = float(kendalltau([known[n] for n in known], [truth.sites[n] for n in known]).statistic)
        yield (
            model,
            "none" if alpha is None else f"alpha {alpha:g}",
            loss,
            f"{samples}, {projections}",
            f"{len(known)} of {len(found.sites)}",
            f"{tau:.2f}",
            f"{found.predicted or 0.0:.3g} / {truth.together:.3g}",
            f"{(found.predicted or 0.0) / truth.together:.2f}",
            f"{seconds:.1f}",
        )


HEADER = (
    "model",
    "smoothing",
    "loss",
    "samples, projections",
    "sites measured",
    "tau",
    "sum predicted / measured with all sites",
    "ratio",
    "CPU seconds of the prediction",
)


def _pair(text: str) -> tuple[int, int]:
    samples, _, projections = text.partition("x")
    try:
        return int(samples), int(projections)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 8x8, samples by projections") from None


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    names = [p.name for p in PACKAGES]
    arguments_of.add_argument("--home", type=Path, default=home_folder())
    arguments_of.add_argument("--models", nargs="*", default=names, choices=names)
    arguments_of.add_argument("--scheme", default="w8a8-channel-static")
    arguments_of.add_argument("--alpha", type=float, nargs="?", const=None, default=0.5, help="alone: no smoothing")
    arguments_of.add_argument("--loss", choices=["mse", "kl"], default="mse")
    arguments_of.add_argument("--numbers", nargs="*", type=_pair, default=[(SAMPLES, PROJECTIONS)])
    arguments = arguments_of.parse_args()
    rows = []
    with torch_threads(arguments.threads):
        where = machine()
        for model in arguments.models:
            try:
                with tempfile.TemporaryDirectory() as work:
                    for line in lines(
                        model,
                        arguments.home,
                        Path(work),
                        scheme=arguments.scheme,
                        alpha=arguments.alpha,
                        loss=arguments.loss,
                        numbers=arguments.numbers,
                    ):
                        rows.append(line)
                        print(" | ".join(line), flush=True)
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    publish("OUTPUT_SHARES", f"{where} Scheme {arguments.scheme}.\n\n{table(HEADER, rows)}", arguments.out)


if __name__ == "__main__":
    main()
