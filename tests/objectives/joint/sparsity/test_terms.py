"""Sparsity terms: their values by hand, their gradients, and what they do to scales that are trained."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.sparsity.targets import SparsityTargets
from alphasmith.objectives.joint.sparsity.terms import SparsitySettings, sparsity_terms
from alphasmith.objectives.literals import SparsityKind

TARGETS = SparsityTargets(encoder=("0.weight", "1.weight"), recurrent=("2.weight",), skipped={}, warnings=())


def model_of(*scales: list[float]) -> Any:
    """Normalizations with given scales."""
    model = nn.Sequential(*(nn.LayerNorm(len(gamma)) for gamma in scales))
    for norm, gamma in zip(model, scales, strict=True):
        norm.weight = nn.Parameter(torch.tensor(gamma))
    return model


@pytest.mark.parametrize(
    ("kind", "first", "second"), [("l1", 12.0, 6.0), ("hoyer", 7 / 5 + 5 / math.sqrt(13), 1.0), ("l2sq", 38.0, 36.0)]
)
def test_values_are_those_of_the_formula(kind: SparsityKind, first: float, second: float) -> None:
    model = model_of([3.0, -4.0], [2.0, 0.0, 3.0], [-6.0])
    terms = sparsity_terms(model, TARGETS, SparsitySettings(kind=kind, encoder=0.5, recurrent=2.0))
    assert float(terms.first) == pytest.approx(0.5 * first)
    assert float(terms.second) == pytest.approx(2.0 * second)
    assert float(terms.total) == pytest.approx(float(terms.first) + float(terms.second))


def test_the_gradient_of_l1_is_lambda_times_the_sign() -> None:
    model = model_of([3.0, -4.0], [2.0, 0.0, 3.0], [-6.0])
    sparsity_terms(model, TARGETS, SparsitySettings(encoder=0.5, recurrent=2.0)).total.backward()
    assert [norm.weight.grad.tolist() for norm in model] == [[0.5, -0.5], [0.5, 0.0, 0.5], [-2.0]]


def test_l1_makes_zeros_and_squares_do_not() -> None:
    gammas = {}
    kinds: tuple[SparsityKind, ...] = ("l1", "l2sq")
    for kind in kinds:
        model = model_of([1.0, 0.5, 0.01], [1.0], [1.0])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(60):
            optimizer.zero_grad()
            sparsity_terms(model, TARGETS, SparsitySettings(kind=kind, encoder=0.05, recurrent=0.0)).total.backward()
            optimizer.step()
        gammas[kind] = model[0].weight.detach()
        assert float(model[2].weight) == 1.0
    assert abs(float(gammas["l1"][2])) < 0.0051
    assert float(gammas["l2sq"][2]) > 0.0051


def test_hoyer_knows_no_size_and_no_division_by_zero() -> None:
    small, large = (model_of([a, 2 * a], [a], [a]) for a in (1e-30, 1e15))
    settings = SparsitySettings(kind="hoyer")
    assert float(sparsity_terms(small, TARGETS, settings).first) == pytest.approx(
        float(sparsity_terms(large, TARGETS, settings).first), rel=1e-5
    )
    dead = model_of([0.0, 0.0], [0.0], [0.0])
    terms = sparsity_terms(dead, TARGETS, settings)
    terms.total.backward()
    assert float(terms.total) == 0
    assert all(bool(torch.isfinite(p.grad).all()) for p in dead.parameters() if p.grad is not None)


def test_an_empty_term_is_zero() -> None:
    empty = SparsityTargets(encoder=(), recurrent=(), skipped={}, warnings=())
    assert float(sparsity_terms(model_of([1.0]), empty, SparsitySettings()).total) == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"kind": "l0"}, "reg.kind"), ({"encoder": -1.0}, "reg.encoder"), ({"recurrent": math.nan}, "reg.recurrent")],
)
def test_wrong_settings_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        sparsity_terms(model_of([1.0], [1.0], [1.0]), TARGETS, SparsitySettings(**settings))
    assert caught.value.field == field


def test_targets_of_another_model_are_refused() -> None:
    other = copy.deepcopy(model_of([1.0]))
    with pytest.raises(InputError, match=r"^1\.weight: is no parameter of the model"):
        sparsity_terms(other, TARGETS, SparsitySettings())
