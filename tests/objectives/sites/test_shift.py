"""A shift of the input of quantized operators: it changes rounding only, and it is what the search scored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import calibrate
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.payload import payload, restore
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing
from tests.support.plain_forms import fake_quantize_weight, quantize_model
from tests.support.quantized_models import (
    SCHEMES,
    Example,
    PaddedConv2d,
    block_example,
    pixels_example,
    shifted,
    site,
)

WEIGHT_ONLY = Scheme(activations="none")
CONVOLUTIONS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv1d(4, 6, 3),
    lambda: nn.Conv1d(4, 6, 3, padding=2, stride=2, bias=False),
    lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2),
    lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 1), groups=2),
    lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
    lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
    lambda: nn.Conv3d(4, 3, 2, padding=1),
]


def relative_error(out: Tensor, ref: Tensor) -> float:
    return float((out - ref).double().norm() / ref.double().norm())


def exact_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with integer weights that reach 127 in every row, which int8 per channel stores without error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randint(-126, 127, parameter.shape, generator=generator))
                parameter.flatten(1)[:, 0] = 127
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def random_shift(channels: int, seed: int = 3) -> Tensor:
    return 5 * torch.randn(channels, generator=torch.Generator().manual_seed(seed))


def asymmetric(shape: Sequence[int], axis: int, seed: int = 1) -> Tensor:
    """Values whose channels lie on one side of zero, each at its own distance."""
    generator = torch.Generator().manual_seed(seed)
    offset = 4 * torch.randn(shape[axis], generator=generator)
    return torch.randn(tuple(shape), generator=generator) + offset.reshape(-1, *[1] * (len(shape) - 1 - axis))


def only_site(model: nn.Module) -> Site:
    """The explicit site of a sequence of one operator."""
    return site(model, ("0",), "explicit", reason="test")


def quantized(
    model: nn.Module, sites: Sequence[Site], smoothings: dict[str, Smoothing], scheme: Scheme, x: Tensor
) -> nn.Module:
    ranges = calibrate(model, sites, [Batch(args=(x,))], rows=1, seed=0)
    result = copy.deepcopy(model)
    quantize_model(
        result,
        sites,
        smoothings=smoothings,
        ranges={found.name: ranges.input_range(found) for found in sites},
        scheme=scheme,
    )
    return result


@pytest.mark.parametrize("make", CONVOLUTIONS)
@pytest.mark.parametrize("mode", ["fold", "explicit"])
def test_a_shift_leaves_the_float_product_of_convolutions(make: Callable[[], nn.Module], mode: str) -> None:
    inner = make()
    model = exact_weights(nn.Sequential(inner))
    x = asymmetric((2, 4, *[6] * (torch.as_tensor(inner.weight).dim() - 2)), 1)
    found = only_site(model)
    # At a folded site somebody else divides; with s = 1 nobody has to.
    found = replace(found, mode="fold", reason="") if mode == "fold" else found
    smoothing = Smoothing(scales=torch.ones(4), shift=random_shift(4))
    result = quantized(model, (found,), {"0": smoothing}, WEIGHT_ONLY, x)
    operator = result.get_submodule("0")
    assert isinstance(operator, QuantizedOperator)
    before = (operator.inner._parameters["bias"], operator.padding)
    assert relative_error(result(x), model(x)) < 1e-5
    assert relative_error(operator(x[0]), model(x[:1])[0]) < 1e-5  # without a batch dimension
    assert (operator.inner._parameters["bias"], operator.padding) == before


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("bias", [True, False])
def test_a_shifted_linear_is_the_formula(scheme: Scheme, bias: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 7, bias=bias)).requires_grad_(False)
    inner = model.get_submodule("0")
    x, z = asymmetric((30, 12), 1), random_shift(12)
    s = torch.rand(12, generator=torch.Generator().manual_seed(5)) + 0.5
    result = quantized(model, (only_site(model),), {"0": Smoothing(scales=s, shift=z)}, scheme, x)
    operator = result.get_submodule("0")
    assert isinstance(operator, QuantizedOperator)
    w = torch.as_tensor(inner.weight)
    rounded = operator(x) - (w.double() @ z.double()).float()
    if bias:
        rounded -= torch.as_tensor(inner.bias)
    # The same operator without a shift, given what the shifted one multiplies.
    plain = quantized(model, (only_site(model),), {"0": Smoothing(scales=s)}, scheme, x - z)
    expected = plain(x - z) - (torch.as_tensor(inner.bias) if bias else 0)
    assert relative_error(rounded, expected) < 1e-4
    assert torch.equal(torch.as_tensor(operator.weight), fake_quantize_weight(w * s, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("range_factor", [1.0, 0.7])
def test_linear_operator_has_the_loss_that_its_site_was_scored_with(scheme: Scheme, range_factor: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 7)).requires_grad_(False)
    x = asymmetric((40, 12), 1)
    found = only_site(model)
    calibration = calibrate(model, (found,), [Batch(args=(x,))], rows=40, seed=0)
    data = calibration.site_data(found, dict(model.named_parameters()))
    smoothing = Smoothing(
        scales=torch.rand(12, generator=torch.Generator().manual_seed(5)) + 0.5,
        shift=data.input_range.middle(data.ties),
        range_factor=range_factor,
    )
    result = quantized(model, (found,), {"0": smoothing}, scheme, x)
    bias = torch.as_tensor(model.get_submodule("0").bias)
    measured = relative_error(result(x) - bias, model(x) - bias) ** 2
    assert measured == pytest.approx(SiteObjective(data, scheme).loss(smoothing), rel=2e-3)


@pytest.mark.parametrize("make", CONVOLUTIONS[:4])
@pytest.mark.parametrize("granularity", ["static", "token"])
def test_convolution_has_the_loss_that_its_site_was_scored_with(
    make: Callable[[], nn.Module], granularity: str
) -> None:
    scheme = Scheme(activation_granularity="token") if granularity == "token" else Scheme()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(make()).requires_grad_(False)
    inner = model.get_submodule("0")
    x = asymmetric((3, 4, *[5] * (torch.as_tensor(inner.weight).dim() - 2)), 1)
    found = only_site(model)
    calibration = calibrate(model, (found,), [Batch(args=(x,))], rows=1000, seed=0)  # every patch
    data = calibration.site_data(found, dict(model.named_parameters()))
    scales = torch.rand(4, generator=torch.Generator().manual_seed(5)) + 0.5
    smoothing = Smoothing(scales=scales, shift=data.input_range.middle(data.ties))
    result = quantized(model, (found,), {"0": smoothing}, scheme, x)
    bias = torch.as_tensor(inner.bias).reshape(-1, *[1] * (x.dim() - 2)) if inner.bias is not None else 0
    measured = relative_error(result(x) - bias, model(x) - bias) ** 2
    assert measured == pytest.approx(SiteObjective(data, scheme).loss(smoothing), rel=2e-3)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(activation_granularity="token")], ids=lambda s: s.name)
def test_a_shift_to_the_middle_spares_asymmetric_channels(scheme: Scheme) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8)).requires_grad_(False)
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)) + 30
    found = only_site(model)
    ones = torch.ones(16)
    middle = calibrate(model, (found,), [Batch(args=(x,))], rows=1, seed=0).input_range(found).middle(found.ties)
    losses = [
        relative_error(quantized(model, (found,), {"0": Smoothing(scales=ones, shift=z)}, scheme, x)(x), model(x))
        for z in (None, middle)
    ]
    assert losses[1] < 0.3 * losses[0]


def test_both_places_of_a_folding_shift_agree() -> None:
    """Folded into biases or subtracted by the quantizer: the same integers but for rounding, the same output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 9), nn.Linear(9, 5)).eval().requires_grad_(False)
    with torch.no_grad():
        model.get_parameter("0.bias").copy_(random_shift(12))
    x = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(1))
    sites = discover(model, Batch(args=(x,))).sites
    assert all(found.shift_edits for found in sites)
    ranges = calibrate(model, sites, [Batch(args=(x,))], rows=1, seed=0)
    smoothings = {
        found.name: Smoothing(
            scales=torch.rand(found.channels, generator=torch.Generator().manual_seed(5)) + 0.5,
            shift=ranges.input_range(found).middle(found.ties),
        )
        for found in sites
    }
    folded = quantized(model, sites, smoothings, Scheme(), x)
    subtracted = quantized(model, [replace(found, shift_edits=()) for found in sites], smoothings, Scheme(), x)
    for name in ("1", "2"):
        assert folded.get_submodule(name).shift is None
        assert subtracted.get_submodule(name).shift is not None
        for tensor in ("weight_values", "input_scale", "correction"):
            first, second = (m.get_submodule(name).get_buffer(tensor) for m in (folded, subtracted))
            assert torch.equal(first, second)
    error = relative_error(folded(x), model(x))
    assert relative_error(folded(x), subtracted(x)) < 0.5 * error  # a rounding may tip over to the next integer
    unshifted = {name: replace(smoothing, shift=None) for name, smoothing in smoothings.items()}
    assert error < relative_error(quantized(model, sites, unshifted, Scheme(), x)(x), model(x))


@pytest.mark.parametrize("example", [block_example, pixels_example])
def test_skipped_operators_of_shifted_sites_compute_what_they_did(example: Callable[[], Example]) -> None:
    made = shifted(example())
    model = copy.deepcopy(made.model)
    quantize_model(model, made.sites, smoothings=made.smoothings, ranges=made.ranges, scheme=WEIGHT_ONLY, skip=["*"])
    x = made.batches[0].args[0]
    assert relative_error(model(x), made.model(x)) < 1e-5


def test_one_skipped_reader_of_a_folded_shift_gets_it_in_its_bias() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return torch.cat([self.a(h), self.b(h)], -1)

    model = exact_weights(Two().double())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = discover(model, Batch(args=(x,))).sites
    assert found.shift_edits
    smoothing = Smoothing(scales=torch.ones(6), shift=random_shift(6))
    for skip in ([], ["a"], ["b"], ["*"]):
        result = copy.deepcopy(model)
        quantize_model(result, [found], smoothings={"a": smoothing}, ranges={}, scheme=WEIGHT_ONLY, skip=skip)
        assert relative_error(result(x), model(x)) < 1e-6
        again = restore(copy.deepcopy(model), *payload(result))
        assert torch.equal(again(x), result(x))


def test_operators_with_a_forward_of_their_own_take_no_shift() -> None:
    model = nn.Sequential(PaddedConv2d(2, 3, 3), nn.Conv2d(3, 2, 1)).eval().requires_grad_(False)
    sites = discover(model, Batch(args=(torch.randn(1, 2, 5, 5),))).sites
    assert [found.shiftable for found in sites] == [False, True]


def test_shift_moves_with_the_model_and_keeps_its_dtype() -> None:
    made = shifted(block_example())
    model = copy.deepcopy(made.model)
    quantize_model(model, made.sites, smoothings=made.smoothings, ranges=made.ranges, scheme=Scheme())
    model.to(torch.bfloat16)
    assert model.get_submodule("q").get_buffer("shift").dtype == torch.float32
    assert model.get_submodule("q").get_buffer("correction").dtype == torch.float32
    assert "shifted" in repr(model.get_submodule("q"))


def test_ranges_after_a_shift() -> None:
    found = ChannelRange(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 10.0]))
    assert found.peaks().tolist() == [3.0, 10.0]
    assert found.peaks(found.middle(torch.arange(2))).tolist() == [2.0, 4.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("example", [block_example, pixels_example])
@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(activation_granularity="token"), WEIGHT_ONLY], ids=lambda s: s.name
)
def test_a_shifted_model_on_a_gpu_is_near_the_one_on_the_cpu(example: Callable[[], Example], scheme: Scheme) -> None:
    made = shifted(example())
    outputs = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(made.model).to(device)
        quantize_model(model, made.sites, smoothings=made.smoothings, ranges=made.ranges, scheme=scheme)
        outputs.append(model(made.batches[0].args[0].to(device)).cpu())
    error = relative_error(outputs[0], made.model(made.batches[0].args[0]))
    assert relative_error(outputs[1], outputs[0]) < 0.5 * error + 1e-5  # a rounding may tip over to the next integer
