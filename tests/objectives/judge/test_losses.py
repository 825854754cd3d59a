"""Losses: hand-computed values, invariants, and refusal of anything that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge import losses
from alphasmith.objectives.judge.losses import divergences, relative_loss, squared_sum
from tests.support.plain_forms import kl_divergence
from tests.support.site_cases import relaxed


def random_pair(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_values_by_hand() -> None:
    assert relative_loss(4.0, 17.0) == pytest.approx(4 / 17)
    # Reference (1/2, 1/2), model (1/4, 3/4): ln 2 - (ln 3) / 2.
    rows = divergences(torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.zeros(2, 2))
    assert rows.tolist() == pytest.approx([math.log(2) - math.log(3) / 2, 0.0])


@relaxed
@given(st.integers(0, 2**31))
def test_divergence_agrees_with_torch_and_ignores_constants(seed: int) -> None:
    logits, ref = random_pair(seed, 2, 4, 6)
    assert divergences(logits, ref).shape == (2, 4)
    assert float(divergences(logits, ref).mean()) == pytest.approx(kl_divergence(logits, ref), rel=1e-9)
    assert float(divergences(logits + 7, ref - 3).mean()) == pytest.approx(kl_divergence(logits, ref), rel=1e-5)


def test_equal_outputs_have_loss_exactly_zero() -> None:
    out, _ = random_pair(0, 4, 7)
    assert not bool(divergences(out, out).any())
    assert relative_loss(0.0, 0.0) == 0.0
    assert relative_loss(0.0, 3.0) == 0.0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ref = random_pair(2, 11, 5)
    whole = divergences(logits, ref)
    monkeypatch.setattr(losses, "_CHUNK", 10)
    assert torch.equal(divergences(logits, ref), whole)


def test_forbidden_classes() -> None:
    never = float("-inf")
    ref = torch.tensor([[0.0, 1.0, never]])
    assert float(divergences(torch.tensor([[0.0, 1.0, never]]), ref)) == 0.0
    assert float(divergences(torch.tensor([[0.0, 1.0, -50.0]]), ref)) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(NonFiniteError, match="divergence"):
        divergences(torch.tensor([[0.0, never, 0.0]]), ref)


def test_sums_are_accumulated_in_double_precision() -> None:
    # In float32 the small entries would vanish against 2^24.
    values = torch.cat((torch.tensor([4096.0]), torch.full((1000,), 0.5)))
    assert squared_sum(values) == pytest.approx(2**24 + 250, rel=1e-12)
    assert squared_sum(torch.empty(0)) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_outputs_never_become_a_loss(bad: float) -> None:
    out, ref = torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0])
    for pair in ((out, ref), (ref, out)):
        with pytest.raises(NonFiniteError):
            divergences(*pair)
    for error, energy in ((bad, 1.0), (1.0, bad), (1e300, 1e-300)):
        with pytest.raises(NonFiniteError):
            relative_loss(error, energy)


def test_an_error_against_nothing_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="all zero"):
        relative_loss(2.0, 0.0)


def test_wrong_shapes_are_named() -> None:
    for pair in ((torch.ones(2, 3), torch.ones(3)), (torch.ones(0), torch.ones(0))):
        with pytest.raises(InputError, match=r"^out:"):
            divergences(*pair)
    with pytest.raises(InputError, match=r"^logits:"):
        divergences(torch.tensor(1.0), torch.tensor(1.0))
