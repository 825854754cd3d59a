"""Weights of rows and outputs in the loss of a site, exact and predicted: formula fA10."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alphasmith.objectives.calibration.site_data import ProducerRows, SiteData, SitePart
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from tests.support.site_cases import KINDS, SCHEMES, relaxed, small_site

BY_ROW = [scheme for scheme in SCHEMES if scheme.weight_granularity != "tensor"]


def assert_same_loss(loss: float, expected: float) -> None:
    """Equal but for the rounding of float32 products.

    It is 1e-6 of the outputs at most, not of their error: the loss is a ratio of energies, so roots are compared. Of a
    loss of 1e-6 (weights in 8 bits, activations in float) that lets 2e-3 pass, of one of 1e-2 no more than 1e-4.
    """
    assert math.sqrt(loss) == pytest.approx(math.sqrt(expected), rel=5e-5, abs=1e-6)


def smoothing_of(data: SiteData, seed: int, *, shifted: bool = False) -> Smoothing:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp2(torch.rand(data.channels, generator=generator) * 4 - 2)
    return Smoothing(scales=scales, shift=data.mean() if shifted else None)


def weighed(data: SiteData, seed: int, factor: float = 1.0) -> SiteData:
    """The site with weights of its rows and outputs between 0.1 and 3."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return factor * (0.1 + 2.9 * torch.rand(count, generator=generator))

    parts = (
        replace(part, row_weight=some(part.x.shape[0]), output_weight=some(part.weight.shape[0])) for part in data.parts
    )
    return replace(data, parts=tuple(parts))


def ones(data: SiteData) -> SiteData:
    return replace(
        data,
        parts=tuple(
            replace(p, row_weight=torch.ones(p.x.shape[0]), output_weight=torch.ones(p.weight.shape[0]))
            for p in data.parts
        ),
    )


def with_producer(data: SiteData, seed: int) -> SiteData:
    generator = torch.Generator().manual_seed(seed)
    rows = data.channels
    energy = torch.rand(rows, generator=generator, dtype=torch.float64)
    producer = ProducerRows(
        channel=torch.arange(rows),
        absmax=torch.rand(rows, generator=generator) + 0.1,
        input_energy=energy,
        energy=energy,
        passed=torch.ones(rows, dtype=torch.float64),
    )
    return replace(data, producers=(producer,))


@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), st.integers(0, 999), st.booleans())
@relaxed
def test_weights_of_one_change_no_bit(kind: str, scheme: Scheme, seed: int, shifted: bool) -> None:
    data = with_producer(small_site(kind, seed), seed)
    smoothing = smoothing_of(data, seed, shifted=shifted)
    exact = [SiteObjective(d, scheme).loss(smoothing) for d in (data, ones(data))]
    assert exact[0] == exact[1]
    models = [NoiseModel(d, scheme, shift=smoothing.shift) for d in (data, ones(data))]
    predicted = [float(model.losses(smoothing.scales.unsqueeze(0))) for model in models]
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-6)


@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), st.integers(0, 999), st.sampled_from([1e-3, 0.5, 64.0, 1e4]))
@relaxed
def test_a_common_factor_of_all_weights_is_no_change(kind: str, scheme: Scheme, seed: int, factor: float) -> None:
    data = with_producer(small_site(kind, seed), seed)
    smoothing = smoothing_of(data, seed)
    few, many = weighed(data, seed), weighed(data, seed, factor)
    assert_same_loss(SiteObjective(many, scheme).loss(smoothing), SiteObjective(few, scheme).loss(smoothing))
    predicted = [float(NoiseModel(d, scheme).losses(smoothing.scales.unsqueeze(0))) for d in (few, many)]
    assert predicted[1] == pytest.approx(predicted[0], rel=1e-4)


@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), st.integers(0, 999), st.booleans())
@relaxed
def test_a_whole_number_of_a_row_is_that_many_rows(kind: str, scheme: Scheme, seed: int, shifted: bool) -> None:
    data = small_site(kind, seed)
    smoothing = smoothing_of(data, seed, shifted=shifted)
    copies = torch.Generator().manual_seed(seed)
    few, many = [], []
    for part in data.parts:
        counts = torch.randint(0, 3, (part.x.shape[0],), generator=copies)
        counts[0] = 2
        few.append(replace(part, row_weight=counts.to(torch.float32)))
        sample = None if part.sample is None else part.sample.repeat_interleave(counts)
        many.append(replace(part, x=part.x.repeat_interleave(counts, dim=0), sample=sample))
    losses = [SiteObjective(replace(data, parts=tuple(parts)), scheme).loss(smoothing) for parts in (few, many)]
    assert_same_loss(*losses)
    models = [NoiseModel(replace(data, parts=tuple(parts)), scheme, shift=smoothing.shift) for parts in (few, many)]
    predicted = [float(model.losses(smoothing.scales.unsqueeze(0))) for model in models]
    # The directions in which columns are correlated are found by a few steps of an iteration, from other rows.
    assert predicted[0] == pytest.approx(predicted[1], rel=0.25, abs=1e-12)


@given(st.sampled_from(BY_ROW), st.integers(0, 999), st.booleans())
@relaxed
def test_an_output_of_weight_0_does_not_count(scheme: Scheme, seed: int, shifted: bool) -> None:
    data = small_site("linear", seed)
    (part,) = data.parts
    smoothing = smoothing_of(data, seed, shifted=shifted)
    weight = torch.rand(3, generator=torch.Generator().manual_seed(seed)) + 0.1
    without = replace(part, weight=part.weight[:2], out_features=(2,), output_weight=weight[:2])
    silent = replace(part, output_weight=torch.cat([weight[:2], torch.zeros(1)]))
    sites = [replace(data, parts=(p,)) for p in (silent, without)]
    losses = [SiteObjective(site, scheme).loss(smoothing) for site in sites]
    assert_same_loss(*losses)
    predicted = [
        float(NoiseModel(site, scheme, shift=smoothing.shift).losses(smoothing.scales.unsqueeze(0))) for site in sites
    ]
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(activation_granularity="token"), Scheme(weights="int4")])
def test_the_exact_loss_is_the_weighted_sum_of_errors(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(40, 12, generator=generator), torch.randn(7, 12, generator=generator)
    data = linear_site_data(x, w)
    plain = SiteObjective(data, scheme)
    rows, outputs = torch.rand(40, generator=generator), torch.rand(7, generator=generator)
    both = SiteObjective(replace(data, parts=(replace(data.parts[0], row_weight=rows, output_weight=outputs),)), scheme)
    smoothing = smoothing_of(data, 1)
    # Errors of single rows and outputs, from sites in which nothing else counts.
    total = energy = 0.0
    for t in range(40):
        for o in range(7):
            one = replace(
                data.parts[0],
                row_weight=torch.eye(40)[t],
                output_weight=torch.eye(7)[o],
            )
            judge = SiteObjective(replace(data, parts=(one,)), scheme)
            total += float(rows[t] * outputs[o]) * judge.loss(smoothing) * judge.reference_energy
            energy += float(rows[t] * outputs[o]) * judge.reference_energy
    assert both.reference_energy == pytest.approx(energy, rel=1e-5)
    assert_same_loss(both.loss(smoothing), total / energy)
    assert both.loss(smoothing) != plain.loss(smoothing)


@pytest.mark.parametrize("scheme", ["w8a8-tensor-static", "w8a8-channel-static", "w8a8-channel-token", "w4a16-g32"])
def test_the_prediction_follows_the_weights(scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 64, generator=generator) * torch.exp(torch.randn(64, generator=generator))
    x[:20] *= 30  # a few large tokens, which count for little
    data = linear_site_data(x, torch.randn(48, 64, generator=generator))
    rows = torch.where(torch.arange(400) < 20, 1e-4, 1.0)
    outputs = torch.exp(2 * torch.randn(48, generator=generator))
    site = replace(data, parts=(replace(data.parts[0], row_weight=rows, output_weight=outputs),))
    judge, model = SiteObjective(site, parsed), NoiseModel(site, parsed)
    for seed in range(4):
        smoothing = smoothing_of(data, seed)
        assert float(model.losses(smoothing.scales.unsqueeze(0))) == pytest.approx(judge.loss(smoothing), rel=0.3)
    log = smoothing.scales.double().requires_grad_()
    value = model.loss(log)
    (slope,) = torch.autograd.grad(value, log)
    assert bool(torch.isfinite(slope).all())
    assert float(slope.abs().max()) > 0


def test_growing_subsets_take_the_weights_of_their_rows() -> None:
    data = weighed(small_site("two_parts", 4), 4)
    judge = SiteObjective(data, Scheme())
    smoothing = smoothing_of(data, 2)
    grown = list(judge.losses(smoothing, range(1, judge.rows + 1)))
    assert grown == pytest.approx([judge.loss(smoothing, rows=n) for n in range(1, judge.rows + 1)], rel=1e-5)


def part_of(data: SiteData) -> SitePart:
    return data.parts[0]


def test_weights_that_do_not_fit_are_named() -> None:
    data = small_site("linear", 1)
    part = part_of(data)
    for field, unfit in (
        ("row_weight", replace(part, row_weight=torch.ones(3))),
        ("output_weight", replace(part, output_weight=torch.ones(9))),
        ("row_weight", replace(part, row_weight=torch.ones(5, dtype=torch.float64))),
    ):
        with pytest.raises(InputError, match=field):
            SiteObjective(replace(data, parts=(unfit,)), Scheme())
    negative = replace(part, row_weight=torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(InputError, match="negative"):
        SiteObjective(replace(data, parts=(negative,)), Scheme())
    unknown = replace(part, output_weight=torch.tensor([1.0, torch.nan, 1.0]))
    with pytest.raises(NonFiniteError, match="output_weight"):
        SiteObjective(replace(data, parts=(unknown,)), Scheme())
