"""The noise model against the exact judge: it predicts, and what it proposes is good. Its slopes: test_noise_descent.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.noise.channel_limit import per_channel_limit
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing, smoothing_scales
from tests.support.site_cases import KINDS, SCHEMES, outlier_layer, relaxed, small_site

STATIC, TOKEN = Scheme(), Scheme(activation_granularity="token")


def scales_at(data: SiteData, alpha: float | torch.Tensor) -> torch.Tensor:
    return smoothing_scales(data.activation_statistic, data.weight_absmax, alpha, data.ties)


def random_scales(data: SiteData, count: int, seed: int, spread: float = 0.5) -> torch.Tensor:
    """(count, C) scales around alpha 0.5."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, data.channels, generator=generator)
    return scales_at(data, 0.5) * (spread * noise).exp()


def best_of_grid(objective: SiteObjective, points: int = 21) -> tuple[float, float]:
    """Least exact loss over single alphas in [0, 1], and its alpha."""
    grid = [i / (points - 1) for i in range(points)]
    return min((objective.loss(Smoothing(scales=scales_at(objective.data, alpha))), alpha) for alpha in grid)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_predicts_the_exact_loss(scheme: Scheme) -> None:
    """Within 10 % with integers of any bits and granularity; few values carry most of an fp8 error, so 25 %."""
    data = linear_site_data(*outlier_layer(1))
    model, objective = NoiseModel(data, scheme), SiteObjective(data, scheme)
    tolerance = 0.25 if scheme.weights == "fp8" else 0.10
    for scales in (*(scales_at(data, alpha) for alpha in (0.3, 0.5, 0.7)), torch.ones(256)):
        predicted = float(model.loss(scales))
        assert predicted == pytest.approx(objective.loss(Smoothing(scales=scales)), rel=tolerance)


@settings(relaxed, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(SCHEMES), st.sampled_from([1.0, 1.2, 0.7]), st.booleans())
def test_predicts_shifted_and_clipped_rows(seed: int, scheme: Scheme, factor: float, shifted: bool) -> None:
    x, w = outlier_layer(seed, rows=96, channels=64, outputs=48)
    data = linear_site_data(x + 2 * x.std(dim=0) * torch.randn(64, generator=torch.Generator().manual_seed(seed)), w)
    shift = data.input_range.middle(data.ties) if shifted else None
    scales = smoothing_scales(data.magnitudes("absmax", shift), data.weight_absmax, 0.5)
    predicted = float(NoiseModel(data, scheme, shift=shift, range_factor=factor).loss(scales))
    exact = SiteObjective(data, scheme).loss(Smoothing(scales=scales, shift=shift, range_factor=factor))
    # A clipped channel that never changes sign errs the same way in every row, and then columns are not independent.
    bound = 3.0 if factor < 1 and scheme.activation_granularity == "static" else 1.6
    assert exact / bound <= predicted <= exact * bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.weights != "fp8"], ids=lambda s: s.name)
def test_covers_every_kind_of_part(kind: str, scheme: Scheme) -> None:
    """Sums over six sites: hundreds of rounding errors of like energy, whose mean square spreads by some 5 %."""
    predicted = exact = 0.0
    for seed in range(6):
        data = small_site(kind, seed, width=8, held_out=1.0, spread=0.3, skew=0.5)
        shift = data.input_range.middle(data.ties) if seed % 2 else None
        scales = random_scales(data, 1, seed, 0.3)[0]
        predicted += float(NoiseModel(data, scheme, shift=shift).loss(scales))
        exact += SiteObjective(data, scheme).loss(Smoothing(scales=scales, shift=shift))
    assert predicted == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("scheme", ["w8a8-channel-static", "w8au8-channel-static", "w8a8-channel-token"])
def test_counts_what_saturation_loses(scheme: str) -> None:
    """Along alpha saturation makes up to 98 % of the loss; a model that takes products as exact ranks by the rest alone."""
    data = linear_site_data(*outlier_layer(1))
    exact = Scheme.parse(scheme)
    pairs = replace(exact, kernel="u8s8-pairs16")
    knowing, blind, judge = NoiseModel(data, pairs), NoiseModel(data, exact), SiteObjective(data, pairs)
    off = {"knowing": 0.0, "blind": 0.0}
    for alpha in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        scales = scales_at(data, alpha)
        loss = judge.loss(Smoothing(scales=scales))
        for name, model in (("knowing", knowing), ("blind", blind)):
            off[name] = max(off[name], abs(math.log(float(model.loss(scales)) / loss)))
    assert off["knowing"] < math.log(2.6)
    assert off["blind"] > 1.3 * off["knowing"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["w8a8-channel-static", "w8au8-tensor-static", "w8a8-channel-token"])
def test_saturation_is_counted_in_every_kind_of_part(kind: str, scheme: str) -> None:
    """Large weights of one sign: half of all pairs saturate, so that little else matters and every part lies as the judge has it."""
    pairs = replace(Scheme.parse(scheme), kernel="u8s8-pairs16")
    predicted = exact = plain = 0.0
    for seed in range(4):
        data = small_site(kind, seed, width=8, held_out=1.0, spread=0.3, skew=0.5)
        parts = tuple(replace(part, weight=1 + 0.2 * part.weight.tanh()) for part in data.parts)
        data = replace(data, parts=parts, weight_absmax=torch.full_like(data.weight_absmax, 1.2))
        scales = torch.ones(data.channels)
        predicted += float(NoiseModel(data, pairs).loss(scales))
        exact += SiteObjective(data, pairs).loss(Smoothing(scales=scales))
        plain += SiteObjective(data, replace(pairs, kernel="exact")).loss(Smoothing(scales=scales))
    # Kernel positions of one channel are no pair, so nothing of a depthwise convolution saturates.
    assert exact == plain if kind == "depthwise" else exact > 5 * plain
    assert predicted == pytest.approx(exact, rel=0.2 if kind == "depthwise" else 0.1)


@pytest.mark.parametrize("scheme", ["w8a8-tensor-static", "w4a8-channel-static", "w4a16-g16"])
def test_ranks_candidates_of_correlated_columns_and_few_outputs(scheme: str) -> None:
    """Rows near one common pattern: which way a weight rounds decides, and independent columns would predict no ranks at all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(256, 1, generator=generator) + 0.1 * torch.randn(256, 48, generator=generator)
    data = linear_site_data(x, torch.randn(4, 48, generator=generator))
    objective, model = SiteObjective(data, Scheme.parse(scheme)), NoiseModel(data, Scheme.parse(scheme))
    candidates = random_scales(data, 24, 0)
    exact = torch.tensor([objective.loss(Smoothing(scales=scales)) for scales in candidates])
    ranks = torch.stack((model.losses(candidates), exact)).argsort(dim=1).argsort(dim=1).to(torch.float64)
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), st.integers(0, 2**31))
def test_together_is_one_by_one(kind: str, scheme: Scheme, seed: int) -> None:
    data = small_site(kind, seed)
    model = NoiseModel(data, scheme)
    candidates = random_scales(data, 5, seed)
    together = model.losses(candidates)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, torch.cat([model.losses(c.unsqueeze(0)) for c in candidates]))
    assert float(model.loss(candidates[3])) == pytest.approx(float(together[3]))


@relaxed
@given(
    st.sampled_from(KINDS), st.sampled_from(SCHEMES), st.integers(0, 2**31), st.sampled_from([0.0625, 0.5, 2.0, 1024.0])
)
def test_a_common_factor_of_all_scales_is_no_change(kind: str, scheme: Scheme, seed: int, factor: float) -> None:
    data = small_site(kind, seed)
    model = NoiseModel(data, scheme)
    scales = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed)).exp()
    assert float(model.losses(scales * factor)) == pytest.approx(float(model.losses(scales)), rel=1e-4)


def test_a_shift_of_nothing_is_no_shift() -> None:
    data = small_site("two_parts", 3)
    scales = random_scales(data, 4, 0)
    plain, shifted = (NoiseModel(data, TOKEN, shift=z).losses(scales) for z in (None, torch.zeros(4)))
    torch.testing.assert_close(plain, shifted)


def test_known_energy_is_taken_as_it_is() -> None:
    data = small_site("two_parts", 3)
    scales = random_scales(data, 4, 0)
    energy = SiteObjective(data, STATIC).reference_energy
    computed, given_ = NoiseModel(data, STATIC).losses(scales), NoiseModel(data, STATIC, energy=energy).losses(scales)
    torch.testing.assert_close(computed, given_, rtol=1e-6, atol=0)


def test_what_is_not_finite_or_positive_never_wins_and_spoils_nothing() -> None:
    data = small_site("conv", 1)
    model = NoiseModel(data, STATIC)
    good = random_scales(data, 1, 0)
    bad = torch.tensor([[1.0, torch.nan, 1, 1], [1, torch.inf, 1, 1], [1, 0, 1, 1], [1, -1, 1, 1]])
    losses = model.losses(torch.cat((bad, good)))
    assert not bool(torch.isfinite(losses[:4]).any())
    assert float(losses[4]) == float(model.losses(good))


@pytest.mark.parametrize("scheme", [STATIC, TOKEN, Scheme.parse("w4a8-g32-token")], ids=lambda s: s.name)
def test_bounded_rows_predict_what_all_rows_do(scheme: Scheme) -> None:
    data = linear_site_data(*outlier_layer(6, rows=1024, outputs=512))
    scales = scales_at(data, 0.5)
    # A quarter of the rows; relative spread of a mean of 256 heavy-tailed rows is below 15 %.
    bounded, whole = (float(NoiseModel(data, scheme, max_rows=rows).loss(scales)) for rows in (256, 1024))
    assert bounded == pytest.approx(whole, rel=0.15)


@pytest.mark.parametrize(
    "scheme", [STATIC, TOKEN, Scheme(weight_granularity="tensor"), Scheme.parse("w4a16-g32")], ids=lambda s: s.name
)
@pytest.mark.parametrize("seed", range(2))
def test_limit_is_below_every_single_alpha(scheme: Scheme, seed: int) -> None:
    data = linear_site_data(*outlier_layer(seed, channels=96, outputs=96))
    objective = SiteObjective(data, scheme)
    model = NoiseModel(data, scheme, energy=objective.reference_energy)
    loss, alpha = best_of_grid(objective)
    start = Smoothing(scales=scales_at(data, alpha), range_factor=1.05)
    limit = per_channel_limit(objective, model, replace(start, range_factor=1.0))
    assert limit.loss <= loss
    assert limit.loss == pytest.approx(objective.loss(limit.smoothing), rel=1e-6)
    assert per_channel_limit(objective, model, start, steps=5).smoothing.range_factor == 1.05


def test_limit_keeps_the_shift() -> None:
    x, w = outlier_layer(4, channels=48, outputs=32)
    data = linear_site_data(x + 3 * x.std(dim=0), w)
    shift = data.input_range.middle(data.ties)
    objective, model = SiteObjective(data, STATIC), NoiseModel(data, STATIC, shift=shift)
    limit = per_channel_limit(objective, model, Smoothing(scales=torch.ones(48), shift=shift))
    assert limit.smoothing.shift is shift
    assert limit.loss < 0.5 * objective.loss(Smoothing(scales=torch.ones(48), shift=shift))


def test_limit_without_better_scales_to_find_is_the_start() -> None:
    data = linear_site_data(*outlier_layer(0, channels=8, outputs=4))
    objective, model = SiteObjective(data, STATIC), NoiseModel(data, STATIC)
    best = per_channel_limit(objective, model, Smoothing(scales=torch.ones(8)))
    again = per_channel_limit(objective, model, best.smoothing, steps=1)
    assert again.loss <= best.loss * (1 + 1e-6)


@pytest.mark.parametrize("scheme", [STATIC, TOKEN, Scheme.parse("w4a8-g3-token")], ids=lambda s: s.name)
def test_dead_channels_and_sites_have_no_noise(scheme: Scheme) -> None:
    x, w = outlier_layer(8, rows=32, channels=12, outputs=8)
    x[:, ::3] = 0
    w[:, 1::4] = 0
    data = linear_site_data(x, w)
    model, objective = NoiseModel(data, scheme), SiteObjective(data, scheme)
    scales = scales_at(data, 0.5)
    assert float(model.loss(scales)) == pytest.approx(objective.loss(Smoothing(scales=scales)), rel=0.5)
    assert bool(torch.isfinite(model.limit_scales(scales)).all())
    dead = NoiseModel(linear_site_data(torch.zeros(3, 2), torch.ones(2, 2)), scheme)
    assert float(dead.loss(torch.ones(2))) == 0.0
    assert dead.limit_scales(torch.ones(2)).tolist() == [1.0, 1.0]


def test_one_channel_cannot_be_smoothed() -> None:
    data = linear_site_data(torch.randn(9, 1, generator=torch.Generator().manual_seed(0)), torch.ones(3, 1))
    model = NoiseModel(data, STATIC)
    assert float(model.loss(torch.tensor([5.0]))) == pytest.approx(float(model.loss(torch.tensor([1.0]))), rel=1e-3)
    assert float(model.loss(model.limit_scales(torch.ones(1)))) <= float(model.loss(torch.ones(1))) * (1 + 1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_one_row_and_one_output(scheme: Scheme) -> None:
    data = linear_site_data(*outlier_layer(9, rows=1, channels=6, outputs=1))
    model = NoiseModel(data, scheme)
    assert float(model.loss(scales_at(data, 0.5))) >= 0
    assert bool((model.limit_scales(torch.ones(6), steps=5) > 0).all())


def test_numbers_far_from_one_do_not_leave_float32() -> None:
    x, w = outlier_layer(10, rows=32, channels=16, outputs=16)
    scales = random_scales(linear_site_data(x, w), 3, 0)
    plain = NoiseModel(linear_site_data(x, w), STATIC).losses(scales)
    small = NoiseModel(linear_site_data(x * 2.0**-40, w), STATIC).losses(scales)
    torch.testing.assert_close(plain, small, rtol=1e-4, atol=0)


def test_an_overflowing_output_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="energy"):
        NoiseModel(linear_site_data(torch.full((2, 2), 1e20), torch.full((2, 2), 1e20)), STATIC)
    with pytest.raises(NonFiniteError, match="energy"):
        NoiseModel(linear_site_data(torch.full((2, 2), 1e30), torch.ones(2, 2)), STATIC, energy=1.0)


def test_wrong_arguments_are_named() -> None:
    data = small_site("linear", 0)
    model = NoiseModel(data, STATIC)
    with pytest.raises(InputError, match=r"^max_rows:"):
        NoiseModel(data, STATIC, max_rows=0)
    with pytest.raises(InputError, match=r"^range_factor:"):
        NoiseModel(data, STATIC, range_factor=0.0)
    with pytest.raises(InputError, match=r"^shift:"):
        NoiseModel(data, STATIC, shift=torch.zeros(3))
    with pytest.raises(NonFiniteError, match="shift"):
        NoiseModel(data, STATIC, shift=torch.full((4,), torch.nan))
    for scales in (torch.ones(3), torch.tensor([1.0, -1.0, 1.0, 1.0])):
        with pytest.raises(InputError, match=r"^scales:"):
            model.loss(scales)
        with pytest.raises(InputError, match=r"^scales:"):
            model.limit_scales(scales)
    with pytest.raises(InputError, match=r"^scales:"):
        model.losses(torch.ones(4))
    with pytest.raises(NonFiniteError):
        model.loss(torch.full((4,), float("nan")))
    spoiled = replace(data, weight_absmax=data.weight_absmax * float("nan"))
    with pytest.raises(NonFiniteError, match="weight_absmax"):
        NoiseModel(spoiled, STATIC)
