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


def integer_gemm_pays(device_type: str, rows: int, channels: int, outputs: int, converted: bool = False) -> bool:
    """Whether integer units multiply matrices of about these sizes exactly and faster than float32 does; timed once per size.

    CPUs without 8-bit dot products have a slow substitute, by a factor of ten and more, as others are faster by a factor.
    Either way gives the same integers: what was decided changes no result.

    Args:
        device_type: ``torch.device.type``, e.g. ``cpu`` or ``cuda``.
        rows: T.
        channels: C.
        outputs: O.
        converted: Whether float32 would have to convert the weight for every product.
    """
    if device_type != "cpu" or not integer_gemm_works(device_type):
        return integer_gemm_works(device_type)
    sizes = _class_of(rows, 1, 1024), _class_of(channels, 16, 2048), _class_of(outputs, 16, 2048)
    return _pays_on_cpu(*sizes, converted, torch.get_num_threads())


def _class_of(size: int, least: int, most: int) -> int:
    """Sizes that are timed as one: up to the next power of two."""
    return min(most, max(least, 1 << (size - 1).bit_length())) if size else least


@cache
def _pays_on_cpu(rows: int, channels: int, outputs: int, converted: bool, _threads: int) -> bool:
    codes = torch.full((rows, channels), 127.0)
    weight = torch.full((outputs, channels), 127, dtype=torch.int8)
    floats, turned = weight.to(torch.float32), weight.t()
    # Activations come as floats and the product becomes one: what that takes on the way to integers and back belongs to it.
    as_floats = _quickest(lambda: codes @ (weight.to(torch.float32) if converted else floats).t())
    return _quickest(lambda: torch._int_mm(codes.char(), turned).float(), worth=as_floats) < as_floats


def _quickest(work: Callable[[], Tensor], *, worth: float = math.inf) -> float:
    """Shortest of a few times [s], which other work on the machine disturbs least; fewer where one is far above ``worth``.

    The first call is one of them, but never the only one: it may have to choose and build its kernel.
    """
    times: list[float] = []
    while len(times) < 5 and (len(times) < 2 or times[-1] < 4 * worth):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """Exact product of two integer matrices: on integer units where they pay, else in float32, which holds the same integers.

    Args:
        x: (T, C) int8.
        weight: (O, C) int8.

    Returns:
        (T, O) int32, or float32 with the same integers: a tensor of its own.
    """
    rows, channels = x.shape
    if rows and channels and integer_gemm_pays(x.device.type, rows, channels, weight.shape[0], True):
        return product_on_units(x, unit_operand(weight), weight.shape[0])
    return product_in_floats(x.to(torch.float32), float_operands(weight, exact_pieces(channels, 128)))


def unit_operand(weight: Tensor) -> Tensor:
    """The right operand of :func:`product_on_units`: a weight (O, C) int8, turned, with zeros up to the sizes its device multiplies."""
    outputs, channels = weight.shape
    inner, outer = padded_sizes(channels, outputs, weight.device)
    if (inner, outer) != (channels, outputs):
        weight = nn.functional.pad(weight, (0, inner - channels, 0, outer - outputs))
    return weight.t()


def product_on_units(x: Tensor, operand: Tensor, outputs: int) -> Tensor:
    """Exact product on integer units, which must be exact there, see :func:`integer_gemm_works`.

    Args:
        x: (T, C) int8, T and C at least 1.
        operand: Of a weight (O, C), see :func:`unit_operand`.
        outputs: O.

    Returns:
        (T, O) int32: a tensor of its own, or a view of one.
    """
    rows, channels = x.shape
    inner, outer = operand.shape
    more_rows = max(0, _CUDA_ROWS - rows) if x.device.type == "cuda" else 0
    if inner > channels or more_rows:
        x = nn.functional.pad(x, (0, inner - channels, 0, more_rows))  # zero channels add nothing
    product = torch._int_mm(x, operand)
    return product[:rows, :outputs] if more_rows or outer > outputs else product


def exact_pieces(channels: int, largest: int, weight: Tensor | None = None) -> list[int]:
    """Channels of products that a float32 accumulator holds exactly, in whatever order it adds.

    Every sum on the way is an integer of at most ``largest * sum_c |w_c|``, which float32 holds up to 2**24. Of a weight at hand, whose
    codes are mostly far smaller than the largest, that sum is known, and most weights need one piece only.

    Args:
        channels: C.
        largest: Magnitude that no code of the activations exceeds, at most 256.
        weight: (O, C) integers in -128..127; None: the largest are assumed.

    Returns:
        Sizes whose sum is C.
    """
    if largest * 128 * channels <= _FLOATS or not channels:
        return [channels]
    fit = _FLOATS // (largest * 128)
    if weight is None or not weight.numel():
        return [min(fit, channels - first) for first in range(0, channels, fit)]
    pieces, reached = [0], weight.new_zeros(weight.shape[0], dtype=torch.float32)
    for block in weight.split(fit, dim=1):
        sums = block.to(torch.float32).abs().sum(dim=1)
        reached += sums
        if pieces[-1] and largest * float(reached.max()) > _FLOATS:
            pieces.append(0)
            reached = sums
        pieces[-1] += block.shape[1]
    return pieces


def float_operands(weight: Tensor, pieces: list[int]) -> tuple[Tensor, ...]:
    """The right operands of :func:`product_in_floats`: a weight (O, C) in float32, turned, in :func:`exact_pieces`."""
    return tuple(part.t() for part in weight.to(torch.float32).split(pieces, dim=1))


def product_in_floats(x: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    """Exact product from float32 products.

    Args:
        x: (T, C) float32 integers.
        operands: Of a weight (O, C), see :func:`float_operands`.

    Returns:
        (T, O) float32 of integers, or int32 where there are several pieces: a tensor of its own.
    """
    if len(operands) == 1:
        return x.mm(operands[0])
    first, *others = x.split([operand.shape[0] for operand in operands], dim=1)
    total: Tensor = first.mm(operands[0]).to(torch.int32)
    for part, operand in zip(others, operands[1:], strict=True):
        total.add_(part.mm(operand).to(torch.int32))
    return total


class WeightProducts:
    """Exact products of activation codes and one weight, with what they need of it derived once. Source: formula fA17.

    Args:
        weight: Gives the weight, (O, C) int8.
        largest: Magnitude that no code exceeds, counted from its zero point: 255 for uint8, else 128.
        keep: Keep the weight as it is multiplied: in float32 where integer units do not pay, 4 bytes per weight, faster with few rows.
    """

    def __init__(self, weight: Callable[[], Tensor], *, largest: int, keep: bool) -> None:
        self._weight, self._largest, self._keep = weight, largest, keep
        self._size: tuple[int, int] | None = None
        self._operand: Tensor | None = None
        self._floats: tuple[Tensor, ...] | None = None
        self._pieces: list[int] | None = None
        self._sums: Tensor | None = None
        self._from_zero: tuple[Tensor, Tensor] | None = None

    def of_bytes(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        """The product of codes of 8 bits, counted from their zero point.

        Args:
            codes: (T, C) float32 integers: codes of int8, or those of uint8 minus ``zero``; C at most :data:`MOST_CHANNELS`.
            zero: () or (T, 1) the code of uint8 that stands for 0; None: the codes are those of int8.

        Returns:
            (T, O) int32, or float32 with the same integers: a tensor of its own.
        """
        if self._size is None:
            outputs, channels = self._weight().shape
            self._size = outputs, channels
        rows, (outputs, channels) = codes.shape[0], self._size
        if rows and channels and integer_gemm_pays(codes.device.type, rows, channels, outputs, not self._keep):
            return self._on_units(codes, zero, outputs)
        return product_in_floats(codes, self._floats or self._operands(channels))

    def _operands(self, channels: int) -> tuple[Tensor, ...]:
        weight = self._weight().to(torch.float32)
        if self._pieces is None:
            self._pieces = exact_pieces(channels, self._largest, weight)
        operands = float_operands(weight, self._pieces)
        if self._keep:
            self._floats = operands
        return operands

    def of_words(self, codes: Tensor) -> Tensor:
        """The product of codes of 16 bits.

        Args:
            codes: (T, C) float32 integers in -32768..32767; C at most :data:`MOST_CHANNELS`.

        Returns:
            (T, O) int64.
        """
        high = (codes / 256).floor_()
        low = codes - (256 * high + 128)
        together = self.of_bytes(high, None).to(torch.int64).mul_(256)
        return together.add_(self.of_bytes(low, None).to(torch.int64)).add_(128 * self._summed())

    def _on_units(self, codes: Tensor, zero: Tensor | None, outputs: int) -> Tensor:
        operand = self._operand
        if operand is None:
            operand = unit_operand(self._weight())
            if self._keep:
                self._operand = operand
        if zero is None:
            return product_on_units(codes.char(), operand, outputs)
        # Units take what lies in -128..127: the codes minus 128. Sums of the weight make up for the rest.
        return product_on_units((codes + (zero - 128)).char(), operand, outputs).add_(self._raised(zero))

    def _raised(self, zero: Tensor) -> Tensor:
        """What codes minus 128 lack: (O,) int32 for one zero point, which is kept, or (T, O)."""
        known = self._from_zero
        if known is not None and known[0] is zero:
            return known[1]
        raised = (128 - zero.to(torch.int32)) * self._summed().to(torch.int32)
        if not zero.dim():
            self._from_zero = zero, raised
        return raised

    def _summed(self) -> Tensor:
        if self._sums is None:
            self._sums = self._weight().sum(dim=1, dtype=torch.int64)
        return self._sums


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
