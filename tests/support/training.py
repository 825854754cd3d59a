"""Small trainings: a quantized classifier and language model with labelled samples, and checkpoints in files."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.training.ports import Checkpoint
from tests.support.plain_forms import quantize_model, symmetric


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples in memory: inputs and, where there are any, labels."""

    inputs: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some of them."""
        places = torch.tensor(list(numbers))
        return Batch(args=(self.inputs[places],), labels=None if self.labels is None else self.labels[places])


@dataclass(frozen=True, eq=False)
class Material:
    """A float model, its quantized form, and samples to train on and to hold out."""

    float_model: nn.Module
    quantized: nn.Module
    train: Rows
    held_out: Rows


class Net(nn.Module):
    """Two layers with a batch norm and dropout, three classes."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 24), nn.BatchNorm1d(24)
        self.drop, self.second = nn.Dropout(0.1), nn.Linear(24, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8) -> (B, outputs)."""
        return torch.as_tensor(self.second(self.drop(torch.relu(self.norm(self.first(x))))))


class Reader(nn.Module):
    """A recurrent language model of nine tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 12), nn.Linear(12, 12), nn.Linear(12, 9)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, 9)."""
        return torch.as_tensor(self.head(torch.tanh(self.mix(self.embed(ids).cumsum(1)))))


def quantized(model: nn.Module, batch: Batch, scheme: Scheme, peak: float = 1.0) -> nn.Module:
    """A quantized copy without smoothing, every input range the same."""
    made = copy.deepcopy(model)
    sites = discover(made, batch).sites
    ranges = {s.name: symmetric(torch.full((s.channels,), peak)) for s in sites}
    quantize_model(made, sites, smoothings={}, ranges=ranges, scheme=scheme)
    return made


def classifier(weights: str = "w4a8-tensor-static", count: int = 240, seed: int = 0) -> Material:
    """A classifier trained in float, then quantized to four bits with ranges that clip too much."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # module initialisers take no generator
    centres = 0.8 * torch.randn(3, 8, generator=generator)
    labels = torch.arange(count) % 3
    inputs = centres[labels] + torch.randn(count, 8, generator=generator)
    model = Net().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    model = model.eval().requires_grad_(False)
    half = count // 2
    train, held_out = Rows(inputs[:half], labels[:half]), Rows(inputs[half:], labels[half:])
    made = quantized(model, Batch(args=(inputs[:4],)), Scheme.parse(weights), peak=0.7)
    return Material(float_model=model, quantized=made, train=train, held_out=held_out)


def reader(seed: int = 0) -> Material:
    """A language model of texts that count upwards, with steps of one or two."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # module initialisers take no generator
    steps = torch.randint(1, 3, (64, 12), generator=generator)
    ids = steps.cumsum(1) % 9
    model = Reader().eval().requires_grad_(False)
    made = quantized(model, Batch(args=(ids[:4],)), Scheme.parse("w4a8-channel-token"))
    return Material(float_model=model, quantized=made, train=Rows(ids[:40]), held_out=Rows(ids[40:]))


class Folder:
    """Checkpoints in a folder: a file each, put in its place by one rename."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved = 0

    def save(self, checkpoint: Checkpoint) -> None:
        """Write it beside the last one, then take that one's place."""
        metadata = {"state": json.dumps(checkpoint.state)}
        beside = self.path / "writing"
        beside.write_bytes(safetensors.torch.save(dict(checkpoint.tensors), metadata))
        os.replace(beside, self.path / "last")
        self.saved += 1

    def load(self) -> Checkpoint | None:
        """The last one."""
        file = self.path / "last"
        if not file.exists():
            return None
        with safetensors.safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            return Checkpoint(tensors=tensors, state=json.loads(opened.metadata()["state"]))
