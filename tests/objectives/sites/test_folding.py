"""Folding: the formula, its dtype and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.sites.folding import edit_parameter, fold, folded_parameters, shift_bias, shift_product
from alphasmith.objectives.sites.types import Operator, ParameterEdit, ShiftEdit, Site
from alphasmith.objectives.smoothing import Smoothing


def site(*, ties: tuple[int, ...] = (0, 1, 2), mode: str = "fold") -> Site:
    """A norm of three channels in front of a linear (4, 3)."""
    channel = torch.arange(3)
    edits = (
        ParameterEdit(parameter="1.weight", channel=channel[None], power=1),
        ParameterEdit(parameter="0.weight", channel=channel, power=-1),
        ParameterEdit(parameter="0.bias", channel=channel, power=-1),
    )
    shifts = (
        ShiftEdit(parameter="0.bias", channel=channel),
        ShiftEdit(parameter="1.bias", channel=channel[None], weight="1.weight"),
    )
    return Site(
        name="1", operators=(), channels=3, mode="fold" if mode == "fold" else "left", reason="", ties=torch.tensor(ties),
        edits=edits if mode == "fold" else (), producers=("0",), shift_edits=shifts if mode == "fold" else (),
    )  # fmt: skip


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)).double()
    with torch.no_grad():
        net.get_parameter("0.weight").copy_(torch.tensor([0.5, -1.0, 2.0]))
        net.get_parameter("0.bias").copy_(torch.tensor([0.1, 0.2, -0.3]))
    return net


positive = st.floats(1e-3, 1e3)


@st.composite
def edits(draw: st.DrawFn) -> tuple[Tensor, ParameterEdit, Tensor]:
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    channels = draw(st.integers(1, 4))
    flat = draw(st.lists(st.integers(-1, channels - 1), min_size=shape[1], max_size=shape[1]))
    values = draw(st.lists(st.floats(-10, 10), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    scales = draw(st.lists(positive, min_size=channels, max_size=channels))
    edit = ParameterEdit(
        parameter="w", channel=torch.tensor(flat)[None], power=draw(st.sampled_from([1, -1])),
        offset=draw(st.sampled_from([0.0, 1.0])),
    )  # fmt: skip
    return torch.tensor(values, dtype=torch.float64).reshape(shape), edit, torch.tensor(scales, dtype=torch.float64)


@given(edits())
@settings(deadline=None)
def test_edit_is_the_formula_written_as_a_loop(drawn: tuple[Tensor, ParameterEdit, Tensor]) -> None:
    value, edit, scales = drawn
    result = edit_parameter(value, edit, scales)
    for row in range(value.shape[0]):
        for column in range(value.shape[1]):
            channel = int(edit.channel[0, column])
            p = float(value[row, column])
            s = 1.0 if channel < 0 else float(scales[channel]) ** edit.power
            expected = p if channel < 0 else (p + edit.offset) * s - edit.offset
            assert float(result[row, column]) == pytest.approx(expected, rel=1e-12, abs=1e-12 * max(1.0, s))


@given(edits())
@settings(deadline=None)
def test_the_opposite_power_undoes_an_edit(drawn: tuple[Tensor, ParameterEdit, Tensor]) -> None:
    value, edit, scales = drawn
    back = edit_parameter(edit_parameter(value, edit, scales), replace(edit, power=-edit.power), scales)
    # one rounding of (p + 1) * s, up to 1.1e4 here, comes back divided by s >= 1e-3
    torch.testing.assert_close(back, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_scales_of_one_and_untouched_elements_keep_their_bits(dtype: torch.dtype, offset: float) -> None:
    value = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).mul(1e-4).to(dtype)
    edit = ParameterEdit(parameter="w", channel=torch.tensor([0, -1, 1, -1, 0]), power=-1, offset=offset)
    assert torch.equal(edit_parameter(value, edit, torch.ones(2)), value)
    scaled = edit_parameter(value, edit, torch.tensor([2.0, 3.0]))
    assert scaled.dtype == dtype
    assert torch.equal(scaled[:, [1, 3]], value[:, [1, 3]])
    assert not torch.equal(scaled[:, 0], value[:, 0])


def test_fold_keeps_the_function_and_equals_the_pure_form() -> None:
    net, x = model(), torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    smoothing = Smoothing(scales=torch.tensor([0.25, 3.0, 11.0]), shift=torch.tensor([0.5, -7.0, 20.0]))
    parameters = dict(net.named_parameters())
    before = {name: value.clone() for name, value in parameters.items()}
    changed = folded_parameters(parameters, site(), smoothing)
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    folded = copy.deepcopy(net)
    fold(folded, site(), smoothing)
    assert set(changed) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(torch.equal(folded.get_parameter(name), value) for name, value in changed.items())
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_shift_without_edits_changes_no_parameter() -> None:
    smoothing = Smoothing(scales=torch.ones(3), shift=torch.ones(3))
    explicit = replace(site(), mode="explicit", edits=site().edits[:1], shift_edits=())
    parameters = dict(model().named_parameters())
    for found in (replace(site(), shift_edits=()), explicit):
        changed = folded_parameters(parameters, found, smoothing)
        assert all(torch.equal(value, parameters[name]) for name, value in changed.items())


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_shift_product_is_what_the_operator_makes_of_a_constant_input(seed: int, conv: bool, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, generator=generator, dtype=torch.float64)
    if conv:
        weight = torch.randn(6, 4 // groups, 3, generator=generator, dtype=torch.float64)
        block = torch.arange(6) // (6 // groups)
        channel = (block[:, None] * (4 // groups) + torch.arange(4 // groups))[:, :, None]
        expected = nn.functional.conv1d(z[:, None].expand(4, 3), weight, groups=groups)[:, 0]
        torch.testing.assert_close(shift_product(weight, channel, False, z), expected)
        return
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(shift_product(weight, torch.arange(4)[None], False, z), weight @ z)
    torch.testing.assert_close(shift_product(weight.T, torch.arange(4)[:, None], True, z), weight @ z)


def test_shift_edits_are_undone_and_leave_other_elements_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    bias, weight = torch.randn(4, generator=generator), torch.randn(4, 3, generator=generator)
    z = torch.tensor([0.5, 100.0, -3.0])
    producer = ShiftEdit(parameter="b", channel=torch.tensor([2, -1, 0, 1]))
    consumer = ShiftEdit(parameter="b", channel=torch.arange(3)[None], weight="w")
    moved = shift_bias(bias, producer, z)
    assert torch.equal(moved[1], bias[1])
    torch.testing.assert_close(moved[[0, 2, 3]], bias[[0, 2, 3]] - z[[2, 0, 1]])
    for edit in (producer, consumer):
        back = shift_bias(shift_bias(bias, edit, z, weight), edit, z, weight, undo=True)
        torch.testing.assert_close(back, bias, rtol=0, atol=1e-4)  # rounded once at the size of the shift, 2^-24 * 300
    with pytest.raises(InputError, match="w: is missing"):
        shift_bias(bias, consumer, z)
    with pytest.raises(InputError, match="does not fit"):
        shift_bias(torch.ones(5), consumer, z, weight)


def test_a_left_site_changes_nothing() -> None:
    assert folded_parameters(dict(model().named_parameters()), site(mode="left"), Smoothing(scales=torch.ones(3))) == {}


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("smoothing", "words"),
    [
        (Smoothing(scales=torch.ones(2)), r"is not \(3,\)"),
        (Smoothing(scales=torch.ones(3, 1)), r"is not \(3,\)"),
        (Smoothing(scales=torch.tensor([0.0, 0.0, 1.0])), "not positive"),
        (Smoothing(scales=torch.tensor([-2.0, -2.0, 1.0])), "not positive"),
        (Smoothing(scales=torch.tensor([1.0, float("nan"), 1.0])), "NaN or infinite"),
        (Smoothing(scales=torch.tensor([1.0, float("inf"), 1.0])), "NaN or infinite"),
        (Smoothing(scales=torch.tensor([1.0, 2.0, 1.0])), "tied"),
        (Smoothing(scales=ONES, shift=torch.ones(2)), r"is not \(3,\)"),
        (Smoothing(scales=ONES, shift=torch.tensor([0.0, float("nan"), 1.0])), "NaN or infinite"),
        (Smoothing(scales=ONES, shift=torch.tensor([0.0, 1.0, 0.0])), "tied"),
        (Smoothing(scales=ONES, range_factor=0.0), "not positive"),
        (Smoothing(scales=ONES, range_factor=float("nan")), "NaN or infinite"),
    ],
)
def test_bad_smoothings_are_refused_and_nothing_changes(smoothing: Smoothing, words: str) -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((InputError, NonFiniteError), match=words):
        fold(net, site(ties=(7, 7, 9)), smoothing)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_sites_that_take_no_scales_or_no_shift_refuse_them() -> None:
    shifted = Smoothing(scales=ONES, shift=ONES)
    with pytest.raises(InputError, match="takes no scales"):
        fold(model(), site(mode="left"), Smoothing(scales=2 * ONES))
    with pytest.raises(InputError, match="takes no shift"):
        fold(model(), site(mode="left"), shifted)
    reader = Operator(
        name="1", weight="1.weight", bias="1.bias", kind="linear", transposed=False, raw=False, in_channels=3, out_channels=4,
    )  # fmt: skip
    for spoilt in (replace(reader, plain=False), replace(reader, raw=True)):
        with pytest.raises(InputError, match="takes no shift"):
            fold(model(), replace(site(), operators=(reader, spoilt)), shifted)
    fold(model(), replace(site(), operators=(reader,)), shifted)


def test_another_model_is_refused() -> None:
    ones = Smoothing(scales=ONES)
    with pytest.raises(InputError, match="is missing"):
        fold(nn.Sequential(nn.Identity(), nn.Linear(3, 4)), site(), ones)
    with pytest.raises(InputError, match="does not fit"):
        fold(nn.Sequential(nn.LayerNorm(3), nn.Linear(5, 4)), site(), ones)
    with pytest.raises(InputError, match="no channel 2"):
        edit_parameter(torch.ones(3), site().edits[1], torch.ones(2))
