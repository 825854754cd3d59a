"""Exact products of 8-bit integer matrices, on integer units where the device has them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

_CUDA_ROWS = 17  # torch._int_mm on CUDA wants more than 16 rows ...
_MULTIPLE = 8  # ... and inner and outer sizes that are multiples of 8


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
        # Zero channels add nothing. On CPU the product of single-channel matrices is wrong in torch 2.13.
        pad_c = -channels % _MULTIPLE
        pad_rows = max(0, _CUDA_ROWS - rows) if cuda else 0
        pad_outputs = -outputs % _MULTIPLE if cuda else 0
        if pad_c or pad_rows:
            x = nn.functional.pad(x, (0, pad_c, 0, pad_rows))
        if pad_c or pad_outputs:
            weight = nn.functional.pad(weight, (0, pad_c, 0, pad_outputs))
        return torch._int_mm(x, weight.t())[:rows, :outputs]
    # Integers up to 128 survive bf16 and TF32 multiplication, so only the accumulator's 24 bits bound the float32 path.
    exact_in_float32 = 128 * 128 * channels < 2**24
    dtype = torch.float32 if exact_in_float32 else torch.float64
    return x.to(dtype) @ weight.to(dtype).t()
