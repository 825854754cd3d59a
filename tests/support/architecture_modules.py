"""Hand-written models with what the libraries' ones do not have."""

from __future__ import annotations

import torch
from torch import nn

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model._recurrent import unroll
from tests.support.architecture_records import (
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    Architecture,
    Folded,
    Kept,
    images,
    randomly,
    tokens,
)


class ConvNet(nn.Module):
    """Convolution, batch norm and ReLU with a depthwise block, a biased convolution, a ReLU6 and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 16, 3, padding=1, groups=4)
        self.grouped_norm = nn.GroupNorm(4, 16)
        self.clipped = nn.Conv2d(16, 8, 1)
        self.strided = nn.Conv2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = nn.functional.leaky_relu(self.depthwise_norm(self.depthwise(nn.functional.max_pool2d(x, 2))), 0.1)
        x = torch.relu(self.pointwise(x))
        x = torch.relu(self.grouped_norm(self.grouped(x)))
        x = nn.functional.relu6(self.clipped(x))
        x = torch.relu(self.strided(x))
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        return torch.as_tensor(self.last(nn.functional.gelu(self.head(x))))


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM and GRU unrolled into linear operators, and a ReLU classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.lstm = nn.LSTM(12, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 10, batch_first=True)
        self.hidden = nn.Linear(10, 14)
        self.classifier = nn.Linear(14, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L) -> (B, L, 5)."""
        x, _ = self.lstm(self.embedding(input_ids))
        x, _ = self.gru(x)
        return torch.as_tensor(self.classifier(torch.relu(self.hidden(x))))


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder``: its attention hides its input projections, its evaluation takes a fused shortcut."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, norm_first=norm_first, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(HIDDEN), enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H) -> (B, L, 3)."""
        return torch.as_tensor(self.head(self.encoder(x)))


def _unrolled_tagger() -> nn.Module:
    model = Tagger()
    unroll(model)
    return model


def _vectors(generator: torch.Generator, samples: int) -> Batch:
    return Batch(args=(torch.randn(samples, 5, HIDDEN, generator=generator, dtype=torch.float64),))


MODULES: tuple[Architecture, ...] = (
    Architecture(
        name="conv-net",
        factory=randomly(ConvNet),
        batch=images(12, name=None),
        folded=tuple(
            Folded(operators=(operator,), producers=(producer,))
            for operator, producer in (
                ("depthwise", "stem_norm"),
                ("pointwise", "depthwise_norm"),
                ("grouped", "pointwise"),
                ("clipped", "grouped_norm"),
                ("head", "strided"),
            )
        ),
        kept=(Kept(operators=("stem",)), Kept(operators=("strided",)), Kept(operators=("last",))),
    ),
    Architecture(
        name="tagger",
        factory=randomly(_unrolled_tagger),
        batch=tokens,
        folded=(
            Folded(
                operators=("lstm.layers.0.ih", "lstm.layers.0_reverse.ih"),
                producers=("embedding",),
            ),
            Folded(operators=("classifier",), producers=("hidden",)),
        ),
    ),
    Architecture(
        name="torch-encoder-pre-norm",
        factory=randomly(lambda: TorchEncoder(norm_first=True)),
        batch=_vectors,
        folded=(
            Folded(operators=("encoder.layers.{n}.linear1",), producers=("encoder.layers.{n}.norm2",), repeat=LAYERS),
            Folded(operators=("encoder.layers.{n}.linear2",), producers=("encoder.layers.{n}.linear1",), repeat=LAYERS),
            Folded(operators=("head",), producers=("encoder.norm",)),
        ),
    ),
    Architecture(
        name="torch-encoder-post-norm",
        factory=randomly(lambda: TorchEncoder(norm_first=False)),
        batch=_vectors,
        folded=(
            Folded(operators=("encoder.layers.{n}.linear2",), producers=("encoder.layers.{n}.linear1",), repeat=LAYERS),
            Folded(operators=("head",), producers=("encoder.norm",)),
        ),
        kept=(Kept(operators=("encoder.layers.{n}.linear1",), repeat=LAYERS),),
    ),
)
