"""Quantizers: bounds, symmetries, exact round trips and agreement with a scalar reading of formula fA4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.quantization.quantizers import (
    QuantizedTensor,
    activation_grid,
    activation_scale,
    byte_zero,
    dequantize_weight,
    fake_quantize_activation,
    pack_int4,
    quantize_activation,
    quantize_weight,
    round_bytes_,
    unpack_int4,
)
from alphasmith.objectives.quantization.scheme import FLOAT, QMAX, ActivationFormat, Scheme
from tests.support.naive_site import naive_quantize, naive_weight
from tests.support.plain_forms import fake_quantize_weight
from tests.support.site_cases import SCHEMES, relaxed

INT8 = Scheme(weights="int8", weight_granularity="tensor", activations="none")

finite = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 8)).flatmap(
    lambda shape: st.lists(
        st.lists(finite, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    ).map(lambda rows: torch.tensor(rows, dtype=torch.float32))
)
schemes = st.sampled_from(SCHEMES)


@relaxed
@given(matrices, schemes)
def test_scales_have_the_documented_shape_and_codes_their_range(w: torch.Tensor, scheme: Scheme) -> None:
    q = quantize_weight(w, scheme)
    groups = -(-w.shape[1] // 3)
    shapes = {"tensor": (), "channel": (w.shape[0], 1), "group": (w.shape[0], groups)}
    assert tuple(q.scale.shape) == shapes[scheme.weight_granularity]
    assert q.values.dtype == (torch.float8_e4m3fn if scheme.weights == "fp8" else torch.int8)
    assert float(q.values.float().abs().max()) <= QMAX[scheme.weights]
    assert bool((q.scale > 0).all())


@relaxed
@given(matrices, schemes)
def test_error_is_at_most_half_a_step(w: torch.Tensor, scheme: Scheme) -> None:
    q = quantize_weight(w, scheme)
    scale = q.scale.double()
    if scheme.weight_granularity == "group":
        scale = scale.repeat_interleave(3, dim=1)[:, : w.shape[1]]
    step = scale
    if scheme.weights == "fp8":  # e4m3 spacing: an eighth of the binade, at least the subnormal spacing
        magnitude = (w.double() / scale).abs().clamp_min(2.0**-6)
        step = scale * magnitude.log2().floor().exp2() / 8
    # Division and product round once each in float32.
    error = (dequantize_weight(q, scheme).double() - w.double()).abs()
    assert bool((error <= step / 2 + 3 * torch.finfo(torch.float32).eps * w.double().abs() + 1e-37).all())


@relaxed
@given(matrices, schemes, st.integers(-20, 20))
def test_symmetric_in_sign_and_in_powers_of_two(w: torch.Tensor, scheme: Scheme, power: int) -> None:
    # Above the smallest normal numbers multiplying by 2^n changes no mantissa.
    w = torch.where(w.abs() < 1e-20, 0.0, w)
    fake = fake_quantize_weight(w, scheme)
    assert torch.equal(fake_quantize_weight(-w, scheme), -fake)
    torch.testing.assert_close(fake_quantize_weight(w * 2.0**power, scheme), fake * 2.0**power, rtol=1e-6, atol=0)


@relaxed
@given(st.integers(0, 2**31), schemes)
def test_agrees_with_scalar_loops_per_operator(seed: int, scheme: Scheme) -> None:
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    w[:, 2] = 0.0
    w[4] = 0.0
    expected = naive_weight(w.numpy(), scheme, (3, 2))
    np.testing.assert_allclose(fake_quantize_weight(w, scheme, (3, 2)).numpy(), expected, rtol=1e-6)


def test_per_tensor_scale_is_one_per_operator() -> None:
    w = torch.cat((torch.full((2, 3), 100.0), torch.full((1, 3), 0.1)))
    separate = fake_quantize_weight(w, INT8, (2, 1))
    assert float(separate[2, 0]) == pytest.approx(0.1)
    assert float(fake_quantize_weight(w, INT8)[2, 0]) == 0.0


def test_rounds_half_to_even() -> None:
    w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_weight(w, INT8).values.tolist() == [[127, 0, 2, 2, 0, -2]]
    # 17 lies midway between the e4m3 neighbours 16 and 18; 16 has the even mantissa. 19 lies between 18 and 20.
    w = torch.tensor([[448.0, 17.0, 19.0]])
    fp8 = Scheme(weights="fp8", weight_granularity="tensor", activations="none")
    assert fake_quantize_weight(w, fp8).tolist() == [[448.0, 16.0, 20.0]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_zero_blocks_have_scale_one(scheme: Scheme) -> None:
    q = quantize_weight(torch.zeros(2, 5), scheme)
    assert bool((q.scale == 1).all())
    assert not bool(dequantize_weight(q, scheme).any())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, torch.finfo(torch.float32).max])
def test_extreme_magnitudes_stay_finite(scheme: Scheme, magnitude: float) -> None:
    w = magnitude * torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.25, 1.0]])
    fake = fake_quantize_weight(w, scheme)
    assert bool(torch.isfinite(fake).all())
    assert bool(((fake - w).abs() <= w.abs()).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_and_activations_are_refused(bad: float) -> None:
    values = torch.tensor([[1.0, bad]])
    one = torch.tensor(1.0)
    with pytest.raises(NonFiniteError):
        quantize_weight(values, INT8)
    with pytest.raises(NonFiniteError):
        fake_quantize_activation(values, one, "int8")
    with pytest.raises(NonFiniteError):
        quantize_activation(torch.ones(1, 2), torch.tensor(bad), "int8")
    with pytest.raises(NonFiniteError):
        activation_scale(values, "int8")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"^w:"):
        quantize_weight(torch.ones(3), INT8)
    with pytest.raises(InputError, match=r"^w:"):
        quantize_weight(torch.ones(0, 3), INT8)
    with pytest.raises(InputError, match=r"^q\.scale:"):
        dequantize_weight(QuantizedTensor(torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 1)), INT8)
    with pytest.raises(InputError, match=r"^absmax:"):
        activation_scale(torch.tensor(-1.0), "int8")
    with pytest.raises(InputError, match=r"^fmt:"):
        activation_scale(torch.tensor(1.0), "none")
    with pytest.raises(InputError, match=r"^fmt:"):
        quantize_activation(torch.ones(2), torch.tensor(1.0), "none")


@relaxed
@given(matrices, st.sampled_from(["int8", "int16", "fp8"]), st.booleans())
def test_activations_round_to_their_scale(x: torch.Tensor, fmt: ActivationFormat, per_token: bool) -> None:
    absmax = x.abs().amax(dim=1, keepdim=True) if per_token else x.abs().max()
    scale = activation_scale(absmax, fmt)
    before = x.clone()
    q = quantize_activation(x, scale, fmt)
    fake = fake_quantize_activation(x, scale, fmt)
    assert torch.equal(fake, q.values.float() * scale)
    assert torch.equal(x, before)
    rows = zip(
        x.numpy(),
        scale.expand(x.shape[0], 1).reshape(-1).numpy() if per_token else [scale.numpy()] * len(x),
        strict=True,
    )
    if float(x.abs().max()) == 0 or float(x[x != 0].abs().min()) > 1e-30:  # scalar loops have no smallest scale
        expected = [naive_quantize(list(row), np.float32(step), fmt) for row, step in rows]
        np.testing.assert_allclose(fake.numpy(), expected, rtol=1e-6)


@relaxed
@given(matrices, st.booleans())
def test_codes_with_a_zero_point_span_the_range(x: torch.Tensor, per_token: bool) -> None:
    edges = (x.amin(1, True), x.amax(1, True)) if per_token else (x.min(), x.max())
    scale, zero = activation_grid(*edges, "uint8")
    assert zero is not None
    q = quantize_activation(x, scale, "uint8", zero)
    fake = fake_quantize_activation(x, scale, "uint8", zero)
    assert q.values.dtype == torch.uint8
    assert torch.equal(fake, (q.values.float() - zero) * scale)
    assert bool(((zero >= 0) & (zero <= 255) & (zero == zero.round())).all())
    # 0 is a code, whatever the range: padding stays what it is.
    assert not bool(fake_quantize_activation(torch.zeros_like(x), scale, "uint8", zero).any())
    # Nothing lies outside of the range, so every value is within half a step, up to float32 rounding of quotient and product.
    error = (fake.double() - x.double()).abs()
    assert bool((error <= 0.5 * scale.double() * (1 + 1e-4) + 3e-7 * x.double().abs() + 1e-37).all())
    # Signed bytes are the same codes, 128 lower.
    signed = round_bytes_(x / scale, "uint8", zero)
    assert torch.equal(signed + 128, q.values.float())
    assert torch.equal(byte_zero(zero) + 128, zero)
    # The mirrored rows have the mirrored grid.
    mirrored, _ = activation_grid(-edges[1], -edges[0], "uint8")
    torch.testing.assert_close(mirrored, scale)


@relaxed
@given(matrices, st.floats(0.1, 3.0))
def test_values_of_one_sign_have_half_the_steps_of_symmetric_codes(x: torch.Tensor, factor: float) -> None:
    x = x.abs() * factor
    if float(x.max()) < 1e-30:
        return
    scale, zero = activation_grid(x.min(), x.max(), "uint8")
    symmetric = activation_scale(x.max(), "int8")
    assert float(scale / symmetric) == pytest.approx(127 / 255, rel=1e-6)
    assert zero is not None
    assert float(zero) == 0


def test_zero_points_go_with_their_format() -> None:
    one = torch.tensor(1.0)
    with pytest.raises(InputError, match="zero: contradicts uint8"):
        quantize_activation(torch.ones(2), one, "uint8")
    with pytest.raises(InputError, match="zero: contradicts int8"):
        fake_quantize_activation(torch.ones(2), one, "int8", one)
    with pytest.raises(InputError, match=r"fmt: 'uint8' spans a range"):
        activation_scale(one, "uint8")
    with pytest.raises(NonFiniteError):
        activation_grid(torch.tensor(float("-inf")), one, "uint8")
    with pytest.raises(InputError, match=r"^scheme\.weights:"):
        quantize_weight(torch.ones(2, 2), FLOAT)
    scale, zero = activation_grid(torch.tensor(0.0), torch.tensor(0.0), "uint8")
    assert (float(scale), float(torch.as_tensor(zero))) == (1.0, 0.0)


def test_activations_beyond_the_range_are_clipped_and_none_passes_through() -> None:
    scale = activation_scale(torch.tensor(127.0), "int8")
    x = torch.tensor([300.0, -300.0, 1.2])
    assert fake_quantize_activation(x, scale, "int8").tolist() == [127.0, -128.0, 1.0]
    assert fake_quantize_activation(x, activation_scale(torch.tensor(448.0), "fp8"), "fp8").tolist()[:2] == [
        288.0,
        -288.0,
    ]
    assert fake_quantize_activation(torch.tensor([1e4]), torch.tensor(1.0), "fp8").tolist() == [448.0]
    assert torch.equal(fake_quantize_activation(x, scale, "none"), x)


@relaxed
@given(st.lists(st.lists(st.integers(-8, 7), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(0, 5))
def test_int4_pairs_survive_packing(rows: list[list[int]], width: int) -> None:
    codes = torch.tensor(rows, dtype=torch.int8)[:, :width]
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == (len(rows), (width + 1) // 2)
    assert torch.equal(unpack_int4(packed, width), codes)


def test_int4_layout_is_low_half_first() -> None:
    assert pack_int4(torch.tensor([1, -1, 3], dtype=torch.int8)).tolist() == [0xF1, 0x03]


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"^values:"):
        pack_int4(torch.tensor([8], dtype=torch.int8))
    with pytest.raises(InputError, match=r"^values:"):
        pack_int4(torch.tensor([1.0]))
    with pytest.raises(InputError, match=r"^packed:"):
        unpack_int4(torch.tensor([1]), 2)
    with pytest.raises(InputError, match=r"^last_dim:"):
        unpack_int4(torch.tensor([1], dtype=torch.uint8), 3)
