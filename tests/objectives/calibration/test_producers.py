"""Quantized weights whose rows a site's scales divide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import Calibration, calibrate
from alphasmith.objectives.calibration.producers import Producers
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Discovery


class Convolutions(nn.Module):
    """Grouped and dense convolutions with ReLUs, a norm before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 12, 3, groups=2)
        self.dense = nn.Conv2d(12, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, H, W) -> (B, 5)."""
        x = torch.relu(self.dense(torch.relu(self.grouped(x))))
        return torch.as_tensor(self.head(self.norm(x.mean((2, 3)))))


class Packed(nn.Module):
    """Gate and up in one weight, of which the scales of ``down`` divide the upper half only."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(6, 16)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(T, 6) -> (T, 6)."""
        gate, up = self.both(x).chunk(2, dim=-1)
        return torch.as_tensor(self.down(torch.sigmoid(gate) * up))


def surveyed(model: nn.Module, x: Tensor) -> tuple[Discovery, Calibration, dict[str, Tensor]]:
    """Sites, calibration and parameters."""
    found = discover(model.eval(), Batch(args=(x[:2],)))
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    return found, calibrate(model, found.sites, [Batch(args=(x,))], rows=4000, seed=0), tensors


@pytest.fixture
def x() -> Tensor:
    """Pictures."""
    return 1 + torch.randn(6, 4, 9, 9, generator=torch.Generator().manual_seed(1))


def test_rows_of_a_grouped_convolution(x: Tensor) -> None:
    torch.manual_seed(0)
    model = Convolutions()
    found, calibration, tensors = surveyed(model, x)
    producers = Producers(found.sites, tensors, calibration)
    site = next(s for s in found.sites if s.name == "dense")
    (rows,) = producers.rows(site)
    assert rows.channel.tolist() == list(range(12))
    torch.testing.assert_close(rows.absmax, model.grouped.weight.detach().abs().flatten(1).amax(1))
    peaks = producers.peaks(site)
    assert peaks is not None
    assert torch.equal(peaks, rows.absmax)
    with torch.no_grad():
        output = model.grouped(x).transpose(0, 1).flatten(1).double()
        patches = torch.nn.functional.unfold(x, 3).unflatten(1, (2, -1)).square().sum(2).mean((0, 2)).double()
    assert model.grouped.bias is not None
    product = output - model.grouped.bias.detach().double()[:, None]
    torch.testing.assert_close(rows.energy, product.square().mean(1), rtol=0.25, atol=0)
    torch.testing.assert_close(rows.input_energy, patches.repeat_interleave(6), rtol=0.1, atol=0)
    passed = output.clamp_min(0).square().mean(1) / output.square().mean(1)
    torch.testing.assert_close(rows.passed, passed, rtol=0.25, atol=0.02)


def test_what_is_not_quantized_is_no_producer(x: Tensor) -> None:
    found, calibration, tensors = surveyed(Convolutions(), x)
    head = next(s for s in found.sites if s.name == "head")
    dense = next(s for s in found.sites if s.name == "dense")
    assert head.mode == "fold"  # into the norm
    assert Producers(found.sites, tensors, calibration).rows(head) == ()
    skipping = Producers(found.sites, tensors, calibration, ["grou*"])
    assert skipping.rows(dense) == ()
    assert skipping.peaks(dense) is None


def test_rows_that_are_not_divided_still_share_the_range() -> None:
    torch.manual_seed(0)
    model = Packed()
    found, calibration, tensors = surveyed(model, torch.randn(300, 6))
    site = next(s for s in found.sites if s.name == "down")
    assert site.mode == "fold"
    (rows,) = Producers(found.sites, tensors, calibration).rows(site)
    assert rows.channel.tolist() == [-1] * 8 + list(range(8))
    assert bool((rows.passed[:8] == 0).all())
    assert bool(((rows.passed[8:] > 0) & (rows.passed[8:] < 1)).all())  # a sigmoid lets less through
    data = calibration.site_data(site, tensors, producers=(rows,))
    assert data.producer_absmax is not None
    assert torch.equal(data.producer_absmax, rows.absmax[8:])
