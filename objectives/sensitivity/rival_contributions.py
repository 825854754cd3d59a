"""What sites would add to the error of the model's output under several smoothings: all of them by the same backward passes. Formula fA9."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.capture import evaluating
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.model_objective import real_rows
from alphasmith.objectives.media.batch import CALL_ERRORS, Batch, call, main_output, unfused_attention
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.plan import same_smoothing
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.sensitivity._gradients import (
    Operators,
    direction,
    error_of,
    frozen,
    hooked,
    reachable,
    single_samples,
    weight_of,
)
from alphasmith.objectives.sensitivity._graph_memory import GraphPlan, graph_plans
from alphasmith.objectives.smoothing import Smoothing

#: Samples that are run, unless told otherwise: clipped rows are rare.
_SAMPLES = 16


def rival_contributions(
    candidate: CandidateModel,
    rivals: Sequence[Mapping[str, Smoothing]],
    batches: Sequence[Batch],
    *,
    loss: Literal["mse", "kl"] = "mse",
    seed: int = 0,
    memory: int | None = None,
    samples: int = _SAMPLES,
    step: Callable[[], None] = lambda: None,
    schemes: Sequence[SiteSchemes] = (),
) -> tuple[dict[str, float], ...]:
    """What every site is predicted to add to the loss at the output under each of several smoothings. Source: formula fA9.

    Every sample runs once forward and, with one random projection of its output, once backward. Errors of two rows of a site are
    taken to be independent, so that the square is taken of every row's part of the sum: as many terms as there are rows scatter
    far less than a few squares of sums over all of them.

    Args:
        candidate: The model; the float one afterwards.
        rivals: Site -> smoothing, each; missing sites keep s = 1 and no shift.
        batches: Data; the first samples of it are used. Padding counts for nothing.
        loss: Loss at the output: ``mse`` or ``kl``.
        seed: Of the projections.
        memory: Most bytes beside the float model: quantized operators, and the graph of one sample; None: no bound.
        samples: Most samples.
        step: Called before every sample; may raise to leave.
        schemes: Schemes of the sites under each of ``rivals``; empty: the candidate's own. Sites in float are left out.

    Returns:
        For each of ``rivals``, site -> contribution in units of the loss; sites of which it is not known are left out, all of them where no
        gradient can be carried back. Where there is memory for one smoothing alone, that is the first.

    Raises:
        InputError: No batches, or a smoothing that does not fit its site.
        NonFiniteError: A weight is NaN or infinite.
    """
    if not batches:
        raise InputError("batches", "is empty", "give at least one batch of data to process")
    operators: dict[str, Mapping[str, nn.Module]] = {}
    labels: list[dict[str, str]] = []
    under = list(schemes) or [candidate.schemes] * len(rivals)
    for number, (smoothings, formats) in enumerate(zip(rivals, under, strict=True)):
        labels.append({})
        with candidate.using(formats):
            alone = candidate.alone(smoothings, dense=False)
        for site, made in alone.items():
            equal = (
                labels[other][site]
                for other in range(number)
                if site in labels[other]
                and under[other].of(site) == formats.of(site)
                and same_smoothing(rivals[other].get(site), smoothings.get(site))
            )
            label = next(equal, f"{number} {site}")
            operators.setdefault(label, made)
            labels[-1][site] = label
    single = single_samples(candidate.model, batches, samples)
    known: Mapping[str, float] = {}
    if single and labels:
        with evaluating(candidate.model), unfused_attention():
            for some in (operators, {label: operators[label] for label in labels[0].values()}):
                left = None if memory is None else memory - _buffer_bytes(some)
                known = known or _contributions(candidate.model, some, single, loss, seed, left, step)
    return tuple({site: known[label] for site, label in of_site.items() if label in known} for of_site in labels)


def _contributions(
    model: nn.Module,
    operators: Operators,
    samples: Sequence[Batch],
    loss: Literal["mse", "kl"],
    seed: int,
    memory: int | None,
    step: Callable[[], None],
) -> dict[str, float]:
    """By label of ``operators``, in the best way that the memory allows; empty where there is none."""
    for plan in graph_plans(model, operators, samples, memory).plans:
        tallies = {label: _Tally() for label in operators}
        weight = 0.0
        try:
            for index, sample in enumerate(samples):
                step()
                generator = torch.Generator().manual_seed((seed << 20) + index)
                weight += _carry_back(model, operators, tallies, plan, sample, loss, generator)
        except (
            CALL_ERRORS
        ):  # kernels without a derivative say so in many ways, as devices do that have too little memory
            continue
        found = {label: tally.sum / weight for label, tally in tallies.items() if tally.reached and weight}
        return {label: value for label, value in found.items() if math.isfinite(value)}
    return {}


@dataclass(kw_only=True)
class _Tally:
    """Sum over rows, and whether a gradient came."""

    sum: float = 0.0
    reached: bool = False


def _carry_back(
    model: nn.Module,
    operators: Operators,
    tallies: Mapping[str, _Tally],
    plan: GraphPlan,
    sample: Batch,
    loss: Literal["mse", "kl"],
    generator: torch.Generator,
) -> float:
    """Run one sample forward, and a projection of its output back to every operator; what the sample adds to the loss's divisor."""
    checkpoints = plan.checkpoints()

    def watch(label: str, quantized: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        error = error_of(quantized, args, kwargs, output)
        axis = 1 if quantized.kind == "conv" and output.dim() > 2 else output.dim() - 1
        met: Tensor = _Met.apply(reachable(output), error, axis, tallies[label])  # type: ignore[no-untyped-call]
        return met

    with frozen(model), torch.enable_grad(), hooked(model, operators, watch), checkpoints.placed():
        rows = real_rows(main_output(call(model, sample)), sample)
        torch.autograd.backward(rows, direction(rows.detach(), loss, generator))
    return weight_of(rows.detach(), loss)


class _Met(torch.autograd.Function):
    """An operator's output as it is; in every row of it the gradient meets what quantizing changes there."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, error: Tensor, axis: int, tally: _Tally) -> Tensor:
        ctx.save_for_backward(error)
        ctx.axis, ctx.tally = axis, tally
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        (error,) = ctx.saved_tensors
        ctx.tally.reached = True
        rows = (gradient.to(error.dtype) * error).sum(ctx.axis, dtype=torch.float64)
        ctx.tally.sum += float(rows.square().sum())
        return gradient, None, None, None


def _buffer_bytes(operators: Operators) -> int:
    return sum(tensor.nbytes for of_site in operators.values() for q in of_site.values() for tensor in q.buffers())
