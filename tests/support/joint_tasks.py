"""A tiny task for joint compression: signs of a hidden low-rank map, learned by models of every kind of layer in a second."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.joint.losses import task_loss
from alphasmith.objectives.joint.ports import JointMetric, Measured, Split
from alphasmith.objectives.media.batch import Batch, call, main_output


class TinyCrn(nn.Module):
    """A convolution with batch normalization, an LSTM with layer normalization, a linear layer; dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1 = nn.Conv1d(6, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.rnn, self.norm2 = nn.LSTM(12, 10, batch_first=True), nn.LayerNorm(10)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6, T) -> (B, 6, T)."""
        rows = torch.relu(self.norm1(self.conv(x))).transpose(1, 2)
        return torch.as_tensor(self.out(self.drop(self.norm2(self.rnn(rows)[0])))).transpose(1, 2)


class TinySamples:
    """Noisy rows and what they should be."""

    def __init__(self, seed: int, count: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(6, 2, generator=torch.Generator().manual_seed(7))
        self.wanted = torch.einsum("cr,brt->bct", mixing, torch.randn(count, 2, 8, generator=generator))
        self.given = self.wanted + 0.3 * torch.randn(self.wanted.shape, generator=generator)

    def __len__(self) -> int:
        return len(self.given)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some of them."""
        return Batch(args=(self.given[list(numbers)],), labels=self.wanted[list(numbers)])


class TinyTask:
    """Denoising; the metric is the signal to noise ratio [dB], and a second one may be left unmeasured.

    Args:
        spoil: Of a loss, by the number of the call from 1: what is returned in its place.
        snr: Of a measured value, by the number of the measurement from 0: what is returned in its place.
    """

    metrics = (JointMetric(name="snr", goal="max", unit="dB"), JointMetric(name="pesq", goal="max"))

    def __init__(
        self,
        spoil: Callable[[int, Tensor], Tensor] = lambda number, loss: loss,
        snr: Callable[[int, float], float] = lambda number, value: value,
    ) -> None:
        self.train = TinySamples(0, 48)
        self._splits = {"study": TinySamples(1, 32), "test": TinySamples(2, 32)}
        self._spoil, self._snr, self._loss = spoil, snr, task_loss("mse")
        self.calls = self.measured = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error."""
        self.calls += 1
        labels: Any = batch.labels
        return self._spoil(self.calls, self._loss(main_output(call(model, batch)), labels))

    def measure(self, model: nn.Module, split: Split) -> Measured:
        """Signal to noise."""
        samples = self._splits[split]
        with torch.no_grad():
            wrong = model(samples.given) - samples.wanted
        value = 10 * math.log10(float(samples.wanted.square().sum() / wrong.square().sum()))
        self.measured += 1
        value = self._snr(self.measured - 1, value)
        return Measured(values={"snr": value, "pesq": None}, notes=("pesq is not installed",))
