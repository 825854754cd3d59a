"""Exact products of 8-bit integer matrices, on integer units where the device has them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

_CUDA_ROWS = 17  # torch._int_mm on CUDA wants more than 16 rows ...
_MULTIPLE = (
    8  # ... and inner and outer sizes that are multiples of 8; on CPU, single-channel products are wrong in torch 2.13
)


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


@cache
def integer_gemm_pays(device_type: str) -> bool:
    """Whether integer products are exact on this kind of device and faster than float32 ones; timed once per kind.

    CPUs without 8-bit dot products have a slow substitute, by a factor of ten and more, as others are faster by a factor.

    Args:
        device_type: ``torch.device.type``, e.g. ``cpu`` or ``cuda``.
    """
    if device_type != "cpu" or not integer_gemm_works(device_type):
        return integer_gemm_works(device_type)
    x, w = (torch.full((256, 512), 127, dtype=torch.int8), torch.full((512, 512), 127, dtype=torch.int8))
    floats = x.to(torch.float32), w.to(torch.float32)
    return _quickest(lambda: torch._int_mm(x, w)) < _quickest(lambda: torch.mm(*floats))


def _quickest(work: Callable[[], Tensor]) -> float:
    """Shortest of a few times [s], which other work on the machine disturbs least."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """Exact product of two integer matrices, on integer units where the device has them.

    Args:
        x: (T, C) int8.
        weight: (O, C) int8.

    Returns:
        (T, O) int32 where the device multiplies integers, else float32 or float64 holding the same integers.
    """
    rows, channels = x.shape
    if rows and channels and integer_gemm_works(x.device.type):
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
    # Integers up to 128 survive bf16 and TF32 multiplication, so only the accumulator's 24 bits bound the float32 path.
    exact_in_float32 = 128 * 128 * channels < 2**24
    dtype = torch.float32 if exact_in_float32 else torch.float64
    return x.to(dtype) @ weight.to(dtype).t()


class IntegerBuffers:
    """Operand and result of repeated int8 products of bounded size: no allocation per product. Unchecked: see ``integer_gemm_works``.

    Operands are padded to the sizes the device multiplies; the padding is zero and stays zero.

    Args:
        stack: Most products at a time.
        rows: Most rows T of an operand.
        channels: C.
        outputs: O.
        device: Where they are.
    """

    def __init__(self, stack: int, rows: int, channels: int, outputs: int, device: torch.device) -> None:
        self._least = _CUDA_ROWS if device.type == "cuda" else 1
        rows = max(rows, self._least)
        inner, outer = padded_sizes(channels, outputs, device)
        self._channels, self._outputs = channels, outputs
        self._x = torch.zeros(stack, rows, inner, dtype=torch.int8, device=device)
        self._product = torch.empty(stack, rows, outer, dtype=torch.int32, device=device)

    def product(self, codes: Tensor, weights: Tensor) -> Tensor:
        """Exact products of ``codes`` (n, T, C) float32 integers in -128..127 and ``weights`` from :func:`weight_codes`.

        Returns:
            (n, T, O) int32, a view that the next call overwrites.
        """
        stack, rows, _ = codes.shape
        self._x[:stack, :rows, : self._channels].copy_(codes)
        # Rows beyond T hold old codes: they fill the product up to the rows CUDA wants, and nobody reads them.
        filled = max(rows, self._least)
        for i in range(stack):
            torch._int_mm(self._x[i, :filled], weights[i], out=self._product[i, :filled])
        return self._product[:stack, :rows, : self._outputs]


def weight_codes(codes: Tensor) -> Tensor:
    """Integers (n, C, O) float32 in -128..127 as the padded (n, C', O') int8 operand of :meth:`IntegerBuffers.product`."""
    stack, channels, outputs = codes.shape
    inner, outer = padded_sizes(channels, outputs, codes.device)
    if codes.device.type == "cuda":  # its integer units read the right operand column by column
        operand = torch.zeros(stack, outer, inner, dtype=torch.int8, device=codes.device).mT
    else:
        operand = torch.zeros(stack, inner, outer, dtype=torch.int8, device=codes.device)
    operand[:, :channels, :outputs].copy_(codes)
    return operand


def padded_sizes(channels: int, outputs: int, device: torch.device) -> tuple[int, int]:
    """(C', O'): the sizes of a weight with ``channels`` inputs and ``outputs`` that ``device`` multiplies."""
    return channels + -channels % _MULTIPLE, outputs + (-outputs % _MULTIPLE if device.type == "cuda" else 0)
