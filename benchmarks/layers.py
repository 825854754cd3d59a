"""Synthetic layers of seven kinds to measure the search on.

Seeds for tuning defaults and seeds for reporting are disjoint, so no figure is reported on what a default was chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.judge.site_objective import linear_site_data

Kind = Literal["lognormal", "outliers", "asymmetric", "both_sides", "dead", "correlated", "peer"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Seeds on which defaults and generators may be tuned, and seeds that only figures in documents are made on.
TUNING_SEEDS = (1, 2, 3)
REPORTING_SEEDS = (101, 102, 103)


@dataclass(frozen=True)
class Size:
    """Rows to calibrate on (as many fresh ones are made), input channels, outputs."""

    rows: int = 1024
    channels: int = 384
    outputs: int = 384


#: Size of the layer of the peers' table.
PEER_SIZE = Size(4096, 768, 768)


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer.

    Attributes:
        name: Kind and seed.
        kind: What is hard about it.
        x: (T, C) float32 rows that a search may see.
        w: (O, C) float32.
        fresh: (T, C) rows of the same distribution that no search sees.
    """

    name: str
    kind: Kind
    x: Tensor
    w: Tensor
    fresh: Tensor


@dataclass(frozen=True)
class PeerShape:
    """Numbers of the ``peer`` kind, tuned on ``TUNING_SEEDS`` to lie near the table of other tools (docs/performance.md).

    Attributes:
        spread: Standard deviation of the log of a channel's magnitude.
        outliers: Share of channels that are ``low`` to ``high`` times larger.
        low: Smallest factor of an outlier channel.
        high: Largest factor of an outlier channel.
        asymmetric: Share of channels whose mean is not 0.
        mean: Standard deviation of those means, in standard deviations of an ordinary channel: asymmetric channels reach as
            far as outlier channels do.
        row_spread: Standard deviation of the log of a row's magnitude.
        column_spread: Standard deviation of the log of a weight column's magnitude.
        output_spread: Standard deviation of the log of a weight row's magnitude.
    """

    spread: float = 0.3
    outliers: float = 0.01
    low: float = 20.0
    high: float = 100.0
    asymmetric: float = 0.2
    mean: float = 90.0
    row_spread: float = 0.27
    column_spread: float = 0.2
    output_spread: float = 0.4


def layers(seed: int, kinds: Sequence[Kind] | None = None, *, size: Size = Size()) -> list[Layer]:
    """One layer of every kind.

    Args:
        seed: Decides everything that is drawn; layers of one seed differ between kinds.
        kinds: Which kinds; None: all. ``peer`` layers are of this size too, see ``PEER_SIZE`` for the table's.
        size: Rows, channels and outputs.
    """
    return [_layer(kind, seed, size) for kind in (kinds or KINDS)]


def layer_data(layer: Layer) -> tuple[SiteData, SiteData]:
    """Data to search on, and fresh rows under the ranges and statistics of the former."""
    data = linear_site_data(layer.x, layer.w, name=layer.name)
    return data, with_ranges_of(linear_site_data(layer.fresh, layer.w, name=layer.name), data)


def with_ranges_of(fresh: SiteData, data: SiteData) -> SiteData:
    """``fresh`` with what a deployed model knows: the ranges and statistics of its calibration ``data``."""
    return replace(fresh, activation_statistics=data.activation_statistics, input_range=data.input_range)


def _layer(kind: Kind, seed: int, size: Size) -> Layer:
    generator = torch.Generator().manual_seed(seed * len(KINDS) + KINDS.index(kind))
    rows, w = _MAKERS[kind](2 * size.rows, size, generator)
    return Layer(f"{kind}-{seed}", kind, rows[: size.rows].contiguous(), w, rows[size.rows :].contiguous())


def _log_normal(count: int, spread: float, generator: torch.Generator) -> Tensor:
    return torch.exp(spread * torch.randn(count, generator=generator))


def _outlier_gain(channels: int, share: float, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(C,) 1, and ``low`` to ``high`` on a random ``share`` of the channels, at least one."""
    chosen = torch.randperm(channels, generator=generator)[: max(1, round(share * channels))]
    gain = torch.ones(channels)
    gain[chosen] = low + (high - low) * torch.rand(len(chosen), generator=generator)
    return gain


def _weights(size: Size, generator: torch.Generator) -> Tensor:
    return torch.randn(size.outputs, size.channels, generator=generator) / math.sqrt(size.channels)


def _lognormal(rows: int, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    w = _weights(size, generator) * _log_normal(size.channels, 0.5, generator)
    scale = _log_normal(size.channels, 1.0, generator)
    return torch.randn(rows, size.channels, generator=generator) * scale, w


def _outliers(rows: int, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    gain = _outlier_gain(size.channels, 0.01, 20, 100, generator)
    return torch.randn(rows, size.channels, generator=generator) * gain, _weights(size, generator)


def _asymmetric(rows: int, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    scale = _log_normal(size.channels, 0.5, generator) * _outlier_gain(size.channels, 0.01, 20, 100, generator)
    mean = 3 * torch.randn(size.channels, generator=generator) * (torch.rand(size.channels, generator=generator) < 0.5)
    x = (torch.randn(rows, size.channels, generator=generator) + mean) * scale
    return x, _weights(size, generator)


def _both_sides(rows: int, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    scale = _log_normal(size.channels, 0.5, generator) * _outlier_gain(size.channels, 0.01, 20, 100, generator)
    column = _outlier_gain(size.channels, 0.01, 5, 20, generator)
    return torch.randn(rows, size.channels, generator=generator) * scale, _weights(size, generator) * column


def _dead(rows: int, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, w = _outliers(rows, size, generator)
    order = torch.randperm(size.channels, generator=generator)
    x[:, order[: size.channels // 10]] = 0.0
    w[:, order[size.channels // 20 : size.channels // 5]] = 0.0  # some dead on both sides, some on one
    return x, w


def _correlated(rows: int, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rank = max(1, size.channels // 8)
    mixing = torch.randn(rank, size.channels, generator=generator) / math.sqrt(rank)
    common = torch.randn(rows, rank, generator=generator) @ mixing
    own = torch.randn(rows, size.channels, generator=generator)
    # Rows differ in magnitude as tokens do: a common factor of every row.
    token = _log_normal(rows, 0.4, generator).unsqueeze(1)
    scale = _log_normal(size.channels, 0.7, generator) * _outlier_gain(size.channels, 0.01, 20, 100, generator)
    return token * (common + 0.3 * own) * scale, _weights(size, generator)


def _peer(rows: int, size: Size, generator: torch.Generator, shape: PeerShape = PeerShape()) -> tuple[Tensor, Tensor]:
    gain = _outlier_gain(size.channels, shape.outliers, shape.low, shape.high, generator)
    scale = _log_normal(size.channels, shape.spread, generator) * gain
    asymmetric = torch.rand(size.channels, generator=generator) < shape.asymmetric
    mean = shape.mean * torch.randn(size.channels, generator=generator) * asymmetric
    x = torch.randn(rows, size.channels, generator=generator) * scale + mean
    columns = _log_normal(size.channels, shape.column_spread, generator)
    outputs = _log_normal(size.outputs, shape.output_spread, generator).unsqueeze(1)
    return x * _log_normal(rows, shape.row_spread, generator).unsqueeze(1), _weights(
        size, generator
    ) * columns * outputs


_MAKERS: dict[Kind, Callable[[int, Size, torch.Generator], tuple[Tensor, Tensor]]] = {
    "lognormal": _lognormal,
    "outliers": _outliers,
    "asymmetric": _asymmetric,
    "both_sides": _both_sides,
    "dead": _dead,
    "correlated": _correlated,
    "peer": _peer,
}
