"""Small models with layers of every kind that is packed, and the stages that change their modules."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.joint.low_rank.norms import fold_norms
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedSettings
from alphasmith.objectives.literals import ConvForm
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.objectives.model.private_copy import private_copy
from tests.support.joint_models import trained


class OwnConv(nn.Conv1d):
    """A convolution whose forward does more than the product, so that its factors are multiplied at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Mixed(nn.Module):
    """Tokens through an embedding that is the output layer, too, convolutions, normalizations and recurrent layers."""

    def __init__(self, rnn: str, width: int, groups: int, own: bool, tied: bool, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        convolution = OwnConv if own else nn.Conv1d
        self.conv = convolution(width, width, 3, padding=1, groups=groups, bias=bias)
        self.norm = nn.BatchNorm1d(width)
        kind = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[rnn]
        self.rnn = kind(width, width // 2, batch_first=True, bidirectional=True, bias=bias)
        self.inner = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, 11, bias=False)
        if tied:
            self.out.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, 11)."""
        x = self.embed(tokens).transpose(1, 2)
        x = torch.relu(self.norm(self.conv(x))).transpose(1, 2)
        x = self.inner(self.rnn(x)[0])
        return torch.as_tensor(self.out(self.mix(x)))


TOKENS = torch.arange(14).reshape(2, 7) % 11
BATCH = Batch(args=(TOKENS,))

#: Arguments of the model: any kind of every layer.
mixed_arguments = st.fixed_dictionaries(
    {
        "rnn": st.sampled_from(["LSTM", "GRU", "RNN"]),
        "width": st.sampled_from([8, 12]),
        "groups": st.sampled_from([1, 2, 4]),
        "own": st.booleans(),
        "tied": st.booleans(),
        "bias": st.booleans(),
    }
)
#: Which stages come before packing: taken apart, folded, rank of the factors.
stages = st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, 1, 2]), st.sampled_from(["channel", "spatial"]))
packed_settings = st.builds(
    PackedSettings,
    clusters=st.builds(
        ClassClusters,
        conv=st.sampled_from([None, 2, 4]),
        recurrent=st.sampled_from([None, 2, 16]),
        linear=st.sampled_from([None, 3, 8]),
        embedding=st.sampled_from([None, 4]),
    ),
    start=st.sampled_from(["linear", "density", "k-means++", "optimal"]),
    coding=st.sampled_from(["packed", "huffman", "smallest"]),
    float16=st.booleans(),
    channels=st.sampled_from([None, 2]),
)


def made(architecture: nn.Module, stage: tuple[bool, bool, int | None, ConvForm], batch: Batch = BATCH) -> nn.Module:
    """A private copy of a model after the stages that change its modules."""
    apart, fold, rank, form = stage
    model = private_copy(architecture).eval()
    if apart:
        rewrite(model)
    if fold:
        fold_norms(model, batch)
    if rank is not None:
        factorize(model, LowRankSettings(rank=rank, conv_form=form))
    return model


def mixed(seed: int = 0, **arguments: object) -> nn.Module:
    """A trained one."""
    given = {"rnn": "LSTM", "width": 12, "groups": 1, "own": False, "tied": True, "bias": True} | arguments
    return trained(Mixed(**given), seed)  # type: ignore[arg-type]
