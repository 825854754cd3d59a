"""Factored layers compute what the dense product of their factors computes, train, and stand only where they are smaller."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.low_rank.factored import FactoredConv, FactoredLinear, conv_matrices, dense_weight
from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.literals import ConvForm, SvdMetric
from alphasmith.objectives.model.plain_operators import rewrite


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class PaddedConv(nn.Conv2d):
    """A convolution that pads its input by itself, as those converted from Keras do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (nn.Linear(10, 12), (3, 10)),
    "no bias": (nn.Linear(10, 12, bias=False), (2, 3, 10)),
    "conv1d": (nn.Conv1d(6, 8, 5, padding=2), (2, 6, 9)),
    "conv3d": (nn.Conv3d(4, 8, 2), (1, 4, 3, 4, 3)),
    "conv2d": (nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 9, 11)),
    "groups": (nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 5, 6)),
    "same": (nn.Conv2d(6, 8, (4, 3), padding="same"), (2, 6, 7, 8)),
    "valid": (nn.Conv2d(6, 8, 3, padding="valid"), (2, 6, 7, 8)),
    "reflect": (nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="reflect"), (2, 6, 7, 8)),
    "circular": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular", bias=False), (2, 6, 7, 8)),
    "no batch": (nn.Conv2d(6, 8, 3), (6, 7, 8)),
    "own forward": (PaddedConv(6, 8, 3), (2, 6, 7, 8)),
}


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_factored_layer_is_the_dense_product_of_its_factors(name: str, form: ConvForm, rank: int) -> None:
    layer, shape = LAYERS[name]
    model = nn.Sequential(copy.deepcopy(layer))
    (found,) = factorize(model, LowRankSettings(rank=rank, conv_form=form))
    assert found.rank == rank
    assert found.numbers < layer.weight.numel()
    factored: Any = model[0]
    parts = [p for key, p in factored.named_parameters() if key != "bias"]
    assert sum(p.numel() for p in parts) == found.numbers, "no dense weight is left"
    weight = factored.dense_weight() if isinstance(factored, (FactoredLinear, FactoredConv)) else factored.weight
    assert found.runs == ("product" if name == "own forward" else "factored")
    dense = copy.deepcopy(layer)
    dense.weight = nn.Parameter(weight.detach().clone())
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    error = (weight - layer.weight).square().sum() / layer.weight.square().sum()
    assert float(error.detach()) == pytest.approx(1 - found.kept, abs=1e-5)
    model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parts)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_matrices_of_a_kernel_give_it_back(form: ConvForm, groups: int) -> None:
    weight = torch.randn(8, 3, 2, 5)
    matrices = conv_matrices(weight, groups, form)
    assert len(matrices) == groups
    assert torch.equal(dense_weight(matrices, weight.shape, form), weight)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gates_of_recurrent_layers_are_decomposed_stacked(kind: Any) -> None:
    model: Any = nn.ModuleDict({"rnn": kind(12, 10, num_layers=2, bidirectional=True, batch_first=True)}).eval()
    x = torch.randn(2, 5, 12)
    dense = model["rnn"](x)[0]
    rewrite(model)
    found = factorize(model, LowRankSettings(energy=1.0, rank=5))
    gates = 4 if kind is nn.LSTM else 3
    assert {(layer.name, layer.shape[0], layer.rank) for layer in found} == {
        (f"rnn.layers.{number}{tail}.{part}", gates * 10, 5)
        for number in (0, 1)
        for tail in ("", "_reverse")
        for part in ("ih", "hh")
    }
    assert isinstance(model["rnn"].layers["0"].hh, FactoredLinear)
    assert 0 < float((model["rnn"](x)[0] - dense).abs().mean()) < float(dense.abs().mean())


def test_only_what_saves_is_factored() -> None:
    tied = nn.Linear(16, 16)
    model = nn.ModuleDict(
        {
            "flat": nn.Linear(16, 16),
            "low": nn.Linear(16, 16),
            "point": nn.Conv2d(1, 8, 1),
            "tied": tied,
            "again": tied,
            "embedding": nn.Embedding(9, 16),
            "head": nn.Linear(16, 9),
            "kept": nn.Linear(16, 16),
        }
    )
    model["low"].weight = nn.Parameter(torch.randn(16, 2) @ torch.randn(2, 16))
    model["head"].weight = model["embedding"].weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {layer.name: layer for layer in factorize(model, LowRankSettings(energy=0.99, exclude=["k*"]))}
    assert {name: layer.runs for name, layer in found.items() if layer.runs != "dense"} == {"low": "factored"}
    assert found["low"].rank == 2
    assert (
        found["flat"].reason == found["point"].reason == "no rank that keeps enough has fewer numbers than the weight"
    )
    assert found["tied"].reason == "its weight is that of again"
    assert found["head"].reason == "its weight is that of embedding"
    assert found["kept"].reason == "kept is excluded"
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("low."))


def test_groups_take_the_largest_rank_of_all() -> None:
    model = nn.Sequential(nn.Conv1d(16, 16, 3, groups=2))
    weight = torch.cat([torch.randn(8, 1) @ torch.randn(1, 24), torch.randn(8, 3) @ torch.randn(3, 24)])
    model[0].weight = nn.Parameter(weight.reshape(16, 8, 3))
    (found,) = factorize(model, LowRankSettings(energy=0.9999))
    assert found.rank == 3
    factored: Any = model[0]
    torch.testing.assert_close(factored.dense_weight(), weight.reshape(16, 8, 3), rtol=1e-4, atol=1e-4)


def test_whitening_by_the_inputs_lowers_the_error_of_the_output() -> None:
    inputs = torch.randn(400, 24) * torch.logspace(-1, 1, 24) @ torch.linalg.qr(torch.randn(24, 24)).Q
    covariances = {"0": inputs.T @ inputs / 400}
    source = nn.Sequential(nn.Linear(24, 24))
    errors = {}
    metrics: tuple[SvdMetric, ...] = ("plain", "activation", "whitened")
    for metric in metrics:
        model = copy.deepcopy(source)
        factorize(model, LowRankSettings(rank=6, metric=metric), covariances=covariances)
        errors[metric] = float((model(inputs) - source(inputs)).square().mean())
    assert errors["whitened"] < errors["plain"]
    assert errors["whitened"] <= errors["activation"] * 1.0001


def test_rows_that_a_normalization_makes_small_cost_no_rank() -> None:
    forms: tuple[ConvForm, ...] = ("channel", "spatial")
    weightings: tuple[dict[str, Tensor], ...]
    for form in forms:
        source = nn.Sequential(nn.Conv2d(8, 16, 3))
        gamma = torch.ones(16)
        gamma[2:] = 1e-4
        ranks = []
        weightings = ({}, {"0": gamma})
        for rows in weightings:
            model = copy.deepcopy(source)
            (found,) = factorize(model, LowRankSettings(energy=0.999, conv_form=form), rows=rows)
            ranks.append(found.rank or 99)
        assert ranks[1] < ranks[0]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"metric": "best"}, "svd.metric"),
        ({"metric": "whitened"}, "svd.metric"),
        ({"conv_form": "cross"}, "svd.form"),
        ({"energy": None}, "svd"),
        ({"energy": 2.0}, "svd.energy"),
        ({"rank": 0}, "svd.rank"),
    ],
)
def test_wrong_settings_are_named_and_change_nothing(settings: dict[str, Any], field: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(InputError) as caught:
        factorize(model, LowRankSettings(**settings))
    assert caught.value.field == field
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_factored_layer_is_decomposed_again_as_its_product(name: str, form: ConvForm) -> None:
    layer, shape = LAYERS[name]
    model = nn.Sequential(copy.deepcopy(layer))
    factorize(model, LowRankSettings(rank=2, conv_form=form))
    before = copy.deepcopy(model)
    other: ConvForm = "spatial" if form == "channel" else "channel"
    (same,) = factorize(model, LowRankSettings(rank=3, conv_form=other))
    assert same.rank == 2, "a rank never rises"
    x = torch.randn(shape)
    assert torch.equal(model(x), before(x)), "what does not fall stays as it is"
    (found,) = factorize(model, LowRankSettings(rank=1, conv_form=other))
    assert found.rank == 1
    assert found.numbers == same.numbers // 2
    assert found.runs == same.runs

    def weight(one: Any) -> Tensor:
        return one.dense_weight() if isinstance(one, (FactoredLinear, FactoredConv)) else one.weight

    kept = float(weight(model[0]).square().sum().detach() / weight(before[0]).square().sum().detach())
    assert kept == pytest.approx(found.kept, abs=1e-5)
    dense = nn.Sequential(copy.deepcopy(layer))
    dense[0].weight = nn.Parameter(weight(before[0]).detach().clone())
    factorize(dense, LowRankSettings(rank=1, conv_form=form))
    torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-4)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_energies_and_ranks_are_chosen_by_class() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(8, 8, 5), "rnn": nn.LSTM(16, 16), "out": nn.Linear(16, 16)})
    rewrite(model)
    layers = factorize(model, LowRankSettings(energy={"linear": 0.5}, rank={"conv": 2, "recurrent_hh": 3}))
    ranks = {layer.name: layer.rank for layer in layers}
    assert ranks["conv"] == 2
    assert ranks["rnn.layers.0.hh"] == 3
    assert ranks["rnn.layers.0.ih"] == 0
    assert 0 < ranks["out"] < 8
    reasons = {layer.name: layer.reason for layer in layers}
    assert reasons["rnn.layers.0.ih"] == "no energy and no rank for recurrent_ih layers"
    with pytest.raises(InputError, match="'gru' is no class of layers"):
        factorize(model, LowRankSettings(energy={"gru": 0.5}))  # type: ignore[dict-item]
