"""A small trained model with everything that joint compression works on, its task, and a script that compresses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from alphasmith.objectives.joint.tasks import SampleTask
from alphasmith.objectives.media.batch import Batch

LENGTH, TONES = 48, 4
#: What a compression of the model is asked for where a test has nothing better to say.
SETTINGS = {
    "drop": {"tolerances": {"accuracy": 3.0}},
    "train": {"steps": 12, "learning_rate": 1e-3},
    "rounds": {"steps": 6, "most": 2, "log_drop": [-2.5, -1.0]},
    "branch": {"ranks": [0, 4], "refits": 2},
    "clusters": {"k": [4, 16, 256], "finetune": 4},
    "study": {"trials": 7, "inner": 3},
}


class Listener(nn.Module):
    """Convolutions with batch norms, an LSTM with a layer norm: which of four tones is in the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv1d(1, 16, 5, padding=2, bias=False), nn.Conv1d(16, 24, 5, stride=2, padding=2)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(24)])
        self.rnn = nn.LSTM(24, 32, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, TONES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, 4)."""
        h = x[:, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = torch.relu(norm(conv(h)))
        scores: Tensor = self.head(self.norm(self.rnn(h.transpose(1, 2))[0]).mean(1))
        return scores


@dataclass(frozen=True, eq=False)
class Tones:
    """Noisy tones with their number as label."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some of them."""
        chosen = list(numbers)
        return Batch(args=(self.inputs[chosen],), labels=self.labels[chosen])


def tones(count: int, seed: int) -> Tones:
    """Tones in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, TONES, (count,), generator=generator)
    phase = 6.28 * torch.rand(count, 1, generator=generator)
    clean = torch.sin(torch.arange(LENGTH) * (0.3 + 0.3 * labels[:, None]) + phase)
    return Tones(clean + 0.7 * torch.randn(count, LENGTH, generator=generator), labels)


def task() -> SampleTask:
    """Which tone it is."""
    return SampleTask(kind="classes", train=tones(192, 0), study=tones(150, 1), test=tones(150, 2))


@cache
def _weights() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = Listener(), task()
        optimizer = torch.optim.Adam(model.parameters(), 4e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(120):
            optimizer.zero_grad()
            chosen = torch.randint(0, len(data.train), (32,), generator=generator).tolist()
            data.loss(model, data.train.batch(chosen)).backward()
            optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def listener() -> Listener:
    """The trained model."""
    model = Listener()
    model.load_state_dict(_weights())
    return model.eval()


def made() -> tuple[nn.Module, SampleTask]:
    """Model and task, as a configuration's function returns them."""
    return listener(), task()
