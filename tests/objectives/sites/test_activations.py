"""What lies between a producer and its consumer: a scale passes where f(k x) = k f(x) for every k > 0, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from tests.support.site_modules import randomised

WIDTH = 8
HOMOGENEOUS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.3),
    "prelu": nn.PReLU(),
    "prelu per channel": nn.PReLU(WIDTH),
    "randomized leaky": nn.RReLU(),
    "threshold at 0": nn.Threshold(0.0, 0.0),
    "dropout": nn.Dropout(),
}
OTHERS: dict[str, nn.Module] = {
    "relu6": nn.ReLU6(),
    "threshold elsewhere": nn.Threshold(0.1, 0.0),
    "threshold to another value": nn.Threshold(0.0, 0.1),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardtanh": nn.Hardtanh(),
    "hardshrink": nn.Hardshrink(),
    "softshrink": nn.Softshrink(),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(),
    "softsign": nn.Softsign(),
    "mish": nn.Mish(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}


def network(activation: nn.Module, convolution: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    if convolution:
        made = nn.Sequential(nn.Conv2d(3, WIDTH, 3), activation, nn.Conv2d(WIDTH, 4, 3))
        return randomised(made), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    made = nn.Sequential(nn.Linear(3, WIDTH), activation, nn.Linear(WIDTH, 4))
    return randomised(made), torch.randn(6, 3, dtype=torch.float64)  # PReLU takes the second axis for the channels


def second(model: nn.Module, x: Tensor) -> Site:
    return next(site for site in discover(model, Batch(args=(x,))).sites if site.name == "2")


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_a_scale_passes_what_is_homogeneous_and_changes_no_slope(name: str, convolution: bool) -> None:
    model, x = network(copy.deepcopy(HOMOGENEOUS[name]), convolution)
    site = second(model, x)
    assert site.mode == "fold"
    assert site.producers == ("0",)
    assert torch.equal(site.ties, torch.arange(WIDTH))
    folded = copy.deepcopy(model)
    fold(folded, site, Smoothing(scales=torch.linspace(-3, 3, WIDTH, dtype=torch.float64).exp()))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-12)
    changed = {n for n, value in folded.state_dict().items() if not torch.equal(value, model.state_dict()[n])}
    assert changed == {"0.weight", "0.bias", "2.weight"}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_lets_a_scale_pass(name: str) -> None:
    site = second(*network(copy.deepcopy(OTHERS[name]), False))
    assert site.mode == "explicit"
    assert site.reason.endswith("1")  # says which module it is
    assert not site.producers


class Slopes(nn.Module):
    """A network whose slopes are what another layer makes of the input: they may grow and shrink with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slopes, self.last = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.other = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> (B, 4)."""
        slopes = self.slopes(x).mean(0)
        return torch.as_tensor(self.last(F.prelu(self.first(x), slopes)) + self.other(slopes))


def test_slopes_are_not_scaled() -> None:
    model = randomised(Slopes())
    found = discover(model, Batch(args=(torch.randn(5, 3, dtype=torch.float64),)))
    modes = {site.name: site.mode for site in found.sites}
    assert modes["last"] == "fold"
    assert modes["other"] == "explicit"


class Heads(nn.Module):
    """A projection per head in one tensor, by einsum: no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(3 * 4, 2)
        self.heads = nn.Parameter(torch.randn(3, WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, 2)."""
        return torch.as_tensor(self.out(torch.einsum("bld,hdk->blhk", self.norm(x), self.heads).flatten(2)))


class Experts(nn.Module):
    """Every expert reads every row: only its name says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Parameter(torch.randn(3, WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, 4)."""
        rows = self.norm(x).reshape(1, -1, WIDTH).expand(3, -1, -1)
        return torch.bmm(rows, self.up).sum(0).reshape(*x.shape[:2], 4)


@pytest.mark.parametrize(("kind", "experts"), [(Heads, False), (Experts, True)])
def test_a_stack_of_matrices_is_called_experts_only_where_it_is(kind: type[nn.Module], experts: bool) -> None:
    model = nn.Sequential(kind(), nn.Linear(2 if kind is Heads else 4, 2)).double().eval()
    found = discover(model, Batch(args=(torch.randn(2, 5, WIDTH, dtype=torch.float64),)))
    told = [*(site.reason for site in found.sites), *(reason for _, reason in found.skipped)]
    assert any("expert" in reason for reason in told) == experts


class Depthwise(nn.Module):
    """A depthwise convolution that is called as a function, its axis of one dropped and put back: state-space models do it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, 2)."""
        weight = self.conv1d.weight.squeeze(1)
        y = F.conv1d(self.norm(x).transpose(1, 2), weight.unsqueeze(1), self.conv1d.bias, padding=3, groups=WIDTH)
        return torch.as_tensor(self.out(F.silu(y[..., : x.shape[1]]).transpose(1, 2)))


def test_a_convolution_called_as_a_function_is_known_to_be_used() -> None:
    found = discover(Depthwise().eval(), Batch(args=(torch.randn(2, 5, WIDTH),)))
    (operator,) = [o for site in found.sites for o in site.operators if o.name == "conv1d"]
    assert operator.raw
    assert operator.kind == "conv"
    (reason,) = [reason for name, reason in found.skipped if name == "conv1d"]
    assert "functional call" in reason
