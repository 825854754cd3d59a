"""Quantization of weights and activations: formulas fA4 (symmetric) and fA17 (with a zero point), their one home.

A scale maps the largest magnitude onto the largest code (``QMAX``): ``scale = absmax / qmax``, ``q = clip(round(v / scale))``.
Integer codes are clipped to ``[-qmax - 1, qmax]``, fp8 (e4m3) values to ``[-448, 448]``. Under uint8 the codes 0..255 span the range
``[low, high]``, which holds 0: ``scale = (high - low) / 255``, ``zero = round(-low / scale)``, ``q = clip(round(v / scale) + zero)``.
Rounding is half to even everywhere (``torch.round`` and torch's own float8 conversion). A block of zeros gets scale 1 and codes 0.
All arithmetic is float32.

Source: claim A-12, formulas fA4 and fA17.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.finite import all_finite
from alphasmith.objectives.quantization.scheme import QMAX, ActivationFormat, Scheme, WeightFormat

# Scales stay normal numbers: below the smallest normal float32 the quotient v / scale loses its bits, and above max / qmax
# the product qmax * scale would overflow.
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max * (1 - 2**-20)
#: What is subtracted from the codes of uint8 where the machine multiplies int8.
BYTE_MIDDLE = 128
_STORAGE: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "int7": torch.int8,
    "int4": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "uint8": torch.uint8,
    "int16": torch.int16,
}


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and the scales that turn them back into values: ``value = (code - zero) * scale``.

    Attributes:
        values: (O, D) codes: int8 for int8 and int4 (int4 codes lie in -8..7, one per element), float8_e4m3fn for fp8; for
            activations also uint8 and int16.
        scale: float32. Granularity ``tensor``: (); ``channel``: (O, 1); ``group``: (O, ceil(D / group_size)), the last group
            of a row being shorter when group_size does not divide D. For activations: whatever scale was given.
        zero: The code that stands for 0, as it was given, of uint8 activations; None: 0.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None


class CodeGrid(NamedTuple):
    """The steps that activations are rounded to.

    Attributes:
        scale: float32, positive.
        zero: Code that stands for 0, 0..255 in float32, of the shape of ``scale``; None for symmetric formats, where it is 0.
    """

    scale: Tensor
    zero: Tensor | None


def quantize_weight(w: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Quantize one operator's weight. Source: claim A-12, formula fA4.

    Args:
        w: (O, D) weight, any floating dtype; computed in float32.
        scheme: Number format and granularity.

    Returns:
        Codes (O, D) and scales, shaped as :class:`QuantizedTensor` says.

    Raises:
        InputError: ``w`` is not a non-empty matrix, or the scheme keeps weights in float.
        NonFiniteError: ``w`` holds NaN or infinity.
    """
    if scheme.is_float:
        raise InputError(
            "scheme.weights", "'none' keeps weights in float and has no codes", "use 'int8', 'int4' or 'fp8'"
        )
    w = _checked_matrix(w)
    absmax = _block_absmax(w, scheme)
    scale = code_scale(absmax, scheme.weights)
    codes = round_codes_(w / _spread(scale, scheme, w.shape[1]), scheme.weights)
    return QuantizedTensor(codes.to(_STORAGE[scheme.weights]), scale)


def dequantize_weight(q: QuantizedTensor, scheme: Scheme) -> Tensor:
    """Turn codes back into float32 values (O, D).

    Args:
        q: What :func:`quantize_weight` returned for the same scheme.
        scheme: The scheme it was quantized with.

    Raises:
        InputError: The scales do not fit the codes under this scheme.
    """
    rows, columns = q.values.shape
    expected = _scale_shape(rows, columns, scheme)
    if tuple(q.scale.shape) != expected:
        raise InputError(
            "q.scale",
            f"has shape {tuple(q.scale.shape)}, {scheme.name} needs {expected}",
            "dequantize with the scheme the weight was quantized with",
        )
    return q.values.to(torch.float32) * _spread(q.scale, scheme, columns)


def activation_scale(absmax: Tensor, fmt: ActivationFormat) -> Tensor:
    """Scale of a symmetric format that maps ``absmax`` onto the largest code; 1 where ``absmax`` is 0. Source: formula fA4.

    Args:
        absmax: Largest magnitudes, any shape: () for a static scale, (T, 1) for one per token.
        fmt: Number format of the activation, neither ``none`` nor uint8, which spans a range.

    Returns:
        float32, the shape of ``absmax``.

    Raises:
        InputError: ``fmt`` has no such scale, or ``absmax`` is negative.
        NonFiniteError: ``absmax`` holds NaN or infinity.
    """
    if fmt == "uint8":
        raise InputError("fmt", "'uint8' spans a range, which a magnitude does not give", "use activation_grid")
    if bool((absmax < 0).any()):
        raise InputError("absmax", "is negative", "give the largest magnitude, not the largest value")
    return activation_grid(-absmax, absmax, fmt).scale


def activation_grid(low: Tensor, high: Tensor, fmt: ActivationFormat) -> CodeGrid:
    """Scale, and for uint8 zero point, for values from ``low`` to ``high``; 0 is always one of them. Source: formulas fA4 and fA17.

    Args:
        low: Smallest values, any shape: () for a static grid, (T, 1) for one per token; above 0 they count as 0.
        high: Largest values, likewise; below 0 they count as 0.
        fmt: Number format of the activation, not ``none``.

    Returns:
        float32, the shape of ``low`` and ``high``; scale 1 where both are 0.

    Raises:
        InputError: ``fmt`` is ``none``, which has no scale.
        NonFiniteError: A bound is NaN or infinite.
    """
    _require_codes(fmt)
    if not (all_finite(low) and all_finite(high)):
        raise NonFiniteError("the activation range holds NaN or infinity")
    return code_grid(low.to(torch.float32), high.to(torch.float32), fmt)


def row_grid(x: Tensor, dims: tuple[int, ...], fmt: ActivationFormat) -> CodeGrid:
    """The grid of every row of finite values, see :func:`activation_grid`.

    Args:
        x: Values of any shape.
        dims: Dimensions that share a grid; they are kept with length 1.
        fmt: Number format, not ``none``.

    Raises:
        InputError: See :func:`activation_grid`.
        NonFiniteError: Likewise.
    """
    return activation_grid(x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True), fmt)


def quantize_activation(x: Tensor, scale: Tensor, fmt: ActivationFormat, zero: Tensor | None = None) -> QuantizedTensor:
    """Quantize activations with a given scale and zero point; values beyond their range are clipped.

    Args:
        x: (T, D) or any shape.
        scale: Positive, broadcastable to ``x``: () or (T, 1).
        fmt: Number format, not ``none``.
        zero: Code that stands for 0, of the shape of ``scale``; given for uint8 and for no other format.

    Returns:
        Codes shaped like ``x``, ``scale`` and ``zero``.

    Raises:
        InputError: ``fmt`` is ``none``, or ``zero`` contradicts it.
        NonFiniteError: ``x`` or the scale holds NaN or infinity.
    """
    _require_codes(fmt)
    _require_zero(zero, fmt)
    codes = round_codes_(_checked_activation(x, scale) / scale, fmt, zero)
    if zero is not None:
        codes.add_(zero)
    return QuantizedTensor(codes.to(_STORAGE[fmt]), scale, zero)


def fake_quantize_activation(x: Tensor, scale: Tensor, fmt: ActivationFormat, zero: Tensor | None = None) -> Tensor:
    """Quantize and dequantize activations: exactly (code - zero) times scale, float32; ``none`` returns ``x`` as float32.

    Args:
        x: (T, D) or any shape.
        scale: Positive, broadcastable to ``x``: () or (T, 1); not used for ``none``.
        fmt: Number format.
        zero: See :func:`quantize_activation`.

    Raises:
        InputError: ``zero`` contradicts the format.
        NonFiniteError: ``x`` or the scale holds NaN or infinity.
    """
    if fmt == "none":
        return x.to(torch.float32)
    _require_zero(zero, fmt)
    return round_codes_(_checked_activation(x, scale) / scale, fmt, zero).mul_(scale)


def code_grid(low: Tensor, high: Tensor, fmt: ActivationFormat) -> CodeGrid:
    """:func:`activation_grid` of float32 bounds, unchecked; NaN stays."""
    if fmt != "uint8":
        return CodeGrid(code_scale(torch.maximum(high, -low).clamp_min(0), fmt), None)
    low, high, codes = low.clamp_max(0), high.clamp_min(0), QMAX[fmt]
    # Divided before they are subtracted: a range as wide as float32 itself has a step.
    scale = torch.where(high == low, 1.0, (high / codes - low / codes).clamp(_TINY, _HUGE / codes))
    return CodeGrid(scale, (-low / scale).round_().clamp_(0, codes))


def row_steps(rows: Tensor, fmt: ActivationFormat) -> CodeGrid:
    """Step and zero point of every row, as :func:`row_grid` has them but for rows of zeros: their codes are 0 under any step.

    Args:
        rows: (T, C) float32, C at least 1.
        fmt: int8 or uint8.

    Returns:
        (T, 1) each.

    Raises:
        NonFiniteError: A row holds NaN or infinity.
    """
    qmax = QMAX[fmt]
    if fmt != "uint8":
        span, low = rows.abs().amax(dim=1, keepdim=True) / qmax, None
    else:
        low, high = rows.amin(dim=1, keepdim=True).clamp_max(0), rows.amax(dim=1, keepdim=True).clamp_min(0)
        span = high / qmax - low / qmax
    if not all_finite(span):  # exactly where an element of the row is not
        raise NonFiniteError("the activation range holds NaN or infinity")
    scale = span.clamp_(_TINY, _HUGE / qmax)
    return CodeGrid(scale, None if low is None else (-low / scale).round_().clamp_(0, qmax))


def code_limits(fmt: ActivationFormat, zero: float | None = None) -> tuple[float, float]:
    """Smallest and largest code of an integer format, counted from its zero point."""
    qmax = QMAX[fmt]
    return (-qmax - 1, qmax) if zero is None else (-zero, qmax - zero)


def row_codes_(quotients: Tensor, zero: Tensor | None) -> Tensor:
    """Round values over their :func:`row_steps` in place to codes of 8 bits, counted from the zero point. Returns ``quotients``."""
    if zero is not None:
        return round_codes_(quotients, "uint8", zero)
    return quotients.round_()  # no value of a row exceeds its largest, which is the code 127


def code_scale(absmax: Tensor, fmt: WeightFormat | ActivationFormat) -> Tensor:
    """Scale that maps float32 ``absmax`` of any shape onto the largest code of ``fmt``; 1 where it is 0. Unchecked; NaN stays."""
    qmax = QMAX[fmt]
    return torch.where(absmax == 0, 1.0, (absmax / qmax).clamp(_TINY, _HUGE / qmax))


def round_codes_(codes: Tensor, fmt: WeightFormat | ActivationFormat, zero: Tensor | None = None) -> Tensor:
    """Round float32 ``codes`` (value / scale) in place to what ``fmt`` can hold, half to even, clipped. Returns ``codes``.

    With a ``zero`` point, which uint8 needs, the codes that return are those of uint8 minus ``zero``: times the scale, they are values.
    """
    qmax = QMAX[fmt]
    if fmt == "fp8":
        return codes.copy_(codes.clamp_(-qmax, qmax).to(torch.float8_e4m3fn))
    if zero is None:
        return codes.round_().clamp_(-qmax - 1, qmax)
    return codes.round_().add_(zero).clamp_(0, qmax).sub_(zero)


def round_bytes_(codes: Tensor, fmt: ActivationFormat, zero: Tensor | None) -> Tensor:
    """Round float32 ``codes`` in place to integers in -128..127: those of int8, or those of uint8 minus 128. Returns ``codes``."""
    if zero is None:
        return round_codes_(codes, fmt)
    return codes.round_().add_(zero - BYTE_MIDDLE).clamp_(-BYTE_MIDDLE, BYTE_MIDDLE - 1)


def byte_zero(zero: Tensor) -> Tensor:
    """Zero point of the codes of :func:`round_bytes_` under a uint8 ``zero`` point: -128..127, float32."""
    return zero.to(torch.float32) - BYTE_MIDDLE


def pack_int4(values: Tensor) -> Tensor:
    """Pack pairs of int4 codes into bytes, the even column in the low half; an odd last column is padded with 0.

    Args:
        values: (..., D) int8 codes in -8..7.

    Returns:
        (..., ceil(D / 2)) uint8.

    Raises:
        InputError: The codes are not int8 or leave -8..7.
    """
    if values.dtype != torch.int8 or values.dim() < 1:
        raise InputError(
            "values", f"has dtype {values.dtype} and {values.dim()} dimensions", "give int8 codes (..., D)"
        )
    if values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
        raise InputError("values", "holds codes outside -8..7", "quantize with an int4 scheme before packing")
    padded = functional.pad(values, (0, values.shape[-1] % 2))
    halves = padded.view(torch.uint8) & 0x0F
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def unpack_int4(packed: Tensor, last_dim: int) -> Tensor:
    """Undo :func:`pack_int4`.

    Args:
        packed: (..., ceil(last_dim / 2)) uint8.
        last_dim: D, the number of codes per row.

    Returns:
        (..., last_dim) int8 in -8..7.

    Raises:
        InputError: ``packed`` is not uint8 or does not hold ``last_dim`` codes per row.
    """
    if packed.dtype != torch.uint8 or packed.dim() < 1:
        raise InputError(
            "packed", f"has dtype {packed.dtype} and {packed.dim()} dimensions", "give the packed uint8 bytes"
        )
    if packed.shape[-1] != (last_dim + 1) // 2:
        raise InputError(
            "last_dim", f"{last_dim} codes do not fill {packed.shape[-1]} bytes", "give the row length before packing"
        )
    halves = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)[..., :last_dim].to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


def _block_absmax(w: Tensor, scheme: Scheme) -> Tensor:
    """Largest magnitude per block that shares a scale, shaped as the scale is."""
    if scheme.weight_granularity == "tensor":
        low, high = torch.aminmax(w)
        return torch.maximum(-low, high)
    if scheme.weight_granularity == "channel":
        # The infinity norm is the abs-max of a row without a temporary as large as w.
        rows: Tensor = torch.linalg.vector_norm(w, ord=float("inf"), dim=1, keepdim=True)
        return rows
    size = scheme.group_size or w.shape[1]
    groups = -(-w.shape[1] // size)
    padded = functional.pad(w, (0, groups * size - w.shape[1])) if w.shape[1] % size else w
    blocks: Tensor = torch.linalg.vector_norm(padded.reshape(-1, groups, size), ord=float("inf"), dim=2)
    return blocks


def _scale_shape(rows: int, columns: int, scheme: Scheme) -> tuple[int, ...]:
    if scheme.weight_granularity == "tensor":
        return ()
    if scheme.weight_granularity == "channel":
        return (rows, 1)
    return (rows, -(-columns // (scheme.group_size or columns)))


def _spread(scale: Tensor, scheme: Scheme, columns: int) -> Tensor:
    """Scales broadcastable to (O, columns)."""
    if scheme.weight_granularity != "group":
        return scale
    return scale.repeat_interleave(scheme.group_size or columns, dim=1)[:, :columns]


def _checked_matrix(w: Tensor) -> Tensor:
    if w.dim() != 2 or w.numel() == 0:
        raise InputError("w", f"has shape {tuple(w.shape)}", "give a non-empty weight (outputs, inputs)")
    w = w.detach().to(torch.float32)
    if not all_finite(w):
        raise NonFiniteError("the weight holds NaN or infinity")
    return w


def _checked_activation(x: Tensor, scale: Tensor) -> Tensor:
    x = x.to(torch.float32)
    if not (all_finite(x) and all_finite(scale)):
        raise NonFiniteError("the activation or its scale holds NaN or infinity")
    return x


def _require_codes(fmt: ActivationFormat) -> None:
    if fmt == "none":
        raise InputError("fmt", "'none' keeps activations in float and has no codes", "use a format with codes")


def _require_zero(zero: Tensor | None, fmt: ActivationFormat) -> None:
    if (zero is None) == (fmt == "uint8"):
        raise InputError("zero", f"contradicts {fmt}", "give a zero point for uint8 and for no other format")
