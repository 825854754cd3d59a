"""Streaming statistics against whole-tensor arithmetic, and reservoir sampling against its own definition."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.objectives.calibration import statistics
from alphasmith.objectives.calibration.statistics import (
    PERCENTILE_ERROR,
    SAMPLE_TOPS,
    ChannelStatistics,
    RowReservoir,
    SampleExtremes,
    priorities,
)
from alphasmith.objectives.errors import InputError, NonFiniteError

SEEDS = st.integers(0, 2**31)


def _rows(seed: int, count: int, channels: int, spread: float = 2.0) -> torch.Tensor:
    """Log-normal magnitudes with random signs; every third channel is dead."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, channels, generator=generator).mul(spread).exp()
    rows *= torch.randn(count, channels, generator=generator).sign()
    rows[:, 2::3] = 0
    return rows


def _pieces(rows: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    edges = [0, *sorted(min(cut, rows.shape[0]) for cut in cuts), rows.shape[0]]
    return [rows[a:b] for a, b in pairwise(edges)]


def _collected(pieces: list[torch.Tensor], channels: int) -> ChannelStatistics:
    collected = ChannelStatistics(channels)
    for piece in pieces:
        collected.update(piece)
    return collected


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 200), channels=st.integers(1, 7))
def test_statistics_equal_those_of_the_whole_tensor(seed: int, count: int, channels: int) -> None:
    rows = _rows(seed, count, channels)
    found = _collected([rows], channels)
    assert found.count == count
    assert torch.equal(found.absmax, rows.abs().amax(0))
    assert torch.equal(found.minimum, rows.amin(0))
    assert torch.equal(found.maximum, rows.amax(0))
    torch.testing.assert_close(found.rms, rows.double().square().mean(0).sqrt().float(), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 300), cuts=st.lists(st.integers(0, 300), max_size=5), q=st.floats(1, 100))
def test_cutting_ordering_and_merging_change_nothing(seed: int, count: int, cuts: list[int], q: float) -> None:
    rows = _rows(seed, count, 4)
    whole = _collected([rows], 4)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = _collected(_pieces(rows[order], cuts), 4)
    merged = ChannelStatistics(4)
    for piece in reversed(_pieces(rows, cuts)):
        merged.merge(_collected([piece], 4))
    for other in (cut, merged):
        assert other.count == whole.count
        for name in ("absmax", "minimum", "maximum"):
            assert torch.equal(getattr(other, name), getattr(whole, name)), name
        assert torch.equal(other.percentile(q), whole.percentile(q))
        torch.testing.assert_close(other.rms, whole.rms, rtol=1e-6, atol=0)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 500), q=st.floats(0.1, 100), spread=st.floats(0.1, 3.0))
def test_percentile_stays_within_its_stated_error(seed: int, count: int, q: float, spread: float) -> None:
    rows = _rows(seed, count, 5, spread).clamp(-(2.0**19), 2.0**19)
    rows[rows.abs() < 2.0**-27] = 0
    found = _collected([rows], 5).percentile(q).double()
    magnitudes = rows.double().abs()
    # The quantile is bracketed, because q / 100 * (count - 1) may round across an integer.
    lower = torch.quantile(magnitudes, max(q / 100 - 1e-12, 0), dim=0, interpolation="higher")
    upper = torch.quantile(magnitudes, min(q / 100 + 1e-12, 1), dim=0, interpolation="higher")
    error = PERCENTILE_ERROR + 1e-5  # the logarithm is taken in float32
    assert bool((found >= lower * (1 - error)).all())
    assert bool((found <= upper * (1 + error)).all())


def test_percentile_is_monotone_and_ends_at_the_exact_absmax() -> None:
    rows = _rows(3, 1000, 6)
    found = _collected([rows], 6)
    curve = torch.stack([found.percentile(q) for q in (1, 25, 50, 90, 99, 99.9, 100)])
    assert bool((curve.diff(dim=0) >= 0).all())
    assert torch.equal(curve[-1], rows.abs().amax(0))
    assert bool((curve[2] < curve[-1] / 2)[[0, 1, 3, 4]].all())


def test_one_outlier_row_moves_the_absmax_but_not_the_percentile() -> None:
    rows = _rows(5, 4000, 4, spread=0.5)
    rows[17] = 5000.0
    found = _collected([rows], 4)
    assert found.absmax.tolist() == [5000.0] * 4
    assert float(found.percentile(99.9).max()) < 50


def test_magnitudes_outside_the_histogram_have_their_documented_values() -> None:
    rows = torch.tensor([[0.0, 1e-12, 3e30]] * 9 + [[0.0, 1e-11, 4e30]])
    found = _collected([rows], 3)
    assert found.percentile(50).tolist() == pytest.approx([0.0, 0.0, 4e30])
    assert found.rms.tolist() == pytest.approx([0.0, 3.3015e-12, 3.1145e30], rel=1e-3)  # squares overflow float32


def test_chunked_updates_see_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(7, 100, 6)
    whole = _collected([rows], 6)
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 25)
    chunked = _collected([rows.T.contiguous().T], 6)  # strided, as convolution inputs are
    assert torch.equal(chunked.percentile(90), whole.percentile(90))
    assert torch.equal(chunked.absmax, whole.absmax)
    torch.testing.assert_close(chunked.rms, whole.rms)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_is_read_as_float32(dtype: torch.dtype) -> None:
    rows = _rows(9, 50, 3, spread=0.5).to(dtype)
    found = _collected([rows], 3)
    assert torch.equal(found.absmax, rows.float().abs().amax(0))
    assert {found.absmax.dtype, found.rms.dtype, found.percentile(50).dtype} == {torch.float32}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_are_refused_and_leave_the_statistics_as_they_were(value: float) -> None:
    rows = _rows(1, 20, 4)
    found = _collected([rows], 4)
    bad = rows.clone()
    bad[13, 1] = value
    with pytest.raises(NonFiniteError, match="channel 1"):
        found.update(bad)
    assert found.count == 20
    assert torch.equal(found.rms, _collected([rows], 4).rms)


def test_nothing_seen_is_zero_and_bad_calls_name_their_field() -> None:
    empty = ChannelStatistics(3)
    empty.update(torch.empty(0, 3))
    for value in (empty.absmax, empty.minimum, empty.maximum, empty.rms, empty.percentile(50)):
        assert value.tolist() == [0.0, 0.0, 0.0]
    for call, field in (
        (lambda: ChannelStatistics(0), "channels"),
        (lambda: empty.update(torch.zeros(2, 4)), "rows"),
        (lambda: empty.update(torch.zeros(2, 3, dtype=torch.int64)), "rows"),
        (lambda: empty.percentile(0), "percentile"),
        (lambda: empty.percentile(100.5), "percentile"),
        (lambda: ChannelStatistics(3, percentiles=False).percentile(50), "percentile"),
        (lambda: empty.merge(ChannelStatistics(4)), "other"),
        (lambda: empty.merge(ChannelStatistics(3, percentiles=False)), "other"),
        (lambda: RowReservoir(0), "rows"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.field == field


def _reservoir(pieces: list[torch.Tensor], capacity: int, seed: int = 0) -> RowReservoir:
    reservoir = RowReservoir(capacity)
    start = 0
    for piece in pieces:
        numbers = torch.arange(start, start + piece.shape[0])
        reservoir.update(piece, priorities(seed, numbers // 7, numbers % 7), numbers)
        start += piece.shape[0]
    return reservoir


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS, count=st.integers(1, 120), capacity=st.integers(1, 60), cuts=st.lists(st.integers(0, 120), max_size=6)
)
def test_reservoir_keeps_distinct_rows_however_the_stream_is_cut(
    seed: int, count: int, capacity: int, cuts: list[int]
) -> None:
    rows = torch.arange(count * 3, dtype=torch.float32).reshape(count, 3)
    whole = _reservoir([rows], capacity, seed)
    cut = _reservoir(_pieces(rows, cuts), capacity, seed)
    assert torch.equal(whole.rows, cut.rows)
    assert torch.equal(whole.tags, cut.tags)
    assert torch.equal(whole.rows, rows[whole.tags])
    assert len(set(whole.tags.tolist())) == min(count, capacity)
    assert cut.seen == count
    turned = RowReservoir(capacity)
    numbers = torch.arange(count).flip(0)
    turned.update(rows[numbers], priorities(seed, numbers // 7, numbers % 7), numbers)
    assert torch.equal(whole.rows, turned.rows)
    smaller = _reservoir([rows], max(1, capacity // 2), seed)
    assert torch.equal(whole.tags[: smaller.tags.numel()], smaller.tags)


def test_every_row_and_every_place_is_equally_likely() -> None:
    draws, count, capacity = 3000, 12, 4
    kept, first = torch.zeros(count), torch.zeros(count)
    rows = torch.zeros(count, 1)
    for seed in range(draws):
        reservoir = RowReservoir(capacity)
        ranks = priorities(seed, torch.arange(count) // 4, torch.arange(count) % 4)
        reservoir.update(rows[:5], ranks[:5], torch.arange(5))
        reservoir.update(rows[5:], ranks[5:], torch.arange(5, count))
        kept[reservoir.tags] += 1
        first[reservoir.tags[0]] += 1
    # Binomial counts: 5 standard deviations on either side; 24 such checks fail by chance less than once in 70 000 runs.
    for found, p in ((kept, capacity / count), (first, 1 / count)):
        assert float((found - draws * p).abs().max()) < 5 * math.sqrt(draws * p * (1 - p))


def test_only_rows_that_stay_are_made() -> None:
    reservoir = RowReservoir(8)
    generator = torch.Generator().manual_seed(0)
    made: list[int] = []

    def gather(index: torch.Tensor) -> torch.Tensor:
        made.extend(index.tolist())
        assert bool((index.diff() > 0).all())
        return index[:, None].float()

    entered = [reservoir.offer(torch.rand(1000, generator=generator, dtype=torch.float64), gather) for _ in range(10)]
    assert sum(entered) == len(made) < 100  # about 8 + 8 ln(10) = 26 are expected
    assert entered[0] == 8
    assert reservoir.rows.shape == (8, 1)
    assert reservoir.tags.tolist() == [-1] * 8


def test_reservoir_is_empty_before_the_first_row_and_refuses_contradictions() -> None:
    reservoir = RowReservoir(4)
    reservoir.update(torch.empty(0, 5), torch.empty(0))
    assert reservoir.rows.shape == (0, 0)
    assert reservoir.tags.shape == (0,)
    reservoir.update(torch.ones(2, 5), torch.rand(2))
    with pytest.raises(InputError, match="same tensor"):
        reservoir.update(torch.ones(2, 6), torch.rand(2))
    with pytest.raises(InputError, match="one tag per row"):
        reservoir.update(torch.ones(2, 5), torch.rand(2), torch.zeros(3))
    with pytest.raises(InputError, match="give one per row"):
        reservoir.update(torch.ones(2, 5), torch.rand(3))
    with pytest.raises(InputError, match="flatten"):
        reservoir.update(torch.ones(5), torch.rand(5))
    assert reservoir.seen == 2


@given(st.integers(0, 2**16), st.integers(1, 60), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_extremes_of_samples_are_those_of_all_in_whatever_batches(seed: int, samples: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, 3, generator=generator)
    extremes = SampleExtremes(3)
    for part in x.split(batch):
        extremes.update(part.amax(dim=1), part.amin(dim=1))
    assert extremes.seen == samples
    kept = min(samples, SAMPLE_TOPS)
    assert torch.equal(extremes.tops[0], x.amax(dim=1).sort(dim=0, descending=True).values[:kept])
    assert torch.equal(extremes.tops[1], (-x).amax(dim=1).sort(dim=0, descending=True).values[:kept])


def test_a_sample_without_rows_has_no_extremes() -> None:
    extremes = SampleExtremes(2)
    extremes.update(torch.tensor([[1.0, 2.0], [-torch.inf, -torch.inf]]), torch.tensor([[0.0, 1.0], [torch.inf] * 2]))
    assert extremes.seen == 1
    assert extremes.tops.tolist() == [[[1.0, 2.0]], [[0.0, -1.0]]]
