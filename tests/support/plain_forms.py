"""What the product computes in pieces, in place or for many candidates at once, as one plain function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.model.modules import operator_module, replace_module
from alphasmith.objectives.quantization.operator import Execution, QuantizedOperator
from alphasmith.objectives.quantization.plan import Plan, QuantizationSummary, named_tensors
from alphasmith.objectives.quantization.quantizers import dequantize_weight, quantize_weight
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.stack import QuantizedStack, put
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing


def relative_squared_error(out: Tensor, ref: Tensor) -> float:
    """``sum (out - ref)^2 / sum ref^2``."""
    return float((out.double() - ref.double()).square().sum() / ref.double().square().sum())


def kl_divergence(logits: Tensor, ref_logits: Tensor) -> float:
    """Mean over rows of ``KL(softmax(ref_logits) || softmax(logits))`` [nats], by torch's own function."""
    ours, reference = (values.double().log_softmax(-1).flatten(0, -2) for values in (logits, ref_logits))
    return float(functional.kl_div(ours, reference, reduction="batchmean", log_target=True))


def fake_quantize_weight(w: Tensor, scheme: Scheme, out_features: Sequence[int] | None = None) -> Tensor:
    """(O, D) weights quantized and dequantized, operator by operator; ``out_features``: rows of each, None: one operator."""
    parts = w.split(list(out_features or (w.shape[0],)))
    return torch.cat([dequantize_weight(quantize_weight(part, scheme), scheme) for part in parts])


def quantization_loss(x: Tensor, w: Tensor, candidate: Tensor | Smoothing, scheme: Scheme) -> float:
    """Relative squared error of one linear layer (rows ``x``, weight ``w``) under one candidate, ranges taken from ``x``."""
    smoothing = candidate if isinstance(candidate, Smoothing) else Smoothing(scales=candidate)
    return SiteObjective(linear_site_data(x, w), scheme).loss(smoothing)


def symmetric(absmax: Tensor) -> ChannelRange:
    """The range ``[-absmax, absmax]``."""
    return ChannelRange(-absmax, absmax)


def quantize_model(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    smoothings: Mapping[str, Smoothing],
    ranges: Mapping[str, ChannelRange],
    scheme: Scheme,
    skip: Sequence[str] = (),
    execution: Execution = "integer",
) -> QuantizationSummary:
    """Smooth and quantize ``model`` in place, once: what a candidate model must be equal to, bit for bit."""
    plan = Plan(model, sites, skip, scheme)
    checked = plan.checked_smoothings(smoothings)
    calibrated = plan.checked_ranges(ranges)
    tensors = named_tensors(model)
    operators: dict[str, QuantizedOperator] = {}
    for target in plan.targets:
        rebuilt = plan.rebuilt(target, tensors, checked, calibrated)
        inner = operator_module(model, target.operator.name)
        operator = QuantizedOperator.quantize(
            inner,
            rebuilt,
            scheme=scheme,
            kind=target.operator.kind,
            transposed=target.operator.transposed,
            execution=execution,
            keep_dense=False,
        )
        replace_module(model, inner, operator)
        operators[target.operator.name] = operator
    stacks = {}
    for target in plan.stacks:
        weight = plan.smoothed(target, tensors, checked)
        stack = QuantizedStack.quantize(weight, scheme=scheme, transposed=target.operator.transposed)
        put(model, target.operator.weight, stack)
        stacks[target.operator.name] = stack
    for name in plan.others:
        tensors[name].data.copy_(plan.edited(name, tensors, checked))
    return plan.summary(model, {**operators, **stacks}, checked)
