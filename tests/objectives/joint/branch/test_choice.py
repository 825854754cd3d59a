"""Alpha and rank chosen together: within the bytes, never worse than what it holds, and nothing measured twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.branch.choice import LayerErrors, choose_alpha_and_rank, ranks_within
from alphasmith.objectives.joint.branch.encoding import branch_layer
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.branch.stored import stored_size
from tests.support.joint_branches import channels_apart, low_rank_under_noise

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = low_rank_under_noise(40, 48, 5, 0.2, GENERATOR)
ROWS = channels_apart(120, 48, GENERATOR)
BOOK, CODES = BranchSettings(residual="codebook", k=16), BranchSettings(residual="int4")


def test_the_choice_is_the_best_of_what_fits() -> None:
    budget = 48 * 40 * 7 // 8
    found = choose_alpha_and_rank(WEIGHT, ROWS, budget, [BOOK, CODES], alphas=(None, 0.3, 0.7))
    errors = [one.error for one in found.tried if one.error is not None]
    assert len(errors) == len(found.tried) == len({one.settings for one in found.tried})
    assert found.best.error == min(errors)
    assert all(one.stored_bytes <= budget for one in found.tried)
    assert {one.settings.alpha for one in found.tried} == {None, 0.3, 0.7}
    assert {one.settings.residual for one in found.tried} == {"codebook", "int4"}
    made = branch_layer(WEIGHT, ROWS, found.best.settings)
    assert made.error == found.best.error
    assert made.stored_bytes == found.best.stored_bytes


def test_together_is_never_worse_than_either_alone_on_the_rows_it_saw() -> None:
    budget = 48 * 40 * 7 // 8
    together = choose_alpha_and_rank(WEIGHT, ROWS, budget, [BOOK]).best.error
    alpha = choose_alpha_and_rank(WEIGHT, ROWS, budget, [BOOK], ranks=[0]).best.error
    rank = choose_alpha_and_rank(WEIGHT, ROWS, budget, [BOOK], alphas=[None]).best.error
    assert together is not None
    assert alpha is not None
    assert rank is not None
    assert together <= min(alpha, rank)


def test_the_largest_rank_fills_the_bytes() -> None:
    for settings in (BOOK, CODES, replace(CODES, branch_bits=8, alpha=None)):
        for budget in (900, 1400, 1700, 2500):
            ranks = ranks_within(WEIGHT, budget, settings)
            sizes = [stored_size(WEIGHT.shape, replace(settings, rank=rank)) for rank in ranks]
            assert all(size <= budget for size in sizes)
            if ranks and ranks[-1] < 21:
                assert stored_size(WEIGHT.shape, replace(settings, rank=ranks[-1] + 1)) > budget


def test_singular_values_are_found_once_an_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    bare = torch.linalg.svd

    def counted(matrix: torch.Tensor, full_matrices: bool = True) -> Any:
        calls.append(matrix.shape)
        return bare(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    errors = LayerErrors(WEIGHT, ROWS)
    candidates = [replace(BOOK, alpha=alpha, rank=rank) for alpha in (0.2, 0.6) for rank in (0, 2, 5)]
    first = [errors.error(one) for one in candidates]
    assert len(calls) == 2
    assert [errors.error(one) for one in candidates] == first
    assert len(calls) == 2


def test_candidates_that_fail_say_why_and_cannot_win() -> None:
    errors = LayerErrors(WEIGHT, ROWS)
    failed = errors.error(replace(CODES, rank=40))
    assert failed.error is None
    assert failed.reason.startswith("branch.rank: 40 is above 21")
    found = choose_alpha_and_rank(WEIGHT, ROWS, 10**6, [CODES], ranks=[40, 3], alphas=[0.5], errors=errors)
    assert found.best.settings.rank == 3
    assert failed in found.tried
    with pytest.raises(InputError, match=r"^fc: every candidate fails"):
        choose_alpha_and_rank(WEIGHT, ROWS, 10**6, [CODES], ranks=[40], alphas=[0.5], name="fc")
    with pytest.raises(InputError, match=r"^budget: 10 bytes hold no form of fc; give 1120 bytes or more"):
        choose_alpha_and_rank(WEIGHT, ROWS, 10, [replace(CODES, activation_bits=None)], name="fc")
