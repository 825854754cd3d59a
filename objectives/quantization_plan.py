"""What quantizing a model changes: which tensors, from which sites' scales, and how many bytes that leaves.

The plan is built once per model and holds none of its tensors; ``quantized.py`` builds models from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.quantized_operator import (
    QuantizedOperator,
    compute_dtype,
    operator_module,
    weight_parameter,
)
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.sites.folding import edit_parameter
from alphasmith.objectives.sites.types import Operator, ParameterEdit, Site

_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class OperatorRecord:
    """What quantization did to one operator.

    Attributes:
        name: Operator.
        site: Its site.
        scheme: Scheme name.
        smoothing: ``folded`` into the producers, ``explicit`` division at the input, or ``none`` (scales 1).
        float_bytes: The weight in float32 [bytes].
        payload_bytes: The stored integers or fp8 values [bytes].
        scale_bytes: Weight scales, activation scale and explicit smoothing scales [bytes].
    """

    name: str
    site: str
    scheme: str
    smoothing: Literal["folded", "explicit", "none"]
    float_bytes: int
    payload_bytes: int
    scale_bytes: int


@dataclass(frozen=True, kw_only=True)
class QuantizationSummary:
    """Sizes of a quantized model, each kind of byte on its own line. Source: claims.md section 2.4, float32 -> int8 = 1/4.

    Attributes:
        operators: One record per quantized operator, in forward order.
        skipped: (name, reason) of operators left in float.
        bias_bytes: Float biases (and other parameters) of quantized operators [bytes].
        norm_bytes: Normalization parameters and statistics [bytes].
        skipped_bytes: Operators left in float, biases included [bytes].
        other_bytes: Everything else the model keeps: embeddings, positions, buffers [bytes].
    """

    operators: tuple[OperatorRecord, ...]
    skipped: tuple[tuple[str, str], ...]
    bias_bytes: int
    norm_bytes: int
    skipped_bytes: int
    other_bytes: int

    @property
    def float_bytes(self) -> int:
        """Quantized weights as they would be in float32 [bytes]."""
        return sum(record.float_bytes for record in self.operators)

    @property
    def payload_bytes(self) -> int:
        """Quantized weights as stored [bytes]; exactly a quarter of ``float_bytes`` for int8 and fp8."""
        return sum(record.payload_bytes for record in self.operators)

    @property
    def scale_bytes(self) -> int:
        """All scales [bytes]."""
        return sum(record.scale_bytes for record in self.operators)

    @property
    def total_bytes(self) -> int:
        """The whole quantized model [bytes]."""
        kept = self.bias_bytes + self.norm_bytes + self.skipped_bytes + self.other_bytes
        return self.payload_bytes + self.scale_bytes + kept


@dataclass(frozen=True, kw_only=True)
class Target:
    """An operator to quantize, its site, and the one name under which its weight is edited."""

    operator: Operator
    site: Site
    weight: str


class Plan:
    """Which tensors change and from which sites' scales; built once per model, holds no model tensors."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], skip: Sequence[str], scheme: Scheme) -> None:
        self.scheme = scheme
        self.sites = {site.name: site for site in sites}
        if len(self.sites) != len(sites):
            raise InputError("sites", "two sites have one name", "pass the sites of one discovery")
        tensors = named_tensors(model)
        first: dict[int, str] = {}
        names: dict[int, int] = {}
        for name, tensor in tensors.items():
            first.setdefault(id(tensor), name)
            names[id(tensor)] = names.get(id(tensor), 0) + 1

        def canonical(name: str) -> str:
            if name not in tensors:
                raise InputError("sites", f"the model has no tensor {name!r}", "discover the sites of this very model")
            return first[id(tensors[name])]

        self.targets: list[Target] = []
        self.skipped: list[tuple[str, str]] = []
        for site in sites:
            for operator in site.operators:
                if operator.raw:
                    self.skipped.append((operator.name, "its weight is used by a functional call"))
                elif any(fnmatchcase(operator.name, pattern) for pattern in skip):
                    self.skipped.append((operator.name, "matches the skip patterns"))
                else:
                    weight_parameter(operator_module(model, operator.name), operator.name)
                    self.targets.append(Target(operator=operator, site=site, weight=canonical(operator.weight)))
        quantized = {target.weight for target in self.targets}
        self.edits: dict[str, list[tuple[str, ParameterEdit]]] = {}
        for site in sites:
            for edit in site.edits:
                name = canonical(edit.parameter)
                # A float operator of an explicit site has nobody to divide its input: its weight must not grow either.
                if site.mode == "left" or (site.mode == "explicit" and name not in quantized):
                    continue
                edit = replace(edit, channel=edit.channel.to(tensors[name].device))
                self.edits.setdefault(name, []).append((site.name, edit))
        shared = {name for name in quantized if names[id(tensors[name])] > 1}
        self.others = [name for name in self.edits if name not in quantized or name in shared]

    def checked_scales(self, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Validated scales of the sites they are not 1 at, float32; leaving the others out keeps their tensors' bits."""
        kept: dict[str, Tensor] = {}
        for name, value in scales.items():
            site = self.sites.get(name)
            if site is None:
                raise InputError("scales", f"no site is named {name!r}", "use the names of the discovered sites")
            s = value.detach().to(torch.float32)
            if s.shape != (site.channels,):
                raise InputError(f"scales[{name}]", f"shape {tuple(s.shape)} is not ({site.channels},)", "give (C,)")
            if not bool(torch.isfinite(s).all()):
                raise NonFiniteError(f"site {name}: a scale is NaN or infinite")
            if not bool((s > 0).all()):
                raise InputError(f"scales[{name}]", "a scale is not positive", "use 1 for channels left alone")
            if bool((s == 1).all()):
                continue
            if site.mode == "left":
                raise InputError(f"scales[{name}]", f"the site takes no scales ({site.reason})", "leave it out")
            _check_ties(site, s)
            kept[name] = s
        return kept

    def checked_absmax(self, absmax: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Validated calibration ranges, float32, of every site with something to quantize; {} where none is needed."""
        ranges: dict[str, Tensor] = {}
        if self.scheme.activations == "none" or self.scheme.activation_granularity == "token":
            return ranges
        for name in {target.site.name: None for target in self.targets}:
            value, channels = absmax.get(name), self.sites[name].channels
            if value is None or value.shape != (channels,):
                found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                raise InputError(f"absmax[{name}]", found, f"give the calibrated abs-max of its {channels} channels")
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(f"site {name}: the calibrated range of an input channel is NaN or infinite")
            ranges[name] = value.detach().to(torch.float32)
        return ranges

    def edited(self, name: str, pristine: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """``pristine`` after every edit of the tensor ``name`` whose site has scales."""
        value = pristine
        for site, edit in self.edits.get(name, ()):
            if site in scales:
                value = edit_parameter(value, edit, scales[site].to(value.device))
        return value

    def rebuilt(
        self, target: Target, source: Mapping[str, Tensor], scales: Mapping[str, Tensor], absmax: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Smoothed weight, largest smoothed input () and explicit scales (C,) of an operator, from pristine weights."""
        site = target.site
        pristine = source[target.weight].detach()
        weight = self.edited(target.weight, pristine.to(compute_dtype(pristine.dtype)), scales)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"site {site.name}: the smoothed weight of {target.operator.name} is NaN or infinite")
        s = scales.get(site.name)
        peak = absmax.get(site.name)
        if peak is not None:
            peak = (peak if s is None else peak / s.to(peak.device)).max().to(weight.device)
        smooth = s.to(weight.device) if s is not None and site.mode == "explicit" else None
        return weight, peak, smooth

    def dependencies(self, target: Target) -> set[str]:
        """Names of the sites whose scales change what :meth:`rebuilt` returns."""
        return {target.site.name, *(site for site, _ in self.edits.get(target.weight, ()))}

    def summary(
        self, model: nn.Module, operators: Mapping[str, QuantizedOperator], scales: Mapping[str, Tensor]
    ) -> QuantizationSummary:
        """Sizes of the model these operators are part of."""
        records = []
        for target in self.targets:
            operator = operators[target.operator.name]
            applied = target.site.name in scales
            scale_tensors = (operator.weight_scale, operator.input_scale, operator.smooth)
            records.append(
                OperatorRecord(
                    name=target.operator.name,
                    site=target.site.name,
                    scheme=self.scheme.name,
                    smoothing=("explicit" if target.site.mode == "explicit" else "folded") if applied else "none",
                    float_bytes=_FLOAT32_BYTES * operator.weight_numel,
                    payload_bytes=operator.weight_values.nbytes,
                    scale_bytes=sum(t.nbytes for t in scale_tensors if t is not None),
                )
            )
        kept = _kept_bytes(model, {name for name, _ in self.skipped})
        return QuantizationSummary(operators=tuple(records), skipped=tuple(self.skipped), **kept)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _check_ties(site: Site, s: Tensor) -> None:
    _, tie = torch.unique(site.ties.to(s.device), return_inverse=True)
    first = torch.zeros(int(tie.max()) + 1, dtype=s.dtype, device=s.device)
    first[tie] = s  # whichever member lands here, all others must equal it
    if not torch.equal(first[tie], s):
        raise InputError(f"scales[{site.name}]", "tied channels have different scales", "give tied channels one scale")


def _kept_bytes(model: nn.Module, skipped: set[str]) -> dict[str, int]:
    """Bytes a quantized model keeps in float, by kind; shared tensors count once."""
    sizes = {"bias_bytes": 0, "norm_bytes": 0, "skipped_bytes": 0, "other_bytes": 0}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedOperator):
            tensors = list(module.inner.parameters()) + list(module.inner.buffers())
            kind = "bias_bytes"
        else:
            tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
            if name in skipped:
                kind = "skipped_bytes"
            else:
                kind = "norm_bytes" if "norm" in type(module).__name__.lower() else "other_bytes"
        for tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                sizes[kind] += tensor.nbytes
    return sizes
