"""Quantization schemes: bits and granularity of weights and activations (claim A-12)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from alphasmith.objectives.errors import InputError

WeightFormat = Literal["int8", "int4", "fp8"]
ActivationFormat = Literal["int8", "fp8", "none"]
WeightGranularity = Literal["tensor", "channel", "group"]
ActivationGranularity = Literal["static", "token"]

#: Largest magnitude of each number format; symmetric abs-max scaling maps the largest value onto it (formula fA4).
QMAX = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What the deployed model will compute in. Source: claim A-12, formula fA4; symmetric abs-max throughout.

    Attributes:
        weights: Number format of weights; fp8 is e4m3.
        weight_granularity: One weight scale per tensor, per output channel, or per group of input channels of a row.
        group_size: Input channels per scale [channels]; required for, and only for, granularity ``group``.
        activations: Number format of activations; ``none`` keeps them in float (weight-only).
        activation_granularity: ``static``: one scale per tensor, fixed by calibration. ``token``: one per row of X, at
            run time (per sample for convolutions, whose patches share pixels).
    """

    weights: WeightFormat = "int8"
    weight_granularity: WeightGranularity = "channel"
    group_size: int | None = None
    activations: ActivationFormat = "int8"
    activation_granularity: ActivationGranularity = "static"

    def __post_init__(self) -> None:
        if (self.weight_granularity == "group") != (self.group_size is not None):
            raise InputError(
                "scheme.group_size",
                f"contradicts weight_granularity {self.weight_granularity!r}",
                "give group_size for granularity 'group' and for no other",
            )
        if self.group_size is not None and self.group_size < 2:
            raise InputError("scheme.group_size", f"{self.group_size} is below 2", "use 32, 64 or 128")
        if self.activations != "none" and (self.weights == "fp8") != (self.activations == "fp8"):
            raise InputError(
                "scheme.activations",
                f"{self.activations} activations contradict {self.weights} weights",
                "use fp8 for both, int8 activations with int8 or int4 weights, or activations 'none'",
            )

    @property
    def static(self) -> bool:
        """Whether activations are quantized with scales fixed by calibration."""
        return self.activations != "none" and self.activation_granularity == "static"

    @property
    def name(self) -> str:
        """Short name, e.g. ``w8a8-channel-static``; every scheme has its own."""
        bits = {"int8": "8", "int4": "4", "fp8": "fp8", "none": "16"}
        granularity = f"g{self.group_size}" if self.weight_granularity == "group" else self.weight_granularity
        tail = "" if self.activations == "none" else f"-{self.activation_granularity}"
        return f"w{bits[self.weights]}a{bits[self.activations]}-{granularity}{tail}"

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme with this ``name``, e.g. ``w8a8-channel-static``, ``w4a8-g64-token``, ``w4a16-g128``.

        Raises:
            InputError: No scheme has this name.
        """
        match = re.fullmatch(r"w(8|4|fp8)a(8|16|fp8)-(tensor|channel|g(\d+))(?:-(static|token))?", name)
        if match is None or (match.group(2) == "16") != (match.group(5) is None):
            raise InputError(
                "scheme", f"no scheme is named {name!r}", "write it like w8a8-channel-static or w4a16-g128"
            )
        weights: dict[str, WeightFormat] = {"8": "int8", "4": "int4", "fp8": "fp8"}
        activations: dict[str, ActivationFormat] = {"8": "int8", "16": "none", "fp8": "fp8"}
        granularities: dict[str, WeightGranularity] = {"tensor": "tensor", "channel": "channel"}
        return cls(
            weights=weights[match.group(1)],
            weight_granularity=granularities.get(match.group(3), "group"),
            group_size=int(match.group(4)) if match.group(4) else None,
            activations=activations[match.group(2)],
            activation_granularity="token" if match.group(5) == "token" else "static",
        )
