"""Clustering on a line: agreement with a search of every partition, with scikit-learn, and what no table may do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.codebook.clustering import BINS, cluster, match
from alphasmith.objectives.literals import CodebookStart
from tests.support.site_cases import relaxed

STARTS: tuple[CodebookStart, ...] = ("linear", "density", "k-means++", "optimal")
finite = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)
rows = st.lists(finite, min_size=1, max_size=40)
#: Trained weights look like this: a bell with long tails.
BELL = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3


def error_of(values: torch.Tensor, table: torch.Tensor) -> float:
    """Sum of squared distances, every weight compared with every entry."""
    return float(((values.double().reshape(-1, 1) - table.double()) ** 2).amin(1).sum())


def least_error(values: list[float], k: int) -> float:
    """Of all ways to cut the ascending values into k intervals."""
    ordered = np.sort(np.array(values))
    best = math.inf
    for cuts in itertools.combinations(range(1, ordered.size), k - 1):
        parts = np.split(ordered, cuts)
        best = min(best, sum(float(((part - part.mean()) ** 2).sum()) for part in parts))
    return best


@relaxed
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=10, unique=True), st.integers(2, 5))
def test_the_optimum_is_that_of_all_partitions(values: list[int], k: int) -> None:
    found = cluster(torch.tensor(values, dtype=torch.float32), k, keep_zero=False)
    best = least_error([float(v) for v in values], min(k, len(values)))
    assert found.error == pytest.approx(best, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("k", [4, 16, 64])
def test_no_start_is_better_than_the_optimum(k: int) -> None:
    errors = {start: cluster(BELL, k, start=start).error for start in STARTS}
    assert BELL.numel() > BINS, "else the histogram is not used"
    assert errors["optimal"] <= min(errors.values()) * 1.0005
    reference = KMeans(k, n_init=1, random_state=0).fit(BELL.reshape(-1, 1).numpy())
    assert 10 * math.log10(errors["optimal"] / reference.inertia_) < 0.05


@pytest.mark.parametrize("start", STARTS)
def test_the_iteration_ends_where_every_entry_is_the_mean_of_its_weights(start: CodebookStart) -> None:
    found = cluster(BELL, 8, start=start, iterations=10_000)
    labels = match(BELL, found.table)
    means = torch.stack([BELL[labels == i].double().mean() for i in range(8)])
    torch.testing.assert_close(found.table.double(), means, rtol=1e-5, atol=1e-7)
    assert found.iterations < 10_000
    assert found.notes == ()


@pytest.mark.parametrize("start", STARTS)
@relaxed
@given(values=rows, k=st.integers(2, 9), keep_zero=st.sampled_from([True, False, None]))
def test_any_weights_get_a_usable_table(
    start: CodebookStart, values: list[float], k: int, keep_zero: bool | None
) -> None:
    weights = torch.tensor(values)
    found = cluster(weights, k, start=start, keep_zero=keep_zero)
    assert 1 <= found.table.numel() <= k
    assert bool((found.table.diff() > 0).all())
    assert bool(torch.isfinite(found.table).all())
    assert float(found.table.min()) >= min(*values, 0.0 if found.zero_kept else math.inf)
    assert float(found.table.max()) <= max(*values, 0.0 if found.zero_kept else -math.inf)
    nearest = (weights.double().reshape(-1, 1) - found.table.double()).abs()
    chosen = nearest.gather(1, match(weights, found.table).reshape(-1, 1)).reshape(-1)
    assert torch.equal(chosen, nearest.amin(1))
    if found.zero_kept:
        assert 0.0 in found.table.tolist()
        assert match(torch.zeros(1), found.table) == found.table.tolist().index(0.0)
    if len(set(values)) <= k and not found.zero_kept:
        assert found.error == 0


@relaxed
@given(rows)
def test_lloyd_never_makes_the_linear_start_worse(values: list[float]) -> None:
    weights = torch.tensor(values)
    begin = torch.linspace(float(weights.min()), float(weights.max()), 4, dtype=torch.float64)
    found = cluster(weights, 4, start="linear", keep_zero=False)
    before = error_of(weights, begin)
    assert error_of(weights, found.table) <= before * (1 + 1e-5) + 1e-12 * float(weights.double().square().sum())


def test_empty_entries_are_used_elsewhere() -> None:
    weights = torch.cat((torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 0.01, torch.tensor([100.0])))
    found = cluster(weights, 32, start="linear")
    assert torch.unique(match(weights, found.table)).numel() == 32


def test_more_entries_than_distinct_values_are_noted() -> None:
    found = cluster(torch.tensor([1.0, 2.0, 2.0, 3.0]), 8, name="layer.weight")
    assert found.table.tolist() == [1.0, 2.0, 3.0]
    assert found.requested == 8
    assert found.notes == ("layer.weight: 3 distinct values, 8 entries asked for",)


def test_equal_weights_are_one_entry() -> None:
    for start in STARTS:
        found = cluster(torch.full((3, 3), -2.5), 16, start=start)
        assert found.table.tolist() == [-2.5]
        assert found.error == 0


def test_zeros_of_a_sparse_tensor_stay_zero() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(4000, generator=generator) + 0.3
    weights[torch.rand(4000, generator=generator) < 0.5] = 0.0
    for start in STARTS:
        found = cluster(weights, 8, start=start)
        assert found.zero_kept
        assert not found.table[match(weights, found.table)][weights == 0].any()
        assert bool((found.table < 0).any() & (found.table > 0).any())
    assert not cluster(weights, 8, keep_zero=False).zero_kept
    assert not cluster(weights[weights != 0], 8).zero_kept


def test_one_huge_weight_costs_the_others_no_digits() -> None:
    small = torch.linspace(-1e-3, 1e-3, 2001)
    alone = cluster(small, 7, keep_zero=False).table
    for huge in (1e30, -1e30):
        found = cluster(torch.cat((small, torch.tensor([huge]))), 8, keep_zero=False).table
        torch.testing.assert_close(found[found.abs() < 1], alone, rtol=0, atol=2e-5)


def test_the_seed_decides_what_is_drawn() -> None:
    tables = [cluster(BELL, 16, start="k-means++", seed=seed, iterations=1).table for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_an_iteration_cut_short_is_noted() -> None:
    found = cluster(BELL, 16, start="linear", iterations=2)
    assert found.iterations == 2
    assert found.notes == ("weights: Lloyd's iteration stopped after 2 steps",)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"k": 1}, "cluster.k"),
        ({"k": 65537}, "cluster.k"),
        ({"start": "middle"}, "cluster.start"),
        ({"iterations": 0}, "cluster.iterations"),
        ({"weights": torch.zeros(0)}, "weights"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        cluster(**({"weights": BELL, "k": 4} | arguments))  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_are_refused(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"^layer\.weight: "):
        cluster(torch.tensor([1.0, bad]), 2, name="layer.weight")


@pytest.mark.parametrize("table", [[], [1.0, 1.0], [2.0, 1.0], [0.0, math.nan]])
def test_a_table_that_does_not_ascend_is_refused(table: list[float]) -> None:
    with pytest.raises(InputError, match="ascending"):
        match(torch.zeros(2), torch.tensor(table))


def test_dead_channels_take_no_entries_from_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    alive, dead = torch.randn(1500, generator=generator), 1e-32 * torch.randn(15_000, generator=generator)
    best = cluster(alive, 255).error  # few enough to be exact; the dead ones have the last entry
    assert cluster(torch.cat((alive, dead)), 256).error <= 1.1 * best
