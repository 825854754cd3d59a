"""A chain of convolutions with dead and near-dead ReLU channels, in any unit between any two layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CLASSES = 10
#: Places where the activation's unit can be changed: between a layer and the next.
PLACES = ("c1", "c2", "c3", "c4")


class DeadChannelNet(nn.Module):
    """Four convolutions with ReLUs, pooling, a head: a chain of folds without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 20, 3, padding=1)
        self.c3 = nn.Conv2d(20, 20, 3, padding=1, stride=2)
        self.c4 = nn.Conv2d(20, 16, 3)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 10, 10) -> (B, CLASSES)."""
        for convolution in (self.c1, self.c2, self.c3, self.c4):
            x = torch.relu(convolution(x))
        return torch.as_tensor(self.head(x.mean((2, 3))))


def pictures(count: int = 8, size: int = 8, seed: int = 7) -> list[Tensor]:
    """Batches (size, 3, 10, 10)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 10, 10, generator=generator) for _ in range(count)]


def dead_channel_net(seed: int = 0, *, near: bool = False, units: Mapping[str, float] | None = None) -> DeadChannelNet:
    """The net with about a third of its channels dead, or near-dead: a bias that a ReLU lets hardly anything through with.

    Args:
        seed: Of weights, and of which channels die.
        near: Whether they still let a thousandth through.
        units: Place -> factor of the activations there; the function stays.
    """
    torch.manual_seed(seed)
    net, generator = DeadChannelNet().eval(), torch.Generator().manual_seed(seed + 1)
    layers = [net.c1, net.c2, net.c3, net.c4]
    x = torch.cat(pictures())
    with torch.no_grad():
        for layer in layers:
            rows = layer.weight.shape[0]
            layer.weight.mul_(torch.randn(rows, 1, 1, 1, generator=generator).mul(0.4).exp())
            bias = torch.as_tensor(layer.bias)
            spread = layer(x).std()
            layer.weight.div_(spread)
            bias.div_(spread)
            dead = torch.rand(rows, generator=generator) < 0.35
            peak = layer(x).amax((0, 2, 3))[dead]
            bias[dead] -= peak - 1e-3 if near else 1.3 * peak.abs() + 1
            x = torch.relu(layer(x))
        readers = dict(zip(PLACES, [*layers[1:], net.head], strict=True))
        for place, unit in (units or {}).items():
            for name in ("weight", "bias"):
                net.get_parameter(f"{place}.{name}").mul_(unit)
            readers[place].get_parameter("weight").div_(unit)
    return net
