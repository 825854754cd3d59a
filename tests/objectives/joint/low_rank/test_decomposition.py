"""Decomposition: the least error at its rank, the energy asked for, weighted errors, and what does not converge."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.low_rank.decomposition import Weighting, decompose, saving_rank
from tests.support.site_cases import relaxed

GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(12, 8, generator=GENERATOR, dtype=torch.float64)

sizes = st.integers(1, 7)


@relaxed
@given(sizes, sizes, st.floats(0.01, 1.0), st.integers(0, 99))
def test_the_rank_is_the_smallest_that_keeps_the_energy(m: int, n: int, energy: float, seed: int) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = decompose(matrix, energy=energy)
    squares = torch.linalg.svdvals(matrix) ** 2
    shares = torch.cumsum(squares, 0) / squares.sum()
    assert found.rank == 1 + int((shares < energy - 1e-11).sum())
    assert found.kept == pytest.approx(float(shares[found.rank - 1]))
    error = (matrix - found.left @ found.right).square().sum() / matrix.square().sum()
    assert float(error) == pytest.approx(1 - found.kept, abs=1e-10)


def test_full_rank_gives_the_matrix_back() -> None:
    for matrix in (MATRIX, MATRIX.T.float(), MATRIX.bfloat16()):
        found = decompose(matrix, rank=99)
        assert found.rank == 8
        assert found.left.dtype == matrix.dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[matrix.dtype]
        torch.testing.assert_close(found.left @ found.right, matrix, rtol=0, atol=tolerance)


@pytest.mark.parametrize("matrix", [torch.zeros(4, 3), torch.ones(4, 3), torch.zeros(1, 1), torch.ones(1, 5)])
def test_singular_matrices_have_a_rank_of_one(matrix: torch.Tensor) -> None:
    found = decompose(matrix, energy=0.999)
    assert found.rank == 1
    torch.testing.assert_close(found.left @ found.right, matrix)


def test_no_other_factors_of_the_rank_have_a_smaller_weighted_error() -> None:
    rows, columns = torch.rand(12, generator=GENERATOR) + 0.1, torch.rand(8, generator=GENERATOR) + 0.1
    inputs = torch.randn(200, 8, generator=GENERATOR, dtype=torch.float64) @ torch.diag(columns.double() ** 3)
    covariance = inputs.T @ inputs / 200
    plain = decompose(MATRIX, rank=3)
    cases: list[tuple[Weighting, Any]] = [
        (Weighting(rows=rows), lambda error: rows.double().unsqueeze(1) * error),
        (Weighting(columns=columns), lambda error: error * columns.double()),
        (Weighting(covariance=covariance), lambda error: error @ inputs.T),
        (Weighting(rows=-rows, covariance=covariance), lambda error: rows.double().unsqueeze(1) * error @ inputs.T),
    ]
    for weighting, seen in cases:
        found = decompose(MATRIX, rank=3, weighting=weighting)
        errors = [float(seen(MATRIX - one.left @ one.right).square().sum()) for one in (found, plain)]
        assert errors[0] < 0.999 * errors[1]
        # Of the weighted matrix nothing of rank 3 is nearer than its own three singular values (Eckart and Young 1936).
        best = float((torch.linalg.svdvals(seen(MATRIX))[3:] ** 2).sum())
        assert errors[0] == pytest.approx(best, rel=1e-4)


def test_scales_of_zero_are_divided_out_again() -> None:
    rows, columns = torch.ones(12), torch.ones(8)
    rows[3], columns[5] = 0.0, 0.0
    dead = torch.zeros(8, 8)
    for weighting in (
        Weighting(rows=rows),
        Weighting(columns=columns),
        Weighting(rows=rows * 0),
        Weighting(covariance=dead),
    ):
        found = decompose(MATRIX, rank=8, weighting=weighting)
        torch.testing.assert_close(found.left @ found.right, MATRIX, rtol=1e-6, atol=1e-6)


def test_small_scales_behind_a_matrix_lower_its_rank() -> None:
    """A scale that is folded shows in the singular values: without it no trained sparsity would."""
    matrix = torch.randn(128, 256, generator=GENERATOR)
    gamma = torch.ones(128)
    gamma[:96] = 1e-3
    assert decompose(matrix, energy=0.99).rank > 110
    assert decompose(matrix, energy=0.99, weighting=Weighting(rows=gamma)).rank <= 32


def test_what_does_not_converge_is_repeated_in_float64_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = torch.linalg.svd

    def failing(matrix: torch.Tensor, full_matrices: bool = True) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                "did not converge"
            )
        return bare(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    found = decompose(MATRIX.float(), rank=2, name="fc.weight")
    assert found.notes == ("fc.weight: its singular values converged in float64 only",)
    assert found.left.dtype == torch.float32

    empty = SimpleNamespace(U=MATRIX, S=torch.full((8,), math.nan), Vh=MATRIX)
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, full_matrices=True: empty)
    with pytest.raises(InputError, match=r"^fc\.weight: its singular values do not converge"):
        decompose(MATRIX.float(), rank=2, name="fc.weight")


@pytest.mark.parametrize(
    ("m", "n", "rank"), [(256, 256, 127), (4, 4, 1), (3, 3, 1), (2, 2, 0), (1, 9, 0), (400, 100, 79)]
)
def test_factors_of_the_largest_saving_rank_are_smaller_and_of_the_next_are_not(m: int, n: int, rank: int) -> None:
    assert saving_rank(m, n) == rank
    assert (m + n) * rank < m * n <= (m + n) * (rank + 1)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "svd"),
        ({"energy": 0.9, "rank": 2}, "svd"),
        ({"energy": 0.0}, "svd.energy"),
        ({"energy": 1.1}, "svd.energy"),
        ({"rank": 0}, "svd.rank"),
        ({"rank": 1, "matrix": torch.zeros(3)}, "fc"),
        ({"rank": 1, "matrix": torch.zeros(0, 3)}, "fc"),
        ({"rank": 1, "matrix": torch.zeros(2, 2, dtype=torch.int64)}, "fc"),
        ({"rank": 1, "weighting": Weighting(rows=torch.ones(8))}, "svd"),
        ({"rank": 1, "weighting": Weighting(covariance=torch.ones(3, 3))}, "svd.covariance"),
        ({"rank": 1, "weighting": Weighting(columns=torch.ones(8), covariance=torch.eye(8))}, "svd.covariance"),
        ({"rank": 1, "weighting": Weighting(covariance=10 * torch.ones(8, 8) - 9 * torch.eye(8))}, "svd.covariance"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], field: str) -> None:
    given: dict[str, Any] = {"matrix": MATRIX, "name": "fc"} | arguments
    with pytest.raises(InputError) as caught:
        decompose(**given)
    assert caught.value.field == field


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_numbers_are_refused(bad: float) -> None:
    cases: tuple[dict[str, Any], ...] = (
        {"matrix": torch.full((2, 2), bad)},
        {"matrix": MATRIX, "weighting": Weighting(rows=torch.full((12,), bad))},
        {"matrix": MATRIX, "weighting": Weighting(covariance=torch.full((8, 8), bad))},
    )
    for arguments in cases:
        with pytest.raises(NonFiniteError, match=r"^fc: "):
            decompose(**arguments, rank=1, name="fc")
