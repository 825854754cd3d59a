"""Layers and rows for branch and residual: low rank under noise, a few channels far above the others."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_apart(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    """(rows, channels) of which 90 of 100 channels are small, 9 ten times and 1 a hundred times as large."""
    size = torch.ones(channels)
    size[torch.randperm(channels, generator=generator)[: -(-channels // 10)]] = 10.0
    size[int(torch.randint(channels, (1,), generator=generator))] = 100.0
    return torch.randn(rows, channels, generator=generator) * size


def low_rank_under_noise(outputs: int, inputs: int, rank: int, noise: float, generator: torch.Generator) -> Tensor:
    """(outputs, inputs) of unit size, a product of two thin matrices and noise."""
    left = torch.randn(outputs, rank, generator=generator)
    right = torch.randn(rank, inputs, generator=generator)
    return torch.as_tensor(left @ right / rank**0.5 + noise * torch.randn(outputs, inputs, generator=generator))
