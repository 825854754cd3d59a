"""The linear layer between integers: to the bit what its formulas say, whichever way multiplies, and no input passes unchecked."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.errors import NonFiniteError
from alphasmith.objectives.quantization import integer_product
from alphasmith.objectives.quantization.operator import OperatorTensors, QuantizedOperator
from alphasmith.objectives.quantization.quantizers import (
    activation_grid,
    code_grid,
    code_limits,
    quantize_activation,
    row_codes_,
    row_steps,
)
from alphasmith.objectives.quantization.saturating_pairs import SaturatingPairs
from alphasmith.objectives.quantization.scheme import QMAX, ActivationFormat, Scheme

NAMES = (
    *("w8a8-channel-static", "w8au8-channel-static", "w8a8-channel-token", "w8au8-channel-token"),
    *("w8a8-tensor-static", "w4a8-channel-token", "w4au8-channel-static", "w8ai16-channel-static"),
    *("w8au8-channel-static-pairs16", "w8a8-channel-token-pairs16"),
)


def made(name: str, linear: nn.Linear, x: Tensor, smooth: Tensor | None = None) -> QuantizedOperator:
    scheme = Scheme.parse(name)
    divided = x if smooth is None else x / smooth
    edges = (
        {"low": divided.amin() / 2, "high": divided.amax() / 2} if scheme.static else {}
    )  # half of the range is clipped
    inner = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    if linear.bias is not None:
        inner.bias.data.copy_(linear.bias)
    tensors = OperatorTensors(weight=linear.weight.detach().clone(), smooth=smooth, **edges)
    return QuantizedOperator.quantize(
        inner.requires_grad_(False), tensors, scheme=scheme, kind="linear", transposed=False
    )


def by_formula(operator: QuantizedOperator, rows: Tensor) -> Tensor:
    """The product of codes and weight in float64, rounded once, and then the scales: nothing that is used by the layer."""
    scheme, fmt = operator.scheme, operator.scheme.activations
    rows = rows if operator.smooth is None else rows / operator.smooth
    scale, zero = operator.input_scale, None if operator.input_zero is None else operator.input_zero.float()
    if scale is None:
        scale, zero = activation_grid(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), fmt)
    codes = quantize_activation(rows, scale, fmt, zero).values.double()
    weight = operator.integer_weight().double()
    product = (codes - (0 if zero is None else zero.double())) @ weight.t()
    if scheme.saturates:
        product += SaturatingPairs(weight).lost(codes + (128 if zero is None else 0))
    values, factor = product.float(), operator.weight_scale.reshape(-1)
    values, factor = (values, factor * scale) if scale.dim() == 0 else (values * scale, factor)
    bias = operator.corrected(operator.correction)
    return values * factor if bias is None else torch.addcmul(bias, values, factor.expand(len(bias)).contiguous())


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([1, 3, 40]),
    st.sampled_from([1, 8, 13, 700, 1500]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 1e-3, 1e30]),
    st.integers(0, 2**31),
)
def test_every_way_gives_the_bits_of_the_formula(
    name: str, rows: int, channels: int, outputs: int, bias: bool, smoothed: bool, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(rows, channels, generator=generator)
    x[0] = 0.0 if seed % 3 == 0 else x[0]
    x[-1, 0] = 0.5 * size  # a range that is not empty
    linear = nn.Linear(channels, outputs, bias=bias).requires_grad_(False)
    linear.weight.copy_(torch.rand(outputs, channels, generator=generator) - (0.1 if seed % 2 else 0.5))  # large sums
    operator = made(name, linear, x, torch.rand(channels, generator=generator) + 0.5 if smoothed else None)
    expected = by_formula(operator, x)
    for units in (False, True) if integer_product.integer_gemm_works("cpu") else (False,):
        for keep in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(integer_product, "integer_gemm_pays", lambda *_, units=units: units)
                operator.keep_codes = keep
                operator._forget()
                for _ in range(2):  # the second with what the first has kept
                    assert torch.equal(operator(x), expected)
                assert torch.equal(operator(x.view(1, rows, channels)), expected.view(1, rows, outputs))
                assert torch.equal(operator(x[0]), expected[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_an_odd_number_in_any_row_is_refused(name: str, odd: float) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    operator = made(name, nn.Linear(16, 4).requires_grad_(False), x)
    operator(x)
    for row, column in ((0, 0), (2, 7), (4, 15)):
        spoilt = x.clone()
        spoilt[row, column] = odd
        with pytest.raises(NonFiniteError, match="activation"):
            operator(spoilt)


@pytest.mark.parametrize("name", NAMES)
def test_large_numbers_whose_sum_is_infinite_are_no_odd_ones(name: str) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    operator = made(name, nn.Linear(16, 4).requires_grad_(False), x)
    largest = torch.finfo(torch.float32).max
    assert torch.equal(
        operator(torch.full_like(x, largest)).isfinite(), by_formula(operator, torch.full_like(x, largest)).isfinite()
    )


@pytest.mark.parametrize("name", ["w8a8-channel-static", "w8au8-channel-static"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_static_scale_that_is_no_number_is_refused(name: str, bad: float) -> None:
    x = torch.randn(5, 16)
    operator = made(name, nn.Linear(16, 4).requires_grad_(False), x)
    operator.weight_values.copy_(operator.weight_values)
    held = list(operator.held())
    held[2] = torch.tensor(bad)
    operator.take(tuple(held))
    with pytest.raises(NonFiniteError, match="scale"):
        operator(x)


@pytest.mark.parametrize("keep", [False, True])
def test_a_payload_that_is_loaded_in_place_counts(keep: bool) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    one, other = (made("w8au8-channel-static", nn.Linear(16, 4).requires_grad_(False), size * x) for size in (1, 3))
    one.keep_codes = other.keep_codes = one.keep_dense = keep
    before, expected = one(x), other(x)
    assert not torch.equal(before, expected)
    holder = nn.ModuleList([one])
    holder.load_state_dict(nn.ModuleList([other]).state_dict())
    assert torch.equal(one(x), expected)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_that_is_trained_gets_its_gradient(name: str) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    operator = made(name, nn.Linear(16, 4).requires_grad_(False), x)
    bias = operator.inner.bias
    assert isinstance(bias, nn.Parameter)
    bias.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator(x.requires_grad_(True)).sum().backward()
    assert torch.equal(torch.as_tensor(bias.grad), torch.full((4,), 5.0))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["int8", "uint8"]),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
)
def test_steps_of_rows_are_those_of_their_ranges(fmt: ActivationFormat, values: list[float]) -> None:
    """Also of rows as large and as small as float32 goes; of a row of zeros the codes are."""
    row = torch.tensor([values])
    scale, zero = row_steps(row, fmt)
    expected = code_grid(row.amin(1, keepdim=True), row.amax(1, keepdim=True), fmt)
    codes = row_codes_(row / scale, zero)
    if row.any():
        assert torch.equal(scale, expected.scale)
        assert zero is None or torch.equal(zero, torch.as_tensor(expected.zero))
    want = quantize_activation(row, expected.scale, fmt, expected.zero).values.float()
    assert torch.equal(codes + 0.0, want - (0.0 if expected.zero is None else expected.zero) + 0.0)
    assert float(codes.abs().max()) <= QMAX[fmt]


def test_limits_of_codes_are_counted_from_their_zero_point() -> None:
    assert code_limits("int8") == (-128, 127)
    assert code_limits("int16") == (-32768, 32767)
    assert code_limits("uint8", 3.0) == (-3, 252)
