"""The clipping that unseen rows are expected to bring, and the range that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.unseen_rows import UnseenClipping
from alphasmith.objectives.smoothing import ChannelRange, Smoothing

STATIC = Scheme.parse("w8a8-channel-static")
ASYMMETRIC = Scheme.parse("w8au8-channel-static")
CHANNELS = 32


def exponential(rows: int, generator: torch.Generator) -> Tensor:
    return (
        torch.empty(rows, CHANNELS).exponential_(generator=generator)
        * torch.randn(rows, CHANNELS, generator=generator).sign()
    )


def normal(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, CHANNELS, generator=generator)


def heavy(rows: int, generator: torch.Generator) -> Tensor:
    """Student's t with 6 degrees of freedom, whose tails have the shape 1/6."""
    chi = torch.randn(rows, CHANNELS, 6, generator=generator).square().sum(dim=2)
    return torch.randn(rows, CHANNELS, generator=generator) / (chi / 6).sqrt()


def clipped(rows: Tensor, w: Tensor, limit: Tensor) -> float:
    """Mean over rows of the squared error that clipping at ``limit`` (C,) makes at the output, columns apart."""
    excess = (rows.abs() - limit).clamp_min(0).double().square().mean(dim=0)
    return float((excess * w.double().square().sum(dim=0)).sum())


@pytest.mark.parametrize("draw", [exponential, normal, heavy])
@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_what_is_expected_is_what_many_fresh_rows_lose(
    draw: Callable[[int, torch.Generator], Tensor], factor: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(8, CHANNELS, generator=generator)
    logs = torch.zeros(1, CHANNELS, dtype=torch.float64)
    fresh = draw(40_000, generator)
    expected, seen = 0.0, 0.0
    for _ in range(20):
        x = draw(400, generator)
        peaks = x.abs().amax(dim=0)
        # Every channel fills the range, as it does near alpha 1.
        scale = (peaks / peaks.max()).clamp_min(1e-3)
        data = linear_site_data(x / scale, w * scale)
        expected += float(UnseenClipping(data, STATIC).error(logs, factor)[0]) / 400
        seen += clipped(fresh / scale, w * scale, factor * data.input_range.peaks().max().expand(CHANNELS))
    assert 0.5 < expected / seen < 2.0


def test_a_cluster_of_rare_large_values_is_no_tail() -> None:
    """Tokens such as the first of a text have values of their own: far out, and never much further."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(8, CHANNELS, generator=generator)
    x = torch.randn(1000, CHANNELS, generator=generator)
    x[::100] = 50.0 + 0.01 * torch.randn(10, CHANNELS, generator=generator)
    plain = Smoothing(scales=torch.ones(CHANNELS))
    assert UnseenClipping(linear_site_data(x, w), STATIC).best_factor(plain) < 1.03


@given(st.floats(-6, 6), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_another_unit_changes_neither_the_loss_nor_the_range(exponent: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = normal(200, generator), torch.randn(8, CHANNELS, generator=generator)
    unit = 10.0**exponent
    ones = Smoothing(scales=torch.ones(CHANNELS))
    scaled = replace(ones, scales=torch.full((CHANNELS,), unit))
    here = UnseenClipping(linear_site_data(x, w), STATIC)
    there = UnseenClipping(linear_site_data(x * unit, w / unit), STATIC)
    logs = [s.scales.double().log().unsqueeze(0) for s in (ones, scaled)]
    assert float(there.error(logs[1], 1.05)) == pytest.approx(float(here.error(logs[0], 1.05)), rel=1e-4)
    assert there.best_factor(scaled) == pytest.approx(here.best_factor(ones), rel=1e-6)


@given(st.integers(0, 2**16), st.booleans(), st.sampled_from([8, 64]), st.sampled_from([STATIC, ASYMMETRIC]))
@settings(max_examples=30, deadline=None)
def test_the_slope_is_that_of_the_smooth_form_which_nears_the_exact_one(
    seed: int, shifted: bool, power: int, scheme: Scheme
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = linear_site_data(heavy(200, generator), torch.randn(8, CHANNELS, generator=generator))
    unseen = UnseenClipping(data, scheme)
    logs = 0.2 * torch.randn(3, CHANNELS, dtype=torch.float64, generator=generator)
    shift = data.mean() if shifted else None
    error, slope = unseen.noise(logs, 1.1, shift, power)
    step, direction = 1e-6, torch.randn(CHANNELS, dtype=torch.float64, generator=generator)
    ahead, behind = (unseen.noise(logs + sign * step * direction, 1.1, shift, power)[0] for sign in (1, -1))
    assert torch.allclose((ahead - behind) / (2 * step), slope @ direction, rtol=1e-4, atol=1e-6 * float(error.max()))
    # A smooth maximum lies above the maximum, so the range is wider and less is clipped.
    assert bool((error <= unseen.error(logs, 1.1, shift) * (1 + 1e-9)).all())
    assert torch.allclose(unseen.noise(logs, 1.1, shift, 4096)[0], unseen.error(logs, 1.1, shift), rtol=0.05)


@pytest.mark.parametrize("scheme", [STATIC, ASYMMETRIC], ids=lambda s: s.name)
def test_the_wider_the_range_the_less_is_clipped(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(2)
    data = linear_site_data(normal(300, generator), torch.randn(8, CHANNELS, generator=generator))
    factors = torch.tensor([0.8, 0.9, 1.0, 1.1, 1.3, 2.0], dtype=torch.float64)
    errors = UnseenClipping(data, scheme).error(torch.zeros(6, CHANNELS, dtype=torch.float64), factors)
    assert bool((errors.diff() < 0).all())


def test_every_end_of_an_asymmetric_range_clips_its_own_side() -> None:
    """Of rows that a ReLU made, nothing is clipped below; of mirrored rows the same as of the rows."""
    generator = torch.Generator().manual_seed(5)
    x, w = normal(300, generator).relu(), torch.randn(8, CHANNELS, generator=generator)
    logs = 0.1 * torch.randn(1, CHANNELS, dtype=torch.float64, generator=generator)
    found = [UnseenClipping(linear_site_data(sign * x, w), ASYMMETRIC).error(logs, 1.1) for sign in (1, -1)]
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-9)
    symmetric = UnseenClipping(linear_site_data(x, w), STATIC).error(logs, 1.1)
    assert float(found[0]) == pytest.approx(float(symmetric), rel=1e-6)


def test_more_rows_that_were_seen_leave_less_to_be_clipped() -> None:
    generator = torch.Generator().manual_seed(2)
    data = linear_site_data(normal(300, generator), torch.randn(8, CHANNELS, generator=generator))
    logs = torch.zeros(1, CHANNELS, dtype=torch.float64)
    few, many = (UnseenClipping(replace(data, rows_seen=n), STATIC).error(logs, 1.0) for n in (300, 30_000))
    assert float(many) < float(few) / 50


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_few_rows_give_a_range_all_the_same(rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    data = linear_site_data(normal(rows, generator), torch.randn(8, CHANNELS, generator=generator))
    unseen = UnseenClipping(data, STATIC)
    assert 1.0 <= unseen.best_factor(Smoothing(scales=torch.ones(CHANNELS))) <= 4.0


@pytest.mark.parametrize("name", ["w8a8-channel-token", "w4a16-g64"])
def test_without_a_static_range_nothing_is_clipped(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    data = linear_site_data(normal(64, generator), torch.randn(8, CHANNELS, generator=generator))
    plain = Smoothing(scales=torch.ones(CHANNELS))
    scheme = Scheme.parse(name)
    assert UnseenClipping(data, scheme).best_factor(plain) == 1.0
    assert SiteObjective(data, scheme, unseen=True).loss(plain) == SiteObjective(data, scheme).loss(plain)


def test_the_judge_adds_it_to_what_its_rows_show() -> None:
    generator = torch.Generator().manual_seed(2)
    data = linear_site_data(normal(300, generator), torch.randn(8, CHANNELS, generator=generator))
    smoothing = Smoothing(scales=torch.rand(CHANNELS, generator=generator) + 0.5, range_factor=1.05)
    judge = SiteObjective(data, STATIC, unseen=True)
    logs = smoothing.scales.double().log().unsqueeze(0)
    added = float(UnseenClipping(data, STATIC).error(logs, 1.05)) / judge.reference_energy
    assert judge.loss(smoothing) == pytest.approx(SiteObjective(data, STATIC).loss(smoothing) + added, rel=1e-6)
    half = judge.loss(smoothing, rows=150) * judge.energy(150)
    shown = SiteObjective(data, STATIC).loss(smoothing, rows=150) * judge.energy(150)
    assert half - shown == pytest.approx(added * judge.reference_energy / 2, rel=1e-4)


def test_rows_of_one_sample_are_alike_and_so_are_what_they_are_clipped_by() -> None:
    """Samples that differ, of rows that hardly do: many rows leave the range together, and none hints at it before."""
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(8, CHANNELS, generator=generator)
    logs = torch.zeros(1, CHANNELS, dtype=torch.float64)

    def draw(samples: int) -> Tensor:
        own = torch.randn(samples, 1, CHANNELS, generator=generator)
        return own + 0.05 * torch.randn(samples, 20, CHANNELS, generator=generator)

    fresh = draw(4000).flatten(0, 1)
    alone, together, seen = 0.0, 0.0, 0.0
    for _ in range(20):
        x = draw(64)
        # Every channel fills the range, as it does near alpha 1.
        peaks = x.abs().amax(dim=(0, 1))
        scale = peaks / peaks.max()
        x = x / scale
        rows = x.flatten(0, 1)
        data = replace(
            linear_site_data(rows[::4].contiguous(), w * scale),
            rows_seen=len(rows),
            input_range=ChannelRange(rows.amin(dim=0), rows.amax(dim=0)),
        )
        reached = torch.stack([x.amax(dim=1), (-x).amax(dim=1)]).sort(dim=1, descending=True).values
        known = replace(data, tops=reached[:, :17], samples_seen=64)
        alone += float(UnseenClipping(data, STATIC).error(logs, 1.0)[0]) / len(rows[::4])
        together += float(UnseenClipping(known, STATIC).error(logs, 1.0)[0]) / len(rows[::4])
        seen += clipped(fresh / scale, w * scale, data.input_range.peaks().max().expand(CHANNELS))
    assert alone < seen / 4, "rows taken for independent hide it"
    assert 0.4 < together / seen < 4.0
