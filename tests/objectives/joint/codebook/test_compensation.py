"""Indices that make up for each other's errors: equal to the nearest where inputs have nothing in common, better for the output where they have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.codebook._compensation import compensated
from alphasmith.objectives.joint.codebook.clustering import cluster, match
from alphasmith.objectives.joint.codebook.tensors import CodebookSettings, decode_weight, encode_weight
from tests.support.site_cases import relaxed


def correlated(columns: int, rank: int, seed: int, rows: int = 400) -> Tensor:
    """Rows whose columns share a few causes."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return causes + 0.1 * torch.randn(rows, columns, generator=generator)


def weights(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@relaxed
@given(
    seed=st.integers(0, 999), columns=st.integers(1, 150), k=st.sampled_from([2, 3, 8, 64]), scale=st.floats(1e-6, 1e6)
)
def test_inputs_with_nothing_in_common_take_the_nearest(seed: int, columns: int, k: int, scale: float) -> None:
    weight = weights(3, columns, seed)
    table = cluster(weight, k).table
    found = compensated(weight, table, scale * torch.eye(columns, dtype=torch.float64))
    assert torch.equal(table[found], table[match(weight, table)])


@relaxed
@given(seed=st.integers(0, 999), columns=st.integers(30, 160), k=st.sampled_from([4, 8, 16]))
def test_less_of_the_output_is_lost_than_with_the_nearest(seed: int, columns: int, k: int) -> None:
    weight, x = weights(16, columns, seed), correlated(columns, 4, seed)
    table = cluster(weight, k).table
    covariance = x.double().T @ x.double() / len(x)
    lost = [
        float((x @ (table[found] - weight).T).square().sum())
        for found in (compensated(weight, table, covariance), match(weight, table))
    ]
    assert lost[0] < lost[1]


def test_blocks_of_columns_change_nothing() -> None:
    """Against the formula, column by column."""
    weight, x = weights(5, 200, 1), correlated(200, 6, 2)
    table = cluster(weight, 8).table
    covariance = x.double().T @ x.double() / len(x)
    damped = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(200, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rows, expected = weight.double().clone(), torch.zeros(5, 200)
    for column in range(200):
        expected[:, column] = table[match(rows[:, column].float(), table)]
        error = (rows[:, column] - expected[:, column].double()) / upper[column, column]
        rows[:, column:] -= error[:, None] * upper[column, column:]
    same = table[compensated(weight, table, covariance)] == expected
    assert same.double().mean() > 0.999, "but for what lies midway between two entries"


def test_zeros_stay_zero_where_there_is_an_entry_for_them() -> None:
    weight = weights(8, 90, 3)
    weight[torch.rand(8, 90, generator=torch.Generator().manual_seed(4)) < 0.4] = 0.0
    x = correlated(90, 3, 5)
    made = encode_weight(weight, CodebookSettings(k=8), covariance=x.double().T @ x.double())
    again = decode_weight("weight", made.entry, made.tensors)
    assert bool((again[weight == 0] == 0).all())
    assert made.error == pytest.approx(float((weight - again).double().square().sum()))


def test_inputs_that_are_always_zero_take_the_nearest() -> None:
    weight = weights(4, 10, 0)
    table = cluster(weight, 4).table
    found = compensated(weight, table, torch.zeros(10, 10, dtype=torch.float64))
    assert torch.equal(found, match(weight, table))


@pytest.mark.parametrize("covariance", [torch.eye(9), torch.full((10, 10), torch.nan), torch.ones(10)])
def test_a_covariance_that_does_not_fit_is_refused(covariance: Tensor) -> None:
    with pytest.raises(InputError, match=r"covariance: .* does not fit 10 columns"):
        compensated(weights(4, 10, 0), torch.tensor([-1.0, 1.0]), covariance)
