"""Quantization schemes: bits and granularity of weights and activations (claim A-12)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import Kernel

WeightFormat = Literal["int8", "int7", "int4", "fp8", "none"]
ActivationFormat = Literal["int8", "uint8", "int16", "fp8", "none"]
WeightGranularity = Literal["tensor", "channel", "group"]
ActivationGranularity = Literal["static", "token"]

#: Largest magnitude of each number format; symmetric abs-max scaling maps the largest value onto it (formula fA4). uint8 has a zero
#: point instead: its codes 0..255 span the range from the smallest value to the largest (formula fA17).
QMAX = {"int8": 127.0, "int7": 63.0, "int4": 7.0, "fp8": 448.0, "uint8": 255.0, "int16": 32767.0}

#: The name of the scheme that quantizes nothing.
_FLOAT = "float"
_WEIGHTS: dict[str, WeightFormat] = {"8": "int8", "7": "int7", "4": "int4", "fp8": "fp8"}
_ACTIVATIONS: dict[str, ActivationFormat] = {"8": "int8", "u8": "uint8", "i16": "int16", "16": "none", "fp8": "fp8"}
#: What the name of a scheme with saturating kernels ends in.
_PAIRS = "-pairs16"
_GRANULARITIES: dict[str, WeightGranularity] = {"tensor": "tensor", "channel": "channel"}
_NAME = re.compile(
    f"w({'|'.join(_WEIGHTS)})a({'|'.join(_ACTIVATIONS)})-(tensor|channel|g([0-9]+))(?:-({'|'.join(get_args(ActivationGranularity))}))?({_PAIRS})?"
)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What the deployed model, or one site of it, will compute in. Source: claim A-12, formulas fA4 and fA17.

    Attributes:
        weights: Number format of weights; int7: codes -64..63 in the bytes of int8, which no kernel saturates with; fp8 is e4m3; ``none`` leaves operators as they are, in float, activations with them.
        weight_granularity: One weight scale per tensor, per output channel, or per group of input channels of a row.
        group_size: Input channels per scale [channels]; required for, and only for, granularity ``group``.
        activations: Number format of activations: ``int8`` and ``int16`` symmetric, ``uint8`` with a zero point, fp8;
            ``none`` keeps them in float (weight-only).
        activation_granularity: ``static``: one scale per tensor, fixed by calibration. ``token``: one per row of X, at
            run time (per sample for convolutions, whose patches share pixels); not for int16.
        kernel: What products of 8-bit integers are where the model runs: ``exact``, or ``u8s8-pairs16``, added two by two in 16
            bits with saturation, as fast kernels do on x86 processors without VNNI (formula fA20).
    """

    weights: WeightFormat = "int8"
    weight_granularity: WeightGranularity = "channel"
    group_size: int | None = None
    activations: ActivationFormat = "int8"
    activation_granularity: ActivationGranularity = "static"
    kernel: Kernel = "exact"

    def __post_init__(self) -> None:
        if (self.weight_granularity == "group") != (self.group_size is not None):
            raise InputError(
                "scheme.group_size",
                f"contradicts weight_granularity {self.weight_granularity!r}",
                "give group_size for granularity 'group' and for no other",
            )
        if self.group_size is not None and self.group_size < 2:
            raise InputError("scheme.group_size", f"{self.group_size} is below 2", "use 32, 64 or 128")
        if self.weights == "none" and (self.activations != "none" or self.weight_granularity != "channel"):
            raise InputError(
                "scheme.weights",
                f"'none' leaves operators in float, which contradicts {self.activations} activations or "
                f"granularity {self.weight_granularity!r}",
                "use activations 'none' and granularity 'channel' with it",
            )
        if self.activations != "none" and (self.weights == "fp8") != (self.activations == "fp8"):
            raise InputError(
                "scheme.activations",
                f"{self.activations} activations contradict {self.weights} weights",
                "use fp8 for both, int8, uint8 or int16 activations with int8 or int4 weights, or activations 'none'",
            )
        if self.activations == "int16" and self.activation_granularity == "token":
            raise InputError(
                "scheme.activation_granularity",
                "'token' contradicts int16 activations, which are static",
                "use 'static', or int8 or uint8 activations per token",
            )
        if self.kernel != "exact" and not self.byte_operands:
            raise InputError(
                "scheme.kernel",
                f"{self.kernel!r} multiplies bytes, which contradicts {self.weights} weights per {self.weight_granularity} "
                f"with {self.activations} activations",
                "use 'exact', or int8 or uint8 activations with int8 weights per tensor or channel",
            )

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized: operators stay as they are."""
        return self.weights == "none"

    @property
    def static(self) -> bool:
        """Whether activations are quantized with scales fixed by calibration."""
        return self.activations != "none" and self.activation_granularity == "static"

    @property
    def asymmetric(self) -> bool:
        """Whether activations have a zero point: their codes span a range from its smallest value to its largest."""
        return self.activations == "uint8"

    @property
    def integer_operands(self) -> bool:
        """Whether activations and weights are integers whose products can be summed before a scale is applied."""
        integer_activations = self.activations in ("int8", "uint8", "int16")
        return integer_activations and self.weights != "fp8" and self.weight_granularity != "group"

    @property
    def byte_operands(self) -> bool:
        """Whether these integers are 8-bit ones, weights and activations alike."""
        return self.integer_operands and self.activations != "int16"

    @property
    def saturates(self) -> bool:
        """Whether products can lose to saturation where the model runs; with weights of fewer than 8 bits none does."""
        return self.kernel == "u8s8-pairs16" and self.weights == "int8"

    @property
    def name(self) -> str:
        """Short name, e.g. ``w8a8-channel-static``; every scheme has its own."""
        if self.is_float:
            return _FLOAT
        weights = next(short for short, fmt in _WEIGHTS.items() if fmt == self.weights)
        activations = next(short for short, fmt in _ACTIVATIONS.items() if fmt == self.activations)
        granularity = f"g{self.group_size}" if self.weight_granularity == "group" else self.weight_granularity
        tail = "" if self.activations == "none" else f"-{self.activation_granularity}"
        return f"w{weights}a{activations}-{granularity}{tail}{_PAIRS if self.kernel != 'exact' else ''}"

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme with this ``name``, e.g. ``w8a8-channel-static``, ``w8au8-channel-static``, ``w4a8-g64-token``, ``w4a16-g128``,
        ``w8a8-channel-static-pairs16``, ``float``.

        Raises:
            InputError: No scheme has this name.
        """
        if name == _FLOAT:
            return FLOAT
        match = _NAME.fullmatch(name)
        if match is None or (match.group(2) == "16") != (match.group(5) is None):
            raise InputError(
                "scheme",
                f"no scheme is named {name!r}",
                "write it like w8a8-channel-static, w4a8-g64-token, w8a16-channel or float, with weights "
                f"{', '.join(_WEIGHTS)} and activations {', '.join(_ACTIVATIONS)} (16: float)",
            )
        return cls(
            weights=_WEIGHTS[match.group(1)],
            weight_granularity=_GRANULARITIES.get(match.group(3), "group"),
            group_size=int(match.group(4)) if match.group(4) else None,
            activations=_ACTIVATIONS[match.group(2)],
            activation_granularity="token" if match.group(5) == "token" else "static",
            kernel="u8s8-pairs16" if match.group(6) else "exact",
        )


#: The scheme of what stays in float.
FLOAT = Scheme(weights="none", activations="none")
