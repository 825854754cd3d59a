"""Memory that the search of one site takes."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData, SitePart

_FLOAT = 4
#: Buffers of one judge where no budget is given [bytes], and candidates that are scored together.
_JUDGE_BUDGET = 2**29
_TOGETHER = 24
#: Rows the noise model samples, entries it samples at least, and, on a GPU, those in flight, with their temporaries [bytes].
_NOISE_ROWS, _NOISE_ENTRIES = 512, 2**19
_IN_FLIGHT, _PER_ENTRY = 2**26, 3 * _FLOAT
#: One part in this many is lost to fragmentation.
_LOSS_DIVISOR = 8


def work_memory(data: SiteData, held_out: SiteData, *, budget: int | None = None) -> int:
    """Upper bound of what the search of a site takes on a GPU at its peak, its rows included; less on the CPU [bytes].

    What the device's libraries take once per process is not included.

    Args:
        data: Rows to search on.
        held_out: Rows that judge.
        budget: Memory for the buffers of each judge, see ``SiteSettings.budget``.
    """
    judges = sum(_judge_bytes(split, budget) for split in (data, held_out))
    total = sum(_tensor_bytes(split) for split in (data, held_out)) + judges + sum(map(_noise_bytes, data.parts))
    return total + total // _LOSS_DIVISOR


def _tensor_bytes(data: SiteData) -> int:
    tensors = [getattr(part, field.name) for part in data.parts for field in fields(part)]
    tensors += [*data.activation_statistics.values(), data.input_range.low, data.input_range.high]
    tensors += [data.weight_absmax, data.ties, data.tops]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _judge_bytes(data: SiteData, budget: int | None) -> int:
    """Weights and float output of a judge in its own order, and the buffers that its budget allows or candidates fill."""
    weights = _FLOAT * sum(part.weight.numel() for part in data.parts)
    outputs = _FLOAT * sum(part.x.shape[0] * part.weight.shape[0] for part in data.parts)
    passing = 2 * _FLOAT * sum(part.x.numel() for part in data.parts) + 2 * outputs
    # One candidate: its weights before and after rounding; half of a budget is for the one, half for the other.
    filled = _TOGETHER * (2 * weights + passing)
    allowed = max(_JUDGE_BUDGET, 4 * weights) if budget is None else budget
    return weights + outputs + min(filled, allowed)


def _noise_bytes(part: SitePart) -> int:
    """Sampled entries of rows and weights, those of all candidates in flight, float64 copies with gradients, squares."""
    sampled = [
        min(tensor.numel(), max(_NOISE_ROWS * tensor.shape[1], _NOISE_ENTRIES)) for tensor in (part.x, part.weight)
    ]
    in_flight = max(max(sampled), min(_IN_FLIGHT, _TOGETHER * max(sampled)))
    return _PER_ENTRY * in_flight + 8 * _FLOAT * sum(sampled) + _FLOAT * part.weight.numel()
