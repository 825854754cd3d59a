"""Losses: hand-computed values, invariants, and refusal of anything that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from alphasmith.objectives import losses
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.losses import (
    kl_divergence,
    mean_squared_error,
    relative_loss,
    relative_squared_error,
    squared_sum,
)
from tests.objectives.site_cases import relaxed


def random_pair(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_values_by_hand() -> None:
    out, ref = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    assert relative_squared_error(out, ref) == pytest.approx(4 / 17)
    assert mean_squared_error(out, ref) == pytest.approx(2.0)
    # Reference (1/2, 1/2), model (1/4, 3/4): ln 2 - (ln 3) / 2.
    assert kl_divergence(torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)) == pytest.approx(
        math.log(2) - math.log(3) / 2
    )


@relaxed
@given(st.integers(0, 2**31), st.floats(min_value=0.25, max_value=4.0))
def test_relative_error_has_no_unit_and_mean_error_has(seed: int, factor: float) -> None:
    out, ref = random_pair(seed, 3, 5)
    assert relative_squared_error(out * factor, ref * factor) == pytest.approx(
        relative_squared_error(out, ref), rel=1e-5
    )
    assert mean_squared_error(out * factor, ref * factor) == pytest.approx(
        factor**2 * mean_squared_error(out, ref), rel=1e-5
    )


@relaxed
@given(st.integers(0, 2**31))
def test_divergence_agrees_with_torch_and_ignores_constants(seed: int) -> None:
    logits, ref = random_pair(seed, 2, 4, 6)
    expected = functional.kl_div(
        logits.double().log_softmax(-1).view(8, 6),
        ref.double().log_softmax(-1).view(8, 6),
        reduction="batchmean",
        log_target=True,
    )
    assert kl_divergence(logits, ref) == pytest.approx(float(expected), rel=1e-9)
    assert kl_divergence(logits + 7, ref - 3) == pytest.approx(float(expected), rel=1e-5)


def test_equal_outputs_have_loss_exactly_zero() -> None:
    out, _ = random_pair(0, 4, 7)
    assert relative_squared_error(out, out) == 0.0
    assert mean_squared_error(out, out) == 0.0
    assert kl_divergence(out, out) == 0.0
    assert relative_squared_error(torch.zeros(3), torch.zeros(3)) == 0.0


def test_masked_rows_do_not_count() -> None:
    logits, ref = random_pair(1, 2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    spoiled = torch.where(mask[..., None], logits, float("nan"))
    assert kl_divergence(spoiled, ref, mask) == pytest.approx(kl_divergence(logits[mask], ref[mask]))
    with pytest.raises(NonFiniteError):
        kl_divergence(spoiled, ref)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ref = random_pair(2, 11, 5)
    whole = kl_divergence(logits, ref)
    monkeypatch.setattr(losses, "_CHUNK", 10)
    assert kl_divergence(logits, ref) == pytest.approx(whole, rel=1e-12)


def test_forbidden_classes() -> None:
    never = float("-inf")
    ref = torch.tensor([[0.0, 1.0, never]])
    assert kl_divergence(torch.tensor([[0.0, 1.0, never]]), ref) == 0.0
    assert kl_divergence(torch.tensor([[0.0, 1.0, -50.0]]), ref) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(NonFiniteError, match="divergence"):
        kl_divergence(torch.tensor([[0.0, never, 0.0]]), ref)


def test_sums_are_accumulated_in_double_precision() -> None:
    # In float32 the small entries would vanish against 2^24.
    values = torch.cat((torch.tensor([4096.0]), torch.full((1000,), 0.5)))
    assert squared_sum(values) == pytest.approx(2**24 + 250, rel=1e-12)
    assert squared_sum(torch.empty(0)) == 0.0


def test_half_precision_outputs_are_compared_in_float32() -> None:
    ref = torch.full((4,), 300.0, dtype=torch.float16)
    out = torch.full((4,), 0.0, dtype=torch.float16)
    assert mean_squared_error(out, ref) == 90000.0  # beyond the largest float16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_outputs_never_become_a_loss(bad: float) -> None:
    out, ref = torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0])
    for loss in (relative_squared_error, mean_squared_error, kl_divergence):
        with pytest.raises(NonFiniteError):
            loss(out, ref)
        with pytest.raises(NonFiniteError):
            loss(ref, out)


def test_an_error_against_nothing_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="all zero"):
        relative_squared_error(torch.ones(2), torch.zeros(2))
    for error, energy in ((math.nan, 1.0), (1.0, math.inf), (1e300, 1e-300)):
        with pytest.raises(NonFiniteError):
            relative_loss(error, energy)


def test_wrong_shapes_are_named() -> None:
    pair = torch.ones(2, 3), torch.ones(3)
    for loss in (relative_squared_error, mean_squared_error, kl_divergence):
        with pytest.raises(InputError, match=r"^out:"):
            loss(*pair)
        with pytest.raises(InputError, match=r"^out:"):
            loss(torch.ones(0), torch.ones(0))
    with pytest.raises(InputError, match=r"^mask:"):
        kl_divergence(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"^mask:"):
        kl_divergence(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(InputError, match=r"^logits:"):
        kl_divergence(torch.tensor(1.0), torch.tensor(1.0))
