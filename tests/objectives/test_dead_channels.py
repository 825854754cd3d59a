"""Scales of dead and near-dead channels: trap T7."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from alphasmith.objectives.dead_channels import NEAR_DEAD, NeutralScales
from alphasmith.objectives.smoothing import SCALE_MAX, SCALE_MIN, coefficient_map, smoothing_scales
from tests.support.site_cases import relaxed


def _statistics(seed: int, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activation, weight and producer statistics of magnitudes that no scale is clamped for; a third of the channels is dead."""
    g = torch.Generator().manual_seed(seed)
    a, w, p = (torch.randn(channels, generator=g).exp() for _ in range(3))
    kind = torch.randint(6, (channels,), generator=g)
    kind[0] = 5
    return torch.where(kind == 0, 0.0, 30 * a), torch.where(kind == 1, 0.0, w / 30), p


@relaxed
@given(st.integers(0, 2**31), st.integers(2, 24), st.floats(0.0, 1.0))
def test_nothing_becomes_the_largest_by_a_channel_that_is_not_live(seed: int, channels: int, alpha: float) -> None:
    a, w, p = _statistics(seed, channels)
    near = torch.rand(channels, generator=torch.Generator().manual_seed(seed)) < 0.2
    a = torch.where(near, a * 1e-4, a)
    live = NeutralScales.of(a, w, p).live
    assume(bool(live.any()))
    s = smoothing_scales(a, w, alpha, producer=p)
    # One live channel that is faint asks for scales beyond the limits of all scales, which come last and say nothing of placing.
    assume(float(s.min()) > SCALE_MIN and float(s.max()) < SCALE_MAX)
    rows, activations, columns = (v / v[live].max().clamp_min(1e-30) for v in (p / s, a / s, w * s))
    for j in (~live).nonzero().flatten().tolist():
        below, above = max(float(rows[j]), float(activations[j])), float(columns[j])
        # Where both cannot be kept, the two exceed by one factor.
        assert max(below, above) <= 1.00001 or below == pytest.approx(above, rel=1e-4)


@relaxed
@given(st.integers(0, 2**31), st.integers(2, 24), st.floats(0.0, 1.0), st.floats(0.05, 4.0))
def test_scales_follow_the_unit_of_the_activation(seed: int, channels: int, alpha: float, unit: float) -> None:
    """Producer rows times c, consumer columns by c: every scale times c, live or dead."""
    a, w, p = _statistics(seed, channels)
    before = smoothing_scales(a, w, alpha, producer=p)
    after = smoothing_scales(unit * a, w / unit, alpha, producer=unit * p)
    torch.testing.assert_close(after, unit * before, rtol=1e-5, atol=0)
    labels = torch.arange(channels) % 2
    theta = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one, other = (
        coefficient_map(a * c, w / c, labels, betas=True, offsets=True, producer=p * c).scales(theta)
        for c in (1.0, unit)
    )
    torch.testing.assert_close(other, unit * one, rtol=1e-5, atol=0)


def test_a_dead_channel_takes_the_geometric_mean_of_the_live_ones() -> None:
    a, w = torch.tensor([0.0, 400.0, 100.0, 0.0]), torch.tensor([1e-3, 1.0, 1.0, 0.0])
    assert smoothing_scales(a, w, 1.0).tolist() == pytest.approx([200.0, 400.0, 100.0, 200.0])


def test_a_row_or_column_of_a_dead_channel_is_kept_below_the_largest() -> None:
    a, w = torch.tensor([0.0, 400.0, 100.0]), torch.tensor([4.0, 1.0, 1.0])
    assert smoothing_scales(a, w, 1.0).tolist() == pytest.approx([100.0, 400.0, 100.0])  # 4 * 100 = 1 * 400
    p = torch.tensor([9.0, 4.0, 4.0])
    wide = torch.tensor([1e-3, 1.0, 1.0])
    assert smoothing_scales(a, wide, 1.0, producer=p).tolist() == pytest.approx(
        [225.0, 400.0, 100.0]
    )  # 9 / 225 = 4 / 100


def test_a_near_dead_channel_is_raised_until_its_producers_row_is_not_the_largest() -> None:
    a, w, p = torch.tensor([1e-5, 4.0, 1.0]), torch.ones(3), torch.ones(3)
    alone = smoothing_scales(a, w, 1.0)
    assert alone.min() < 1e-4
    assert smoothing_scales(a, w, 1.0, producer=p).tolist() == pytest.approx([1.0, 4.0, 1.0])
    small = torch.tensor([1e-5, 1.0, 1.0])  # its row is as small as its activation: it is alive
    assert torch.equal(smoothing_scales(a, w, 1.0, producer=small), alone)


def test_what_counts_as_near_dead() -> None:
    a, p = torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 0.9 * NEAR_DEAD, 1.1 * NEAR_DEAD])
    assert NeutralScales.of(a, torch.ones(5), p).live.tolist() == [True, True, True, True, False]


def test_without_a_live_channel_nothing_is_scaled() -> None:
    a, w = torch.tensor([0.0, 3.0]), torch.tensor([2.0, 0.0])
    assert smoothing_scales(a, w, 0.7, producer=torch.ones(2)).tolist() == [1.0, 1.0]


def test_the_linear_map_and_the_formula_agree_and_tied_channels_are_dead_as_one() -> None:
    a, w = torch.tensor([0.0, 0.0, 5.0, 3.0, 0.0]), torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0])
    ties = torch.tensor([0, 0, 1, 2, 2])
    scales = smoothing_scales(a, w, 0.6, ties)
    mapped = coefficient_map(a, w, torch.tensor([0, 0, 1, 1, 1]), ties=ties).scales(torch.tensor([0.6, 0.6]).double())
    torch.testing.assert_close(mapped, scales)
    assert scales[0] == scales[1]
    assert scales[3] == scales[4] == smoothing_scales(a[3:4], w[3:4], 0.6)
