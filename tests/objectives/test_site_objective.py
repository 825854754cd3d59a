"""The exact judge against slow scalar loops, and what growing subsets, gauges and bad data must do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives import site_objective
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.losses import relative_squared_error
from alphasmith.objectives.quantizers import fake_quantize_weight
from alphasmith.objectives.scheme import Scheme
from alphasmith.objectives.site_data import SiteData
from alphasmith.objectives.site_objective import SiteObjective, linear_site_data, quantization_loss
from alphasmith.objectives.smoothing import smoothing_scales
from tests.objectives.naive_site import naive_loss
from tests.objectives.site_cases import KINDS, SCHEMES, outlier_layer, relaxed, small_site

seeds = st.integers(0, 2**31)


def close_to(loss: float) -> Any:
    """1e-5 relative, or what float32 products cost: outputs err by e = 1.2e-7 of their size, their squared error by 2 e sqrt(loss)."""
    return pytest.approx(loss, rel=1e-5, abs=8 * 1.2e-7 * loss**0.5)


def random_scales(data: SiteData, seed: int) -> torch.Tensor:
    return torch.randn(data.ties.shape, generator=torch.Generator().manual_seed(seed)).exp()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_agrees_with_scalar_loops_everywhere(kind: str, scheme: Scheme) -> None:
    data = small_site(kind, 7)
    scales = random_scales(data, 8)
    assert SiteObjective(data, scheme).loss(scales) == close_to(naive_loss(data, scheme, scales))


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), seeds)
def test_agrees_with_scalar_loops(kind: str, scheme: Scheme, seed: int) -> None:
    data = small_site(kind, seed)
    scales = random_scales(data, seed + 1)
    assert SiteObjective(data, scheme).loss(scales) == close_to(naive_loss(data, scheme, scales))


def test_subsets_take_the_same_fraction_of_every_part() -> None:
    data = small_site("two_parts", 3)  # parts of 4 and 7 rows
    scales, scheme = random_scales(data, 4), SCHEMES[0]
    objective = SiteObjective(data, scheme)
    assert objective.rows == 7
    for rows in range(1, 8):
        assert objective.loss(scales, rows=rows) == close_to(naive_loss(data, scheme, scales, rows / 7))


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), seeds)
def test_growing_subsets_end_where_a_single_call_does(kind: str, scheme: Scheme, seed: int) -> None:
    data = small_site(kind, seed)
    objective = SiteObjective(data, scheme)
    scales = random_scales(data, seed)
    sizes = range(1, objective.rows + 1)
    alone = [objective.loss(scales, rows=rows) for rows in sizes]
    assert list(objective.losses(scales, sizes)) == pytest.approx(alone, rel=1e-5)


def test_candidates_may_be_scored_in_turns() -> None:
    data = small_site("shared", 0)
    objective = SiteObjective(data, SCHEMES[0])
    one, other = random_scales(data, 1), random_scales(data, 2)
    pairs = list(zip(objective.losses(one, (1, 3, 5)), objective.losses(other, (1, 3, 5)), strict=True))
    assert pairs[-1] == pytest.approx((objective.loss(one), objective.loss(other)), rel=1e-5)
    assert objective.exact_evaluations == 4


def test_rows_beyond_the_chunk_and_early_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = outlier_layer(0, rows=50, channels=16, outputs=8)
    data = linear_site_data(x, w)
    whole = SiteObjective(data, Scheme()).loss(torch.ones(16))
    monkeypatch.setattr(site_objective, "_CHUNK_ROWS", 7)
    objective = SiteObjective(data, Scheme())
    assert objective.loss(torch.ones(16)) == pytest.approx(whole, rel=1e-6)
    growing = objective.losses(torch.ones(16), (20, 50))
    next(growing)
    assert next(growing) == pytest.approx(whole, rel=1e-6)


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), seeds, st.integers(-6, 6))
def test_a_common_factor_of_all_scales_is_no_change(kind: str, scheme: Scheme, seed: int, power: int) -> None:
    data = small_site(kind, seed)
    objective = SiteObjective(data, scheme)
    scales = random_scales(data, seed)
    assert objective.loss(scales * 2.0**power) == pytest.approx(objective.loss(scales), rel=1e-6)


@relaxed
@given(seeds)
def test_weight_only_identity_is_the_plain_quantization_error(seed: int) -> None:
    data = small_site("linear", seed)
    part, scheme = data.parts[0], Scheme(activations="none")
    expected = relative_squared_error(part.x @ fake_quantize_weight(part.weight, scheme).T, part.x @ part.weight.T)
    assert SiteObjective(data, scheme).loss(torch.ones(4)) == pytest.approx(expected, rel=1e-4)


def test_more_bits_and_finer_scales_lose_less() -> None:
    x, w = outlier_layer(3)
    s = smoothing_scales(x.abs().amax(0), w.abs().amax(0), 0.5)
    loss = {scheme.name: quantization_loss(x, w, s, scheme) for scheme in SCHEMES}
    assert loss["w8a8-channel-static"] < loss["w4a8-channel-static"]
    assert loss["w8a8-channel-token"] < loss["w8a8-channel-static"]
    assert loss["w8a8-g3-static"] < loss["w8a8-channel-static"] < loss["w8a8-tensor-static"]
    assert loss["w4a16-g3"] < loss["w4a16-channel"] < loss["w4a16-tensor"]
    assert quantization_loss(x, w, torch.ones(256), Scheme()) > 5 * loss["w8a8-channel-static"]


def test_the_data_is_left_alone_and_evaluations_are_counted() -> None:
    data = small_site("grouped", 5)
    before = [(part.x.clone(), part.weight.clone()) for part in data.parts]
    scales = random_scales(data, 6).requires_grad_()
    objective = SiteObjective(data, SCHEMES[0])
    first = objective.loss(scales)
    assert objective.loss(scales) == first
    assert list(objective.losses(scales, (2, 4)))[1] == pytest.approx(first, rel=1e-6)
    assert objective.exact_evaluations == 3
    assert all(
        torch.equal(part.x, x) and torch.equal(part.weight, w) for part, (x, w) in zip(data.parts, before, strict=True)
    )


def test_a_dead_site_loses_nothing_and_an_error_against_nothing_is_refused() -> None:
    assert quantization_loss(torch.zeros(3, 2), torch.ones(2, 2), torch.ones(2), Scheme()) == 0.0
    x, w = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, -0.5, -0.5]])
    with pytest.raises(NonFiniteError, match="all zero"):
        quantization_loss(x, w, torch.tensor([1.0, 0.3, 0.7]), Scheme())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "weight", "sample_absmax", "activation_absmax", "weight_absmax"])
def test_non_finite_data_is_named(name: str, bad: float) -> None:
    data = small_site("conv", 0)
    owner = data if hasattr(data, name) else data.parts[0]
    tensor = getattr(owner, name).clone()
    tensor.view(-1)[1] = bad
    spoiled = replace(owner, **{name: tensor})
    with pytest.raises(NonFiniteError, match=name):
        SiteObjective(spoiled if isinstance(spoiled, SiteData) else replace(data, parts=(spoiled,)), Scheme())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_scales_are_a_failed_candidate(bad: float) -> None:
    data = small_site("linear", 0)
    with pytest.raises(NonFiniteError, match="scales"):
        SiteObjective(data, Scheme()).loss(torch.tensor([1.0, bad, 1.0, 1.0]))


def test_an_overflowing_candidate_is_a_failed_candidate() -> None:
    data = linear_site_data(torch.full((2, 2), 1e20), torch.full((2, 2), 1e20))
    with pytest.raises(NonFiniteError):
        SiteObjective(data, Scheme()).loss(torch.ones(2))


def test_contradicting_shapes_are_named() -> None:
    data = small_site("grouped", 0)
    part = data.parts[0]
    for change in (
        {"groups": 5},
        {"out_features": (3, 3)},
        {"weight": part.weight[:, :-1]},
        {"channel": part.channel + 1},
        {"x": part.x[:0]},
        {"sample": None},
        {"sample_absmax": part.sample_absmax[:, :-1] if part.sample_absmax is not None else None},
    ):
        with pytest.raises(InputError, match=r"^site: .* of part 0"):
            SiteObjective(replace(data, parts=(replace(part, **change),)), Scheme())
    with pytest.raises(InputError, match="weight_absmax"):
        SiteObjective(replace(data, weight_absmax=torch.ones(3)), Scheme())
    with pytest.raises(InputError, match="no rows"):
        SiteObjective(replace(data, parts=()), Scheme())
    with pytest.raises(InputError, match=r"^x:"):
        linear_site_data(torch.ones(2, 3), torch.ones(2, 4))


def test_wrong_candidates_and_subsets_are_named() -> None:
    objective = SiteObjective(small_site("linear", 0), Scheme())
    for scales in (torch.ones(3), torch.tensor([1.0, 0.0, 1.0, 1.0])):
        with pytest.raises(InputError, match=r"^scales:"):
            objective.loss(scales)
    for rows in ((), (0, 2), (3, 3), (2, 6)):
        with pytest.raises(InputError, match=r"^rows:"):
            objective.losses(torch.ones(4), rows)
    assert objective.exact_evaluations == 0
