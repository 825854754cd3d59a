"""Layers in place: they compute what their form says, come back bit by bit, and stand only where they are smaller."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.branch.encoding import branch_layer
from alphasmith.objectives.joint.branch.layers import BranchConv, BranchLinear, BranchModule, branch_module
from alphasmith.objectives.joint.branch.placement import branch_layers
from alphasmith.objectives.joint.branch.rows import LayerRows, collect_rows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from tests.support.joint_models import Crn, trained

FINE = BranchSettings(rank=1, residual="int8", activation_bits=None)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class PaddedConv(nn.Conv2d):
    """A convolution that pads its input by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (nn.Linear(32, 24), (3, 5, 32)),
    "no bias": (nn.Linear(32, 24, bias=False), (7, 32)),
    "conv1d": (nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    "conv2d": (nn.Conv2d(6, 16, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 9, 8)),
    "conv3d": (nn.Conv3d(4, 16, 2), (2, 4, 3, 4, 3)),
    "same": (nn.Conv2d(6, 16, (5, 3), padding="same"), (2, 6, 7, 8)),
    "reflect": (nn.Conv2d(6, 16, 3, padding=1, padding_mode="reflect", bias=False), (2, 6, 7, 8)),
    "unbatched": (nn.Conv2d(6, 16, 3, padding=1), (6, 7, 8)),
}


def placed(layer: nn.Module, x: Tensor, settings: BranchSettings) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    batched = x if x.dim() != 3 or isinstance(layer, nn.Linear | nn.Conv1d) else x.unsqueeze(0)
    rows = collect_rows(model, [Batch(args=(batched,))], count=4096, seed=0)
    (report,) = branch_layers(model, rows, settings)
    assert report.reason == ""
    return model


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", ["static", "token"])
@pytest.mark.parametrize("form", [{"residual": "int8"}, {"residual": "codebook", "k": 64}])
def test_a_layer_computes_what_its_rows_foretell(name: str, granularity: Any, form: dict[str, Any]) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    settings = BranchSettings(rank=2, activation_granularity=granularity, **form)
    model = placed(layer, x, settings)
    batched = x if name != "unbatched" else x.unsqueeze(0)
    plain = nn.Sequential(layer)
    rows = collect_rows(plain, [Batch(args=(batched,))], count=4096, seed=0)["0"]
    foretold = branch_layer(layer.weight, rows, settings).error
    with torch.no_grad():
        wanted, found = layer(x), model(x)
        without = wanted if layer.bias is None else layer(x) - layer(torch.zeros_like(x))
    assert found.shape == wanted.shape
    error = float((found - wanted).double().square().sum() / without.double().square().sum())
    assert error == pytest.approx(foretold, rel=1e-2)
    assert error < 5e-3


@pytest.mark.parametrize("name", LAYERS)
def test_the_dense_weight_stands_for_the_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    model = placed(layer, x, replace(FINE, rank=2))
    dense = copy.deepcopy(layer)
    (made,) = model.children()
    assert isinstance(made, BranchModule)
    dense.weight = nn.Parameter(made.dense_weight())
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("form", [{"residual": "int4"}, {"residual": "codebook"}])
def test_a_layer_made_of_what_is_stored_has_the_same_bits(name: str, form: dict[str, Any]) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    (made,) = placed(layer, x, BranchSettings(rank=2, **form)).children()
    assert isinstance(made, BranchLinear | BranchConv)
    entry = made.entry.model_dump(mode="json")
    tensors = {key: value.clone() for key, value in made.tensors().items()}
    fresh = copy.deepcopy(layer)
    nn.init.zeros_(fresh.weight)
    again = branch_module(fresh, entry, tensors, name="fc")
    assert torch.equal(again(x), made(x))
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    state = {key: value.clone() for key, value in made.state_dict().items()}
    assert {key for key in state if key != "bias"} == set(tensors)


def test_moving_and_casting_a_model_leaves_what_is_stored() -> None:
    layer, shape = LAYERS["linear"]
    x = torch.randn(shape)
    model = placed(layer, x, BranchSettings(rank=2))
    (made,) = model.children()
    assert isinstance(made, BranchModule)
    before = {name: value.clone() for name, value in made.tensors().items()}
    wanted = model(x)
    model.half()
    for name, value in made.tensors().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert model(x.half()).dtype == torch.float16
    torch.testing.assert_close(model(x.half()).float(), wanted, rtol=1e-2, atol=1e-2)


def test_a_stored_tensor_that_changes_is_not_run_as_it_was() -> None:
    layer, shape = LAYERS["linear"]
    (made,) = placed(layer, torch.randn(shape), BranchSettings(rank=2)).children()
    assert isinstance(made, BranchModule)
    made.get_buffer("left").mul_(2)
    with pytest.raises(InputError, match=r"^0: it has the digest"):
        made(torch.randn(shape))


def test_every_layer_is_told_of() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.tied, self.head = nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(24, 32)
            self.head.weight = self.tied.weight
            self.tiny, self.conv = nn.Linear(4, 2), nn.Conv1d(8, 16, 3, padding=1)
            self.grouped, self.own = nn.Conv1d(16, 16, 3, padding=1, groups=2), PaddedConv(6, 16, 2)
            self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 24))
            self.spare, self.left = nn.Linear(32, 24), nn.Linear(32, 24)

        def forward(self, x: Tensor) -> Tensor:
            y = self.tied(self.fc(x)) + self.head(self.normed(x)) + self.left(x).repeat(1, 2)[:, :32]
            z = self.grouped(self.conv(y.reshape(-1, 8, 4))).sum() + self.tiny(x[:, :4]).sum()
            return torch.as_tensor(y + z + self.own(y.reshape(-1, 2, 4, 4).repeat(1, 3, 1, 1)).sum())

    model = Everything().eval()
    x = torch.randn(6, 32)
    names = ["fc", "tied", "tiny", "conv", "own", "left"]
    rows = collect_rows(model, [Batch(args=(x,))], count=64, seed=0, layers=names)
    before = model(x)
    report = branch_layers(model, rows, FINE, exclude=["le*"])
    reasons = {layer.name: layer.reason for layer in report}
    assert reasons["fc"] == reasons["conv"] == ""
    assert reasons["tied"] == "its weight is that of head"
    assert "in place of" in reasons["tiny"] or reasons["tiny"].startswith("rank ")
    assert reasons["grouped"] == "it is a convolution of 2 groups"
    assert reasons["own"] == "its own forward does more than the product"
    assert reasons["normed"] == "its weight is computed"
    assert reasons["spare"] == "no row of the data reaches it"
    assert reasons["left"] == "left is excluded"
    torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.1)
    for layer in report:
        assert (layer.stored_bytes < layer.float_bytes) == (layer.reason == "")


def test_a_rank_that_saves_nothing_leaves_its_layer_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)).eval()
    rows = collect_rows(model, [Batch(args=(torch.randn(40, 64),))], count=32, seed=0)
    first, second = branch_layers(model, rows, replace(FINE, rank=8))
    assert (first.rank, first.reason) == (8, "")
    assert second.reason.startswith("rank 8 is above 3, ")
    own = {"1": replace(FINE, rank=2)}
    (again,) = (layer for layer in branch_layers(model, rows, FINE, own=own) if layer.name == "1")
    assert again.rank == 2


def test_gates_of_recurrent_layers_become_branches_once_they_are_linear() -> None:
    model = trained(Crn())
    rewrite(model)
    x = torch.randn(2, 1, 5, 6)
    rows = collect_rows(model, [Batch(args=(x,))], count=64, seed=0)
    with torch.no_grad():
        before = model(x)
        report = branch_layers(model, rows, FINE)
        torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.05 * float(before.abs().max()))
    assert {layer.name for layer in report if layer.rank and layer.name.startswith("rnn")}


def test_rows_do_not_depend_on_how_the_data_are_cut() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3)).eval()
    x = torch.randn(6, 4, 12)
    whole = collect_rows(model, [Batch(args=(x,))], count=16, seed=3)
    parts = collect_rows(model, [Batch(args=(x[:2],)), Batch(args=(x[2:],))], count=16, seed=3)
    assert whole.keys() == parts.keys() == {"0", "2"}
    for name, rows in whole.items():
        torch.testing.assert_close(parts[name].x, rows.x)
        assert rows.x.shape[0] == 16
        assert rows.peaks is not None
        assert bool((rows.x.abs().reshape(16, -1, 3).amax(2) <= rows.peaks * 1.0001).all())


def test_unknown_names_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for given in ({"own": {"gone": FINE}}, {"why": {"gone": "flat"}}):
        with pytest.raises(InputError, match=r"^gone: "):
            branch_layers(model, {}, FINE, **given)
    with pytest.raises(InputError, match=r"^gone: "):
        collect_rows(model, [], count=4, seed=0, layers=["gone"])
    made = branch_layer(torch.randn(24, 32), LayerRows(x=torch.randn(9, 32)), FINE)
    with pytest.raises(InputError, match=r"^0: is stored for shape"):
        branch_module(nn.Linear(4, 4), made.entry, made.tensors, name="0")
    with pytest.raises(InputError, match=r"^0: is no convolution of one group"):
        branch_module(nn.Embedding(24, 32), made.entry, made.tensors, name="0")
