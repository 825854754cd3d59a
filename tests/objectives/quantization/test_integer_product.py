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
    exact_pieces,
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


def test_a_way_that_takes_far_longer_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def work() -> Tensor:
        calls.append(1)
        return torch.zeros(())

    clock = iter(float(second) for second in range(20))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    quickest: Callable[..., float] = integer_product._quickest
    assert quickest(work, worth=0.1) == 1.0
    assert len(calls) == 2  # the first call may have had a kernel to build
    assert quickest(work) == 1.0
    assert len(calls) == 7


@pytest.mark.parametrize("size", [(1, 300, 500), (200, 1100, 500), (200, 300, 1100)])
def test_few_rows_and_large_sizes_are_timed_for_themselves(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int]
) -> None:
    if not integer_product.integer_gemm_works("cpu"):
        pytest.skip(NO_UNITS)
    times = iter([2.0, 1.0, 1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(integer_product, "_quickest", lambda work, **_: next(times))
    assert integer_gemm_pays("cpu", 200, 300, 500)
    assert not integer_gemm_pays("cpu", *size)
    assert integer_gemm_pays(
        "cpu", *size, True
    )  # where float32 converts the weight each time, that is another question


def test_what_is_timed_is_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if not integer_product.integer_gemm_works("cpu"):
        pytest.skip(NO_UNITS)
    seen: list[Tensor] = []

    def quickest(work: Callable[[], Tensor], **_: float) -> float:
        seen.append(work())
        return 1.0

    monkeypatch.setattr(integer_product, "_quickest", quickest)
    for converted in (False, True):
        integer_gemm_pays("cpu", 3, 20, 40, converted)
    assert all(made.dtype == torch.float32 and torch.equal(made, torch.full((4, 64), 32 * 127.0**2)) for made in seen)
    assert len(seen) == 4


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
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(integer_product, "integer_gemm_pays", lambda *_, units=integer: units)
            flat = integer_product.integer_product(x[0].to(torch.int8), w[0].t().to(torch.int8))
        assert torch.equal(flat.to(torch.float32), expected[0])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 5, 40]),
    st.sampled_from([1, 17, 1023, 1024, 4100]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_products_of_words_are_exact(
    rows: int, channels: int, outputs: int, units: bool, keep: bool, seed: int
) -> None:
    """What float64 makes of int16 codes and weight, to the last integer, on integer units and without them."""
    if units and not integer_product.integer_gemm_works("cpu"):
        return
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-32768, 32768, (rows, channels), generator=generator).float()
    weight = torch.randint(-128, 128, (outputs, channels), generator=generator).to(torch.int8)
    codes[0], weight[0] = 32767 - 65535 * (seed % 2), -128  # the largest sums
    products = WeightProducts(lambda: weight, largest=128, keep=keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer_product, "integer_gemm_pays", lambda *_: units)
        product = products.of_words(codes)
    assert torch.equal(product.double(), codes.double() @ weight.double().t())


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize(("zero", "of_each"), [(0.0, 255), (255.0, -255)])
def test_the_widest_product_fits(monkeypatch: pytest.MonkeyPatch, units: bool, zero: float, of_each: int) -> None:
    if units and not integer_product.integer_gemm_works("cpu"):
        pytest.skip(NO_UNITS)
    monkeypatch.setattr(integer_product, "integer_gemm_pays", lambda *_: units)
    weight = torch.full((1, MOST_CHANNELS), -128, dtype=torch.int8)
    products = WeightProducts(lambda: weight, largest=255, keep=False)
    product = products.of_bytes(torch.full((1, MOST_CHANNELS), float(of_each)), torch.tensor(zero))
    assert int(product) == -128 * of_each * MOST_CHANNELS


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 3),
    st.sampled_from([128, 255]),
    st.sampled_from([1, 20, 127]),
    st.sampled_from([torch.int8, torch.float32]),
    st.integers(0, 2**31),
)
def test_no_piece_can_leave_what_float32_holds(
    channels: int, outputs: int, largest: int, spread: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-spread - 1, spread + 1, (outputs, channels), generator=generator)
    weight = codes.to(dtype)
    pieces = exact_pieces(channels, largest, weight)
    assert torch.equal(weight, codes.to(dtype))  # it only looks
    assert sum(pieces) == channels
    sums = [largest * int(part.abs().sum(dim=1).max()) for part in codes.split(pieces, dim=1)]
    assert max(sums) <= 2**24
    assert len(pieces) <= len(exact_pieces(channels, largest))
    if largest * int(codes.abs().sum(dim=1).max()) <= 2**24:
        assert pieces == [channels]


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
    """Codes of int8 (no zero point) and of uint8 minus their zero point, the largest sums among them, twice with what was kept of the first time."""
    if units and not integer_product.integer_gemm_works("cpu"):
        return
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, channels), generator=generator).to(torch.int8)
    zero = None
    if by_row is None:
        codes = torch.randint(-128, 128, (rows, channels), generator=generator).float()
        codes[0], weight[0] = -128, -128
    else:
        zero = torch.randint(0, 256, (rows, 1) if by_row else (), generator=generator).float()
        zero.view(-1)[0] = 0
        unsigned = torch.randint(0, 256, (rows, channels), generator=generator).float()
        unsigned[0], weight[0] = 255, -128
        codes = unsigned - zero
    expected = codes.double() @ weight.double().t()
    products = WeightProducts(lambda: weight, largest=128 if zero is None else 255, keep=keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer_product, "integer_gemm_pays", lambda *_: units)
        for _ in range(2):
            assert torch.equal(products.of_bytes(codes, zero).double(), expected)
