"""An independent, slow reading of the formulas: scalar loops, products and sums in float64, no torch arithmetic.

Only divisions and roundings are done in float32 as the library does them, so that both land on the same side of a rounding tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.site_data import SiteData, SitePart

Array = NDArray[np.float32]

LARGEST = {"int8": 127, "int4": 7, "fp8": 448}


def _e4m3_values() -> list[float]:
    """Magnitudes of float8 e4m3 in the order of their codes: 7 subnormals after 0, then 8 per binade up to 448."""
    values = [mantissa * 2.0**-9 for mantissa in range(8)]
    for exponent in range(-6, 9):
        values += [(1 + mantissa / 8) * 2.0**exponent for mantissa in range(8)]
    return values[:-1]  # the last code is NaN


E4M3 = _e4m3_values()


def naive_round(value: float, fmt: str) -> float:
    """Nearest number of the format, half to even code."""
    if fmt == "fp8":
        magnitude = min(abs(value), 448.0)
        code = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - magnitude), i % 2))
        return math.copysign(E4M3[code], value)
    largest = LARGEST[fmt]
    return float(min(max(round(value), -largest - 1), largest))  # Python's round is half to even


def naive_scale(values: Sequence[np.float32], fmt: str) -> np.float32:
    largest = max((abs(v) for v in values), default=np.float32(0))
    return np.float32(1) if largest == 0 else np.float32(largest) / np.float32(LARGEST[fmt])


def naive_quantize(values: Sequence[np.float32], scale: np.float32, fmt: str) -> list[float]:
    return [float(np.float32(naive_round(float(v / scale), fmt)) * scale) for v in values]


def naive_weight(w: Array, scheme: Scheme, out_features: Sequence[int]) -> NDArray[np.float64]:
    """Dequantized weight (O, D), block by block."""
    out = np.zeros(w.shape)
    start = 0
    for features in out_features:
        stop = start + features
        if scheme.weight_granularity == "tensor":
            blocks = [[(o, d) for o in range(start, stop) for d in range(w.shape[1])]]
        else:
            size = w.shape[1] if scheme.group_size is None else scheme.group_size
            blocks = [
                [(o, d) for d in range(first, min(first + size, w.shape[1]))]
                for o in range(start, stop)
                for first in range(0, w.shape[1], size)
            ]
        for block in blocks:
            values = [w[place] for place in block]
            for place, value in zip(
                block, naive_quantize(values, naive_scale(values, scheme.weights), scheme.weights), strict=True
            ):
                out[place] = value
        start = stop
    return out


def _products(part: SitePart, x: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    """X W^T, each output seeing only the columns of its convolution group."""
    width = w.shape[1]
    out = np.zeros((x.shape[0], w.shape[0]))
    row = 0
    for features in part.out_features:
        for o in range(features):
            block = o * part.groups // features
            for t in range(x.shape[0]):
                out[t, row] = sum(x[t, block * width + d] * w[row, d] for d in range(width))
            row += 1
    return out


def _activation_range(data: SiteData, part: SitePart, scheme: Scheme, s: Array, x: Array, t: int) -> list[np.float32]:
    if scheme.activation_granularity == "static":
        return [data.activation_absmax.numpy()[c] / s[c] for c in range(s.size)]
    if part.sample is not None and part.sample_absmax is not None:
        sample = int(part.sample[t])
        return [part.sample_absmax.numpy()[sample, c] / s[c] for c in range(s.size)]
    return list(x[t])


def naive_loss(data: SiteData, scheme: Scheme, scales: torch.Tensor, fraction: float = 1.0) -> float:
    """Relative squared error over the first ``fraction`` of the rows of every part."""
    s = scales.numpy()
    error = energy = 0.0
    for part in data.parts:
        rows = math.ceil(part.x.shape[0] * fraction - 1e-9)
        channel, width = part.channel.numpy(), part.weight.shape[1]
        x = np.stack([part.x.numpy()[t] / s[channel] for t in range(rows)])
        scaled = np.zeros(part.weight.shape, dtype=np.float32)
        row = 0
        for features in part.out_features:
            for o in range(features):
                block = o * part.groups // features
                for d in range(width):
                    scaled[row, d] = part.weight.numpy()[row, d] * s[channel[block * width + d]]
                row += 1
        quantized = x.astype(np.float64)
        if scheme.activations != "none":
            for t in range(rows):
                scale = naive_scale(_activation_range(data, part, scheme, s, x, t), scheme.activations)
                quantized[t] = naive_quantize(list(x[t]), scale, scheme.activations)
        out = _products(part, quantized, naive_weight(scaled, scheme, part.out_features))
        ref = _products(part, part.x.numpy()[:rows].astype(np.float64), part.weight.numpy().astype(np.float64))
        error += float(((out - ref) ** 2).sum())
        energy += float((ref**2).sum())
    return error / energy
