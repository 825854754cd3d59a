"""What an error in a row and at an output of a site counts at the model's output: weights of its calibrated rows. Formula fA10."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import Calibration
from alphasmith.objectives.calibration.capture import (
    CurrentBatch,
    PartLayout,
    PartRows,
    RowNames,
    SiteRecord,
    evaluating,
    part_layouts,
    part_seed,
)
from alphasmith.objectives.judge.model_objective import real_rows
from alphasmith.objectives.media.batch import CALL_ERRORS, Batch, call, main_output, unfused_attention
from alphasmith.objectives.sensitivity._gradients import direction, frozen, hooked, watched
from alphasmith.objectives.sensitivity._graph_memory import GraphPlan, GraphPlans, graph_plans
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.text import counted, error_line


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A calibration whose rows and outputs carry weights.

    Attributes:
        calibration: The same rows; sites that no gradient reaches stay without weights.
        reason: Why some or all are without them; empty where none is.
    """

    calibration: Calibration
    reason: str


def weighed(
    calibration: Calibration,
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    *,
    seed: int,
    loss: Literal["mse", "kl"] = "mse",
    memory: int | None = None,
    step: Callable[[], None] = lambda: None,
) -> Weighed:
    """Weigh the calibrated rows and the outputs of every site by what the model's output feels. Source: formula fA10.

    Every batch runs once forward and, with one random projection of every sample's output, once backward; squared gradients at the
    outputs of a site's operators are summed over its rows and over its outputs. Rows are found again by their names (the
    sample and the place within it), as calibration drew them.

    Args:
        calibration: Of these sites on these batches.
        model: The float model, on the batches' device.
        sites: Sites that were calibrated.
        batches: The data that were calibrated on, in that order.
        seed: What the rows were drawn with.
        loss: Loss at the output: ``mse`` or ``kl``.
        memory: Most bytes of a graph: samples run one by one where that of a batch needs more, and blocks of the model are computed
            again in the backward pass where that of a sample does; None: no bound.
        step: Called after every sample; may raise to leave.
    """
    parts = [
        _Part(site.name, index, model, layout, seed, kept=calibration.sites[site.name].parts[index].x.shape[0])
        for site in sites
        if site.name in calibration.sites
        for index, layout in enumerate(part_layouts(model, site))
    ]
    operators = {f"{part.site}/{part.index}": part.operators for part in parts}
    by_key = dict(zip(operators, parts, strict=True))
    with evaluating(model), unfused_attention():
        # Whole batches where their graph fits, else samples one by one: rows and directions are the same, checkpoints or not.
        whole = [p for p in graph_plans(model, operators, batches, memory).plans if not p.checkpointed]
        ways = GraphPlans(plans=tuple(whole)) if whole else graph_plans(model, operators, _one_by_one(batches), memory)
        reason = ways.failure
        if ways.plans:
            try:
                _collect(model, operators, by_key, batches, loss, seed, step, ways.plans[0], single=not whole)
            except CALL_ERRORS as error:  # kernels without a derivative say so in many ways
                reason = f"gradients cannot be carried back through the model ({error_line(error)})"
    if reason:
        return Weighed(calibration=calibration, reason=reason)
    records = dict(calibration.sites)
    lost = []
    for name in dict.fromkeys(part.site for part in parts):
        record = records[name]
        found = _normalised(
            [part.weights(rows) for part, rows in zip([p for p in parts if p.site == name], record.parts, strict=True)]
        )
        if found is None:
            lost.append(name)
        else:
            records[name] = replace(record, parts=found)
    if lost:
        reason = f"no gradient reaches {counted(len(lost), 'site')}, the first of them {lost[0]}"
    return Weighed(calibration=replace(calibration, sites=records), reason=reason)


def unweighed(record: SiteRecord) -> SiteRecord:
    """The same rows of a site, all of which count alike."""
    return replace(record, parts=tuple(replace(part, row_weight=None, output_weight=None) for part in record.parts))


class _Part:
    """Squared gradients of one part while samples pass."""

    def __init__(self, site: str, index: int, model: nn.Module, layout: PartLayout, seed: int, *, kept: int) -> None:
        self.site = site
        self.index = index
        self.operators = {name: model.get_submodule(name) for name in layout.names}
        self._sizes = {operator.name: operator.out_channels for operator in layout.operators}
        self._convolution = layout.is_convolution
        self._kept = kept
        self._names = RowNames(part_seed(seed, site, index))
        self._modules = {id(module): name for name, module in self.operators.items()}
        self._first = layout.names[0]
        self._calls: dict[str, int] = {}
        self._passing: list[_Call] = []
        self._priorities = torch.empty(0, dtype=torch.float64)
        self._weights = torch.empty(0, dtype=torch.float64)
        self._outputs: dict[str, Tensor] = {}
        self._ranked = True

    def start(self) -> None:
        """A sample begins."""
        self._calls, self._passing = {}, []

    def see(self, module: nn.Module, output: Tensor, current: CurrentBatch) -> Tensor:
        """Watch the gradient of one call's output."""
        name = self._modules[id(module)]
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        if name == self._first:
            self._passing.append(_Call.of(self._places(output), self._names, current))
            # Which patches calibration left out as padding is not known from the output.
            self._ranked = self._ranked and not (self._convolution and current.mask is not None)
        if not torch.is_grad_enabled():
            return output
        tensor = watched(output)

        def arrive(gradient: Tensor) -> None:
            axis = self._axis(gradient)
            rows = gradient.detach().movedim(axis, -1).reshape(-1, gradient.shape[axis])
            squares = rows.to(torch.promote_types(rows.dtype, torch.float32)).square()
            sums = squares.sum(dim=0, dtype=torch.float64).cpu()
            self._outputs[name] = self._outputs[name] + sums if name in self._outputs else sums
            if number < len(self._passing) and self._passing[number].add(squares.sum(dim=1, dtype=torch.float64).cpu()):
                return
            self._ranked = False  # another operator of the part is called otherwise than the one that names its rows

        tensor.register_hook(arrive)
        return tensor

    def end(self) -> None:
        """A sample is done: of all rows so far those of highest priority stay, as many as calibration kept."""
        found = [call for call in self._passing if call.priorities.numel()]
        if not found:
            return
        self._priorities = torch.cat([self._priorities, *(call.priorities for call in found)])
        self._weights = torch.cat([self._weights, *(call.weights[call.keep] for call in found)])
        if self._priorities.numel() > self._kept:
            best = self._priorities.topk(self._kept).indices
            self._priorities, self._weights = self._priorities[best], self._weights[best]

    def weights(self, rows: PartRows) -> PartRows:
        """The rows with their weights, not normalised; without them where no gradient came."""
        if not self._outputs:
            return rows
        # An operator that no gradient reaches adds nothing to the output.
        nothing = {name: torch.zeros(size, dtype=torch.float64) for name, size in self._sizes.items()}
        outputs = torch.cat(list((nothing | self._outputs).values()))
        total, count = outputs.sum(), rows.x.shape[0]
        if outputs.numel() != sum(self._sizes.values()) or not bool(torch.isfinite(total)):
            return rows
        ranked = self._ranked and self._priorities.numel() == count
        order = self._priorities.argsort(descending=True)
        return replace(
            rows,
            row_weight=self._weights[order] if ranked else (total / count).expand(count),
            output_weight=outputs / total.clamp_min(torch.finfo(total.dtype).tiny),
        )

    def _axis(self, output: Tensor) -> int:
        return 1 if self._convolution and output.dim() > 2 else output.dim() - 1

    def _places(self, output: Tensor) -> tuple[int, ...]:
        shape = list(output.shape)
        del shape[self._axis(output)]
        return (math.prod(shape),) if self._convolution else tuple(shape)


@dataclass(eq=False, kw_only=True)
class _Call:
    """Rows of one call of a part: their priorities, which of them are real, and the squared gradients summed so far."""

    priorities: Tensor
    keep: Tensor
    weights: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], names: RowNames, current: CurrentBatch) -> _Call:
        """The rows of a tensor with these leading dimensions, padding left out as calibration leaves it out."""
        priorities = names.priorities(shape, current)
        keep = torch.ones(priorities.numel(), dtype=torch.bool)
        mask = current.mask
        if mask is not None and shape in (tuple(mask.shape), (mask.numel(),)):
            keep = mask.flatten().cpu()
        return cls(priorities=priorities[keep], keep=keep, weights=torch.zeros(priorities.numel(), dtype=torch.float64))

    def add(self, squares: Tensor) -> bool:
        """Count squared gradients of the rows; False where there are not as many."""
        if squares.shape != self.weights.shape:
            return False
        self.weights += squares
        return True


def _collect(
    model: nn.Module,
    operators: Any,
    parts: dict[str, _Part],
    batches: Sequence[Batch],
    loss: Literal["mse", "kl"],
    seed: int,
    step: Callable[[], None],
    plan: GraphPlan,
    *,
    single: bool,
) -> None:
    current = CurrentBatch()
    checkpoints = plan.checkpoints()

    def see(key: str, module: nn.Module, _: Any, __: Any, output: Tensor) -> Tensor:
        if checkpoints.again:  # gradients arrive at what was seen first
            return watched(output) if torch.is_grad_enabled() else output
        return parts[key].see(module, output, current)

    for batch in batches:
        for some in _one_by_one([batch]) if single else [batch]:
            current.start(some)
            if some.mask is None or bool(some.mask.any()):
                for part in parts.values():
                    part.start()
                with frozen(model), torch.enable_grad(), hooked(model, operators, see), checkpoints.placed():
                    output = main_output(call(model, some))
                    rows = real_rows(output, some)
                    wanted = _directions(output.detach(), some, loss, (seed << 20) + current.first)
                    torch.autograd.backward(rows, wanted)
                for part in parts.values():
                    part.end()
            current.end()
            for _ in range(some.size):
                step()


def _directions(output: Tensor, batch: Batch, loss: Literal["mse", "kl"], seed: int) -> Tensor:
    """Random directions of the real rows of an output, each sample's own where samples can be told apart."""
    if output.dim() == 0 or output.shape[0] != batch.size:
        return direction(real_rows(output, batch), loss, torch.Generator().manual_seed(seed))
    found = []
    for index in range(batch.size):
        sample = batch.narrow(index, index + 1)
        if sample.mask is None or bool(sample.mask.any()):
            rows = real_rows(output[index : index + 1], sample)
            found.append(direction(rows, loss, torch.Generator().manual_seed(seed + index)))
    return torch.cat(found)


def _one_by_one(batches: Sequence[Batch]) -> list[Batch]:
    return [batch.narrow(index, index + 1) for batch in batches for index in range(batch.size)]


def _normalised(parts: Sequence[PartRows]) -> tuple[PartRows, ...] | None:
    """Weights of a site with a mean of 1, float32; None where one of its parts has none, or all are 0."""
    rows = [part.row_weight for part in parts if part.row_weight is not None]
    outputs = sum(0 if part.output_weight is None else part.output_weight.numel() for part in parts)
    if len(rows) != len(parts):
        return None
    mean = float(torch.cat(rows).mean())
    if not mean > 0:
        return None
    return tuple(
        replace(
            part,
            row_weight=None if part.row_weight is None else (part.row_weight / mean).to(torch.float32),
            output_weight=None if part.output_weight is None else (part.output_weight * outputs).to(torch.float32),
        )
        for part in parts
    )
