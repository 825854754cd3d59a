"""Smoothing scales: formula fA1, its invariants and its traps T1 and T7."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.smoothing import (
    SCALE_MAX,
    SCALE_MIN,
    expand_alphas,
    power_of_two_scales,
    smoothing_scales,
)
from tests.support.site_cases import relaxed

# Magnitudes for which no scale reaches the clamp: s lies between 2^-5 and 2^6.
magnitude = st.floats(min_value=2.0**-5, max_value=2.0**6, width=32)
alphas = st.floats(min_value=0.0, max_value=1.0)
channels = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*(st.lists(magnitude, min_size=n, max_size=n).map(torch.tensor) for _ in range(2)))
)


@relaxed
@given(channels, alphas)
def test_is_the_formula(statistics: tuple[torch.Tensor, torch.Tensor], alpha: float) -> None:
    a, w = statistics
    scales = smoothing_scales(a, w, alpha)
    expected = [float(x) ** alpha / float(y) ** (1 - alpha) for x, y in zip(a, w, strict=True)]
    assert scales.tolist() == pytest.approx(expected, rel=1e-6)
    assert scales.dtype == torch.float32


@relaxed
@given(channels, alphas, alphas)
def test_grows_with_alpha_only_where_the_product_exceeds_one(
    statistics: tuple[torch.Tensor, torch.Tensor], one: float, other: float
) -> None:
    """Trap T1: ds/dalpha = s ln(a w)."""
    a, w = statistics
    low, high = sorted((one, other))
    growth = smoothing_scales(a, w, high).double() - smoothing_scales(a, w, low).double()
    rises = a.double() * w.double() > 1
    tolerance = 1e-6 * smoothing_scales(a, w, low).double()
    assert bool((growth[rises] >= -tolerance[rises]).all())
    assert bool((growth[~rises] <= tolerance[~rises]).all())


@relaxed
@given(st.integers(0, 2**31), alphas)
def test_product_is_unchanged_before_quantization(seed: int, alpha: float) -> None:
    """Claim A-11: X' W' = X W."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(6, 9, generator=generator), torch.randn(4, 9, generator=generator)
    s = smoothing_scales(x.abs().amax(0), w.abs().amax(0), alpha)
    torch.testing.assert_close((x / s) @ (s * w).T, x @ w.T, rtol=1e-5, atol=1e-5)


def test_matches_the_published_convention() -> None:
    """SmoothQuant's abs-max convention: activations up to 4, weights up to 0.5, alpha 0.8."""
    assert float(smoothing_scales(torch.tensor([4.0]), torch.tensor([0.5]), 0.8)) == pytest.approx(3.48, abs=5e-3)


def test_ends_of_alpha_move_the_whole_range_to_one_side() -> None:
    a, w = torch.tensor([4.0, 0.3]), torch.tensor([0.5, 7.0])
    torch.testing.assert_close(smoothing_scales(a, w, 1.0), a)
    torch.testing.assert_close(smoothing_scales(a, w, 0.0), 1 / w)


@pytest.mark.parametrize(
    ("a", "w", "bound"), [(1e30, 1e-30, SCALE_MAX), (1e-38, 1e30, SCALE_MIN), (1e-45, 1.0, SCALE_MIN)]
)
def test_scales_are_clamped(a: float, w: float, bound: float) -> None:
    scale = smoothing_scales(torch.tensor([a]), torch.tensor([w]), 0.9)
    assert float(scale) == pytest.approx(bound)


@relaxed
@given(channels, alphas, st.integers(0, 2**31))
def test_ties_share_the_scale_of_their_largest_statistics(
    statistics: tuple[torch.Tensor, torch.Tensor], alpha: float, seed: int
) -> None:
    a, w = statistics
    ties = torch.randint(3, a.shape, generator=torch.Generator().manual_seed(seed)) * 7 - 5
    scales = smoothing_scales(a, w, alpha, ties)
    for tie in ties.unique():
        members = ties == tie
        alone = smoothing_scales(a[members].max().view(1), w[members].max().view(1), alpha)
        assert torch.equal(scales[members], alone.expand(int(members.sum())))


def test_free_ties_change_nothing() -> None:
    a, w = torch.tensor([4.0, 0.3]), torch.tensor([0.5, 7.0])
    assert torch.equal(smoothing_scales(a, w, 0.3, torch.tensor([1, 0])), smoothing_scales(a, w, 0.3))


def test_gradient_is_the_derivative_in_alpha() -> None:
    a, w = torch.tensor([4.0, 0.3, 0.0]), torch.tensor([0.5, 7.0, 1.0])
    alpha = torch.tensor([0.2, 0.9, 0.5], requires_grad=True)
    scales = smoothing_scales(a, w, alpha)
    (gradient,) = torch.autograd.grad(scales.sum(), alpha)
    dead = float(scales[2].detach())  # the geometric mean of the other two moves half as much as each
    live = [(s + dead / 2) * math.log(float(x * y)) for s, x, y in zip(scales[:2].tolist(), a, w, strict=False)]
    assert gradient.tolist() == pytest.approx([*live, 0.0], rel=1e-5)


def test_expands_one_alpha_per_group() -> None:
    expanded = expand_alphas(torch.tensor([0.1, 0.9]), torch.tensor([1, 0, 1]))
    assert expanded.tolist() == pytest.approx([0.9, 0.1, 0.9])


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
def test_labels_without_an_alpha_are_refused(labels: list[int]) -> None:
    with pytest.raises(InputError, match=r"^labels:"):
        expand_alphas(torch.tensor([0.1, 0.9]), torch.tensor(labels))


def test_wrong_arguments_are_named() -> None:
    one = torch.ones(2)
    with pytest.raises(InputError, match=r"^alphas:"):
        expand_alphas(torch.tensor(0.5), torch.tensor([0]))
    with pytest.raises(InputError, match=r"^activation:"):
        smoothing_scales(torch.ones(0), torch.ones(0), 0.5)
    with pytest.raises(InputError, match=r"^activation:"):
        smoothing_scales(-one, one, 0.5)
    with pytest.raises(InputError, match=r"^weight:"):
        smoothing_scales(one, torch.ones(3), 0.5)
    with pytest.raises(InputError, match=r"^alpha:"):
        smoothing_scales(one, one, torch.ones(3))
    with pytest.raises(InputError, match=r"^alpha:"):
        smoothing_scales(one, one, torch.tensor([0.1, 0.2]), torch.tensor([4, 4]))
    with pytest.raises(InputError, match=r"^ties:"):
        smoothing_scales(one, one, 0.5, torch.tensor([0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_statistics_and_alphas_are_refused(bad: float) -> None:
    one, spoiled = torch.ones(2), torch.tensor([1.0, bad])
    for arguments in ((spoiled, one, 0.5), (one, spoiled, 0.5), (one, one, spoiled), (one, one, bad)):
        with pytest.raises(NonFiniteError):
            smoothing_scales(*arguments)


@relaxed
@given(st.lists(st.floats(2.0**-13, 2.0**14), min_size=1, max_size=12), st.integers(0, 2**31))
def test_powers_of_two_are_near_equal_where_scales_are_and_undone_to_the_bit(values: list[float], seed: int) -> None:
    scales = torch.tensor([*values, values[0]])
    found = power_of_two_scales(scales)
    assert torch.equal(found.log2(), found.log2().round())
    assert found[0] == found[-1]
    assert bool((found >= SCALE_MIN).all() & (found <= SCALE_MAX).all())
    # At most half an octave off, beside the factor that all of them share.
    off = found.double().log2() - scales.double().log2()
    assert float(off.max() - off.min()) <= 1.0 + 1e-9
    w = torch.randn(5, len(scales), generator=torch.Generator().manual_seed(seed))
    assert torch.equal((w * found) / found, w)
    assert torch.equal(power_of_two_scales(found), found)
