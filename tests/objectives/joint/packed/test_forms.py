"""Layers run in the faster of their forms, whichever that is, and compute the same up to float rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.low_rank.decomposition import Factors, decompose
from alphasmith.objectives.joint.low_rank.factored import FactoredConv, FactoredLinear
from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.joint.packed.forms import LayerForm, Timer, apply_forms, choose_forms, least_time
from alphasmith.objectives.media.batch import Batch
from tests.support.packed_models import BATCH, TOKENS, made, mixed, mixed_arguments
from tests.support.site_cases import relaxed


def told(*seconds: float) -> Timer:
    """A timer that runs what it is given, and says what it is told, again and again."""

    def endless() -> Iterator[float]:
        while True:
            yield from seconds

    found = endless()

    def timer(work: Callable[[], object]) -> float:
        work()
        return next(found)

    return timer


def close(model: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        first, second = model(TOKENS), other(TOKENS)
    return torch.allclose(first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max()))


@relaxed
@given(mixed_arguments, st.sampled_from(["channel", "spatial"]), st.booleans(), st.integers(0, 20))
def test_every_form_computes_the_same(arguments: Any, form: Any, small: bool, seed: int) -> None:
    model = made(mixed(seed, **arguments), (True, False, 2, form))
    before = copy.deepcopy(model)
    forms = choose_forms(model, BATCH, timer=told(1.0, 2.0) if small else told(2.0, 1.0))
    assert {one.layer: one.runs for one in forms if one.layer in ("rnn", "mix")} == (
        {"rnn": "cell", "mix": "factored"} if small else {"rnn": "fused", "mix": "dense"}
    )
    assert model.state_dict().keys() == before.state_dict().keys(), "choosing changed the model"
    apply_forms(model, forms)
    assert close(before, model)
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[arguments["rnn"]]
    assert isinstance(model.get_submodule("rnn"), kind) is not small
    left = [m for m in model.modules() if isinstance(m, (FactoredLinear, FactoredConv))]
    assert bool(left) is small
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_reasons_and_seconds_are_told() -> None:
    model = made(mixed(own=True), (True, False, 2, "channel"))
    forms = {one.layer: one for one in choose_forms(model, BATCH, timer=told(0.002, 0.001))}
    assert forms["mix"].seconds == {"factored": 0.002, "dense": 0.001}
    assert forms["mix"].reason == "1 ms a call, factored 2 ms"
    assert forms["conv"] == LayerForm(
        layer="conv", runs="dense", reason="its factors would be multiplied at every call"
    )
    assert not [name for name in forms if name.startswith("rnn.")], "what is inside a fused layer has no form"
    equal = {one.layer: one.runs for one in choose_forms(model, BATCH, timer=told(1.0))}
    assert (equal["mix"], equal["rnn"]) == ("dense", "fused")


def test_inner_layers_of_a_cell_have_forms_of_their_own() -> None:
    model = made(mixed(), (True, False, 2, "channel"))
    found = [one.layer for one in choose_forms(model, BATCH, timer=told(1.0, 2.0))]
    assert found.index("rnn") < found.index("rnn.layers.0.ih")
    mixture = [LayerForm(layer=name, runs="dense", reason="") for name in found if name.startswith("rnn.")]
    before = copy.deepcopy(model)
    apply_forms(model, mixture)
    assert close(before, model)
    assert isinstance(model.get_submodule("rnn.layers.0.ih"), nn.Linear)


def test_convolutions_keep_their_settings() -> None:
    layer = nn.Conv2d(8, 12, 3, stride=2, padding=(1, 2), dilation=(1, 2), groups=2, padding_mode="reflect")
    model = nn.Sequential(layer, nn.Conv2d(12, 8, 3, padding="same", bias=False)).eval()
    factorize(model, LowRankSettings(rank=1))
    x = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    apply_forms(model, choose_forms(model, Batch(args=(x,)), timer=told(2.0, 1.0)))
    assert isinstance(model[0], nn.Conv2d)
    assert str(model[0]) == str(layer)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_shared_layer_is_replaced_everywhere() -> None:
    shared = FactoredLinear(_factors(), None)
    model = nn.ModuleDict({"a": shared, "b": shared})
    apply_forms(model, [LayerForm(layer="a", runs="dense", reason="")])
    assert isinstance(model["a"], nn.Linear)
    assert model["a"] is model["b"]


def _factors() -> Factors:
    return decompose(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), rank=2)


def test_what_the_batch_does_not_reach_stays_as_it_is() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.used(x))

    model = Idle().eval()
    factorize(model, LowRankSettings(rank=1))
    forms = choose_forms(model, Batch(args=(torch.ones(1, 8),)), timer=told(2.0, 1.0))
    assert {one.layer: (one.runs, one.seconds) for one in forms} == {
        "used": ("dense", {"factored": 2.0, "dense": 1.0}),
        "idle": ("factored", {}),
    }


def test_a_recurrent_layer_that_cannot_be_fused_stays_a_cell() -> None:
    model = made(mixed(), (True, False, None, "channel"))
    inner = model.get_submodule("rnn.layers.0")
    inner.hh = nn.Sequential(inner.get_submodule("hh"))
    (form,) = choose_forms(model, BATCH, timer=told(2.0, 1.0))
    assert (form.layer, form.runs, form.reason) == ("rnn", "cell", "hh of a recurrent layer is no linear layer")
    biased = made(mixed(bias=False), (True, False, None, "channel"))
    biased.get_submodule("rnn.layers.0.ih").bias = nn.Parameter(torch.ones(24))
    (form,) = choose_forms(biased, BATCH, timer=told(2.0, 1.0))
    assert (form.runs, form.reason) == ("cell", "ih of a recurrent layer has a bias of its own")


@pytest.mark.parametrize(
    ("layer", "runs", "problem"),
    [
        ("none", "dense", "the model has no none"),
        ("inner", "dense", "LayerNorm has no dense form"),
        ("inner", "fused", "LayerNorm is no unrolled recurrent layer"),
    ],
)
def test_impossible_forms_are_refused(layer: str, runs: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        apply_forms(mixed(), [LayerForm(layer=layer, runs=runs, reason="")])


def test_a_model_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(InputError, match="the model cannot be run on it"):
        choose_forms(mixed(), Batch(args=(torch.ones(2, 2, 2),)))


def test_the_clock_counts_calls_after_the_first() -> None:
    calls: list[int] = []
    assert least_time(lambda: calls.append(1)) >= 0
    assert len(calls) > 1
