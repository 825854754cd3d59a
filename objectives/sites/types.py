"""What discovery finds, as plain frozen records. No tracing here, no arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from alphasmith.objectives.literals import SiteMode
from alphasmith.objectives.sites.coverage import layers_of

OperatorKind = Literal["linear", "conv"]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One linear or convolution of the model, found by the identity of its weight.

    Attributes:
        name: Dotted module path that owns the weight, e.g. ``model.layers.0.self_attn.q_proj``.
        weight: Full parameter name of the weight.
        bias: Full parameter name of the bias, or None.
        kind: ``linear`` (X (T, C), W (O, C)) or ``conv`` (X patches (T, C*kernel), W (O, C/groups*kernel)).
        transposed: True when the parameter is stored (in, out), as GPT-2's Conv1D and transposed convolutions do.
        raw: True when the weight is used by a functional call rather than by its own module's forward (stacked experts,
            ``nn.MultiheadAttention``): its scale can be folded, its input cannot be quantized or multiplied.
        in_channels: Number of input channels C.
        out_channels: Number of output channels O.
        kernel: Kernel size, () for linear.
        groups: Convolution groups, 1 for linear.
        plain: True when it runs the library's own forward, so that nothing happens to its input before the product (but
            the padding that the module states) and its bias is what is added. Only then can its input be shifted.
        stacked: Number of matrices of a raw operator whose weight is a tensor (E, ., .) of them that only linear products read
            (stacked experts): its weight can be quantized, its input cannot. 0 for any other.
    """

    name: str
    weight: str
    bias: str | None
    kind: OperatorKind
    transposed: bool
    raw: bool
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    plain: bool = True
    stacked: int = 0


@dataclass(frozen=True, kw_only=True)
class ParameterEdit:
    """How one parameter absorbs a site's scales s: ``p' = (p + offset) * s[channel]**power - offset``.

    Attributes:
        parameter: Full name of the parameter or buffer.
        channel: (broadcastable to the parameter) int64; the site channel of every element, -1 where it is not touched.
        power: +1 for consumers (weights grow with s, formula fA3), -1 for producers (outputs shrink, formula fA2).
        offset: 1.0 for norms that multiply by (1 + w), else 0.0.
    """

    parameter: str
    channel: torch.Tensor
    power: int
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ShiftEdit:
    """How one bias absorbs a site's shift z, before any scale does.

    A producer's bias shrinks: ``b' = b - z[channel]``. A consumer's grows by what its weight W makes of the shift:
    ``b'_o = b_o + sum over W[o, ...] of W * z[channel]``.

    Attributes:
        parameter: Full name of the bias.
        channel: int64 site channel, -1 where nothing is shifted: of every element of the bias (producers), or of every
            element of the weight, broadcastable to it (consumers).
        weight: Full name of the consumer's weight; empty for producers.
        transposed: True when that weight is stored (in, out).
    """

    parameter: str
    channel: torch.Tensor
    weight: str = ""
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Site:
    """One activation tensor and the operators that read it. Source: claim A-1.

    Attributes:
        name: Name of the first operator, in forward order, that reads the tensor; unique among sites.
        operators: All operators that read it, in forward order.
        channels: C.
        mode: ``fold`` (s goes into the producers), ``explicit`` (the quantizer of the input divides by s at run time),
            ``left`` (s = 1).
        reason: Why it is not ``fold``; empty when it is. Shown to the user.
        ties: (C,) int64; channels with the same value must share one scale (grouped-query attention). arange(C) when free.
        edits: Parameter edits of consumers and producers; for ``explicit`` sites only those of the consumers.
        producers: Names of the modules that absorb 1/s; empty unless ``fold``.
        shift_edits: Biases that absorb a shift, where producers and consumers provably can; empty where a shift stays in
            the quantizer of the input.
    """

    name: str
    operators: tuple[Operator, ...]
    channels: int
    mode: SiteMode
    reason: str
    ties: torch.Tensor
    edits: tuple[ParameterEdit, ...]
    producers: tuple[str, ...]
    shift_edits: tuple[ShiftEdit, ...] = ()

    @property
    def shiftable(self) -> bool:
        """Whether a shift can be applied: every operator's own quantizer sees the tensor, and its bias is what is added."""
        return self.mode != "left" and all(operator.plain and not operator.raw for operator in self.operators)

    @property
    def weight_count(self) -> int:
        """Numbers in the weights of its operators: multiply-adds of one row."""
        return sum(o.in_channels * o.out_channels * math.prod(o.kernel) // o.groups for o in self.operators)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter of two or more dimensions.

    Attributes:
        name: Its full name; the first one where it has several.
        aliases: Its other names, where it is tied.
        shape: Its shape.
        share: Its part of all parameters of the model, 0 to 1; tied parameters count once.
        reason: Why it cannot be quantized; empty where it is the weight of a site's operator that can.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    share: float
    reason: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose weight it is, or the parameter itself where it is not called so."""
        return layers_of(self.name, *self.aliases)


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """All sites of a model, and all its weights.

    Attributes:
        sites: In forward order of their first operator. Every non-raw operator is in exactly one site.
        weights: Every parameter of two or more dimensions, with the reason where it cannot be quantized.
    """

    sites: tuple[Site, ...]
    weights: tuple[Weight, ...]

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(layer, reason) of every weight that cannot be quantized."""
        return tuple((layer, weight.reason) for weight in self.weights if weight.reason for layer in weight.layers)
