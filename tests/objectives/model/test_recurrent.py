"""Unrolled recurrent layers compute what PyTorch's fused ones do, under names that can be written back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model._recurrent import UnrolledRecurrent, fuse, original_names, unroll, unrolled


class Tagger(nn.Module):
    """A recurrent layer between two others, called as users call it."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(3, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.rnn.flatten_parameters()
        return self.rnn(*args, **kwargs)


@st.composite
def recurrent(draw: st.DrawFn) -> nn.RNNBase:
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN", "RNN_RELU"]))
    settings_: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if kind == "LSTM":
        settings_["proj_size"] = draw(st.sampled_from([0, 0, 2]))
    if kind == "RNN_RELU":
        settings_["nonlinearity"] = "relu"
    make: Callable[..., nn.RNNBase] = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(kind, nn.RNN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 1000)))
        return make(draw(st.integers(1, 4)), draw(st.integers(3, 5)), dtype=torch.float64, **settings_)


def draw_input(rnn: nn.RNNBase, batch: int | None, steps: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, rnn.input_size) if batch is None else (steps, batch, rnn.input_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.transpose(0, 1) if batch is not None and rnn.batch_first else x


def draw_state(rnn: nn.RNNBase, batch: int | None, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    rows = rnn.num_layers * (2 if rnn.bidirectional else 1)
    sizes = [rnn.proj_size or rnn.hidden_size] + ([rnn.hidden_size] if rnn.mode == "LSTM" else [])
    middle = () if batch is None else (batch,)
    state = tuple(torch.randn((rows, *middle, size), generator=generator, dtype=torch.float64) for size in sizes)
    return state if rnn.mode == "LSTM" else state[0]


def flat(result: Any) -> list[torch.Tensor]:
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


@settings(max_examples=80, deadline=None)
@given(
    rnn=recurrent(),
    batch=st.sampled_from([None, 1, 3]),
    steps=st.integers(1, 5),
    with_state=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_equal_the_fused_layer(
    rnn: nn.RNNBase, batch: int | None, steps: int, with_state: bool, seed: int
) -> None:
    model = Tagger(copy.deepcopy(rnn))
    mapping = unroll(model)
    assert isinstance(model.rnn, UnrolledRecurrent)
    x = draw_input(rnn, batch, steps, seed)
    arguments = (x, draw_state(rnn, batch, seed + 1)) if with_state else (x,)
    expected, actual = flat(rnn(*arguments)), flat(model(*arguments))
    assert [e.shape for e in expected] == [a.shape for a in actual]
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)

    for result in (expected, actual):
        torch.autograd.backward([tensor.square().sum() for tensor in result])
    gradients = {name: parameter.grad for name, parameter in rnn.named_parameters()}
    for name, parameter in model.rnn.named_parameters():
        original = gradients[mapping[f"rnn.{name}"].removeprefix("rnn.")]
        assert parameter.grad is not None
        assert original is not None
        torch.testing.assert_close(parameter.grad, original, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(rnn=recurrent())
def test_state_dict_round_trip(rnn: nn.RNNBase) -> None:
    model = Tagger(rnn)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    mapping = unroll(model)
    restored = original_names(model.state_dict(), mapping)
    assert restored.keys() == before.keys()
    assert all(torch.equal(restored[name], before[name]) for name in before)
    assert set(mapping) == set(model.state_dict()) - {"head.weight", "head.bias"}
    # The very same parameters: an optimizer made before unrolling still trains the model.
    for name, parameter in model.named_parameters():
        assert parameter is parameters[mapping.get(name, name)]
    fresh = Tagger(type(rnn)(**_arguments(rnn)))
    fresh.load_state_dict(restored)


def _arguments(rnn: nn.RNNBase) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
    arguments = {name: getattr(rnn, name) for name in names} | {"dtype": torch.float64}
    if rnn.mode == "LSTM":
        arguments["proj_size"] = rnn.proj_size
    if rnn.mode == "RNN_RELU":
        arguments["nonlinearity"] = "relu"
    return arguments


@settings(max_examples=40, deadline=None)
@given(rnn=recurrent())
def test_fusing_is_the_inverse_of_unrolling(rnn: nn.RNNBase) -> None:
    model = Tagger(copy.deepcopy(rnn).eval())
    before = dict(model.rnn.named_parameters())
    unroll(model)
    assert unrolled(model) == ("rnn",)
    again = fuse(model.rnn)
    assert type(again) is type(rnn)
    assert not again.training
    assert {name: id(value) for name, value in again.named_parameters()} == {n: id(v) for n, v in before.items()}
    x = draw_input(rnn, 2, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip(flat(again(x)), flat(rnn(x)), strict=True))


def test_fusing_needs_an_unrolled_layer_of_linear_ones() -> None:
    with pytest.raises(InputError, match="LSTM is no unrolled recurrent layer"):
        fuse(nn.LSTM(2, 3))
    model = Tagger(nn.LSTM(2, 3))
    unroll(model)
    model.get_submodule("rnn.layers.0").hh = nn.Identity()
    with pytest.raises(InputError, match="hh of a recurrent layer is no linear layer"):
        fuse(model.rnn)


def test_only_the_named_layers_are_unrolled() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": nn.GRU(2, 3)})
    assert set(unroll(model, only=("b",)).values()) == {f"b.{name}" for name, _ in nn.GRU(2, 3).named_parameters()}
    assert unrolled(model) == ("b",)
    assert isinstance(model["a"], nn.LSTM)


def test_documented_names() -> None:
    mapping = unroll(nn.ModuleDict({"lstm": nn.LSTM(2, 3, bidirectional=True)}))
    assert mapping["lstm.layers.0.ih.weight"] == "lstm.weight_ih_l0"
    assert mapping["lstm.layers.0_reverse.hh.bias"] == "lstm.bias_hh_l0_reverse"
    assert len(mapping) == 8


def test_nested_and_shared_layers() -> None:
    shared = nn.GRU(2, 2)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.LSTM(2, 2)), shared]), "again": shared})
    mapping = unroll(model)
    assert not any(isinstance(module, nn.RNNBase) for module in model.modules())
    assert model.get_submodule("blocks.1") is model.get_submodule("again")
    assert set(model.state_dict()) == set(mapping)
    assert mapping["blocks.0.0.layers.0.hh.weight"] == "blocks.0.0.weight_hh_l0"
    assert mapping["again.layers.0.hh.weight"] == "again.weight_hh_l0"


def test_ih_runs_once_and_hh_once_per_step() -> None:
    model = Tagger(nn.LSTM(2, 3))
    unroll(model)
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name.rpartition(".")[2]))
    model(torch.zeros(5, 1, 2))
    assert calls == ["ih"] + ["hh"] * 5


def test_dropout_between_layers_in_training_only() -> None:
    model = Tagger(nn.GRU(2, 8, num_layers=2, dropout=0.5))
    unroll(model)
    x = torch.ones(3, 1, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert model.rnn.training
        assert not torch.equal(model(x)[0], model(x)[0])
        model.eval()
        assert torch.equal(model(x)[0], model(x)[0])


def test_evaluation_mode_is_kept() -> None:
    model = Tagger(nn.LSTM(2, 3)).eval()
    unroll(model)
    assert not any(module.training for module in model.modules())


def test_a_subclass_with_its_own_forward_is_left() -> None:
    class Reversed(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return super().forward(input.flip(0), hx)

    model = Tagger(Reversed(2, 3))
    assert unroll(model) == {}
    assert isinstance(model.rnn, Reversed)


def test_a_model_without_recurrent_layers_is_unchanged() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = dict(model.named_modules())
    assert unroll(model) == {}
    assert dict(model.named_modules()) == before


def test_bare_layer_is_refused() -> None:
    with pytest.raises(InputError, match=r"bare nn\.LSTM; wrap it"):
        unroll(nn.LSTM(2, 3))


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_hh_l0"])
def test_parametrized_layer_is_refused_and_nothing_changes(name: str) -> None:
    class Double(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

    model = nn.ModuleList([nn.LSTM(2, 3), nn.LSTM(2, 3)])
    nn.utils.parametrize.register_parametrization(model[1], name, Double())
    with pytest.raises(InputError, match=f"{name} .* is not a parameter"):
        unroll(model)
    assert all(isinstance(module, nn.LSTM) for module in model)


@pytest.mark.parametrize(
    ("input", "hx", "field"),
    [
        (pack_sequence([torch.zeros(3, 2)]), None, "input"),
        (torch.zeros(4, 1, 3), None, "input"),
        (torch.zeros(2), None, "input"),
        (torch.zeros(0, 1, 2), None, "input"),
        (torch.zeros(4, 1, 2), torch.zeros(1, 1, 3), "hx"),
        (torch.zeros(4, 1, 2), (torch.zeros(1, 1, 3), torch.zeros(1, 2, 3)), "hx"),
    ],
)
def test_unusable_input_is_refused(input: Any, hx: Any, field: str) -> None:
    model = Tagger(nn.LSTM(2, 3))
    unroll(model)
    with pytest.raises(InputError) as error:
        model(input, hx)
    assert error.value.field == field


def test_names_that_collide_are_refused() -> None:
    values = {"a": torch.zeros(1), "b": torch.ones(1)}
    with pytest.raises(InputError, match="two tensors would be named b"):
        original_names(values, {"a": "b"})
