"""Quantized models: one to ship (:func:`quantize_model`), or one reused for many candidates (:class:`CandidateModel`).

Both build every tensor from pristine weights: fold edits first (formulas fA2, fA3), in float32 at least, then quantization
(fA4), so that a candidate scored in a search and the model shipped from the same scales have the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization_plan import (
    OperatorRecord,
    Plan,
    QuantizationSummary,
    Target,
    named_tensors,
)
from alphasmith.objectives.quantized_operator import Execution, QuantizedOperator, operator_module, replace_module
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.sites.types import Site

__all__ = ["CandidateModel", "OperatorRecord", "QuantizationSummary", "QuantizedOperator", "quantize_model"]


def quantize_model(
    model: nn.Module,
    discovery_sites: Sequence[Site],
    *,
    scales: Mapping[str, Tensor],
    absmax: Mapping[str, Tensor],
    scheme: Scheme,
    skip: Sequence[str] = (),
    execution: Execution = "integer",
) -> QuantizationSummary:
    """Smooth and quantize ``model`` in place. Source: claims A-1, A-11, A-12; formulas fA2 to fA4.

    Sites of mode ``fold`` put their scales into producers and consumers; ``explicit`` sites put them into the consumers'
    weights and divide the input at run time. Then every operator that can be quantized is replaced by a
    :class:`QuantizedOperator`.

    Args:
        model: A private float copy, not folded yet, in evaluation mode.
        discovery_sites: Sites of this model.
        scales: Site name -> (C,) positive scales s; a missing site keeps s = 1.
        absmax: Site name -> (C,) abs-max of every input channel over calibration, before smoothing. Needed for static
            activations: the range of the smoothed input is ``max_c(absmax_c / s_c)``.
        scheme: Number formats and granularity.
        skip: ``fnmatch`` patterns of operator names to leave in float.
        execution: See :class:`QuantizedOperator`.

    Raises:
        InputError: Sites, scales or ranges do not fit the model or each other.
        NonFiniteError: A scale, range or folded weight is NaN or infinite, named by its site. The copy is then spoiled.
    """
    plan = Plan(model, discovery_sites, skip, scheme)
    checked = plan.checked_scales(scales)
    ranges = plan.checked_absmax(absmax)
    tensors = named_tensors(model)
    operators: dict[str, QuantizedOperator] = {}
    for target in plan.targets:
        weight, peak, smooth = plan.rebuilt(target, tensors, checked, ranges)
        if target.weight not in plan.others:
            del tensors[target.weight]  # free each float weight as soon as its payload exists
        operators[target.operator.name] = _wrap(
            model, target, weight, peak, smooth, scheme=scheme, execution=execution, keep_dense=False
        )
    for name in plan.others:
        tensors[name].data.copy_(plan.edited(name, tensors[name].detach(), checked))
    return plan.summary(model, operators, checked)


class CandidateModel:
    """One working copy of a model that becomes candidate after candidate. Source: claim A-2.

    Every candidate is rebuilt from the tensors of the model given, which is read, never written, and must not change
    meanwhile. Memory: the working copy (weights once in the stored format and, for operators outside the integer path or
    with ``execution="simulated"``, once more dequantized) plus one parameter at a time in float64 while it is rebuilt.

    Args:
        model: The float model; copied once.
        sites: Its sites.
        absmax: See :func:`quantize_model`.
        scheme: Number formats and granularity.
        skip: ``fnmatch`` patterns of operator names to leave in float.
        execution: See :class:`QuantizedOperator`.

    Raises:
        InputError: See :func:`quantize_model`.
        NonFiniteError: A calibrated range is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        absmax: Mapping[str, Tensor],
        scheme: Scheme,
        skip: Sequence[str] = (),
        *,
        execution: Execution = "integer",
    ) -> None:
        self._plan = Plan(model, sites, skip, scheme)
        self._absmax = self._plan.checked_absmax(absmax)
        self._source_model = model
        self._source = named_tensors(model)
        self._execution = execution
        self.scheme = scheme
        self.sites = tuple(sites)
        self.reset()

    @property
    def model(self) -> nn.Module:
        """The working copy: the last candidate applied, or the float model after :meth:`reset`. Replaced by ``reset``."""
        return self._working

    def reset(self) -> nn.Module:
        """Make the working copy the float model again, bit for bit, and return it (in evaluation mode)."""
        self._working = copy.deepcopy(self._source_model).eval()
        tensors = named_tensors(self._working)
        self._tensors = {
            name: tensors[name] for name in self._plan.others
        }  # the other weights are dropped when wrapped
        self._operators: dict[str, QuantizedOperator] = {}
        self._applied: dict[str, Tensor] | None = None
        return self._working

    def apply(self, scales: Mapping[str, Tensor]) -> None:
        """Turn the working copy into the candidate with these scales, from pristine weights.

        Only tensors that depend on a site whose scales differ from the last candidate's are rebuilt.

        Args:
            scales: Site name -> (C,) positive scales; missing sites keep s = 1.

        Raises:
            InputError: An unknown site, a wrong shape, a scale that is not positive, or scales that differ within a tie.
            NonFiniteError: A scale or a folded weight is NaN or infinite. The next ``apply`` starts afresh.
        """
        checked = self._plan.checked_scales(scales)
        previous, self._applied = self._applied, None
        changed = {site.name for site in self.sites if previous is None or _differs(site.name, previous, checked)}
        for target in self._plan.targets:
            if not changed.isdisjoint(self._plan.dependencies(target)):
                self._rebuild(target, checked)
        for name in self._plan.others:
            if not changed.isdisjoint(site for site, _ in self._plan.edits[name]):
                # Cast first: biases of quantized operators are float32 in the working copy of a half-precision model.
                pristine = self._source[name].detach().to(self._tensors[name].dtype)
                self._tensors[name].data.copy_(self._plan.edited(name, pristine, checked))
        self._applied = checked

    def summary(self) -> QuantizationSummary:
        """Sizes of the candidate applied last.

        Raises:
            InputError: No candidate was applied since the last reset.
        """
        if self._applied is None:
            raise InputError("candidate", "no scales are applied", "call apply(scales) first")
        return self._plan.summary(self._working, self._operators, self._applied)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the working copy without gradients."""
        with torch.no_grad():
            return self._working(*args, **kwargs)

    def _rebuild(self, target: Target, scales: Mapping[str, Tensor]) -> None:
        weight, peak, smooth = self._plan.rebuilt(target, self._source, scales, self._absmax)
        operator = self._operators.get(target.operator.name)
        if operator is not None:
            operator.requantize(weight=weight, absmax=peak, smooth=smooth)
            return
        self._operators[target.operator.name] = _wrap(
            self._working,
            target,
            weight,
            peak,
            smooth,
            scheme=self.scheme,
            execution=self._execution,
            keep_dense=True,
        )


def _wrap(
    model: nn.Module,
    target: Target,
    weight: Tensor,
    absmax: Tensor | None,
    smooth: Tensor | None,
    *,
    scheme: Scheme,
    execution: Execution,
    keep_dense: bool,
) -> QuantizedOperator:
    """Put a quantized operator in the place of the float one, under each name the module has."""
    inner = operator_module(model, target.operator.name)
    operator = QuantizedOperator.quantize(
        inner,
        weight=weight,
        absmax=absmax,
        smooth=smooth,
        scheme=scheme,
        kind=target.operator.kind,
        transposed=target.operator.transposed,
        execution=execution,
        keep_dense=keep_dense,
    )
    replace_module(model, inner, operator)
    return operator


def _differs(site: str, previous: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> bool:
    before, now = previous.get(site), current.get(site)
    if before is None or now is None:
        return before is not now
    return not torch.equal(before, now.to(before.device))
