"""Exact products of integer matrices: on 8-bit integer units where they pay, else in float32, the same to the bit.

Units multiply int8 by int8. Activations in other formats are taken apart into such codes, and sums of weights put together again what
belongs together (formula fA17), so that every product is the exact integer, whatever the machine:

    uint8 q, zero z    sum_c (q_c - z) w_c = sum_c (q_c - 128) w_c - (z - 128) sum_c w_c
    int16 q            q = 256 h + l + 128 with h, l in -128..127:  256 sum_c h_c w_c + sum_c l_c w_c + 128 sum_c w_c
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

_CUDA_ROWS = 17  # torch._int_mm on CUDA wants more than 16 rows ...
_MULTIPLE = (
    8  # ... and inner and outer sizes that are multiples of 8; on CPU, single-channel products are wrong in torch 2.13
)
#: Channels whose products a float32 accumulator holds exactly: 128 * 128 * 1023 < 2**24.
_SLICE = 1023
#: Integers below it are float32 numbers.
_FLOATS = 2**24
#: Channels whose products of any 8-bit codes, zero points included, an int32 accumulator holds: 255 * 128 * 65793 < 2**31.
MOST_CHANNELS = 65793


@cache
def integer_gemm_works(device_type: str) -> bool:
    """Whether ``torch._int_mm`` exists on this kind of device and is exact there; tried once per kind.

    Some CPUs without 8-bit dot products multiply in saturating 16-bit pairs, so the probe uses the largest magnitudes.

    Args:
        device_type: ``torch.device.type``, e.g. ``cpu`` or ``cuda``.
    """
    a = torch.full((_CUDA_ROWS, 64), 127, dtype=torch.int8)
    a[::2] = -127
    a[1, ::3] = -128
    b = torch.full((16, 64), 127, dtype=torch.int8)
    b[::3] = -127
    expected = a.to(torch.int64) @ b.to(torch.int64).t()
    try:
        result = torch._int_mm(a.to(device_type), b.to(device_type).t()).cpu()
    except (RuntimeError, AttributeError):  # not implemented for this kind of device, or not in this torch
        return False
    return torch.equal(result.to(torch.int64), expected)


def integer_gemm_pays(device_type: str, rows: int, channels: int, outputs: int) -> bool:
    """Whether integer units multiply matrices of about these sizes exactly and faster than float32 does; timed once per size.

    CPUs without 8-bit dot products have a slow substitute, by a factor of ten and more, as others are faster by a factor.
    Either way gives the same integers: what was decided changes no result.

    Args:
        device_type: ``torch.device.type``, e.g. ``cpu`` or ``cuda``.
        rows: T.
        channels: C.
        outputs: O.
    """
    if device_type != "cpu" or not integer_gemm_works(device_type):
        return integer_gemm_works(device_type)
    return _pays_on_cpu(*(min(1024, max(16, 1 << (size - 1).bit_length())) for size in (rows, channels, outputs)))


@cache
def _pays_on_cpu(rows: int, channels: int, outputs: int) -> bool:
    x, w = (torch.full((size, channels), 127, dtype=torch.int8) for size in (rows, outputs))
    floats = x.to(torch.float32), w.to(torch.float32)
    as_floats = _quickest(lambda: floats[0] @ floats[1].t())
    return _quickest(lambda: torch._int_mm(x, w.t()), worth=as_floats) < as_floats


def _quickest(work: Callable[[], Tensor], *, worth: float = math.inf) -> float:
    """Shortest of a few times [s], which other work on the machine disturbs least; fewer where one is far above ``worth``."""
    times: list[float] = []
    while len(times) < 5 and (not times or times[-1] < 4 * worth):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def integer_product(x: Tensor, weight: Tensor, floats: Callable[[], Tensor] | None = None) -> Tensor:
    """Exact product of two integer matrices: on integer units where they pay, else in float32, which holds the same integers.

    Args:
        x: (T, C) int8, or float32 integers in -128..127.
        weight: (O, C) int8.
        floats: Gives the weight in float32, where that is kept; None: it is converted for the call.

    Returns:
        (T, O) int32, or float32 with the same integers: a tensor of its own.
    """
    rows, channels = x.shape
    if not rows or not channels or not integer_gemm_pays(x.device.type, rows, channels, weight.shape[0]):
        return _in_slices(x, weight if floats is None else floats())
    x = x.to(torch.int8)
    outputs = weight.shape[0]
    cuda = x.device.type == "cuda"
    # Zero channels add nothing.
    inner, outer = padded_sizes(channels, outputs, x.device)
    pad_c, pad_outputs = inner - channels, outer - outputs
    pad_rows = max(0, _CUDA_ROWS - rows) if cuda else 0
    if pad_c or pad_rows:
        x = nn.functional.pad(x, (0, pad_c, 0, pad_rows))
    if pad_c or pad_outputs:
        weight = nn.functional.pad(weight, (0, pad_c, 0, pad_outputs))
    return torch._int_mm(x, weight.t())[:rows, :outputs]


def activation_product(codes: Tensor, weight: Tensor, sums: Tensor | None, zero: Tensor | None) -> Tensor:
    """Exact product of activation codes minus their zero point and a weight. Source: formula fA17.

    Args:
        codes: (T, C) int8, uint8 or int16; C at most :data:`MOST_CHANNELS`.
        weight: (O, C) int8.
        sums: (O,) int64 sums of the weight over channels; not used for int8, None there.
        zero: () or (T, 1) the code that stands for 0, an integer in any type, for uint8; None: 0.

    Returns:
        (T, O) int32 or int64, or for int8 as :func:`integer_product`; what it holds is converted to a float by one rounding.
    """
    if codes.dtype == torch.int8 or sums is None:
        return integer_product(codes, weight)
    if codes.dtype == torch.uint8:
        signed = (codes ^ 128).view(torch.int8)  # the same bits as code - 128
        return _from_zero(integer_product(signed, weight), 0 if zero is None else zero, sums)
    high = (codes >> 8).to(torch.int8)
    low = ((codes & 255) - 128).to(torch.int8)
    together = integer_product(high, weight).to(torch.int64).mul_(256)
    return together.add_(integer_product(low, weight).to(torch.int64)).add_(128 * sums)


def _from_zero(product: Tensor, zero: Tensor | int, sums: Tensor) -> Tensor:
    """The product of codes minus 128, counted from their zero point instead, as int32."""
    raised = 128 - (zero if isinstance(zero, int) else zero.to(torch.int32))
    return product.to(torch.int32) + raised * sums.to(torch.int32)


class WeightProducts:
    """Exact products of activation codes and one weight, with what they need of it derived once. Source: formula fA17.

    Args:
        codes: Gives the weight, (O, C) int8.
        keep: Keep it in float32 where integer units do not pay: 4 bytes per weight, faster with few rows.
    """

    def __init__(self, codes: Callable[[], Tensor], *, keep: bool) -> None:
        self._codes, self._keep = codes, keep
        self._floats: Tensor | None = None
        self._sums: Tensor | None = None
        self._largest = 0

    def of_bytes(self, signed: Tensor, zero: Tensor | None) -> Tensor:
        """The product of codes of 8 bits, from their zero point on.

        Args:
            signed: (T, C) float32 codes of int8, or those of uint8 minus 128: integers in -128..127; C at most :data:`MOST_CHANNELS`.
            zero: () or (T, 1) the code of uint8 that stands for 0; None: the codes are those of int8.

        Returns:
            (T, O) int32, or float32 with the same integers: a tensor of its own.
        """
        product = integer_product(signed, self._codes(), self._kept if self._keep else None)
        if zero is None:
            return product
        sums = self._summed()
        # As long as every number on the way is an integer that float32 holds, float32 adds them exactly.
        if product.dtype == torch.float32 and 2**14 * signed.shape[1] + 255 * self._largest < _FLOATS:
            return product.add_((128 - zero).to(torch.float32) * sums.to(torch.float32))
        return _from_zero(product, zero, sums)

    def of_codes(self, codes: Tensor) -> Tensor:
        """The product of int16 codes (T, C), see :func:`activation_product`."""
        return activation_product(codes, self._codes(), self._summed(), None)

    def _summed(self) -> Tensor:
        if self._sums is None:
            self._sums = self._codes().sum(dim=1, dtype=torch.int64)
            self._largest = int(self._sums.abs().max())
        return self._sums

    def _kept(self) -> Tensor:
        if self._floats is None:
            self._floats = self._codes().to(torch.float32)
        return self._floats


def _in_slices(x: Tensor, weight: Tensor) -> Tensor:
    """The product from float32 products of few enough channels each."""
    if x.shape[1] <= _SLICE:
        return x.to(torch.float32) @ weight.to(torch.float32).t()
    total = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.int32)
    for part, columns in zip(x.split(_SLICE, dim=1), weight.split(_SLICE, dim=1), strict=True):
        total += (part.to(torch.float32) @ columns.to(torch.float32).t()).to(torch.int32)
    return total


class ExactProducts:
    """Operands and results of repeated int8 products of bounded size: no allocation per product.

    On integer units where they pay, else in float32 slices; the results are the same to the bit. Operands for integer units
    are padded to the sizes the device multiplies; the padding is zero and stays zero.

    Args:
        stack: Most products at a time.
        rows: Most rows T of an operand.
        channels: C.
        outputs: O.
        device: Where they are.
        integer: Whether integer units multiply, see :func:`integer_gemm_pays`.
    """

    def __init__(
        self, stack: int, rows: int, channels: int, outputs: int, device: torch.device, *, integer: bool
    ) -> None:
        self._channels, self._outputs, self._integer = channels, outputs, integer
        self._least = _CUDA_ROWS if device.type == "cuda" else 1
        if integer:
            rows = max(rows, self._least)
            inner, outer = padded_sizes(channels, outputs, device)
            self._x = torch.zeros(stack, rows, inner, dtype=torch.int8, device=device)
            self._product = torch.empty(stack, rows, outer, dtype=torch.int32, device=device)
        elif channels > _SLICE:
            self._total = torch.empty(stack * rows * outputs, dtype=torch.float64, device=device)

    @staticmethod
    def sizes(channels: int, outputs: int, device: torch.device, *, integer: bool) -> tuple[int, int]:
        """Bytes of one weight operand, and of the buffers per row and product."""
        if not integer:
            return 4 * channels * outputs, 8 * outputs if channels > _SLICE else 0
        inner, outer = padded_sizes(channels, outputs, device)
        return inner * outer, inner + 4 * outer

    def operand(self, codes: Tensor) -> Tensor:
        """Integers (n, C, O) float32 in -128..127 as the right operand of :meth:`product`."""
        if not self._integer:
            return codes.clone()
        stack = codes.shape[0]
        inner, outer = padded_sizes(self._channels, self._outputs, codes.device)
        if codes.device.type == "cuda":  # its integer units read the right operand column by column
            operand = torch.zeros(stack, outer, inner, dtype=torch.int8, device=codes.device).mT
        else:
            operand = torch.zeros(stack, inner, outer, dtype=torch.int8, device=codes.device)
        operand[:, : self._channels, : self._outputs].copy_(codes)
        return operand

    def product(self, codes: Tensor, operand: Tensor, out: Tensor) -> None:
        """Exact products of ``codes`` (n, T, C) float32 integers in -128..127 and an operand, rounded once to ``out`` (n, T, O)."""
        if self._integer:
            out.copy_(self._on_units(codes, operand))
            return
        torch.bmm(codes[:, :, :_SLICE], operand[:, :_SLICE], out=out)
        if self._channels > _SLICE:
            total = self._total[: out.numel()].view(out.shape).copy_(out)
            for first in range(_SLICE, self._channels, _SLICE):
                some = slice(first, first + _SLICE)
                torch.bmm(codes[:, :, some], operand[:, some], out=out)
                total.add_(out)
            out.copy_(total)

    def _on_units(self, codes: Tensor, operand: Tensor) -> Tensor:
        """(n, T, O) int32, a view that the next call overwrites."""
        stack, rows, _ = codes.shape
        self._x[:stack, :rows, : self._channels].copy_(codes)
        # Rows beyond T hold old codes: they fill the product up to the rows CUDA wants, and nobody reads them.
        filled = max(rows, self._least)
        for i in range(stack):
            torch._int_mm(self._x[i, :filled], operand[i], out=self._product[i, :filled])
        return self._product[:stack, :rows, : self._outputs]


def padded_sizes(channels: int, outputs: int, device: torch.device) -> tuple[int, int]:
    """(C', O'): the sizes of a weight with ``channels`` inputs and ``outputs`` that ``device`` multiplies."""
    return channels + -channels % _MULTIPLE, outputs + (-outputs % _MULTIPLE if device.type == "cuda" else 0)
