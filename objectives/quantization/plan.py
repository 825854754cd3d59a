"""The plan of a quantization: which tensors it changes, from which sites' smoothings, and how many bytes that leaves.

The plan is built once per model and holds none of its tensors; ``quantized.py`` builds models from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.finite import all_finite
from alphasmith.objectives.model.modules import operator_module, weight_parameter
from alphasmith.objectives.quantization.operator import OperatorTensors, QuantizedOperator, compute_dtype
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.quantization.stack import QuantizedStack
from alphasmith.objectives.sites.folding import check_smoothing, edit_parameter, shift_bias, shift_product
from alphasmith.objectives.sites.types import Operator, ParameterEdit, ShiftEdit, Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing
from alphasmith.objectives.text import matches

_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class OperatorRecord:
    """What quantization did to one operator.

    Attributes:
        name: Operator.
        site: Its site.
        scheme: Scheme name.
        smoothing: ``folded`` into the producers, ``explicit`` division at the input, or ``none`` (scales 1, no shift).
        float_bytes: The weight in float32 [bytes].
        payload_bytes: The stored integers or fp8 values [bytes].
        scale_bytes: Weight scales, activation scale and zero point, explicit smoothing scales, shifts and their corrections [bytes].
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
    """Sizes of a quantized model, each kind of byte on its own line. Source: formula fA4.

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
        """All scales and shifts [bytes]."""
        return sum(record.scale_bytes for record in self.operators)

    @property
    def total_bytes(self) -> int:
        """The whole quantized model [bytes]."""
        kept = self.bias_bytes + self.norm_bytes + self.skipped_bytes + self.other_bytes
        return self.payload_bytes + self.scale_bytes + kept


@dataclass(frozen=True, kw_only=True)
class Target:
    """An operator to quantize, its site, the site's scheme, and the one name under which its weight is edited."""

    operator: Operator
    site: Site
    scheme: Scheme
    weight: str


class Plan:
    """Which tensors change and from which sites' smoothings; built once per model, holds no model tensors."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], skip: Sequence[str], schemes: Scheme | SiteSchemes
    ) -> None:
        self.schemes = SiteSchemes.given(schemes)
        self.schemes.require_sites(site.name for site in sites)
        self.skip = tuple(skip)
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
        self.stacks: list[Target] = []
        self.skipped: list[tuple[str, str]] = []
        for site in sites:
            scheme = self.schemes.of(site.name)
            for operator in site.operators:
                if operator.raw and not operator.stacked:
                    self.skipped.append((operator.name, "its weight is used by a functional call"))
                elif matches(operator.name, skip):
                    self.skipped.append((operator.name, "matches the skip patterns"))
                elif scheme.is_float:
                    self.skipped.append((operator.name, "the scheme of its site is float"))
                else:
                    if not operator.stacked:
                        weight_parameter(operator_module(model, operator.name), operator.name)
                    targets = self.stacks if operator.stacked else self.targets
                    weight = canonical(operator.weight)
                    targets.append(Target(operator=operator, site=site, scheme=scheme, weight=weight))
        quantized = {target.weight for target in (*self.targets, *self.stacks)}
        self.edits: dict[str, list[tuple[str, ParameterEdit]]] = {}
        for site in sites:
            for edit in site.edits:
                name = canonical(edit.parameter)
                # A float operator of an explicit site has nobody to divide its input: its weight must not grow either.
                if site.mode == "left" or (site.mode == "explicit" and name not in quantized):
                    continue
                edit = replace(edit, channel=edit.channel.to(tensors[name].device))
                self.edits.setdefault(name, []).append((site.name, edit))
        # A quantized operator adds what its weight makes of a shift by itself; float ones need it in their bias.
        corrected = {canonical(target.operator.bias) for target in self.targets if target.operator.bias}
        self.shifts: dict[str, list[tuple[str, ShiftEdit]]] = {}
        for site in sites:
            for shifted in site.shift_edits:
                name = canonical(shifted.parameter)
                if shifted.weight and name in corrected:
                    continue
                weight = canonical(shifted.weight) if shifted.weight else ""
                self.shifts.setdefault(name, []).append((site.name, replace(shifted, parameter=name, weight=weight)))
        self.shared = {name for name in quantized if names[id(tensors[name])] > 1}
        # Shifted biases first: what is added to them comes from weights that are still pristine.
        edited = dict.fromkeys((*self.shifts, *self.edits))
        self.others = [name for name in edited if name not in quantized or name in self.shared]

    def checked_smoothings(self, smoothings: Mapping[str, Smoothing]) -> dict[str, Smoothing]:
        """Validated smoothings, float32, of the sites that they change; leaving the others out keeps their tensors' bits."""
        kept: dict[str, Smoothing] = {}
        for name, given in smoothings.items():
            site = self.sites.get(name)
            if site is None:
                raise InputError("smoothings", f"no site is named {name!r}", "use the names of the discovered sites")
            shift = given.shift
            if shift is not None:
                shift = None if bool((shift == 0).all()) else shift.detach().to(torch.float32)
            smoothing = replace(given, scales=given.scales.detach().to(torch.float32), shift=shift)
            check_smoothing(site, smoothing)
            if smooths(smoothing) or smoothing.range_factor != 1:
                kept[name] = smoothing
        return kept

    def checked_ranges(self, ranges: Mapping[str, ChannelRange]) -> dict[str, ChannelRange]:
        """Validated calibration ranges, float32, of every site with something to quantize; {} where none is needed."""
        kept: dict[str, ChannelRange] = {}
        for name in {target.site.name: None for target in self.targets if target.scheme.static}:
            value, channels = ranges.get(name), self.sites[name].channels
            if value is None or value.low.shape != (channels,) or value.high.shape != (channels,):
                found = (
                    "is missing" if value is None else f"has shapes {tuple(value.low.shape)}, {tuple(value.high.shape)}"
                )
                raise InputError(f"ranges[{name}]", found, f"give the calibrated range of its {channels} channels")
            low, high = (edge.detach().to(torch.float32) for edge in (value.low, value.high))
            if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
                raise NonFiniteError(f"site {name}: the calibrated range of an input channel is NaN or infinite")
            if bool((low > high).any()):
                raise InputError(f"ranges[{name}]", "the smallest value is above the largest", "give low <= high")
            kept[name] = ChannelRange(low, high)
        return kept

    def edited(
        self,
        name: str,
        source: Mapping[str, Tensor],
        smoothings: Mapping[str, Smoothing],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The tensor ``name`` after every edit of it whose site is smoothed.

        Args:
            name: A tensor with edits.
            source: Pristine tensors: this one and, for biases of float operators, which take a shift's product, their weights.
            smoothings: See :meth:`checked_smoothings`.
            dtype: What to cast to before the edits; None: keep.
        """
        value = source[name].detach().to(dtype or source[name].dtype)
        shifts = [(smoothings[site], edit) for site, edit in self.shifts.get(name, ()) if site in smoothings]
        for smoothing, edit in shifts:
            if smoothing.shift is not None and not edit.weight:
                value = shift_bias(value, edit, smoothing.shift)
        value = self._scaled(name, value, smoothings)
        for smoothing, edit in shifts:
            if smoothing.shift is not None and edit.weight:
                weight = self._scaled(edit.weight, source[edit.weight].detach().double(), smoothings)
                z = _divided(smoothing.shift, smoothing.scales)
                value = (value + shift_product(weight, edit.channel, edit.transposed, z)).to(value.dtype)
        return value

    def rebuilt(
        self,
        target: Target,
        source: Mapping[str, Tensor],
        smoothings: Mapping[str, Smoothing],
        ranges: Mapping[str, ChannelRange],
    ) -> OperatorTensors:
        """What an operator is quantized from, from pristine weights.

        The static range reaches from the smallest to the largest ``range_factor * (value - z_c) / s_c`` that calibration saw. At folded sites the operator
        reads x / s, so the shift it subtracts is z / s; where the producers' biases absorb the shift it subtracts nothing.

        Raises:
            NonFiniteError: The smoothed weight is NaN or infinite.
        """
        site = target.site
        pristine = source[target.weight].detach()
        dtype = compute_dtype(pristine.dtype)
        weight = self.smoothed(target, source, smoothings)
        smoothing = smoothings.get(site.name)
        low, high = _edges(ranges.get(site.name), smoothing, weight.device)
        if smoothing is None or not smooths(smoothing):
            return OperatorTensors(weight=weight, low=low, high=high)
        explicit = site.mode == "explicit"
        smooth = smoothing.scales.to(weight.device) if explicit else None
        if smoothing.shift is None:
            return OperatorTensors(weight=weight, low=low, high=high, smooth=smooth)
        z = _divided(smoothing.shift, smoothing.scales)
        shift = None if site.shift_edits else (smoothing.shift if explicit else z).to(weight.device, dtype)
        exact = self._scaled(target.weight, pristine.double(), smoothings)
        correction = shift_product(exact, self._inputs(target), target.operator.transposed, z).to(dtype)
        return OperatorTensors(
            weight=weight, low=low, high=high, smooth=smooth, shift=shift, correction=correction
        )  # fmt: skip

    def smoothed(self, target: Target, source: Mapping[str, Tensor], smoothings: Mapping[str, Smoothing]) -> Tensor:
        """The weight of an operator after every edit of it whose site is smoothed, in the type that it is computed in.

        Raises:
            NonFiniteError: It is NaN or infinite.
        """
        pristine = source[target.weight].detach()
        weight = self._scaled(target.weight, pristine.to(compute_dtype(pristine.dtype)), smoothings)
        if not all_finite(weight):
            raise NonFiniteError(
                f"site {target.site.name}: the smoothed weight of {target.operator.name} is NaN or infinite"
            )
        return weight

    def _scaled(self, name: str, value: Tensor, smoothings: Mapping[str, Smoothing]) -> Tensor:
        for site, edit in self.edits.get(name, ()):
            if site in smoothings:
                value = edit_parameter(value, edit, smoothings[site].scales.to(value.device))
        return value

    def _inputs(self, target: Target) -> Tensor:
        """Site channel of every element of a target's weight."""
        for site, edit in self.edits.get(target.weight, ()):
            if site == target.site.name and edit.power > 0:
                return edit.channel
        raise InputError(
            f"site {target.site.name}",
            f"does not say which channels {target.operator.name} reads",
            "discover the sites of this very model",
        )

    def dependencies(self, target: Target) -> set[str]:
        """Names of the sites whose smoothing changes what :meth:`rebuilt` returns."""
        return {target.site.name, *(site for site, _ in self.edits.get(target.weight, ()))}

    def editors(self, name: str) -> set[str]:
        """Names of the sites whose smoothing changes what :meth:`edited` returns for the tensor ``name``."""
        shifts = self.shifts.get(name, ())
        weights = [
            edit.weight for _, edit in shifts if edit.weight
        ]  # what is added to a bias comes from scaled weights
        scaled = (site for tensor in (name, *weights) for site, _ in self.edits.get(tensor, ()))
        return {*(site for site, _ in shifts), *scaled}

    def summary(
        self,
        model: nn.Module,
        operators: Mapping[str, QuantizedOperator | QuantizedStack],
        smoothings: Mapping[str, Smoothing],
    ) -> QuantizationSummary:
        """Sizes of the model these operators are part of."""
        records = []
        for target in (*self.targets, *self.stacks):
            operator = operators[target.operator.name]
            smoothing = smoothings.get(target.site.name)
            applied = smoothing is not None and smooths(smoothing)
            scale_tensors = (
                operator.weight_scale,
                operator.input_scale,
                operator.input_zero,
                operator.smooth,
                operator.shift,
                operator.correction,
            )
            records.append(
                OperatorRecord(
                    name=target.operator.name,
                    site=target.site.name,
                    scheme=target.scheme.name,
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


def smooths(smoothing: Smoothing) -> bool:
    """Whether a smoothing changes any parameter: scales other than 1, or a shift."""
    return smoothing.shift is not None or not bool((smoothing.scales == 1).all())


def same_smoothing(left: Smoothing | None, right: Smoothing | None) -> bool:
    """Whether two smoothings (None: none) are equal to the bit."""
    if left is None or right is None:
        return left is right
    if left.range_factor != right.range_factor or not torch.equal(left.scales, right.scales.to(left.scales.device)):
        return False
    if left.shift is None or right.shift is None:
        return left.shift is right.shift
    return torch.equal(left.shift, right.shift.to(left.shift.device))


def _divided(shift: Tensor, scales: Tensor) -> Tensor:
    """(C,) float64 shift in units of the smoothed input."""
    return shift.double() / scales.to(shift.device).double()


def _edges(
    found: ChannelRange | None, smoothing: Smoothing | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """() smallest and () largest value of a site's smoothed input, times its range factor; None without a calibrated range."""
    if found is None:
        return None, None
    given = () if smoothing is None else (smoothing.scales, smoothing.shift, smoothing.range_factor)
    low, high = found.edges(*given)
    return low.to(device), high.to(device)


def _kept_bytes(model: nn.Module, skipped: set[str]) -> dict[str, int]:
    """Bytes a quantized model keeps in float, by kind; shared tensors count once."""
    sizes = {"bias_bytes": 0, "norm_bytes": 0, "skipped_bytes": 0, "other_bytes": 0}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedOperator):
            tensors = list(module.inner.parameters()) + list(module.inner.buffers())
            kind = "bias_bytes"
        elif isinstance(module, QuantizedStack):
            continue
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
