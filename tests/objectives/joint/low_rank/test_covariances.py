"""Covariances are those of what every layer multiplies with its weight."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.low_rank.covariances import input_covariances
from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class PaddedConv(nn.Conv2d):
    """A convolution that pads its input by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (nn.Linear(10, 12), (5, 3, 10)),
    "one row": (nn.Linear(10, 12), (10,)),
    "conv1d": (nn.Conv1d(6, 8, 5, padding=2, dilation=2), (2, 6, 19)),
    "conv2d": (nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 6, 9, 11)),
    "own forward": (PaddedConv(6, 8, 3), (2, 6, 7, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_energy_of_the_output_follows_from_the_covariance(name: str) -> None:
    """Mean over rows of |W x|^2 is the trace of W C W^T: C holds exactly the rows that W meets."""
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer)
    nn.init.zeros_(layer.bias)
    model = nn.Sequential(layer).eval()
    batches = [Batch(args=(torch.randn(shape),)) for _ in range(3)]
    covariance = input_covariances(model, batches)["0"]
    weight = layer.weight.detach().flatten(1).double()
    with torch.no_grad():
        outputs = [model(*batch.args).double() for batch in batches]
    rows = sum(output.numel() for output in outputs) / weight.shape[0]
    energy = sum(float(output.square().sum()) for output in outputs) / rows
    assert float(torch.trace(weight @ covariance @ weight.T)) == pytest.approx(energy, rel=1e-5)


def test_groups_count_together() -> None:
    layer = nn.Conv2d(8, 12, 3, groups=2, bias=False)
    x = torch.randn(2, 8, 5, 6)
    (found,) = input_covariances(nn.Sequential(layer).eval(), [Batch(args=(x,))]).values()
    parts = [F.unfold(part, 3).transpose(1, 2).flatten(0, 1).double() for part in x.chunk(2, 1)]
    torch.testing.assert_close(found, sum(p.T @ p for p in parts) / sum(len(p) for p in parts))


def test_factored_layers_read_what_dense_ones_did() -> None:
    model = nn.Sequential(nn.Conv1d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 7, 5)).eval()
    batch = Batch(args=(torch.randn(4, 6, 9),))
    before = input_covariances(model, [batch])
    factorize(model, LowRankSettings(rank={"conv": 2}, energy=None))
    torch.testing.assert_close(input_covariances(model, [batch])["0"], before["0"])
    factorize(model, LowRankSettings(rank=1, metric="whitened"), covariances=input_covariances(model, [batch]))
    assert model[2].rank == 1


def test_whitening_loses_less_of_the_output_than_the_bare_decomposition() -> None:
    model = nn.Sequential(nn.Linear(24, 24, bias=False)).eval()
    x = torch.randn(64, 24) * torch.logspace(-2, 1, 24)
    given = input_covariances(model, [Batch(args=(x,))])
    errors = []
    for metric in ("plain", "whitened"):
        small = copy.deepcopy(model)
        factorize(small, LowRankSettings(rank=4, metric=metric), covariances=given)
        with torch.no_grad():
            errors.append(float((small(x) - model(x)).square().sum() / model(x).square().sum()))
    assert errors[1] < 0.5 * errors[0]


def test_every_step_of_a_recurrent_layer_counts() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 3)})
    rewrite(model)

    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.inner["rnn"](x)[0])

    x = torch.randn(7, 2, 4)
    runs = Runs().eval()
    found = input_covariances(runs, [Batch(args=(x,))])
    with torch.no_grad():
        states = torch.cat([torch.zeros(1, 2, 3), runs(x)[:-1]]).flatten(0, 1).double()
    assert set(found) == {"inner.rnn.layers.0.ih", "inner.rnn.layers.0.hh"}
    torch.testing.assert_close(found["inner.rnn.layers.0.hh"], states.T @ states / len(states))


def test_what_cannot_be_collected_is_said() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    with pytest.raises(InputError, match="no sample"):
        input_covariances(model, [])
    with pytest.raises(NonFiniteError, match="0 reads NaN"):
        input_covariances(model, [Batch(args=(torch.tensor([[math.nan, 0.0, 0.0]]),))])
    with pytest.raises(InputError, match="cannot be run"):
        input_covariances(model, [Batch(args=(torch.ones(1, 4),))])
