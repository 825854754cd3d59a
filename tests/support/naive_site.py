"""An independent, slow reading of the formulas: scalar loops, products and sums in float64, no torch arithmetic.

Only the element-wise steps up to the rounding are done in float32 as the library does them, so that both land on the same side of
a rounding tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alphasmith.objectives.calibration.site_data import SiteData, SitePart
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing

Array = NDArray[np.float32]

LARGEST = {"int8": 127, "int7": 63, "int4": 7, "fp8": 448, "int16": 32767}


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
    return naive_weight_codes(w, scheme, out_features)[0]


def naive_weight_codes(
    w: Array, scheme: Scheme, out_features: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Dequantized weight (O, D), and the step of every entry."""
    out, steps = np.zeros(w.shape), np.zeros(w.shape)
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
            step = naive_scale(values, scheme.weights)
            for place, value in zip(block, naive_quantize(values, step, scheme.weights), strict=True):
                out[place], steps[place] = value, step
        start = stop
    return out, steps


def _saturated(
    part: SitePart,
    codes: tuple[NDArray[np.float64], list[np.float32], list[int | None]],
    w: NDArray[np.float64],
    steps: NDArray[np.float64],
    channels: int,
) -> NDArray[np.float64]:
    """X W^T with products of unsigned codes and weights added two by two in 16 bits: neighbouring channels at one kernel position."""
    x, row_steps, zeros = codes
    width, kernel = w.shape[1], x.shape[1] // channels
    out = np.zeros((x.shape[0], w.shape[0]))
    row = 0
    for features in part.out_features:
        for o in range(features):
            block = o * part.groups // features
            for t in range(x.shape[0]):
                zero = zeros[t] if zeros[t] is not None else 128
                total = 0
                for k in range(kernel):
                    places = list(range(k, width, kernel))
                    for first in range(0, len(places), 2):
                        pair = 0
                        for d in places[first : first + 2]:
                            weight = round(w[row, d] / steps[row, d])
                            pair += (round(x[t, block * width + d] / row_steps[t]) + zero) * weight
                            total -= zero * weight
                        total += min(max(pair, -32768), 32767)
                out[t, row] = total * float(row_steps[t]) * steps[row, 0]
            row += 1
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


def naive_grid(low: np.float32, high: np.float32, fmt: str) -> tuple[np.float32, int | None]:
    """Step and zero point for values from ``low`` to ``high``."""
    low, high = min(low, np.float32(0)), max(high, np.float32(0))
    if fmt != "uint8":
        return naive_scale([low, high], fmt), None
    step = np.float32(1) if low == high else high / np.float32(255) - low / np.float32(255)
    return step, min(max(round(float(-low / step)), 0), 255)


def _edges(
    low: Array, high: Array, s: Array, shift: Array | None, factor: float = 1.0
) -> tuple[np.float32, np.float32]:
    """Smallest and largest value of all channels after shift and division."""
    z = np.zeros_like(low) if shift is None else shift
    smallest = min((lo - zc) / sc for lo, zc, sc in zip(low, z, s, strict=True))
    largest = max((h - zc) / sc for h, zc, sc in zip(high, z, s, strict=True))
    return min(smallest, np.float32(0)) * np.float32(factor), max(largest, np.float32(0)) * np.float32(factor)


def _dequantized(values: Sequence[np.float32], step: np.float32, zero: int | None, fmt: str) -> list[float]:
    """What values / step round to, times the step."""
    if zero is None:
        return [float(np.float32(naive_round(float(v), fmt)) * step) for v in values]
    return [float(np.float32(min(max(round(float(v)) + zero, 0), 255) - zero) * step) for v in values]


def _codes(
    data: SiteData, part: SitePart, scheme: Scheme, smoothing: Smoothing
) -> tuple[NDArray[np.float64], list[np.float32], list[int | None]]:
    """Dequantized activations (T, D), still divided by the scales; step and zero point of every row."""
    s = smoothing.scales.numpy()
    shift = None if smoothing.shift is None else smoothing.shift.numpy()
    channel, x, fmt = part.channel.numpy(), part.x.numpy(), scheme.activations
    if shift is not None:
        x = x - shift[channel]
    one = np.float32(1)
    if fmt == "none":
        return np.array(x * (one / s[channel]), dtype=np.float64), [], []
    out = np.zeros(x.shape)
    steps: list[np.float32] = []
    zeros: list[int | None] = []
    calibrated = data.input_range.low.numpy(), data.input_range.high.numpy()
    static, static_zero = naive_grid(*_edges(*calibrated, s, shift, smoothing.range_factor), fmt)
    for t in range(x.shape[0]):
        if scheme.activation_granularity == "static":
            # One factor for scale and step together, as the library multiplies.
            values = [v * (one / (s[c] * static)) for v, c in zip(x[t], channel, strict=True)]
            out[t] = _dequantized(values, static, static_zero, fmt)
            steps.append(static)
            zeros.append(static_zero)
            continue
        values = [v * (one / s[c]) for v, c in zip(x[t], channel, strict=True)]
        if part.sample is not None and part.sample_low is not None and part.sample_high is not None:
            row = int(part.sample[t])
            edges = _edges(part.sample_low.numpy()[row], part.sample_high.numpy()[row], s, shift)
        else:
            edges = min(values), max(values)
        step, zero = naive_grid(*edges, fmt)
        out[t] = _dequantized([v / step for v in values], step, zero, fmt)
        steps.append(step)
        zeros.append(zero)
    return out, steps, zeros


def naive_row_errors(
    data: SiteData, scheme: Scheme, smoothing: Smoothing
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Squared error and squared norm of the float output of every row, part by part."""
    s = smoothing.scales.numpy()
    found = []
    for part in data.parts:
        channel, (_, width) = part.channel.numpy(), part.weight.shape
        scaled = np.zeros(part.weight.shape, dtype=np.float32)
        row = 0
        for features in part.out_features:
            for o in range(features):
                block = o * part.groups // features
                for d in range(width):
                    scaled[row, d] = part.weight.numpy()[row, d] * s[channel[block * width + d]]
                row += 1
        quantized = _codes(data, part, scheme, smoothing)
        dense, weight_steps = naive_weight_codes(scaled, scheme, part.out_features)
        if scheme.saturates:
            out = _saturated(part, quantized, dense, weight_steps, data.channels)
        else:
            out = _products(part, quantized[0], dense)
        weight = part.weight.numpy().astype(np.float64)
        if smoothing.shift is not None:
            out += _products(part, smoothing.shift.numpy().astype(np.float64)[channel][None], weight)
        ref = _products(part, part.x.numpy().astype(np.float64), weight)
        found.append((((out - ref) ** 2).sum(1), (ref**2).sum(1)))
    return found


def naive_loss(data: SiteData, scheme: Scheme, smoothing: Smoothing, fraction: float = 1.0) -> float:
    """Relative squared error over the first ``fraction`` of the rows of every part."""
    error = energy = 0.0
    for errors, energies in naive_row_errors(data, scheme, smoothing):
        rows = math.ceil(errors.size * fraction - 1e-9)
        error += float(errors[:rows].sum())
        energy += float(energies[:rows].sum())
    return error / energy
