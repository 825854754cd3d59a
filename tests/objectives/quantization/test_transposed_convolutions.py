"""Transposed convolutions from discovery to the quantized model: channels are input channels, weights are (in, out, kernel)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import calibrate
from alphasmith.objectives.calibration.weight_matrix import as_matrix, from_matrix, matrix_shape
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.payload import payload, restore
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import OperatorKind
from alphasmith.objectives.smoothing import Smoothing
from tests.support.plain_forms import quantize_model
from tests.support.quantized_models import SCHEMES
from tests.support.site_modules import randomised

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.ConvTranspose1d(4, 6, 3),
    "strided": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "cut": lambda: nn.ConvTranspose1d(4, 6, 2, padding=1, dilation=1),
    "grouped": lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), groups=2),
    "depthwise": lambda: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=4, bias=False),
    "dilated": lambda: nn.ConvTranspose2d(4, 3, 3, dilation=2, padding=(1, 2)),
    "volume": lambda: nn.ConvTranspose3d(4, 2, 2, stride=2),
}


def made(name: str) -> tuple[nn.Sequential, nn.Module, Tensor]:
    """A convolution, a ReLU and a transposed one, in float32; and an input."""
    torch.manual_seed(0)
    transposed = CONVOLUTIONS[name]()
    n = torch.as_tensor(transposed.weight).dim() - 2
    before = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n](3, 4, 1)
    model = nn.Sequential(before, nn.ReLU(), transposed)
    randomised(model).float()
    return model, transposed, torch.randn(3, 3, *(5,) * n)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_scales_fold_into_what_comes_before(name: str) -> None:
    model, _, x = made(name)
    model, x = model.double(), x.double()
    _, site = discover(model, Batch(args=(x,))).sites
    (operator,) = site.operators
    assert (site.mode, site.channels, operator.kind, operator.raw) == ("fold", 4, "conv", False)
    assert not site.shiftable  # how many inputs an output sees depends on its place
    folded = copy.deepcopy(model)
    fold(folded, site, Smoothing(scales=torch.tensor([0.1, 3.0, 20.0, 1.0], dtype=torch.float64)))
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_scales_fold_into_its_outputs(groups: int) -> None:
    model = randomised(
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups), nn.PReLU(6), nn.ConvTranspose2d(6, 2, 2, groups=groups))
    )  # fmt: skip
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    site = discover(model, Batch(args=(x,))).sites[1]
    assert site.mode == "fold"
    assert site.producers == ("0",)
    folded = copy.deepcopy(model)
    fold(folded, site, Smoothing(scales=torch.linspace(-2, 2, 6, dtype=torch.float64).exp()))
    torch.testing.assert_close(folded(x), model(x))
    assert not torch.equal(folded.get_parameter("0.weight"), model.get_parameter("0.weight"))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(activation_granularity="token")], ids=lambda s: s.name)
def test_it_has_the_loss_that_its_site_was_scored_with(name: str, scheme: Scheme) -> None:
    model, transposed, x = made(name)
    site = discover(model, Batch(args=(x,))).sites[1]
    calibration = calibrate(model, (site,), [Batch(args=(x,))], rows=10_000, seed=0)  # every patch
    data = calibration.site_data(site, dict(model.named_parameters()))
    weight = torch.as_tensor(transposed.weight).detach()
    assert torch.equal(data.weight_absmax, weight.abs().flatten(1).amax(1))
    scales = torch.tensor([0.5, 2.0, 1.3, 0.8])
    smoothing = Smoothing(scales=scales)
    hidden = torch.relu(model[0](x)).detach()
    alone = nn.Sequential(nn.Identity(), nn.Identity(), copy.deepcopy(transposed)).requires_grad_(False).eval()
    quantize_model(
        alone, (site_alone := discover(alone, Batch(args=(hidden,))).sites[0],),
        smoothings={site_alone.name: smoothing}, ranges={site_alone.name: data.input_range}, scheme=scheme,
    )  # fmt: skip
    assert site_alone.mode == "explicit"
    bias = 0 if transposed.bias is None else torch.as_tensor(transposed.bias).reshape(-1, *[1] * (x.dim() - 2)).detach()
    exact = transposed(hidden).detach() - bias
    error = alone(hidden) - bias - exact
    measured = float(error.double().square().sum() / exact.double().square().sum())
    assert measured == pytest.approx(SiteObjective(data, scheme).loss(smoothing), rel=2e-3)


@pytest.mark.parametrize("name", ["strided", "grouped", "depthwise"])
def test_every_output_channel_has_its_own_scale(name: str) -> None:
    model, transposed, x = made(name)
    weight, bias = torch.as_tensor(transposed.weight).detach().clone(), transposed.bias
    groups = int(getattr(transposed, "groups", 1))
    expected = torch.empty_like(weight)
    per_group, outputs = weight.shape[0] // groups, weight.shape[1]
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        for output in range(outputs):
            step = weight[rows, output].abs().max() / 127
            expected[rows, output] = (weight[rows, output] / step).round() * step
    site = discover(model, Batch(args=(x,))).sites[1]
    quantize_model(model, (site,), smoothings={}, ranges={}, scheme=Scheme(activations="none"))
    operator = model[2]
    assert isinstance(operator, QuantizedOperator)
    torch.testing.assert_close(operator.weight.as_subclass(Tensor), expected)
    assert operator.weight_scale.numel() == outputs * groups
    assert (operator.bias is None) == (bias is None)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_stored_one_has_the_bits_of_the_one_that_was_stored(scheme: Scheme) -> None:
    model, _, x = made("grouped")
    sites = discover(model, Batch(args=(x,))).sites
    ranges = calibrate(model, sites, [Batch(args=(x,))], rows=1, seed=0)
    skeleton = copy.deepcopy(model)
    quantize_model(
        model, sites, smoothings={sites[1].name: Smoothing(scales=torch.tensor([0.5, 2.0, 1.3, 0.8]))},
        ranges={site.name: ranges.input_range(site) for site in sites}, scheme=scheme,
    )  # fmt: skip
    again = restore(skeleton, *payload(model))
    assert torch.equal(again(x), model(x))
    expected = made("grouped")[0](x).detach()
    assert float((model(x).detach() - expected).norm() / expected.norm()) < 0.3
    with_size = model[2](torch.relu(model[0](x)), output_size=[11, 6])  # arguments of its forward still reach it
    assert with_size.shape[2:] == (11, 6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_matrix_is_a_weight_laid_out_otherwise(kind: OperatorKind, transposed: bool, groups: int) -> None:
    shape = (6, 9) if kind == "linear" else (6, 9, 2, 3)
    groups = 1 if kind == "linear" else groups
    weight = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    matrix = as_matrix(weight, kind, transposed, groups)
    assert matrix.shape == matrix_shape(shape, kind, transposed, groups)
    assert torch.equal(matrix.flatten().sort().values, weight.flatten())
    assert torch.equal(from_matrix(matrix, shape, kind, transposed, groups), weight)
