"""Models with encoder layers, recurrent layers and normalizations in all places, for joint compression."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Crn(nn.Module):
    """A convolutional encoder, an LSTM between normalizations, a decoder: as in speech enhancement."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.inner = nn.LayerNorm(48)
        self.rnn = nn.LSTM(48, 16, batch_first=True)
        self.out = nn.Linear(16, 48)
        self.shared = nn.LayerNorm([6, 8])
        self.idle = nn.LayerNorm(4)
        self.decoder = nn.ConvTranspose2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, T, 6) -> (B, 1, T, 6)."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        batch, channels, steps, bins = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch, steps, bins * channels)
        y = self.out(self.rnn(self.inner(rows))[0]).reshape(batch, steps, bins, channels)
        y = self.shared(y).permute(0, 3, 1, 2)
        return torch.as_tensor(self.decoder(x + y))


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, with weights and statistics that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 if parameter.dim() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()
