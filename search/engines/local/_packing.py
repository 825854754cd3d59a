"""Work and results as bytes: tensors travel as numpy arrays, which pickles twice as fast as torch's own way."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

#: Types that numpy has.
_PLAIN = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


def packed(value: Any) -> bytes:
    """A pickle of ``value``, for ``pickle.loads``; tensors on the CPU are copied, whatever they share."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Plain tensors as arrays; everything else as it reduces itself."""
        plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided
        if not plain or value.dtype not in _PLAIN or value.requires_grad or value.is_conj() or value.is_neg():
            return NotImplemented
        return torch.from_numpy, (value.numpy(),)
