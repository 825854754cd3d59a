"""One pass over a tensor says what ``torch.isfinite`` says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.finite import all_finite

NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(values=st.lists(NUMBERS, max_size=40), rows=st.integers(1, 3))
def test_it_agrees_with_every_element(values: list[float], rows: int) -> None:
    tensor = torch.tensor([values] * rows, dtype=torch.float32).reshape(rows, len(values))
    assert all_finite(tensor) == all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, 4095])
def test_one_odd_element_is_seen_wherever_it_is(dtype: torch.dtype, odd: float, place: int) -> None:
    values = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(values)
    values.view(-1)[place] = odd
    assert not all_finite(values)
    assert not all_finite(values.T)
