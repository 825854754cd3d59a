"""What lowers the loss at the output of a real model at no cost at run time, beside alphas: a zero point, biases, rounding of weights.

    python -m benchmarks.free_levers [--models DINOv2 MiniLM Whisper] [--alphas 0.65 0.8] [--threads 1] [--out]

One alpha for the whole model, static activations, weights int8 per channel, short form of the data. ``bias``: the mean over the
calibration samples of what an operator's error adds to its output, on what it reads in the float model, is taken out of its bias.
``compensated``: codes of weights whose errors make up for each other on what the operator reads (formula fB12 with the codes as
entries), in place of the nearest ones. All are scored on held-out samples; ``±``: paired standard error of the difference to ``int8`` in the
same row. ``weights``: activations in float, which shows what rounded weights alone make.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.model.search import ModelScales
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

_INT8, _UINT8, _WEIGHTS = "w8a8-channel-static", "w8au8-channel-static", "w8a16-channel"
#: Column, scheme, whether weights are compensated, whether biases are corrected.
LEVERS: tuple[tuple[str, str, bool, bool], ...] = (
    ("int8", _INT8, False, False),
    ("int8, bias", _INT8, False, True),
    ("int8, compensated", _INT8, True, False),
    ("uint8", _UINT8, False, False),
    ("uint8, bias", _UINT8, False, True),
    ("uint8, compensated", _UINT8, True, False),
    ("weights", _WEIGHTS, False, False),
    ("weights, compensated", _WEIGHTS, True, False),
)
HEADER = ("model", "alpha", "held-out samples", *(name for name, _, _, _ in LEVERS))
#: Codes that a weight may have, and what is added to the diagonal of the second moments of what it reads, over their mean.
_CODES, _DAMPING, _BLOCK = 127, 0.05, 64


@dataclass(eq=False)
class _Seen:
    """What an operator reads and gets wrong in the float model.

    Attributes:
        rows: Rows so far.
        error: (O,) sum of its errors.
        moments: (C, C) sum of x x^T of its smoothed inputs; None: not asked for.
    """

    rows: int
    error: Tensor
    moments: Tensor | None


def losses(
    candidate: CandidateModel,
    smoothings: Mapping[str, Smoothing],
    calibration: Sequence[Batch],
    judge: ModelObjective,
) -> list[str]:
    """The cells of one alpha."""
    cells, base = [], None
    for name, scheme, compensate, correct in LEVERS:
        candidate.reset()
        candidate.use(Scheme.parse(scheme))
        seen = observed(candidate, smoothings, calibration) if compensate or correct else {}
        with candidate.applied(smoothings):
            for operator_name, operator in candidate._operators.items():
                at = seen.get(operator_name)
                if at is not None and compensate and at.moments is not None:
                    _compensate(operator, _smoothed(candidate, operator_name, smoothings), at.moments)
                if at is not None and correct:
                    mean = (at.error / at.rows).to(torch.float32)
                    operator.correction = -mean if operator.correction is None else operator.correction - mean
            errors = torch.cat(
                [judge.errors_of(_run(candidate.model, batch), place) for place, batch in enumerate(judge.batches)]
            )
        base = errors if base is None else base
        _, scatter = paired_difference(errors, base, judge.weight)
        cells.append(f"{float(errors.sum()) / judge.weight:.5f}" + (f" ± {scatter:.5f}" if errors is not base else ""))
        print(f"  {name}: {cells[-1]}", flush=True)
    return cells


def observed(
    candidate: CandidateModel, smoothings: Mapping[str, Smoothing], calibration: Sequence[Batch]
) -> dict[str, _Seen]:
    """Operator -> what it reads and gets wrong where all others are in float; linear operators."""
    made = {name: op for site in candidate.alone(smoothings).values() for name, op in site.items()}
    seen: dict[str, _Seen] = {}
    mask: list[Tensor | None] = [None]
    model = candidate.reset()
    hooks = [
        model.get_submodule(name).register_forward_hook(_watching(name, operator, seen, mask), with_kwargs=True)
        for name, operator in made.items()
        if isinstance(operator, QuantizedOperator) and operator.kind == "linear"
    ]
    try:
        for batch in calibration:
            mask[0] = batch.mask
            _run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _watching(
    name: str, operator: QuantizedOperator, seen: dict[str, _Seen], mask: list[Tensor | None]
) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        read: Tensor = args[0] if args else next(iter(kwargs.values()))
        error = operator(read) - output
        rows, wrong = read.reshape(-1, read.shape[-1]), error.reshape(-1, error.shape[-1])
        if mask[0] is not None and read.shape[:-1] == mask[0].shape:  # padding is nothing that anybody reads
            real = mask[0].reshape(-1).bool()
            rows, wrong = rows[real], wrong[real]
        smoothed = operator.smoothed(rows)
        moments, total = smoothed.T @ smoothed, wrong.sum(0, dtype=torch.float64)
        at = seen.setdefault(name, _Seen(0, torch.zeros_like(total), torch.zeros_like(moments)))
        at.rows += len(rows)
        at.error += total
        if at.moments is not None:
            at.moments += moments

    return hook


def _smoothed(candidate: CandidateModel, name: str, smoothings: Mapping[str, Smoothing]) -> Tensor:
    """The weight that an operator of the candidate is rounded from."""
    plan = candidate._plan
    target = next(target for target in plan.targets if target.operator.name == name)
    return plan.rebuilt(target, candidate._source, plan.checked_smoothings(smoothings), candidate._ranges).weight


def _compensate(operator: QuantizedOperator, weight: Tensor, moments: Tensor) -> None:
    """Codes column after column, the most read first, each error spread over those behind it. Source: formula fB12."""
    scale = operator.weight_scale.double().reshape(-1, 1)
    order = torch.argsort(moments.diagonal(), descending=True)
    rows = (operator.matrix(weight.detach()).double() / scale)[:, order]
    covariance = moments.double()[order][:, order]
    covariance = covariance + torch.eye(len(order), dtype=torch.float64) * _DAMPING * covariance.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    spread: Tensor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(rows)
    for start in range(0, rows.shape[1], _BLOCK):
        stop = min(start + _BLOCK, rows.shape[1])
        errors = rows.new_empty(rows.shape[0], stop - start)
        for column in range(start, stop):
            codes[:, column] = rows[:, column].round().clamp(-_CODES, _CODES)
            error = (rows[:, column] - codes[:, column]) / spread[column, column]
            rows[:, column:stop] -= error[:, None] * spread[column, column:stop]
            errors[:, column - start] = error
        rows[:, stop:] -= errors @ spread[start:stop, stop:]
    made = torch.empty_like(codes)
    made[:, order] = codes
    operator.weight_values = made.to(torch.int8)
    operator._forget()


def _run(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return main_output(call(model, batch))


def rows_of(model: str, alphas: Sequence[float], home: Path, work: Path) -> list[tuple[str, ...]]:
    """Lines of the table.

    Raises:
        AbsentError: Model or data are not here.
    """
    request = Request(model=model, scheme=_INT8, seed=0, short=True, sweep=False, home=home)
    config, batches = configured(request, model_folder(model, home), work)
    candidate, sites, task = candidates(config, batches)
    judge = ModelObjective(candidate, task.held_out, loss=loss_of_answers(candidate.model, task.held_out[0]))
    scales, samples = ModelScales(sites), str(sum(batch.size for batch in task.held_out))
    made: list[tuple[str, ...]] = []
    for alpha in alphas:
        cells = losses(candidate, scales.single(alpha), task.calibration, judge)
        made.append((model, f"{alpha:g}", samples, *cells))
        print(" | ".join(made[-1]), flush=True)
    return made


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("--home", type=Path, default=home_folder())
    arguments_of.add_argument("--models", nargs="*", default=["DINOv2", "MiniLM", "Whisper"])
    arguments_of.add_argument("--alphas", nargs="*", type=float, default=[0.65, 0.8])
    arguments = arguments_of.parse_args()
    rows: list[tuple[str, ...]] = []
    with torch_threads(arguments.threads):
        where = machine()
        for model in arguments.models:
            try:
                with tempfile.TemporaryDirectory() as work:
                    rows += rows_of(model, arguments.alphas, arguments.home.resolve(), Path(work))
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    publish("FREE_LEVERS", f"{where}\n\n{table(HEADER, rows)}", arguments.out)


if __name__ == "__main__":
    main()
