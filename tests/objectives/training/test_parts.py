"""Rounding and its gradients, the order of samples, the float model's outputs, the paired comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.quantizers import fake_quantize_activation, row_grid
from alphasmith.objectives.quantization.scheme import QMAX, ActivationFormat, WeightFormat
from alphasmith.objectives.training._rounding import rounded, rounded_by_row
from alphasmith.objectives.training._teacher import TeacherOutputs
from alphasmith.objectives.training._verdict import paired
from alphasmith.objectives.training.sampler import EndlessOrder
from tests.support.training import Rows, reader


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("shape", [(), (7, 1), (7, 3, 1)], ids=["tensor", "channel", "group"])
def test_gradients_are_those_of_the_formulas(fmt: WeightFormat, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 11, generator=generator) if len(shape) == 3 else torch.randn(7, 33, generator=generator)
    x = x.requires_grad_()
    # So small that the largest values are clipped.
    scale = (0.5 + torch.rand(shape, generator=generator)) * 1.5 / QMAX[fmt]
    scale.requires_grad_()
    weights = torch.randn(x.shape, generator=generator)
    out = rounded(x, scale, fmt)
    (out * weights).sum().backward()
    codes, qmax = (out / scale).detach(), QMAX[fmt]
    ratio = (x / scale).detach()
    low, high = (-qmax, qmax) if fmt == "fp8" else (-qmax - 1, qmax)
    half = 0 if fmt == "fp8" else 0.5
    inside = (ratio >= low - half) & (ratio <= high + half)
    assert 0 < int((~inside).sum()) < x.numel() / 2
    torch.testing.assert_close(x.grad, weights * inside)
    single = weights * torch.where(inside, codes - ratio, codes)
    shared = x.numel() // max(1, scale.numel())
    expected = single.sum_to_size(shape) / math.sqrt(shared * qmax)
    torch.testing.assert_close(scale.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shifted", "divided"), [(True, False), (False, True), (True, True)])
def test_smoothing_within_the_rounding_is_smoothing_before_it(shifted: bool, divided: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 33, generator=generator, dtype=dtype)
    shift = torch.randn(33, generator=generator) if shifted else None
    smooth = 0.5 + torch.rand(33, generator=generator) if divided else None
    weights = torch.randn(7, 33, generator=generator, dtype=dtype)
    found = []
    for within in (True, False):
        leaf, scale = x.clone().requires_grad_(), torch.tensor(1 / QMAX["int8"]).requires_grad_()
        if within:
            out = rounded(leaf, scale, "int8", shift=shift, smooth=smooth)
        else:
            moved = leaf if shift is None else leaf - shift
            moved = moved if smooth is None else moved / smooth
            out = rounded(moved.float(), scale, "int8").to(dtype)
        (out * weights).sum().backward()
        found.append((out.detach(), torch.as_tensor(leaf.grad), torch.as_tensor(scale.grad)))
    (out, by_input, by_scale), (other, other_input, other_scale) = found
    assert torch.equal(out, other)
    assert out.dtype == by_input.dtype == dtype
    torch.testing.assert_close(by_input, other_input)
    torch.testing.assert_close(by_scale, other_scale)


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("shape", [(), (7, 1)], ids=["tensor", "channel"])
def test_the_largest_value_of_a_block_is_within_the_range(fmt: WeightFormat, shape: tuple[int, ...]) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(3))
    peak = x.abs().amax(1, keepdim=True) if shape else x.abs().amax()
    x.requires_grad_()
    rounded(x, peak / QMAX[fmt], fmt).sum().backward()
    assert torch.equal(torch.as_tensor(x.grad), torch.ones(7, 33))


@pytest.mark.parametrize("shape", [(), (7, 1)], ids=["tensor", "channel"])
def test_a_scale_that_fell_to_zero_has_a_gradient_that_is_no_number(shape: tuple[int, ...]) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(4)).requires_grad_()
    scale = torch.zeros(shape).requires_grad_()
    rounded(x, scale, "int8").sum().backward()
    assert not torch.isfinite(torch.as_tensor(scale.grad)).any()


def test_a_range_with_a_zero_point_ends_where_its_codes_do() -> None:
    """Gradients pass up to half a step beyond either end; that of the scale is LSQ's, with codes counted from the zero point."""
    scale, zero = torch.tensor(0.5, requires_grad=True), torch.tensor(55, dtype=torch.uint8)
    x = torch.tensor([-28.0, -27.7, -27.2, 0.1, 99.9, 100.2, 100.3], requires_grad=True)
    out = rounded(x, scale, "uint8", zero=zero)
    assert out.tolist() == [-27.5, -27.5, -27.0, 0.0, 100.0, 100.0, 100.0]
    out.sum().backward()
    assert torch.as_tensor(x.grad).tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    expected = ((out.detach() - x.detach() * inside) / 0.5).sum() / (7 * QMAX["uint8"]) ** 0.5
    assert float(torch.as_tensor(scale.grad)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("fmt", ["int8", "uint8", "fp8"])
def test_rows_with_a_scale_of_their_own_pass_every_gradient(fmt: ActivationFormat) -> None:
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = rounded_by_row(x, (-1,), fmt)
    scale, zero = row_grid(x.detach(), (-1,), fmt)
    assert torch.equal(out.detach(), fake_quantize_activation(x.detach(), scale, fmt, zero))
    weights = torch.randn(5, 4, 6)
    (out * weights).sum().backward()
    assert torch.equal(torch.as_tensor(x.grad), weights)
    assert torch.equal(rounded_by_row(torch.zeros(2, 3), (-1,), fmt), torch.zeros(2, 3))


@settings(deadline=None)
@given(
    samples=st.integers(1, 23), seed=st.integers(0, 2**40), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=12)
)
def test_every_pass_takes_every_sample_once_however_it_is_cut(samples: int, seed: int, cuts: Sequence[int]) -> None:
    order = EndlessOrder(samples, seed)
    drawn = [number for count in cuts for number in order.draw(count)]
    for start in range(0, len(drawn) - samples + 1, samples):
        assert sorted(drawn[start : start + samples]) == list(range(samples))
    again = EndlessOrder(samples, seed)
    again.drawn = sum(cuts[:-1])
    assert again.draw(cuts[-1]) == drawn[len(drawn) - cuts[-1] :]


def test_orders_differ_between_passes_and_seeds() -> None:
    first, other = EndlessOrder(40, 0), EndlessOrder(40, 1)
    passes = [first.draw(40), first.draw(40), other.draw(40)]
    assert len({tuple(one) for one in passes}) == 3


class Ragged(Rows):
    """Texts of different lengths, filled up behind."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        found = super().batch(numbers)
        ids = found.args[0]
        lengths = torch.tensor([2 + number % (ids.shape[1] - 1) for number in numbers])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return Batch(args=(ids * mask,), mask=mask)


def test_outputs_of_the_float_model_are_computed_once_and_found_again(tmp_path: Path) -> None:
    material = reader()
    samples = Ragged(material.train.inputs)
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            calls.append(len(ids))
            return torch.as_tensor(material.float_model(ids))

    device = torch.device("cpu")
    kept = [
        TeacherOutputs(Counted(), samples, task="tokens", size=7, device=device, folder=tmp_path, limit=limit)
        for limit in (1 << 30, 100)
    ]
    assert sum(calls) == 2 * len(samples)
    for numbers in ([5, 0, 39], [11], [39, 38, 37, 36]):
        memory, file = (outputs.rows(numbers, device) for outputs in kept)
        assert torch.equal(memory, file)
        batch = samples.batch(numbers)
        logits = material.float_model(batch.args[0])
        mask = torch.as_tensor(batch.mask)
        torch.testing.assert_close(memory, logits[:, :-1][mask[:, 1:] & mask[:, :-1]])
    assert sum(calls) == 2 * len(samples)
    del kept
    assert list(tmp_path.iterdir()) == []


def test_outputs_without_room_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = reader()
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="has no room for them"):
        TeacherOutputs(
            material.float_model,
            material.train,
            task="tokens",
            size=7,
            device=torch.device("cpu"),
            folder=tmp_path,
            limit=9,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_paired_comparison_is_that_of_a_mean_where_weights_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(50, generator=generator), torch.rand(50, generator=generator) - 0.1
    verdict = paired(before, after, torch.ones(50))
    differences = (before - after).double()
    assert verdict.gain == pytest.approx(float(differences.mean()))
    assert verdict.standard_error == pytest.approx(float(differences.std()) / math.sqrt(50))


def test_its_standard_error_is_the_spread_of_gains_over_samples() -> None:
    """400 repetitions estimate a standard deviation to 1 / sqrt(800), 3.5 %: 15 % is more than four times that."""
    generator = torch.Generator().manual_seed(1)
    gains, errors = [], []
    for _ in range(400):
        weights = torch.randint(1, 20, (80,), generator=generator).double()
        fallen = weights * (0.2 + 0.5 * torch.randn(80, generator=generator, dtype=torch.float64))
        verdict = paired(fallen, torch.zeros(80), weights)
        gains.append(verdict.gain)
        errors.append(verdict.standard_error)
    assert float(torch.tensor(gains).std()) == pytest.approx(sum(errors) / len(errors), rel=0.15)
    assert paired(torch.ones(3), torch.ones(3), torch.ones(3)).better is False
