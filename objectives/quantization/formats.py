"""Formats of sites by name: the scheme that each stands for, which are dearer than others, and what a target serves; free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import SiteFormat, Target
from alphasmith.objectives.quantization.scheme import (
    FLOAT,
    ActivationFormat,
    ActivationGranularity,
    Scheme,
    WeightFormat,
)
from alphasmith.objectives.text import counted, listed

#: All formats, from the cheapest to the dearest.
FORMATS: tuple[SiteFormat, ...] = get_args(SiteFormat)

_ACTIVATIONS: Mapping[SiteFormat, tuple[ActivationFormat, ActivationGranularity]] = {
    "int8-static": ("int8", "static"),
    "uint8-static": ("uint8", "static"),
    "int8-token": ("int8", "token"),
    "int16-static": ("int16", "static"),
    "fp8-static": ("fp8", "static"),
    "fp8-token": ("fp8", "token"),
}
#: How dear the products of a format are, in steps: 8-bit operands with a scale that is known before the run; with one that is taken of
#: every row at run time; 16-bit operands; float.
_STEP: Mapping[SiteFormat, int] = {
    "int8-static": 0,
    "uint8-static": 0,
    "int7-weights": 0,
    "fp8-static": 0,
    "int8-token": 1,
    "fp8-token": 1,
    "int16-static": 2,
    "float": 3,
}

#: Activations as the scheme has them, weights of 7 bits: a choice where kernels saturate.
_SEVEN: SiteFormat = "int7-weights"

#: Target -> format of the weights -> formats that it runs as they are meant; a site left in float is served by all of them.
#: vLLM: schemes of compressed-tensors, whose int8 activations are static or per token, with a zero point or without (its CPU kernels: without).
#: ONNX Runtime: QuantizeLinear of int8, uint8 and (opset 21) int16; its DynamicQuantizeLinear has one scale per tensor, so no ``int8-token``.
#: OpenVINO: FakeQuantize of 256 levels, symmetric or not. TensorRT: explicit quantization, int8 without zero point and fp8.
_SERVED: Mapping[Target, Mapping[WeightFormat, tuple[SiteFormat, ...]]] = {
    "vllm": {"int8": ("int8-static", "uint8-static", _SEVEN, "int8-token"), "fp8": ("fp8-static", "fp8-token")},
    "onnxruntime": {"int8": ("int8-static", "uint8-static", _SEVEN, "int16-static")},
    "openvino": {"int8": ("int8-static", "uint8-static", _SEVEN)},
    "tensorrt": {"int8": ("int8-static",), "fp8": ("fp8-static",)},
}

#: Names of sites in a line.
_NAMED = 4


def scheme_of(name: SiteFormat, base: Scheme) -> Scheme:
    """The scheme of a site in a format: weights as the model's scheme has them, activations as the format says.

    Args:
        name: The format.
        base: The model's own scheme.

    Raises:
        InputError: Its weights cannot be multiplied with such activations.
    """
    if name == "float":
        return FLOAT
    if name == _SEVEN:
        return replace(base, weights="int7")
    activations, granularity = _ACTIVATIONS[name]
    plain = replace(base, activations=activations, activation_granularity=granularity, kernel="exact")
    # Kernels for bytes multiply nothing else.
    return replace(plain, kernel=base.kernel) if plain.byte_operands else plain


def format_of(scheme: Scheme) -> SiteFormat | None:
    """The format whose scheme this is; None where activations are float and weights are not, or the two go together otherwise.

    Args:
        scheme: Any.
    """
    if scheme.is_float:
        return "float"
    pair = (scheme.activations, scheme.activation_granularity)
    return next((name for name, known in _ACTIVATIONS.items() if known == pair), None)


def fitting(base: Scheme) -> tuple[SiteFormat, ...]:
    """Formats that go with the weights of a scheme, from the cheapest to the dearest; weights of 7 bits where those of 8 saturate.

    Args:
        base: The model's own scheme.
    """
    fp8 = base.weights == "fp8"
    fit = {name for name, (activations, _) in _ACTIVATIONS.items() if (activations == "fp8") == fp8}
    fit |= {"float", *([_SEVEN] if base.saturates else [])}
    return tuple(name for name in FORMATS if name in fit)


def step_of(name: SiteFormat) -> int:
    """How dear a format's products are, in steps: 0 static 8-bit, 1 per token, 2 16-bit, 3 float.

    Args:
        name: The format.
    """
    return _STEP[name]


def is_dearer(name: SiteFormat, own: SiteFormat) -> bool:
    """Whether the products of a format are dearer than those of another, by the steps of :func:`step_of`.

    Args:
        name: The format.
        own: The other one.
    """
    return _STEP[name] > _STEP[own]


def served(target: Target, base: Scheme) -> tuple[SiteFormat, ...]:
    """Formats that go with a scheme's weights and that a target serves, from the cheapest to the dearest.

    Args:
        target: What will serve the model.
        base: The model's own scheme.
    """
    possible = fitting(base)
    if target == "any":
        return possible
    weights = "int8" if base.weights == "int7" else base.weights
    known = (*_SERVED[target].get(weights, ()), "float")
    return tuple(name for name in possible if name in known)


def check_served(field: str, names: Sequence[SiteFormat], target: Target, base: Scheme) -> None:
    """Require that a scheme's weights go with every format, and that the target serves it.

    Args:
        field: Where the formats were given.
        names: The formats.
        target: What will serve the model.
        base: The model's own scheme.

    Raises:
        InputError: Names the first format that is not possible, and those that are.
    """
    possible, held = fitting(base), served(target, base)
    for name in names:
        if name not in possible:
            raise InputError(field, f"{name!r} does not go with {base.weights} weights", f"use {', '.join(possible)}")
        if name not in held:
            problem = f"{name!r} is nothing that {target} serves with {base.weights} weights"
            raise InputError(field, problem, f"use {', '.join(held)}, or another target")


def told(changed: Mapping[str, SiteFormat], sites: int, own: SiteFormat, *, named: bool = True) -> str:
    """A plan in a line, e.g. ``int8-token at 3 of 24 sites: a, b, c; int8-static at the rest``.

    Args:
        changed: Site -> format, of those that are not in the scheme's own.
        sites: All sites with a choice.
        own: The scheme's format.
        named: Whether a few sites are named.
    """
    if not changed:
        return f"{own} at every site"
    counts = Counter(changed.values())
    parts = []
    for name in sorted(counts, key=lambda name: (counts[name], FORMATS.index(name))):
        where = [site for site, given in changed.items() if given == name]
        names = f": {listed(where, _NAMED)}" if named and len(where) <= _NAMED else ""
        parts.append(f"{name} at {counts[name]} of {counted(sites, 'site')}{names}")
    rest = "" if len(changed) == sites else f"; {own} at the rest"
    return "; ".join(parts) + rest
