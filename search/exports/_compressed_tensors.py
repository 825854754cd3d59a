"""Checkpoints in the layout of compressed-tensors, which transformers and vLLM load: written with safetensors and JSON alone.

An operator ``X`` becomes ``X.weight`` (integers or fp8) or ``X.weight_packed`` (32-bit words), ``X.weight_scale`` and, for static
activations, ``X.input_scale`` (and ``X.input_zero_point``); all else is as in the float checkpoint, and ``quantization_config`` in ``config.json`` says which is
which. Layout: compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.stored_names import initializes_all_weights, splits_weights
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.text import listed
from alphasmith.search.exports._card import Obstacle
from alphasmith.search.exports.source import DeployedOperator, ExportSource

Layout = Literal["int-quantized", "float-quantized", "pack-quantized"]

#: Bits of a word that packed codes share.
_WORD = 32
#: Codes with a zero point are -128..127 there, 0..255 here.
_ZERO = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What is written.

    Attributes:
        tensors: By name.
        config: ``config.json`` with its ``quantization_config``.
        quantized: Names of the operators that are integer (or fp8).
        left: Operators that the run quantized and that stay float here, because the format has no place for them, with the reason.
        notes: What the consumer computes otherwise than the run did.
        obstacles: What of its class stands in the way of loading it, see :data:`Obstacle`.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    quantized: tuple[str, ...]
    left: Mapping[str, str]
    notes: tuple[str, ...]
    obstacles: tuple[Obstacle, ...]


def layout_of(scheme: Scheme) -> Layout:
    """How the format holds a scheme.

    Raises:
        InputError: Field ``--format``: it does not.
    """
    refusal = ""
    if scheme.activations == "none":
        if scheme.weight_granularity == "tensor" and scheme.weights != "fp8":
            refusal = "weights alone are held per channel or per group"
        found: Layout = "float-quantized" if scheme.weights == "fp8" else "pack-quantized"
    else:
        found = "float-quantized" if scheme.weights == "fp8" else "int-quantized"
        if scheme.weights == "int4":
            refusal = "int4 weights are held with float activations alone"
        if scheme.activations == "int16":
            refusal = "activations are held with 8 bits"
    if found != "pack-quantized" and scheme.weight_granularity == "group":
        refusal = "8-bit weights are held per tensor or per channel"
    if refusal:
        raise InputError(
            "--format",
            f"compressed-tensors cannot hold {scheme.name}: {refusal}",
            "run with scheme w8a8-channel-static, w8a8-channel-token, wfp8afp8-channel-token or w4a16-g128",
        )
    return found


def compressed_tensors(source: ExportSource, plain: Mapping[str, DeployedOperator]) -> Checkpoint:
    """The checkpoint of a result.

    Args:
        source: The result.
        plain: Operators by name that take the place of those with a division or shift at run time; empty: these are refused.

    Raises:
        InputError: Not a model of transformers, a scheme that the format lacks, an operator with a division or shift at run time, or
            operators that a server fuses with different scales.
    """
    left = {o.name: reason for o in source.operators if (reason := _no_place(o, source))}
    left |= dict.fromkeys(source.stacks, "several matrices in one tensor")
    operators = [plain.get(o.name, o) for o in source.operators if o.name not in left]
    if not operators:
        raise InputError(
            "--format", "no operator of this result fits compressed-tensors", "export it to another format"
        )
    layouts = {o.scheme: layout_of(o.scheme) for o in operators}
    _refuse_explicit(operators, source)
    _check_shared(operators, source)
    tensors = dict(source.float_tensors)
    for operator in operators:
        _check_groups(operator)
        tensors.pop(source.weight_names[operator.name], None)
        tensors |= {f"{operator.name}.{leaf}": value for leaf, value in _stored(operator, layouts[operator.scheme])}
    return Checkpoint(
        tensors=tensors,
        config={**source.config, "quantization_config": _quantization(operators, layouts, source, left)},
        quantized=tuple(operator.name for operator in operators),
        left=left,
        notes=tuple(_notes(layouts)),
        obstacles=tuple(_obstacles(source.architecture, layouts)),
    )


def explicit_operators(source: ExportSource) -> tuple[str, ...]:
    """Operators with a division or a shift at run time, which the format has no tensor for.

    Args:
        source: The result.
    """
    return tuple(o.name for o in source.operators if o.explicit and not _no_place(o, source))


def read_operator(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> DeployedOperator:
    """An operator as a checkpoint of this format holds it: what :func:`compressed_tensors` wrote.

    Args:
        name: Of its module.
        tensors: Of the checkpoint.
        scheme: Its number formats.

    Raises:
        KeyError: A tensor is missing.
    """
    if layout_of(scheme) == "pack-quantized":
        shape = [int(n) for n in tensors[f"{name}.weight_shape"]]
        codes = unpacked(tensors[f"{name}.weight_packed"], _bits(scheme), shape[1])
    else:
        codes = tensors[f"{name}.weight"]
    static = scheme.static
    zero = tensors[f"{name}.input_zero_point"] if static and scheme.asymmetric else None
    return DeployedOperator(
        name=name,
        kind="linear",
        transposed=False,
        scheme=scheme,
        codes=codes,
        scale=tensors[f"{name}.weight_scale"],
        input_scale=tensors[f"{name}.input_scale"] if static else None,
        input_zero=None if zero is None else (zero.to(torch.int16) + _ZERO).to(torch.uint8),
        explicit=False,
    )


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes in 32-bit words, the first in the lowest bits, each raised by half of its range so that it is not negative.

    Args:
        codes: (O, D) int8 in -2^(bits-1) .. 2^(bits-1) - 1.
        bits: Of a code; 32 is a multiple of them.

    Returns:
        (O, ceil(D * bits / 32)) int32; the last word of a row is filled with zero bits.
    """
    per_word = _WORD // bits
    # Bytes wrap around, so that -8..7 become 0..15 and -128..127 become 0..255 without a wider copy.
    raised = functional.pad(codes.view(torch.uint8) + (1 << (bits - 1)), (0, -codes.shape[1] % per_word))
    words = torch.zeros(codes.shape[0], raised.shape[1] // per_word, dtype=torch.int32)
    for place in range(per_word):
        words |= raised[:, place::per_word].to(torch.int32) << (place * bits)
    return words


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`packed`.

    Args:
        words: (O, ceil(columns * bits / 32)) int32.
        bits: Of a code.
        columns: Codes of a row.

    Returns:
        (O, columns) int8.
    """
    per_word = _WORD // bits
    codes = torch.empty(words.shape[0], words.shape[1] * per_word, dtype=torch.int8)
    for place in range(per_word):
        codes[:, place::per_word] = ((words >> (place * bits)) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes[:, :columns].contiguous()


def _no_place(operator: DeployedOperator, source: ExportSource) -> str:
    """Why an operator stays float in this format; empty: it does not."""
    if operator.kind != "linear":
        return "a convolution"
    module = source.architecture.get_submodule(operator.name) if _has(source.architecture, operator.name) else None
    if not isinstance(module, nn.Linear):
        return "no nn.Linear of the architecture" if module is None else f"a {type(module).__name__}"
    if operator.name not in source.weight_names:
        return "its weight is no tensor of its own in the checkpoint"
    return ""


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _refuse_explicit(operators: Sequence[DeployedOperator], source: ExportSource) -> None:
    explicit = [operator.name for operator in operators if operator.explicit]
    if explicit:
        sites = source.sites_of(explicit)
        raise InputError(
            "--format",
            f"compressed-tensors has no place for what sites {listed(sites)} divide by or subtract at run time",
            "give --unsmoothed-sites to write them as if no alpha had been found, or run with --set sites.explicit=never",
        )


def _check_shared(operators: Sequence[DeployedOperator], source: ExportSource) -> None:
    """One scale for the input of operators that a server runs as one (q, k, v; gate, up): they read one tensor, so it is one site's."""
    by_name = {operator.name: operator for operator in operators}
    for site in source.result.manifest.sites:
        scales = [by_name[name].input_scale for name in site.operators if name in by_name]
        static = [scale for scale in scales if scale is not None]
        if any(not torch.equal(scale, static[0]) for scale in static):
            raise InputError(
                "--format",
                f"the operators of site {site.name} have different input scales, and a server that fuses them takes one",
                "run again; a training with ranges of their own cannot be exported to this format",
            )


def _check_groups(operator: DeployedOperator) -> None:
    size = operator.scheme.group_size
    if size is not None and operator.codes.shape[1] % size:
        raise InputError(
            "--format",
            f"{operator.name} has {operator.codes.shape[1]} inputs, which groups of {size} do not divide",
            "exclude its site with sites.exclude, or choose another scheme.group_size",
        )


def _stored(operator: DeployedOperator, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an operator, by the last part of their names."""
    codes = operator.codes
    if layout == "pack-quantized":
        yield "weight_packed", packed(codes, _bits(operator.scheme))
        yield "weight_shape", torch.tensor(codes.shape, dtype=torch.int64)
    else:
        yield "weight", codes
    yield "weight_scale", operator.scale.reshape(1) if operator.scale.dim() == 0 else operator.scale
    if operator.input_scale is not None:
        yield "input_scale", operator.input_scale.reshape(1)
    if operator.input_zero is not None:
        yield "input_zero_point", (operator.input_zero.to(torch.int16) - _ZERO).to(torch.int8).reshape(1)


def _quantization(
    operators: Sequence[DeployedOperator],
    layouts: Mapping[Scheme, Layout],
    source: ExportSource,
    left: Mapping[str, str],
) -> dict[str, Any]:
    groups = {}
    for number, (scheme, layout) in enumerate(layouts.items()):
        mine = [operator.name for operator in operators if operator.scheme == scheme]
        groups[f"group_{number}"] = {
            # With one scheme every nn.Linear is meant, and the float ones are listed; with several each is named.
            "targets": ["Linear", *_heads(mine, source)] if len(layouts) == 1 else mine,
            "format": layout,
            "weights": _arguments(_bits(scheme), scheme, scheme.weight_granularity, scheme.group_size),
            "input_activations": _inputs(scheme),
            "output_activations": None,
        }
    quantized = {operator.name for operator in operators}
    linear = [name for name, module in source.architecture.named_modules() if isinstance(module, nn.Linear)]
    # What holds stacks is named too: some servers make linear layers of them.
    ignored = {name for name in linear if name not in quantized} | {name for name in left if name not in quantized}
    formats = set(layouts.values())
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": sorted(ignored),
        "config_groups": groups,
    }


def _heads(names: Sequence[str], source: ExportSource) -> tuple[str, ...]:
    """Those of the operators that make logits of a language model: for vLLM they are no linear layers, so that they are named."""
    found = getattr(source.architecture, "get_output_embeddings", lambda: None)()
    return tuple(name for name in names if found is not None and source.architecture.get_submodule(name) is found)


def _arguments(
    bits: int, scheme: Scheme, strategy: str, group_size: int | None, *, dynamic: bool = False, symmetric: bool = True
) -> dict[str, Any]:
    kind = "float" if scheme.weights == "fp8" else "int"
    told = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}
    return told if group_size is None else told | {"group_size": group_size}


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activations == "none":
        return None
    strategy = "tensor" if scheme.static else "token"
    return _arguments(8, scheme, strategy, None, dynamic=not scheme.static, symmetric=not scheme.asymmetric)


def _bits(scheme: Scheme) -> int:
    return 4 if scheme.weights == "int4" else 8


def _obstacles(architecture: nn.Module, layouts: Mapping[Scheme, Layout]) -> Iterator[Obstacle]:
    if splits_weights(architecture):
        yield "splits"
    if "pack-quantized" in layouts.values() and initializes_all_weights(architecture):
        yield "initializes"


def _notes(layouts: Mapping[Scheme, Layout]) -> Iterator[str]:
    if any(layout == "int-quantized" and not scheme.static for scheme, layout in layouts.items()):
        yield (
            "per-token scales are the library's own (compressed-tensors divides the largest magnitude by 127.5, Alphasmith by "
            "127), so that codes of activations differ by rounding; compare metrics, not bits"
        )
    if any(layout == "int-quantized" and scheme.saturates for scheme, layout in layouts.items()):
        yield "the loss told here is that of kernels that add pairs of products in 16 bits with saturation"
    if any(s.byte_operands and s.weights == "int8" and not s.saturates for s in layouts):
        yield (
            "kernels for 8-bit integers of x86 processors without VNNI may add pairs of products in 16 bits with saturation; "
            "the loss told here is that of exact products"
        )
    yield "transformers computes with dequantized weights: it shows the content, not speed or memory"
