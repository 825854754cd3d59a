"""Whether integer units multiply is decided by time, and changes nothing but the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphasmith.objectives.quantization import integer_product
from alphasmith.objectives.quantization.integer_product import (
    MOST_CHANNELS,
    ExactProducts,
    WeightProducts,
    activation_product,
    integer_gemm_pays,
)

NO_UNITS = "no exact integer products on this processor: nothing is decided by time"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    integer_product._pays_on_cpu.cache_clear()
    yield
    integer_product._pays_on_cpu.cache_clear()


@pytest.mark.parametrize("decided", [True, False])
def test_the_quicker_way_is_taken_once_per_size(monkeypatch: pytest.MonkeyPatch, decided: bool) -> None:
    if not integer_product.integer_gemm_works("cpu"):
        pytest.skip(NO_UNITS)
    times = iter([2.0, 1.0] if decided else [1.0, 2.0])  # float32 first
    monkeypatch.setattr(integer_product, "_quickest", lambda work, **_: next(times))
    assert integer_gemm_pays("cpu", 200, 300, 500) is decided
    assert integer_gemm_pays("cpu", 256, 400, 400) is decided  # the same power of two above each
    with pytest.raises(StopIteration):
        integer_gemm_pays("cpu", 257, 400, 400)


def test_a_way_that_takes_far_longer_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def work() -> Tensor:
        calls.append(1)
        return torch.zeros(())

    clock = iter(float(second) for second in range(20))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    quickest: Callable[..., float] = integer_product._quickest
    assert quickest(work, worth=0.1) == 1.0
    assert len(calls) == 1
    assert quickest(work) == 1.0
    assert len(calls) == 6


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 5, 40]),
    st.sampled_from([1, 17, 1023, 1024, 2046, 4100]),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_both_ways_give_the_same_bits(stack: int, rows: int, channels: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (stack, rows, channels), generator=generator).to(torch.float32)
    w = torch.randint(-128, 128, (stack, channels, outputs), generator=generator).to(torch.float32)
    x[:, 0], w[:, :, 0] = -128.0, -128.0  # the largest sums
    expected = (x.double() @ w.double()).to(torch.float32)
    for integer in (False, True) if integer_product.integer_gemm_works("cpu") else (False,):
        products = ExactProducts(stack, rows + 2, channels, outputs, x.device, integer=integer)
        out = torch.empty(stack, rows, outputs)
        operand = products.operand(w)
        larger = torch.empty(stack, rows + 2, outputs)
        products.product(torch.full((stack, rows + 2, channels), 127.0), operand, larger)
        products.product(x, operand, out)  # what an earlier product left does not show
        assert torch.equal(out, expected)
        flat = integer_product.integer_product if integer else integer_product._in_slices
        assert torch.equal(flat(x[0].to(torch.int8), w[0].t().to(torch.int8)).to(torch.float32), expected[0])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.uint8, torch.int16]),
    st.sampled_from([1, 5, 40]),
    st.sampled_from([1, 17, 1023, 1024, 4100]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_products_of_other_codes_are_exact(
    dtype: torch.dtype, rows: int, channels: int, outputs: int, by_row: bool, units: bool, seed: int
) -> None:
    """What float64 makes of (code - zero) and weight, to the last integer, on integer units and without them."""
    if units and not integer_product.integer_gemm_works("cpu"):
        return
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 256) if dtype == torch.uint8 else (-32768, 32768)
    codes = torch.randint(low, high, (rows, channels), generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (outputs, channels), generator=generator).to(torch.int8)
    codes[0], weight[0] = high - 1, -128  # the largest sums
    zero = None
    if dtype == torch.uint8:
        zero = torch.randint(0, 256, (rows, 1) if by_row else (), generator=generator).float()
        zero.view(-1)[0] = 0
    expected = (codes.double() - (0 if zero is None else zero.double())) @ weight.double().t()
    sums = weight.sum(dim=1, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer_product, "integer_gemm_pays", lambda *_: units)
        product = activation_product(codes, weight, sums, zero)
    assert product.dtype in (torch.int32, torch.int64)
    assert torch.equal(product.double(), expected)


def test_the_widest_product_fits() -> None:
    codes = torch.full((1, MOST_CHANNELS), 255, dtype=torch.uint8)
    weight = torch.full((1, MOST_CHANNELS), -128, dtype=torch.int8)
    sums = weight.sum(dim=1, dtype=torch.int64)
    for zero, of_each in ((0.0, 255), (255.0, 0)):
        product = activation_product(codes, weight, sums, torch.tensor(zero))
        assert int(product) == -128 * of_each * MOST_CHANNELS


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 5, 40]),
    st.sampled_from([1, 17, 900, 1023, 1024, 4100]),
    st.integers(1, 9),
    st.sampled_from([None, False, True]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_products_of_a_weight_are_exact_whatever_it_keeps(
    rows: int, channels: int, outputs: int, by_row: bool | None, units: bool, keep: bool, seed: int
) -> None:
    """Codes of int8 (no zero point) and of uint8 minus 128, the largest sums among them, twice with what was kept of the first time."""
    if units and not integer_product.integer_gemm_works("cpu"):
        return
    generator = torch.Generator().manual_seed(seed)
    signed = torch.randint(-128, 128, (rows, channels), generator=generator).float()
    weight = torch.randint(-128, 128, (outputs, channels), generator=generator).to(torch.int8)
    signed[0], weight[0] = 127, -128
    zero = None
    if by_row is not None:
        zero = torch.randint(0, 256, (rows, 1) if by_row else (), generator=generator).float()
        zero.view(-1)[0] = 0
    from_zero = signed.double() if zero is None else signed.double() + 128 - zero.double()
    expected = from_zero @ weight.double().t()
    products = WeightProducts(lambda: weight, keep=keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer_product, "integer_gemm_pays", lambda *_: units)
        for _ in range(2):
            assert torch.equal(products.of_bytes(signed, zero).double(), expected)
