"""Folding: the formula, its dtype and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.sites.folding import edit_parameter, fold, folded_parameters
from alphasmith.objectives.sites.types import ParameterEdit, Site


def site(*, ties: tuple[int, ...] = (0, 1, 2), mode: str = "fold") -> Site:
    """A norm of three channels in front of a linear (4, 3)."""
    channel = torch.arange(3)
    edits = (
        ParameterEdit(parameter="1.weight", channel=channel[None], power=1),
        ParameterEdit(parameter="0.weight", channel=channel, power=-1),
        ParameterEdit(parameter="0.bias", channel=channel, power=-1),
    )
    return Site(
        name="1", operators=(), channels=3, mode="fold" if mode == "fold" else "left", reason="", ties=torch.tensor(ties),
        edits=edits if mode == "fold" else (), producers=("0",),
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
    scales = torch.tensor([0.25, 3.0, 11.0])
    parameters = dict(net.named_parameters())
    before = {name: value.clone() for name, value in parameters.items()}
    changed = folded_parameters(parameters, site(), scales)
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    folded = copy.deepcopy(net)
    fold(folded, site(), scales)
    assert set(changed) == {"0.weight", "0.bias", "1.weight"}
    assert all(torch.equal(folded.get_parameter(name), value) for name, value in changed.items())
    torch.testing.assert_close(folded(x), net(x), rtol=1e-13, atol=1e-13)


def test_a_left_site_changes_nothing() -> None:
    assert folded_parameters(dict(model().named_parameters()), site(mode="left"), torch.ones(3)) == {}


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (torch.ones(2), r"is not \(3,\)"),
        (torch.ones(3, 1), r"is not \(3,\)"),
        (torch.tensor([1.0, 0.0, 1.0]), "finite and positive"),
        (torch.tensor([1.0, -2.0, 1.0]), "finite and positive"),
        (torch.tensor([1.0, float("nan"), 1.0]), "finite and positive"),
        (torch.tensor([1.0, float("inf"), 1.0]), "finite and positive"),
        (torch.tensor([1.0, 2.0, 1.0]), "tied"),
    ],
)
def test_bad_scales_are_refused_and_nothing_changes(scales: Tensor, words: str) -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=words):
        fold(net, site(ties=(7, 7, 9)), scales)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="is missing"):
        fold(nn.Sequential(nn.Identity(), nn.Linear(3, 4)), site(), torch.ones(3))
    with pytest.raises(InputError, match="does not fit"):
        fold(nn.Sequential(nn.LayerNorm(3), nn.Linear(5, 4)), site(), torch.ones(3))
    with pytest.raises(InputError, match="no channel 2"):
        edit_parameter(torch.ones(3), site().edits[1], torch.ones(2))
