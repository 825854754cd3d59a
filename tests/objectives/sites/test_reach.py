"""What the traced batch does not reach: nothing is folded that another branch could read or make, every weight is accounted for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.coverage import Coverage, coverage, percent
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Discovery, Site
from alphasmith.objectives.smoothing import Smoothing
from tests.support import site_modules as m

HIGH, LOW = torch.full((1, 3, m.C), 1.0), torch.full((1, 3, m.C), -1.0)
INNER = 18


class Branching(nn.Module):
    """norm -> first -> ReLU -> second where the input is positive, else whatever ``other`` makes of what it has in hand."""

    def __init__(self, other: nn.Module | None, take: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(m.C)
        self.first, self.second = nn.Linear(m.C, INNER), nn.Linear(INNER, 5)
        self.other = other
        self._take = take

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x + torch.linspace(-1, 1, m.C, dtype=x.dtype))
        hidden = torch.relu(self.first(normed))
        if bool(x.mean() > 0):
            return torch.as_tensor(self.second(hidden))
        return self._take(self, normed, hidden)


#: other layer, what it does in the branch that is not taken, sites that must not fold for its sake
BRANCHES: dict[str, tuple[Callable[[], nn.Module | None], Callable[[Any, Tensor, Tensor], Tensor], set[str]]] = {
    "reads the hidden tensor": (lambda: nn.Linear(INNER, 5), lambda s, n, h: s.other(h), {"first", "second"}),
    "reads half of it": (lambda: nn.Linear(INNER // 2, 5), lambda s, n, h: s.other(h[..., ::2]), {"first", "second"}),
    "reads the normalization": (lambda: nn.Linear(m.C, 5), lambda s, n, h: s.other(n), {"first", "second"}),
    "flattens it": (lambda: nn.Linear(3 * INNER, 5), lambda s, n, h: s.other(h.flatten(1))[:, None], {"first", "second"}),
    "makes the hidden tensor": (lambda: nn.Linear(m.C + 1, INNER), lambda s, n, h: s.second(s.other(F.pad(n, (0, 1)))), {"first", "second"}),
    "normalizes it": (lambda: nn.LayerNorm(INNER), lambda s, n, h: s.second(s.other(h)), {"second"}),
    "convolves it": (lambda: nn.Conv1d(INNER, 5, 1), lambda s, n, h: s.other(h.mT).mT, {"first", "second"}),
    "is nested": (
        lambda: nn.Sequential(nn.ReLU(), nn.ModuleList([nn.Linear(INNER, 5)])), lambda s, n, h: s.other[1][0](h), {"first", "second"},
    ),
    "reads a slice": (lambda: nn.Linear(7, 5), lambda s, n, h: s.other(h[..., :7]), {"first", "second"}),
    "normalizes the output": (lambda: nn.RMSNorm(5), lambda s, n, h: s.other(s.second(h)), set()),
}  # fmt: skip


@pytest.fixture(params=BRANCHES)
def branching(request: pytest.FixtureRequest) -> tuple[nn.Module, set[str]]:
    make, take, kept = BRANCHES[request.param]
    return m.randomised(Branching(make(), take)), kept


def discovered(model: nn.Module) -> Discovery:
    return discover(model, Batch(args=(HIGH.double(),)))


def scaled(model: nn.Module, sites: list[Site]) -> nn.Module:
    folded = copy.deepcopy(model)
    for site in sites:
        scales = torch.linspace(0.2, 5, site.channels, dtype=torch.float64)[site.ties]
        fold(folded, site, Smoothing(scales=scales))
    return folded


def test_sites_that_an_unreached_layer_could_touch_are_not_folded(branching: tuple[nn.Module, set[str]]) -> None:
    model, kept = branching
    found = discovered(model)
    sites = {site.name: site for site in found.sites}
    assert {name for name in ("first", "second") if sites[name].mode != "fold"} == kept
    for name in kept:
        assert sites[name].mode == "explicit"  # its operators can divide by themselves: the tensor stays as it is
        assert "other" in sites[name].reason
        assert "branch that the example batch does not take" in sites[name].reason


def test_what_folds_is_right_in_the_branch_that_was_not_traced(branching: tuple[nn.Module, set[str]]) -> None:
    model, _ = branching
    folded = scaled(model, [site for site in discovered(model).sites if site.mode == "fold"])
    for x in (HIGH, LOW):
        with torch.no_grad():
            torch.testing.assert_close(folded(x.double()), model(x.double()), rtol=1e-10, atol=1e-12)


def test_unreached_layers_become_sites_that_take_no_scales() -> None:
    make, take, _ = BRANCHES["is nested"]
    found = discovered(m.randomised(Branching(make(), take)))
    (site,) = [site for site in found.sites if site.mode == "left"]
    assert site.name == "other.1.0"
    assert site.reason == "the example batch does not reach it"
    (operator,) = site.operators
    assert (operator.weight, operator.bias) == ("other.1.0.weight", "other.1.0.bias")
    assert (operator.in_channels, operator.out_channels, operator.raw, operator.plain) == (INNER, 5, False, True)


def test_a_layer_in_another_module_that_never_saw_the_tensor_is_not_suspected() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = m.randomised(m.Mlp())
            self.decoder = Later()

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.decoder(self.block(x)))

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 5), nn.Linear(m.C, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.one(x) if x.isfinite().all() else self.two(x))

    found = discover(m.randomised(Apart()), Batch(args=(HIGH.double(),)))
    modes = {site.name: site.mode for site in found.sites}
    assert modes["block.fc1"] == modes["block.fc2"] == "fold"


class Everything(nn.Module):
    """One weight of every fate."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, m.C)
        self.tied = nn.Linear(m.C, 9, bias=False)
        self.tied.weight = self.table.weight
        self.norm = nn.LayerNorm(m.C)
        self.fc = nn.Linear(m.C, m.C)
        self.pair = nn.Bilinear(m.C, m.C, m.C)
        self.functional = nn.Parameter(torch.randn(m.C, m.C))
        self.stack = nn.Parameter(torch.randn(2, m.C, m.C))
        self.turned = nn.Parameter(torch.randn(2, m.C, m.C))
        self.gain = nn.Parameter(torch.randn(1, m.C))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(m.C, m.C))
        self.never = nn.Parameter(torch.randn(3, 4))
        self.idle = nn.Linear(m.C, m.C)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.norm(self.table(ids)))
        x = F.linear(self.pair(x, x), self.functional) * self.gain
        x = self.normed(torch.einsum("bli,ij->blj", x, self.stack[0]))
        x = F.linear(x @ self.turned[0], self.turned[1])  # once stored (in, out), once (out, in)
        return torch.as_tensor(self.tied(x))


def everything(floats: dict[str, str] | None = None) -> tuple[nn.Module, Coverage]:
    model = m.randomised(Everything())
    found = discover(model, Batch(args=(torch.arange(6).reshape(2, 3),)))
    return model, coverage(found.weights, found.sites, floats or {})


def test_every_weight_of_two_dimensions_has_a_status_and_the_true_reason() -> None:
    model, found = everything({"idle": "no row reached it"})
    assert {w.name for w in found.weights} == {n for n, p in model.named_parameters() if p.dim() > 1}
    assert [w.name for w in found.weights if w.status == "quantized"] == ["stack", "fc.weight"]
    reasons = {w.name: w.reason for w in found.left}
    assert reasons["table.weight"] == "its weight is shared with the embedding table"
    assert next(w for w in found.weights if w.name == "table.weight").layers == ("table", "tied")
    assert "linear in pair" in reasons["pair.weight"]
    assert reasons["functional"] == "used by a functional call in the model, not by a layer's own forward"
    assert reasons["turned"] == "several matrices in one tensor, used by a functional call in the model"
    assert reasons["gain"] == "read by mul in the model, which is neither a linear nor a convolution"
    assert reasons["normed.parametrizations.weight.original1"] == "the weight of normed is computed from it"
    assert reasons["never"] == "not read by the forward of the model"
    assert reasons["idle.weight"] == "no row reached it"


def test_shares_are_of_the_whole_model_and_add_up() -> None:
    model, found = everything()
    total = sum(p.numel() for p in model.parameters())
    for weight in found.weights:
        assert weight.share == pytest.approx(model.get_parameter(weight.name).numel() / total)
    assert found.quantized + sum(share for _, share, _ in found.reasons()) == pytest.approx(1)
    account = found.account()
    assert account.startswith(
        f"{percent(found.quantized)} of the weights are quantized; {percent(1 - found.quantized)} stay float: "
    )
    assert f"{percent(found.reasons()[0][1])} pair (read by" in account
    assert "more reasons" in account


def test_nothing_rounds_to_all_or_nothing() -> None:
    assert [percent(share) for share in (0.0, 1e-4, 0.014, 0.996, 1.0)] == [
        "0 %",
        "below 1 %",
        "1 %",
        "above 99 %",
        "100 %",
    ]
    mlp = m.randomised(m.Mlp())
    found = discover(mlp, Batch(args=(HIGH.double(),)))
    assert coverage(found.weights, found.sites, {}).account() == "100 % of the weights are quantized"


def test_rows_of_one_weight_of_the_users_model_are_one_entry() -> None:
    model = m.randomised(m.Attention("matmul", False))
    found = discover(model, Batch(args=(HIGH.double(),)))
    parts = {f"{name}.weight": "in_proj_weight" for name in ("q", "k", "v")}
    rows = sum(model.get_parameter(name).shape[0] for name in parts)
    (whole,) = [w for w in coverage(found.weights, found.sites, {}, parts).weights if w.name == "in_proj_weight"]
    assert whole.shape == (rows, m.C)
    assert whole.share == pytest.approx(sum(w.share for w in found.weights if w.name in parts))
    split = coverage(found.weights, found.sites, {"k": "why"}, parts)
    assert [w.status for w in split.weights if w.name == "in_proj_weight"] == ["quantized", "float"]
