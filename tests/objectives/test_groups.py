"""Grouping: the numeric examples of the claims, what every method must keep, and optimality of k-means."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.groups import Grouping, group_channels
from alphasmith.objectives.literals import GroupMethod
from tests.support.site_cases import relaxed

METHODS: tuple[GroupMethod, ...] = ("range", "kmeans", "outlier", "multi_outlier", "mean_difference")
methods = st.sampled_from(METHODS)
magnitude = st.one_of(st.just(0.0), st.just(2.5), st.floats(min_value=2.0**-20, max_value=2.0**20, width=32))
magnitudes = st.lists(magnitude, min_size=1, max_size=40).map(torch.tensor)


def members(grouping: Grouping) -> list[int]:
    return torch.bincount(grouping.labels, minlength=grouping.k).tolist()


def nested(*shares: tuple[int, float, float]) -> torch.Tensor:
    """``count`` values evenly over (low, high] for every share; the first value is 0."""
    parts = [low + (high - low) * torch.arange(1, count + 1) / count for count, low, high in shares]
    values = torch.cat(parts)
    values[0] = 0.0
    return values


# Examples of claims


def test_ten_sub_ranges_of_one_to_hundred() -> None:
    values = torch.arange(1, 101).float()
    grouping = group_channels(values, method="range", k=10)
    assert grouping.labels.tolist() == [(v - 1) // 10 for v in range(1, 101)]
    assert grouping.k == 10


def test_only_first_and_last_sub_range_occupied_gives_two_groups() -> None:
    values = torch.tensor([1.0, 4, 10, 91, 95, 100])
    grouping = group_channels(values, method="range", k=10)
    assert grouping.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert grouping.values.tolist() == pytest.approx([5.0, 286 / 3])
    assert (grouping.k, grouping.requested_k, grouping.outliers) == (2, 10, (False, False))


@pytest.mark.parametrize("method", ["outlier", "multi_outlier", "mean_difference"])
def test_ninety_nine_to_one(method: GroupMethod) -> None:
    values = nested((99, 0, 10), (1, 91, 100))
    grouping = group_channels(values, method=method, k=4)
    assert grouping.labels.tolist() == [0] * 99 + [1]
    assert grouping.outliers == (False, True)


def test_ninety_nine_one_gives_two_outlier_groups() -> None:
    values = nested((90, 0, 10), (9, 10, 20), (1, 91, 100))
    assert float(values[89]) == 10.0  # on the edge: normal, by the right-closed rule
    grouping = group_channels(values, method="multi_outlier", k=3)
    assert grouping.labels.tolist() == [0] * 90 + [1] * 9 + [2]
    assert grouping.outliers == (False, True, True)
    assert group_channels(values, method="outlier", k=3).labels.tolist() == [0] * 90 + [1] * 10


def test_mean_difference_misses_nested_outliers() -> None:
    """Trap T4: why it is not the default."""
    values = nested((90, 0, 10), (9, 10, 20), (1, 91, 100))
    assert members(group_channels(values, method="mean_difference", k=2, deviations=2)) == [99, 1]


def test_linear_bins_break_over_decades_and_log_bins_do_not() -> None:
    """Trap T4: 10-20 falls into the first bin of 0-1000."""
    values = torch.tensor([1.0] * 90 + [15.0] * 9 + [1000.0])
    assert members(group_channels(values, method="multi_outlier", k=3)) == [99, 1]
    assert members(group_channels(values, method="multi_outlier", k=3, log=True)) == [90, 9, 1]
    assert members(group_channels(values, method="kmeans", k=3)) == [90, 9, 1]


# What every method keeps


@relaxed
@given(magnitudes, methods, st.integers(1, 8), st.integers(1, 12), st.booleans())
def test_groups_are_a_partition_in_ascending_order(
    values: torch.Tensor, method: GroupMethod, k: int, bins: int, log: bool
) -> None:
    grouping = group_channels(values, method=method, k=k, bins=bins, log=log)
    assert tuple(grouping.labels.shape) == tuple(values.shape)
    assert 1 <= grouping.k <= min(k, len(values.unique()))
    assert grouping.requested_k == k
    assert min(members(grouping)) >= 1
    assert sum(members(grouping)) == len(values)
    # Ascending: sorting by magnitude sorts by group, and equal magnitudes share one.
    assert bool((grouping.labels[values.argsort()].diff() >= 0).all())
    assert all(len(grouping.labels[values == v].unique()) == 1 for v in values.unique())
    means = [float(values[grouping.labels == g].double().mean()) for g in range(grouping.k)]
    assert grouping.values.tolist() == pytest.approx(means)
    assert len(grouping.outliers) == grouping.k
    assert not grouping.outliers[0]
    assert any(grouping.outliers) <= ("outlier" in method or method == "mean_difference")


@relaxed
@given(magnitudes, methods, st.integers(1, 5), st.integers(0, 2**31))
def test_order_of_channels_does_not_matter(values: torch.Tensor, method: GroupMethod, k: int, seed: int) -> None:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    labels = group_channels(values, method=method, k=k).labels
    assert torch.equal(group_channels(values[order], method=method, k=k).labels, labels[order])


@relaxed
@given(magnitudes, methods, st.integers(1, 5), st.integers(0, 2**31))
def test_ties_stay_together_and_are_placed_by_their_largest(
    values: torch.Tensor, method: GroupMethod, k: int, seed: int
) -> None:
    ties = torch.randint(6, values.shape, generator=torch.Generator().manual_seed(seed))
    grouping = group_channels(values, method=method, k=k, ties=ties)
    largest = torch.stack([values[ties == tie].max() for tie in ties])
    assert torch.equal(grouping.labels, group_channels(largest, method=method, k=k).labels)


@relaxed
@given(
    st.lists(st.floats(min_value=2.0**-7, max_value=2.0**14, width=32), min_size=1, max_size=9).map(torch.tensor),
    st.integers(1, 4),
)
def test_kmeans_is_optimal(values: torch.Tensor, k: int) -> None:
    """No cut of the sorted values into as many intervals has a smaller sum of squares in log magnitude."""
    logs = values.double().log().sort().values
    grouping = group_channels(values, method="kmeans", k=k)

    def cost(groups: list[torch.Tensor]) -> float:
        return sum(float((group - group.mean()).square().sum()) for group in groups)

    found = cost([values.double().log()[grouping.labels == g] for g in range(grouping.k)])
    best = min(
        cost([logs[a:b] for a, b in zip((0, *cuts), (*cuts, len(logs)), strict=True)])
        for cuts in combinations(range(1, len(logs)), min(k, len(logs)) - 1)
    )
    assert found <= best + 1e-9
    assert grouping.k == min(k, len(values.unique()))


# Edges: trap T7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[3.0], [0.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_one_channel_or_one_magnitude_is_one_group(method: GroupMethod, values: list[float]) -> None:
    grouping = group_channels(torch.tensor(values), method=method, k=4, log=True)
    assert grouping.labels.tolist() == [0] * len(values)
    assert grouping.values.tolist() == [values[0]]


def test_as_many_groups_as_channels() -> None:
    grouping = group_channels(torch.tensor([5.0, 1.0, 100.0]), method="kmeans", k=3)
    assert grouping.labels.tolist() == [1, 0, 2]
    assert group_channels(torch.tensor([5.0, 1.0, 100.0]), method="kmeans", k=9).k == 3


def test_dead_channels_join_the_lowest_group() -> None:
    values = torch.tensor([0.0, 1.0, 1.1, 50.0, 0.0])
    assert group_channels(values, method="kmeans", k=2).labels.tolist() == [0, 0, 0, 1, 0]
    assert group_channels(values, method="range", k=2, log=True).labels.tolist() == [0, 0, 0, 1, 0]


def test_merging_keeps_the_widest_gaps() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 50.0, 52.0, 100.0])
    assert group_channels(values, method="range", k=3, bins=100).labels.tolist() == [0, 0, 0, 1, 1, 2]
    outliers = group_channels(torch.tensor([0.0, 0.1, 50.0, 60.0, 100.0]), method="multi_outlier", k=3)
    assert outliers.labels.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_one_group_is_plain_smoothing(method: GroupMethod) -> None:
    grouping = group_channels(nested((99, 0, 10), (1, 91, 100)), method=method, k=1)
    assert (grouping.k, grouping.outliers) == (1, (False,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_bad_magnitude_names_its_channel(bad: float) -> None:
    with pytest.raises(InputError, match="channel 1 is"):
        group_channels(torch.tensor([1.0, bad]), method="range", k=2)


def test_wrong_arguments_are_named() -> None:
    values = torch.ones(3)
    unknown: Any = "median"
    with pytest.raises(InputError, match=r"^groups\.method:"):
        group_channels(values, method=unknown, k=2)
    with pytest.raises(InputError, match=r"^groups\.k:"):
        group_channels(values, method="range", k=0)
    with pytest.raises(InputError, match=r"^groups\.bins:"):
        group_channels(values, method="range", k=2, bins=0)
    with pytest.raises(InputError, match=r"^groups\.deviations:"):
        group_channels(values, method="mean_difference", k=2, deviations=0)
    with pytest.raises(InputError, match=r"^values:"):
        group_channels(torch.ones(0), method="range", k=2)
    with pytest.raises(InputError, match=r"^ties:"):
        group_channels(values, method="range", k=2, ties=torch.tensor([0]))
