"""Work as bytes: what comes out is what went in, for every type of tensor."""

from __future__ import annotations

import pickle

import pytest
import torch

from alphasmith.search.engines.local._packing import packed

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)])
def test_tensors_come_back_to_the_bit_and_can_be_written_to(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    back = pickle.loads(packed({"a": (value, "text")}))["a"]
    assert back[1] == "text"
    assert back[0].dtype == dtype
    assert torch.equal(back[0], value)
    back[0].zero_()


def test_views_transposes_and_parameters_survive() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = [base.T, base[:, ::2], base[1:3], torch.nn.Parameter(base)]
    for back, view in zip(pickle.loads(packed(views)), views, strict=True):
        assert torch.equal(back, view)
    assert isinstance(pickle.loads(packed(views))[3], torch.nn.Parameter)


def test_a_slice_takes_only_its_own_bytes() -> None:
    assert len(packed(torch.zeros(1_000_000)[:10])) < 1000
