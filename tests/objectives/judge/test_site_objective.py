"""The exact judge against slow scalar loops, and what growing subsets, shifts, ranges and gauges must do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge import _site_kernel as site_scoring
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.quantization import integer_product
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing, smoothing_scales
from tests.support.naive_site import naive_loss
from tests.support.plain_forms import fake_quantize_weight, quantization_loss, relative_squared_error
from tests.support.site_cases import KINDS, SATURATING, SCHEMES, identity, outlier_layer, relaxed, small_site

seeds = st.integers(0, 2**31)
INTEGER = [
    scheme for scheme in SCHEMES if scheme.activations in ("int8", "uint8") and scheme.weight_granularity != "group"
]


def close_to(loss: float) -> Any:
    """1e-5 relative, or what float32 products cost: outputs err by e = 1.2e-7 of their size, their squared error by 2 e sqrt(loss)."""
    return pytest.approx(loss, rel=1e-5, abs=8 * 1.2e-7 * loss**0.5)


def random_smoothing(data: SiteData, seed: int, shifted: bool = False, range_factor: float = 1.0) -> Smoothing:
    generator = torch.Generator().manual_seed(seed)
    return Smoothing(
        scales=torch.randn(data.channels, generator=generator).exp(),
        shift=data.input_range.middle(data.ties) if shifted else None,
        range_factor=range_factor,
    )


@pytest.mark.parametrize("shifted", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_agrees_with_scalar_loops_everywhere(kind: str, scheme: Scheme, shifted: bool) -> None:
    data = small_site(kind, 7, skew=1.0)
    candidate = random_smoothing(data, 8, shifted)
    assert SiteObjective(data, scheme).loss(candidate) == close_to(naive_loss(data, scheme, candidate))


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), seeds, st.booleans(), st.sampled_from([0.5, 1.0, 1.25]))
def test_agrees_with_scalar_loops(kind: str, scheme: Scheme, seed: int, shifted: bool, factor: float) -> None:
    data = small_site(kind, seed, skew=1.0)
    candidate = random_smoothing(data, seed + 1, shifted, factor)
    assert SiteObjective(data, scheme).loss(candidate) == close_to(naive_loss(data, scheme, candidate))


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SATURATING), seeds, st.booleans(), st.sampled_from([0.5, 1.0, 1.25]))
def test_agrees_with_scalar_loops_where_kernels_saturate(
    kind: str, scheme: Scheme, seed: int, shifted: bool, factor: float
) -> None:
    data = small_site(kind, seed, skew=1.0)
    # Weights of one size and sign, so that their pairs do leave 16 bits.
    data = replace(data, parts=tuple(replace(part, weight=part.weight.abs() + 3) for part in data.parts))
    candidate = random_smoothing(data, seed + 1, shifted, factor)
    candidate = replace(candidate, scales=candidate.scales**0.1)
    assert SiteObjective(data, scheme).loss(candidate) == close_to(naive_loss(data, scheme, candidate))


def test_saturation_costs_and_seven_bits_do_not_saturate() -> None:
    x = torch.rand(64, 32, generator=torch.Generator().manual_seed(1))
    data = linear_site_data(x, 1 + torch.rand(16, 32, generator=torch.Generator().manual_seed(2)))
    plain = identity(data)
    exact, saturated = (
        SiteObjective(data, Scheme.parse(f"w8a8-channel-static{kernel}")).loss(plain) for kernel in ("", "-pairs16")
    )
    assert saturated > 10 * exact
    seven = [
        SiteObjective(data, Scheme.parse(f"w7a8-channel-static{kernel}")).loss(plain) for kernel in ("", "-pairs16")
    ]
    assert exact < seven[0] == seven[1] < saturated


@pytest.mark.parametrize("scheme", INTEGER, ids=lambda s: s.name)
def test_integer_units_change_no_bit_of_a_loss(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    if not integer_product.integer_gemm_works("cpu"):
        pytest.skip("this CPU has no integer product")
    for kind, width in (("linear", 3), ("shared", 9), ("two_parts", 5)):
        data = small_site(kind, 11, width=width, skew=1.0)
        for shifted in (False, True):
            candidate = random_smoothing(data, 12, shifted)
            losses = []
            for pays in (True, False):
                monkeypatch.setattr(site_scoring, "integer_gemm_pays", lambda *_, pays=pays: pays)
                losses.append(SiteObjective(data, scheme).loss(candidate))
            assert losses[0] == losses[1]


def test_codes_are_multiplied_exactly_where_the_scheme_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Products(integer_product.ExactProducts):
        def __init__(self, *sizes: Any, **keywords: Any) -> None:
            made.append(1)
            super().__init__(*sizes, **keywords)

    monkeypatch.setattr("alphasmith.objectives.judge._site_kernel.ExactProducts", Products)
    for scheme in SCHEMES:
        for kind, dense in (("shared", True), ("grouped", False)):
            made.clear()
            SiteObjective(small_site(kind, 0), scheme)
            assert bool(made) == (dense and scheme in INTEGER)


def test_subsets_take_the_same_fraction_of_every_part() -> None:
    data = small_site("two_parts", 3)  # parts of 4 and 7 rows
    candidate, scheme = random_smoothing(data, 4), SCHEMES[0]
    objective = SiteObjective(data, scheme)
    assert objective.rows == 7
    for rows in range(1, 8):
        assert objective.loss(candidate, rows=rows) == close_to(naive_loss(data, scheme, candidate, rows / 7))


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), seeds, st.booleans())
def test_growing_subsets_end_where_a_single_call_does(kind: str, scheme: Scheme, seed: int, shifted: bool) -> None:
    data = small_site(kind, seed)
    objective = SiteObjective(data, scheme)
    candidate = random_smoothing(data, seed, shifted)
    sizes = range(1, objective.rows + 1)
    alone = [objective.loss(candidate, rows=rows) for rows in sizes]
    assert list(objective.losses(candidate, sizes)) == pytest.approx(alone, rel=1e-5)


def test_candidates_may_be_scored_in_turns() -> None:
    data = small_site("shared", 0)
    objective = SiteObjective(data, SCHEMES[0])
    one, other = random_smoothing(data, 1), random_smoothing(data, 2)
    pairs = list(zip(objective.losses(one, (1, 3, 5)), objective.losses(other, (1, 3, 5)), strict=True))
    assert pairs[-1] == pytest.approx((objective.loss(one), objective.loss(other)), rel=1e-5)
    assert objective.exact_evaluations == 4


@pytest.mark.parametrize(
    "name", ["w8a8-channel-static", "w8a8-channel-token", "w8a8-g3-static", "wfp8afp8-tensor-token"]
)
def test_chunks_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = outlier_layer(0, rows=50, channels=16, outputs=8)
    data, scheme = linear_site_data(x, w), Scheme.parse(name)
    candidate = random_smoothing(data, 1, shifted=True)
    whole = SiteObjective(data, scheme).loss(candidate)
    monkeypatch.setattr(site_scoring, "_CACHE", 7 * 4 * (16 + 8))  # a few rows at a time
    objective = SiteObjective(data, scheme)
    assert objective.loss(candidate) == pytest.approx(whole, rel=1e-6)
    growing = objective.losses(candidate, (20, 50))
    next(growing)
    assert next(growing) == pytest.approx(whole, rel=1e-6)


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), seeds, st.integers(-6, 6), st.booleans())
def test_a_common_factor_of_all_scales_is_no_change(
    kind: str, scheme: Scheme, seed: int, power: int, shifted: bool
) -> None:
    data = small_site(kind, seed)
    objective = SiteObjective(data, scheme)
    candidate = random_smoothing(data, seed, shifted)
    scaled = replace(candidate, scales=candidate.scales * 2.0**power)
    assert objective.loss(scaled) == pytest.approx(objective.loss(candidate), rel=1e-6)


@relaxed
@given(seeds)
def test_weight_only_identity_is_the_plain_quantization_error(seed: int) -> None:
    data = small_site("linear", seed)
    part, scheme = data.parts[0], Scheme(activations="none")
    x, quantized, weight = part.x.double(), fake_quantize_weight(part.weight, scheme).double(), part.weight.double()
    expected = relative_squared_error(x @ quantized.T, x @ weight.T)
    assert SiteObjective(data, scheme).loss(identity(data)) == close_to(expected)


@relaxed
@given(st.sampled_from(KINDS), seeds)
def test_a_shift_leaves_the_float_product(kind: str, seed: int) -> None:
    # Weights that are codes already lose nothing, so what remains is the shift and its correction.
    data = small_site(kind, seed, skew=3.0)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in data.parts:
        codes = torch.randint(-127, 128, part.weight.shape, generator=generator).to(torch.float32)
        codes[:, 0] = 127.0
        parts.append(replace(part, weight=codes))
    objective = SiteObjective(replace(data, parts=tuple(parts)), Scheme(activations="none"))
    shift = 10 * torch.randn(data.channels, generator=generator)
    assert objective.loss(replace(identity(data), shift=shift)) < 1e-10


@pytest.mark.parametrize("granularity", ["static", "token"])
def test_a_shift_helps_channels_far_from_zero(granularity: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator) + 20 * torch.randn(32, generator=generator)
    data = linear_site_data(x, torch.randn(16, 32, generator=generator))
    objective = SiteObjective(data, Scheme.parse(f"w8a8-channel-{granularity}"))
    plain = identity(data)
    shifted = replace(plain, shift=data.input_range.middle(data.ties))
    assert objective.loss(shifted) < 0.2 * objective.loss(plain)
    assert objective.loss(replace(plain, shift=torch.zeros(32))) == objective.loss(plain)


def test_a_wider_range_is_a_coarser_step_and_tokens_have_their_own() -> None:
    data = linear_site_data(*outlier_layer(2))
    candidates = [replace(identity(data), range_factor=factor) for factor in (1.0, 1.5, 2.0)]
    static = SiteObjective(data, Scheme())
    assert static.loss(candidates[0]) < static.loss(candidates[1]) < static.loss(candidates[2])
    token = SiteObjective(data, Scheme(activation_granularity="token"))
    assert token.loss(candidates[0]) == token.loss(candidates[2])


def test_range_factor_holds_the_share_of_rows_it_was_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 8, generator=generator)
    x[::500] *= 100  # 2 rows of 1000
    data = linear_site_data(x, torch.randn(4, 8, generator=generator))
    objective = SiteObjective(data, Scheme())
    candidate = random_smoothing(data, 3)
    peaks = (x / candidate.scales).abs().amax(1)
    factors = [objective.range_factor(candidate, percentile) for percentile in (50.0, 99.0, 99.8, 100.0)]
    assert factors == sorted(factors)
    assert factors[2] < 0.1
    assert factors[3] == pytest.approx(1.0)
    for percentile, factor in zip((50.0, 99.0, 99.8), factors, strict=False):
        share = float((peaks <= factor * float(peaks.max()) * (1 + 1e-6)).double().mean())
        assert share >= percentile / 100 - 1e-9
    assert objective.range_factor(replace(candidate, shift=x.median(0).values), 50.0) <= 1.0
    for scheme in (Scheme(activation_granularity="token"), Scheme(activations="none")):
        assert SiteObjective(data, scheme).range_factor(candidate, 50.0) == 1.0
    with pytest.raises(InputError, match="percentile"):
        objective.range_factor(candidate, 0.0)
    dead = linear_site_data(torch.zeros(3, 2), torch.ones(2, 2))
    assert SiteObjective(dead, Scheme()).range_factor(identity(dead), 99.9) == 1.0


def test_more_bits_and_finer_scales_lose_less() -> None:
    x, w = outlier_layer(3)
    s = smoothing_scales(x.abs().amax(0), w.abs().amax(0), 0.5)
    loss = {scheme.name: quantization_loss(x, w, s, scheme) for scheme in SCHEMES}
    assert loss["w8a8-channel-static"] < loss["w4a8-channel-static"]
    assert loss["w8a8-channel-token"] < loss["w8a8-channel-static"]
    assert loss["w8a8-g3-static"] < loss["w8a8-channel-static"] < loss["w8a8-tensor-static"]
    assert loss["w4a16-g3"] < loss["w4a16-channel"] < loss["w4a16-tensor"]
    assert quantization_loss(x, w, torch.ones(256), Scheme()) > 5 * loss["w8a8-channel-static"]
    assert quantization_loss(x, w, Smoothing(scales=s), Scheme()) == loss["w8a8-channel-static"]


def test_the_data_is_left_alone_and_evaluations_are_counted() -> None:
    data = small_site("grouped", 5)
    before = [(part.x.clone(), part.weight.clone()) for part in data.parts]
    candidate = random_smoothing(data, 6)
    candidate = replace(candidate, scales=candidate.scales.requires_grad_())
    objective = SiteObjective(data, SCHEMES[0])
    first = objective.loss(candidate)
    assert objective.loss(candidate) == first
    assert list(objective.losses(candidate, (2, 4)))[1] == pytest.approx(first, rel=1e-6)
    assert objective.exact_evaluations == 3
    assert all(
        torch.equal(part.x, x) and torch.equal(part.weight, w) for part, (x, w) in zip(data.parts, before, strict=True)
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_the_smallest_sites(scheme: Scheme) -> None:
    for rows, channels, outputs in ((1, 1, 1), (1, 5, 3), (6, 1, 2)):
        generator = torch.Generator().manual_seed(rows)
        data = linear_site_data(
            torch.randn(rows, channels, generator=generator), torch.randn(outputs, channels, generator=generator)
        )
        candidate = random_smoothing(data, 1)
        assert SiteObjective(data, scheme).loss(candidate) == close_to(naive_loss(data, scheme, candidate))
    # Equal rows, of which the shift leaves nothing.
    data = linear_site_data(torch.tensor([[1.5, -2.0, 0.25]]).expand(4, 3), torch.eye(3))
    shifted = Smoothing(scales=torch.ones(3), shift=data.input_range.middle(data.ties))
    assert SiteObjective(data, scheme).loss(shifted) == pytest.approx(0.0, abs=1e-12)


def test_a_dead_consumer_counts_for_nothing() -> None:
    data = small_site("shared", 1)
    part = data.parts[0]
    dead = replace(part, weight=part.weight.clone())
    dead.weight[part.out_features[0] :] = 0.0
    alone = replace(
        part,
        weight=part.weight[: part.out_features[0]].clone(),
        out_features=part.out_features[:1],
        operators=part.operators[:1],
    )
    candidate = random_smoothing(data, 2)
    for scheme in SCHEMES:
        losses = [SiteObjective(replace(data, parts=(p,)), scheme).loss(candidate) for p in (dead, alone)]
        assert losses[0] == close_to(losses[1])


def test_a_dead_site_loses_nothing_and_an_error_against_nothing_is_refused() -> None:
    assert quantization_loss(torch.zeros(3, 2), torch.ones(2, 2), torch.ones(2), Scheme()) == 0.0
    x, w = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, -0.5, -0.5]])
    with pytest.raises(NonFiniteError, match="all zero"):
        quantization_loss(x, w, torch.tensor([1.0, 0.3, 0.7]), Scheme())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "weight", "sample_low", "sample_high", "weight_absmax"])
def test_non_finite_data_is_named(name: str, bad: float) -> None:
    data = small_site("conv", 0)
    owner = data if hasattr(data, name) else data.parts[0]
    tensor = getattr(owner, name).clone()
    tensor.view(-1)[1] = bad
    spoiled = replace(owner, **{name: tensor})
    with pytest.raises(NonFiniteError, match=name):
        SiteObjective(spoiled if isinstance(spoiled, SiteData) else replace(data, parts=(spoiled,)), Scheme())


def test_non_finite_statistics_and_ranges_are_named() -> None:
    data = small_site("conv", 0)
    bad = torch.full((4,), torch.nan)
    statistics = {"absmax": data.activation_statistic, "rms": bad}
    with pytest.raises(NonFiniteError, match="rms"):
        SiteObjective(replace(data, activation_statistics=statistics), Scheme())
    with pytest.raises(NonFiniteError, match="input_range high"):
        SiteObjective(replace(data, input_range=replace(data.input_range, high=bad)), Scheme())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_candidates_are_failed_candidates(bad: float) -> None:
    data = small_site("linear", 0)
    objective = SiteObjective(data, Scheme())
    values = torch.tensor([1.0, bad, 1.0, 1.0])
    with pytest.raises(NonFiniteError, match="scales"):
        objective.loss(Smoothing(scales=values))
    with pytest.raises(NonFiniteError, match="shift"):
        objective.loss(replace(identity(data), shift=values))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_an_overflowing_candidate_is_a_failed_candidate(scheme: Scheme) -> None:
    data = linear_site_data(torch.full((2, 2), 1e20), torch.full((2, 2), 1e20))
    with pytest.raises(NonFiniteError):
        SiteObjective(data, scheme).loss(Smoothing(scales=torch.ones(2)))
    # Scales whose reciprocal leaves float32 would turn into codes of no meaning; they must not turn into a loss.
    data = linear_site_data(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.ones(3, 2))
    with pytest.raises(NonFiniteError):
        SiteObjective(data, scheme).loss(Smoothing(scales=torch.tensor([1.0, 1e-40])))


def test_contradicting_shapes_are_named() -> None:
    data = small_site("grouped", 0)
    part = data.parts[0]
    assert part.sample_low is not None
    for change in (
        {"groups": 5},
        {"out_features": (3, 3)},
        {"weight": part.weight[:, :-1]},
        {"channel": part.channel + 1},
        {"x": part.x[:0]},
        {"sample": None},
        {"sample_low": part.sample_low[:, :-1]},
        {"sample_high": None},
        {"sample_low": part.sample_low + 1e3},
    ):
        with pytest.raises(InputError, match=r"^site: .* of part 0"):
            SiteObjective(replace(data, parts=(replace(part, **change),)), Scheme())
    for wrong in (replace(data, weight_absmax=torch.ones(3)), replace(data, ties=torch.arange(3))):
        with pytest.raises(InputError, match="has shape"):
            SiteObjective(wrong, Scheme())
    upside_down = replace(data.input_range, low=data.input_range.high, high=data.input_range.low)
    with pytest.raises(InputError, match="input_range"):
        SiteObjective(replace(data, input_range=upside_down), Scheme())
    for statistics in ({}, {"absmax": torch.ones(3)}, {"absmax": -torch.ones(4)}):
        with pytest.raises(InputError, match="activation_statistics"):
            SiteObjective(replace(data, activation_statistics=statistics), Scheme())
    with pytest.raises(InputError, match="no rows"):
        SiteObjective(replace(data, parts=()), Scheme())
    with pytest.raises(InputError, match=r"^x:"):
        linear_site_data(torch.ones(2, 3), torch.ones(2, 4))


def test_wrong_candidates_and_subsets_are_named() -> None:
    data = small_site("linear", 0)
    objective, good = SiteObjective(data, Scheme()), identity(data)
    for field, candidate in (
        ("scales", Smoothing(scales=torch.ones(3))),
        ("scales", Smoothing(scales=torch.tensor([1.0, 0.0, 1.0, 1.0]))),
        ("shift", replace(good, shift=torch.ones(3))),
        ("range_factor", replace(good, range_factor=0.0)),
        ("range_factor", replace(good, range_factor=float("nan"))),
    ):
        with pytest.raises(InputError, match=rf"^{field}:"):
            objective.loss(candidate)
    for rows in ((), (0, 2), (3, 3), (2, 6)):
        with pytest.raises(InputError, match=r"^rows:"):
            objective.losses(good, rows)
    assert objective.exact_evaluations == 0
