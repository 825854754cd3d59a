"""Multiply-adds of sites against counts made by hand."""

from __future__ import annotations

import torch
from torch import nn

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sensitivity.multiply_adds import multiply_adds, shares_of
from alphasmith.objectives.sites.discovery import discover


class Mixed(nn.Module):
    """A strided convolution, one in groups, a transposed one, and two linears that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.left, self.right = nn.Linear(4, 5), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8, 8) -> (B, 11)."""
        x = torch.relu(self.up(torch.relu(self.grouped(torch.relu(self.stem(x)))))).mean((2, 3))
        return torch.cat([self.left(x), self.right(x)], -1)


def test_every_operator_counts_its_weight_once_for_every_place() -> None:
    model, batch = Mixed().eval(), Batch(args=(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))
    found = multiply_adds(model, discover(model, batch).sites, batch)
    places = 2 * 4 * 4
    assert found == {
        "stem": places * 4 * 3 * 9,
        "grouped": places * 8 * 2,
        "up": places * 8 * 4 * 4,
        "left": 2 * 4 * (5 + 6),
    }
    assert sum(shares_of(found).values()) == 1.0
    assert not any(module._forward_hooks for module in model.modules())
