"""Where the error of the model's output comes from: what every site adds to it, predicted from gradients and measured. Formula fA9."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.capture import evaluating
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.losses import divergences, squared_sum
from alphasmith.objectives.judge.model_objective import real_rows
from alphasmith.objectives.media.batch import CALL_ERRORS, Batch, call, main_output, unfused_attention
from alphasmith.objectives.quantization.candidate_model import CandidateModel
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
from alphasmith.objectives.text import counted, error_line

#: Samples that shares are computed from, and random projections of each one's output.
SAMPLES = 8
PROJECTIONS = 8
#: Sites measured beside the prediction, and in its place where there is none; samples they are measured on.
MEASURED = 3
MEASURED_INSTEAD = 12
MEASURED_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class SiteShare:
    """What one site adds to the loss at the model's output.

    Attributes:
        site_loss: Relative squared error of its operators' outputs on the same samples (formula fA5).
        predicted: Its predicted contribution to the loss (formula fA9); None where no gradient reaches it.
        measured: Loss with only this site quantized, on the first samples; None where it was not measured.
    """

    site_loss: float
    predicted: float | None = None
    measured: float | None = None


@dataclass(frozen=True, kw_only=True)
class OutputShares:
    """What every site adds to the loss at the model's output.

    Attributes:
        loss: Which loss: ``mse`` (relative) or ``kl`` [nats per row].
        sites: Site -> its contribution, in forward order; sites with nothing quantized are left out.
        measured: Loss with all of them quantized; None where it is not finite.
        notes: What people should know, e.g. that nothing could be predicted.
    """

    loss: Literal["mse", "kl"]
    sites: Mapping[str, SiteShare]
    measured: float | None
    notes: tuple[str, ...] = ()

    @property
    def predicted(self) -> float | None:
        """Sum of the predicted contributions; None where there is none."""
        known = [site.predicted for site in self.sites.values() if site.predicted is not None]
        return math.fsum(known) if known else None

    def share(self, site: str) -> float | None:
        """Predicted contribution of a site as a part of their sum, 0 to 1; None where it was not predicted."""
        return self._part(None if site not in self.sites else self.sites[site].predicted)

    def share_measured(self, site: str) -> float | None:
        """Loss with only this site quantized, over the same sum; over the loss with all where nothing was predicted."""
        return self._part(None if site not in self.sites else self.sites[site].measured)

    def _part(self, value: float | None) -> float | None:
        whole = self.measured if self.predicted is None else self.predicted
        return None if value is None or not whole else value / whole


def output_shares(
    candidate: CandidateModel,
    smoothings: Mapping[str, Smoothing],
    batches: Sequence[Batch],
    *,
    loss: Literal["mse", "kl"] = "mse",
    seed: int = 0,
    memory: int | None = None,
    samples: int = SAMPLES,
    projections: int = PROJECTIONS,
    measured: int = MEASURED,
    step: Callable[[], None] = lambda: None,
) -> OutputShares:
    """Predict what every site adds to the loss at the model's output, and measure it for the largest. Source: formula fA9.

    One sample runs through the float model at a time; a hook at every operator computes what quantizing its site changes
    there, and as many backward passes as there are projections carry random projections of the output back to it. The
    gradient's graph of one sample must fit into ``memory``, which a forward pass that keeps nothing finds out before. Where it
    does not, the blocks of the model are computed again in every backward pass instead of being kept (gradient checkpointing); where
    that is not enough, each output has one projection, whose graph is freed as it is read; a note says so. Where no way fits, where the
    model's output carries no gradient (a detached forward, a kernel without a derivative), or at sites that no gradient reaches, the
    sites of the largest site loss are measured instead, and a note says so.

    Args:
        candidate: The model; the float one afterwards.
        smoothings: Site -> smoothing; missing sites keep s = 1 and no shift.
        batches: Data; the first samples of it are used. Padding counts for nothing.
        loss: Loss at the output: ``mse`` or ``kl``.
        seed: Of the projections.
        memory: Most bytes beside the float model: quantized operators, and the graph of one sample; None: no bound.
        samples: Most samples.
        projections: Projections of each sample's output.
        measured: Sites that are measured beside the prediction.
        step: Called before every sample that is run forward; may raise to leave.

    Raises:
        InputError: No batches, a number below 1, or a smoothing that does not fit its site.
        NonFiniteError: The float model's output, or a weight, is NaN or infinite.
    """
    if not batches:
        raise InputError("batches", "is empty", "give at least one batch of data to process")
    for name, value in (("samples", samples), ("projections", projections)):
        if value < 1:
            raise InputError(name, f"{value} is below 1", "give a positive number")
    operators = candidate.alone(smoothings)
    model = candidate.model
    single = single_samples(model, batches, samples)
    if not single:
        raise InputError("batches", "hold padding alone", "give batches with real positions")
    if memory is not None:
        memory -= sum(
            tensor.nbytes for of_site in operators.values() for q in of_site.values() for tensor in q.buffers()
        )
    with evaluating(model), unfused_attention():
        found = _predict(model, operators, single, loss, seed, projections, memory, step)
        chosen = _chosen(found, measured)
        losses, together = _measure(model, operators, single[:MEASURED_SAMPLES], loss, chosen, step)
    # What no gradient reaches may also play no part in the output: then quantizing it changes nothing.
    predicted = {name: 0.0 if losses.get(name) == 0 else value for name, value in found.predicted.items()}
    lost = [name for name, value in predicted.items() if value is None]
    notes = [found.note] if found.note else []
    if lost:
        why = found.failure or f"no gradient reaches {counted(len(lost), 'site')}, the first of them {lost[0]}"
        which = f"the {MEASURED_INSTEAD} of the largest site loss are" if len(lost) > MEASURED_INSTEAD else "they are"
        notes.append(f"what sites add to the output's error cannot be predicted: {why}; {which} measured instead")
    sites = {
        name: SiteShare(site_loss=found.site_losses[name], predicted=predicted[name], measured=losses.get(name))
        for name in operators
    }
    return OutputShares(loss=loss, sites=sites, measured=together, notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class _Prediction:
    """Site -> what it adds (None: unknown) and its own loss; why nothing could be predicted, and what was given up for memory, or empty."""

    predicted: dict[str, float | None]
    site_losses: dict[str, float]
    failure: str
    note: str = ""


@dataclass(kw_only=True)
class _Tally:
    """Sums of one site over calls and samples; ``projected`` is that of the projection that runs backward now."""

    error: float = 0.0
    energy: float = 0.0
    contribution: float = 0.0
    projected: float = 0.0
    reached: bool = False


class _Projected(torch.autograd.Function):
    """An operator's output as it is; its gradient meets what quantizing changes there.

    The error is saved as autograd saves tensors, so that it goes where the graph goes: freed with it, or computed again.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, error: Tensor, tally: _Tally) -> Tensor:
        ctx.save_for_backward(error)
        ctx.tally = tally
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (error,) = ctx.saved_tensors
        ctx.tally.reached = True
        ctx.tally.projected += float((gradient.to(error.dtype) * error).sum(dtype=torch.float64))
        return gradient, None, None


class _Pass:
    """Samples run through the float model, with the errors of every site at its operators."""

    def __init__(self, model: nn.Module, operators: Operators, loss: Literal["mse", "kl"]) -> None:
        self._model = model
        self._operators = operators
        self._loss: Literal["mse", "kl"] = loss
        self._tallies = {site: _Tally() for site in operators}
        self._weight = 0.0

    def observe(self, sample: Batch) -> None:
        """Run one sample forward without gradients: site losses alone."""

        def look(site: str, quantized: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            self._count(site, error_of(quantized, args, kwargs, output), output)
            return output

        with torch.no_grad(), hooked(self._model, self._operators, look):
            call(self._model, sample)

    def carry_back(self, sample: Batch, plan: GraphPlan, generator: torch.Generator) -> None:
        """Run one sample forward, and random projections of its output backward to every operator."""
        checkpoints = plan.checkpoints()

        def watch(site: str, quantized: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            error = error_of(quantized, args, kwargs, output)
            if not checkpoints.again:
                self._count(site, error, output)
            if not torch.is_grad_enabled():
                return output
            projected: Tensor = _Projected.apply(reachable(output), error, self._tallies[site])  # type: ignore[no-untyped-call]
            return projected

        with (
            frozen(self._model),
            torch.enable_grad(),
            hooked(self._model, self._operators, watch),
            checkpoints.placed(),
        ):
            rows = real_rows(main_output(call(self._model, sample)), sample)
            for left in range(plan.projections - 1, -1, -1):
                for tally in self._tallies.values():
                    tally.projected = 0.0
                wanted = direction(rows.detach(), self._loss, generator)
                torch.autograd.backward(rows, wanted, retain_graph=left > 0)
                for tally in self._tallies.values():
                    tally.contribution += tally.projected**2 / plan.projections
        self._weight += weight_of(rows.detach(), self._loss)

    def result(self, failure: str, note: str = "") -> _Prediction:
        """What was found."""
        predicted: dict[str, float | None] = {}
        for site, tally in self._tallies.items():
            value = tally.contribution / self._weight if self._weight else math.nan
            known = not failure and (tally.reached or tally.error == 0) and math.isfinite(value)
            predicted[site] = value if known else None
        site_losses = {site: t.error / t.energy if t.energy else 0.0 for site, t in self._tallies.items()}
        return _Prediction(predicted=predicted, site_losses=site_losses, failure=failure, note=note)

    def _count(self, site: str, error: Tensor, output: Tensor) -> None:
        """Count what changes at a call into the site's own loss."""
        tally = self._tallies[site]
        tally.error += squared_sum(error)
        tally.energy += squared_sum(output.detach().to(error.dtype))


def _predict(
    model: nn.Module,
    operators: Operators,
    samples: Sequence[Batch],
    loss: Literal["mse", "kl"],
    seed: int,
    projections: int,
    memory: int | None,
    step: Callable[[], None],
) -> _Prediction:
    """Carry gradients back in the best way that the memory allows; where there is none, find site losses alone."""
    found = graph_plans(model, operators, samples, memory, projections)
    failure = found.failure
    for plan in found.plans:
        run = _Pass(model, operators, loss)
        try:
            for index, sample in enumerate(samples):
                step()
                # Of the sample's own: what it draws depends on no other sample.
                run.carry_back(sample, plan, torch.Generator().manual_seed((seed << 20) + index))
        except (
            CALL_ERRORS
        ) as error:  # kernels without a derivative say so in many ways, as devices do that have too little memory
            failure = failure or f"gradients cannot be carried back through the model ({error_line(error)})"
        else:
            return run.result("", plan.note)
    run = _Pass(model, operators, loss)
    for sample in samples:
        step()
        run.observe(sample)
    return run.result(failure)


def _chosen(found: _Prediction, measured: int) -> list[str]:
    """Sites to measure: the largest of those predicted, and those of the largest site loss of the others."""
    known = {name: value for name, value in found.predicted.items() if value is not None}
    lost = [name for name in found.predicted if name not in known]
    largest = sorted(known, key=lambda name: known[name], reverse=True)[:measured]
    return largest + sorted(lost, key=lambda name: found.site_losses[name], reverse=True)[:MEASURED_INSTEAD]


def _measure(
    model: nn.Module,
    operators: Operators,
    samples: Sequence[Batch],
    loss: Literal["mse", "kl"],
    chosen: Sequence[str],
    step: Callable[[], None],
) -> tuple[dict[str, float], float | None]:
    """Loss at the output with single sites quantized, and with all of them; where it is not finite there is none."""
    sets: list[Operators] = [*({name: operators[name]} for name in chosen), operators]
    sums, weight = [0.0] * len(sets), 0.0
    for sample in samples:
        step()
        with torch.no_grad():
            reference = real_rows(main_output(call(model, sample)), sample).clone()
            weight += weight_of(reference, loss)
            for index, part in enumerate(sets):
                with hooked(model, part, _replace):
                    rows = real_rows(main_output(call(model, sample)), sample)
                sums[index] += _difference(rows, reference, loss)
    losses = [value / weight if weight and math.isfinite(value) else None for value in sums]
    return {n: v for n, v in zip(chosen, losses, strict=False) if v is not None}, losses[-1]


def _replace(_: str, quantized: nn.Module, args: Any, kwargs: Any, __: Tensor) -> Tensor:
    output: Tensor = quantized(*args, **kwargs)
    return output


def _difference(rows: Tensor, reference: Tensor, loss: Literal["mse", "kl"]) -> float:
    """What the rows of one sample add to the sum of the loss; infinite where it is not finite."""
    try:
        if loss == "kl":
            return max(0.0, float(divergences(rows, reference).sum()))
        return squared_sum(rows.to(torch.float32) - reference.to(torch.float32))
    except NonFiniteError:
        return math.inf
