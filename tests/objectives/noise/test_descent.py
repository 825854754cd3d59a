"""Descent on the noise model: slopes, convexity, and minima within their boxes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.groups import group_channels
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.noise._closed_form import ClosedForm
from alphasmith.objectives.noise._descent import descend
from alphasmith.objectives.noise._rounding import Rounding, measure
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import LogScales, Smoothing, coefficient_map
from tests.support.site_cases import KINDS, SCHEMES, outlier_layer, relaxed, small_site

STATIC, TOKEN = Scheme(), Scheme(activation_granularity="token")


def closed_forms(data: SiteData, scheme: Scheme, shift: torch.Tensor | None = None) -> list[ClosedForm]:
    roundings: list[Rounding] = []
    for part in data.parts:
        measured = measure(data, part, scheme, shift, 1.0, 512, 512)
        roundings += measured.weights
        roundings += [measured.activations] if measured.activations else []
    return [ClosedForm(rounding, data.channels, 512) for rounding in roundings]


def space_of(data: SiteData, groups: int, *, betas: bool = False, offsets: bool = True) -> LogScales:
    labels = group_channels(data.activation_statistic, method="kmeans", k=groups).labels
    return coefficient_map(data.activation_statistic, data.weight_absmax, labels, betas=betas, offsets=offsets)


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), st.integers(0, 2**31), st.sampled_from([16, 64]))
def test_slope_is_the_derivative(kind: str, scheme: Scheme, seed: int, power: int) -> None:
    data = small_site(kind, seed, skew=0.3)
    generator = torch.Generator().manual_seed(seed)
    shift = data.input_range.middle(data.ties) if seed % 2 else None
    point, direction = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    step = 1e-5
    for form in closed_forms(data, scheme, shift):
        value, slope = form.noise(point, power)
        ends = [form.noise(point + sign * step * direction, power)[0] for sign in (1, -1)]
        # A difference of step 1e-5 carries rounding of 1e-16 / 1e-5, and curvature of the square of power times step.
        expected = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((slope * direction).sum(dim=1), expected, rtol=1e-3, atol=1e-5 * float(value.max()))


@settings(relaxed, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0.25, 0.5, 0.75]))
def test_log_loss_is_convex_along_segments(seed: int, at: float) -> None:
    """With given steps and 8 bits; the cap of columns far below one step is all that bends it, here by less than 1e-3."""
    data = linear_site_data(*outlier_layer(seed, rows=24, channels=32, outputs=16))
    space = space_of(data, 4)
    size = space.parameters
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(2, size, generator=generator, dtype=torch.float64) * 0.3
    ends[:, : size // 2] += 0.4
    points = torch.stack((ends[0], ends[1], ends[0] + at * (ends[1] - ends[0])))
    scheme = Scheme(weight_granularity="tensor")
    noise = torch.stack([form.noise(space.logs(points), 64)[0] for form in closed_forms(data, scheme)]).sum(dim=0)
    logs = noise.log()
    assert float(logs[2]) <= float((1 - at) * logs[0] + at * logs[1]) + 1e-3


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.weights != "fp8"], ids=lambda s: s.name)
def test_closed_form_agrees_with_rounding_samples(scheme: Scheme) -> None:
    """Within 20 % for 8 bits, 50 % for 4: enough for a direction."""
    data = linear_site_data(*outlier_layer(1, rows=128, channels=96, outputs=96))
    space = space_of(data, 1, offsets=False)
    alphas = torch.tensor([[0.4], [0.6]], dtype=torch.float64)
    energy = SiteObjective(data, scheme).reference_energy
    closed = torch.stack([form.noise(space.logs(alphas), 256)[0] for form in closed_forms(data, scheme)]).sum(dim=0)
    sampled = NoiseModel(data, scheme, energy=energy).losses(space.scales(alphas))
    tolerance = 0.5 if scheme.weights == "int4" else 0.2
    torch.testing.assert_close(closed / energy, sampled, rtol=tolerance, atol=0)


def test_gradient_of_the_loss_points_downhill() -> None:
    data = linear_site_data(*outlier_layer(5, rows=128, channels=64, outputs=64))
    model = NoiseModel(data, STATIC)
    logs = torch.zeros(64, requires_grad=True)
    loss = model.loss(logs.exp())
    (slope,) = torch.autograd.grad(loss, logs)
    below = model.loss((-0.1 * slope / slope.abs().max()).exp())
    assert float(below) < float(loss.detach())


@pytest.mark.parametrize("scheme", [STATIC, TOKEN, Scheme.parse("w4a8-g32-token")], ids=lambda s: s.name)
def test_minimum_is_no_worse_than_the_best_single_alpha(scheme: Scheme) -> None:
    data = linear_site_data(*outlier_layer(0))
    objective = SiteObjective(data, scheme)
    model = NoiseModel(data, scheme, energy=objective.reference_energy)
    single = space_of(data, 1, offsets=False)
    grid = torch.linspace(0, 1, 11, dtype=torch.float64).unsqueeze(1)
    best = min(objective.loss(Smoothing(scales=scales)) for scales in single.scales(grid))
    space = space_of(data, 4)
    k = space.groups
    low, high = torch.cat((torch.zeros(k), -torch.ones(k))), torch.ones(2 * k)
    starts = torch.stack([torch.cat((torch.full((k,), a), torch.zeros(k))) for a in (0.3, 0.5, 0.7)])
    found = model.minimise(space, low, high, starts)
    # The grid's winner was picked by the exact loss, the minimum by a model of a few percent.
    assert objective.loss(Smoothing(scales=space.scales(found.theta))) <= best * 1.02


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_one_alpha_is_found_from_a_poor_start(start: float) -> None:
    data = linear_site_data(*outlier_layer(3, channels=64, outputs=64))
    model, space = NoiseModel(data, STATIC), space_of(data, 1, offsets=False)
    found = model.minimise(space, torch.zeros(1), torch.ones(1), torch.tensor([[start]]))
    grid = model.losses(space.scales(torch.linspace(0, 1, 101, dtype=torch.float64).unsqueeze(1)))
    assert found.loss <= float(grid.min()) * 1.02


@settings(relaxed, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.sampled_from(SCHEMES), st.booleans())
def test_minimum_stays_in_its_box_and_never_loses_to_a_start(seed: int, kind: str, scheme: Scheme, betas: bool) -> None:
    data = small_site(kind, seed)
    model = NoiseModel(data, scheme)
    space = coefficient_map(
        data.activation_statistic, data.weight_absmax, torch.tensor([0, 1, 2, 1]), betas=betas, offsets=True
    )
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.rand(2, space.parameters, generator=generator).sort(dim=0).values.double()
    starts = torch.rand(3, space.parameters, generator=generator).double()
    found = model.minimise(space, low, high, starts, steps=6)
    assert bool(((low <= found.theta) & (found.theta <= high)).all())
    first = model.losses(space.scales(torch.clamp(starts, low, high)))
    assert found.loss <= float(first.min()) * (1 + 1e-6)
    assert found.loss == pytest.approx(float(model.losses(space.scales(found.theta.unsqueeze(0)))), rel=1e-6)
    assert torch.equal(found.theta, model.minimise(space, low, high, starts, steps=6).theta)


@pytest.mark.parametrize("scheme", [STATIC, TOKEN, Scheme.parse("w4a8-g3-token")], ids=lambda s: s.name)
def test_limit_scales_respect_ties_and_never_lose_to_the_start(scheme: Scheme) -> None:
    x, w = outlier_layer(5, channels=32, outputs=16)
    ties = torch.arange(32) // 4
    data = replace(linear_site_data(x, w), ties=ties)
    model = NoiseModel(data, scheme)
    scales = model.limit_scales(torch.ones(32), steps=20)
    assert all(len(scales[ties == tie].unique()) == 1 for tie in ties)
    assert len(scales.unique()) > 1
    assert float(model.loss(scales)) <= float(model.loss(torch.ones(32)))


@settings(relaxed, max_examples=25)
@given(st.integers(0, 2**31))
def test_descent_finds_the_minimum_of_a_bowl_in_a_box(seed: int) -> None:
    """A separable quadratic, badly scaled: its minimum in a box is its centre, clamped."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(5, generator=generator, dtype=torch.float64)
    weight = (2 * torch.randn(5, generator=generator, dtype=torch.float64)).exp()

    def bowl(point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (weight * (point - centre).square()).sum(dim=1), 2 * weight * (point - centre)

    low, high = -torch.full((5,), 0.5, dtype=torch.float64), torch.full((5,), 0.5, dtype=torch.float64)
    start = torch.zeros(2, 5, dtype=torch.float64)
    point, value = descend(bowl, start, low, high, steps=100, reach=0.1, tolerance=1e-12)
    least = bowl(torch.clamp(centre, low, high).unsqueeze(0))[0]
    assert value.tolist() == bowl(point)[0].tolist()
    torch.testing.assert_close(value, least.expand(2), rtol=1e-3, atol=1e-6)


def test_descent_steps_back_from_what_is_not_finite() -> None:
    def cliff(point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = torch.where(point < 0.05, -point, torch.nan)
        return value.squeeze(1), torch.full_like(point, -1.0)

    low, high = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    point, value = descend(cliff, low.unsqueeze(0), low, high, steps=20, reach=0.1, tolerance=1e-9)
    assert math.isfinite(float(value))
    assert 0 < float(point) < 0.05


def test_wrong_arguments_are_named() -> None:
    data = small_site("linear", 0)
    model = NoiseModel(data, STATIC)
    space = coefficient_map(data.activation_statistic, data.weight_absmax, torch.zeros(4, dtype=torch.int64))
    one, start = torch.ones(1), torch.ones(1, 1)
    with pytest.raises(InputError, match=r"^low:"):
        model.minimise(space, one, 0 * one, start)
    for starts in (torch.ones(1), torch.ones(1, 2), torch.ones(0, 1)):
        with pytest.raises(InputError, match=r"^starts:"):
            model.minimise(space, one, one, starts)
    with pytest.raises(InputError, match=r"^high:"):
        model.minimise(space, one, torch.ones(2), start)
    with pytest.raises(InputError, match=r"^steps:"):
        model.minimise(space, 0 * one, one, start, steps=0)
    with pytest.raises(NonFiniteError, match="starts"):
        model.minimise(space, 0 * one, one, start * float("nan"))
