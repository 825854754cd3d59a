"""Quantized models: one to ship (:func:`quantize_model`), or one reused for many candidates (:class:`CandidateModel`).

Both build every tensor from pristine weights: fold edits first (formulas fA2, fA3), in float32 at least, then quantization
(fA4), so that a candidate scored in a search and the model shipped from the same scales have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from alphasmith.objectives.quantization_plan import (
    OperatorRecord,
    Plan,
    QuantizationSummary,
    Target,
    named_tensors,
)
from alphasmith.objectives.quantized_operator import (
    Execution,
    OperatorTensors,
    QuantizedOperator,
    operator_module,
    replace_module,
)
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing

__all__ = ["OperatorRecord", "QuantizationSummary", "QuantizedOperator", "quantize_model"]


def quantize_model(
    model: nn.Module,
    discovery_sites: Sequence[Site],
    *,
    smoothings: Mapping[str, Smoothing],
    ranges: Mapping[str, ChannelRange],
    scheme: Scheme,
    skip: Sequence[str] = (),
    execution: Execution = "integer",
) -> QuantizationSummary:
    """Smooth and quantize ``model`` in place. Source: claims A-1, A-11, A-12; formulas fA2 to fA4.

    Sites of mode ``fold`` put their scales into producers and consumers; ``explicit`` sites put them into the consumers'
    weights and divide the input at run time. A shift goes into biases where the site has ``shift_edits`` and is subtracted at
    run time elsewhere. Then every operator that can be quantized is replaced by a :class:`QuantizedOperator`.

    Args:
        model: A private float copy, not folded yet, in evaluation mode.
        discovery_sites: Sites of this model.
        smoothings: Site name -> smoothing; a missing site keeps s = 1, no shift and the calibrated range.
        ranges: Site name -> range of every input channel over calibration, before smoothing. Needed for static activations:
            the range of the smoothed input is ``range_factor * max_c(peak_c / s_c)``, peaks taken after the shift.
        scheme: Number formats and granularity.
        skip: ``fnmatch`` patterns of operator names to leave in float.
        execution: See :class:`QuantizedOperator`.

    Raises:
        InputError: Sites, smoothings or ranges do not fit the model or each other.
        NonFiniteError: A scale, shift, range or folded weight is NaN or infinite, named by its site. The copy is then spoiled.
    """
    plan = Plan(model, discovery_sites, skip, scheme)
    checked = plan.checked_smoothings(smoothings)
    calibrated = plan.checked_ranges(ranges)
    tensors = named_tensors(model)
    operators: dict[str, QuantizedOperator] = {}
    for target in plan.targets:
        rebuilt = plan.rebuilt(target, tensors, checked, calibrated)
        if target.weight not in plan.shared:
            del tensors[target.weight]  # free each float weight as soon as its payload exists
        operators[target.operator.name] = wrap(
            model, target, rebuilt, scheme=scheme, execution=execution, keep_dense=False
        )
    for name in plan.others:
        tensors[name].data.copy_(plan.edited(name, tensors, checked))
    return plan.summary(model, operators, checked)


def wrap(
    model: nn.Module,
    target: Target,
    tensors: OperatorTensors,
    *,
    scheme: Scheme,
    execution: Execution,
    keep_dense: bool,
) -> QuantizedOperator:
    """Put a quantized operator in the place of the float one, under each name the module has."""
    inner = operator_module(model, target.operator.name)
    operator = QuantizedOperator.quantize(
        inner,
        tensors,
        scheme=scheme,
        kind=target.operator.kind,
        transposed=target.operator.transposed,
        execution=execution,
        keep_dense=keep_dense,
    )
    replace_module(model, inner, operator)
    return operator
