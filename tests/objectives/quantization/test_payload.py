"""Saving and reloading a quantized model gives the same bits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model._recurrent import unroll
from alphasmith.objectives.quantization.operator import OperatorTensors, QuantizedOperator
from alphasmith.objectives.quantization.payload import payload, restore
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from tests.support.plain_forms import quantize_model, symmetric
from tests.support.quantized_models import SCHEMES, Example, block_example, pixels_example, shifted, site


def through_files(tensors: dict[str, Tensor], structure: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a safetensors file and a JSON file keep; safetensors itself refuses shared storage."""
    return safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(structure))


def scrambled(model: nn.Module) -> nn.Module:
    """The same architecture with other weights."""
    skeleton = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*skeleton.parameters(), *skeleton.buffers()):
            tensor.zero_()
    return skeleton


def quantized(example: Example, scheme: Scheme) -> nn.Module:
    model = copy.deepcopy(example.model)
    quantize_model(model, example.sites, smoothings=example.smoothings, ranges=example.ranges, scheme=scheme)
    return model


@pytest.mark.parametrize("example", [block_example, pixels_example])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("skeleton_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda made: made, shifted], ids=["", "shifted"])
def test_reload_has_the_same_bits(
    example: Callable[[], Example], scheme: Scheme, skeleton_dtype: torch.dtype, change: Callable[[Example], Example]
) -> None:
    made = change(example())
    model = quantized(made, scheme)
    stored = through_files(*payload(model))
    reloaded = restore(scrambled(made.model).to(skeleton_dtype), *stored)
    for batch in made.batches:
        assert torch.equal(reloaded(*batch.args), model(*batch.args))
    # A second trip changes nothing: the payload is a fixed point.
    again, structure = payload(reloaded)
    assert structure == stored[1]
    assert again.keys() == stored[0].keys()
    assert all(
        torch.equal(again[k].float(), stored[0][k].float()) and again[k].dtype == stored[0][k].dtype for k in again
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_reload_into_another_precision_keeps_the_stored_one(dtype: torch.dtype) -> None:
    made = block_example(dtype=dtype)
    model = quantized(made, Scheme())
    reloaded = restore(scrambled(made.model).float(), *through_files(*payload(model)))
    output = reloaded(*made.batches[0].args)
    assert output.dtype == dtype
    assert torch.equal(output, model(*made.batches[0].args))


def test_reload_onto_a_skeleton_without_memory() -> None:
    made = pixels_example()
    model = quantized(made, Scheme(weights="int4", activation_granularity="token"))
    reloaded = restore(copy.deepcopy(made.model).to("meta"), *through_files(*payload(model)))
    assert torch.equal(reloaded(*made.batches[0].args), model(*made.batches[0].args))


def test_float_names_are_kept() -> None:
    made = block_example()
    tensors, _ = payload(quantized(made, Scheme()))
    assert {name for name in tensors if name in made.model.state_dict()} == {
        "norm.weight",
        "norm.bias",
        *(f"{name}.bias" for name in ("q", "down", "out", "head")),
    }
    assert tensors["k.weight_values"].dtype == torch.int8


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, and two operators that share explicit scales."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("table", torch.linspace(0, 1, 6), persistent=False)
        self.register_buffer("part", torch.as_tensor(self.table)[:3])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.table
        return torch.as_tensor(self.lm_head(self.a(x) + self.b(x)))


def test_tied_tensors_are_stored_once_and_tied_again() -> None:
    torch.manual_seed(0)  # module initialisers take no generator
    model = Tied().eval().requires_grad_(False)
    skeleton = scrambled(model)
    sites = (site(model, ("a", "b"), "explicit", reason="test"),)
    smoothings = {"a": Smoothing(scales=torch.rand(6) + 0.5, shift=torch.rand(6))}
    ranges = {"a": symmetric(torch.full((6,), 3.0))}
    quantize_model(model, sites, smoothings=smoothings, ranges=ranges, scheme=Scheme())
    tensors, structure = payload(model)
    assert structure["aliases"] == {
        "lm_head.weight": "embed.weight",
        "b.smooth": "a.smooth",
        "b.shift": "a.shift",
    }
    reloaded = restore(skeleton, *through_files(tensors, structure))
    assert reloaded.get_parameter("lm_head.weight") is reloaded.get_parameter("embed.weight")
    tokens = torch.arange(11)[None]
    assert torch.equal(reloaded(tokens), model(tokens))
    # The non-persistent buffer may hold a folded scale; it must survive although state_dict() leaves it out.
    assert torch.equal(reloaded.get_buffer("table"), model.get_buffer("table"))


def test_unrolled_lstm_reloads() -> None:
    torch.manual_seed(0)  # module initialisers take no generator
    model = nn.ModuleDict({"rnn": nn.LSTM(5, 4, batch_first=True, bidirectional=True)}).eval()
    unroll(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert names
    sites = tuple(site(model, (name,), "explicit", reason="recurrent") for name in names)
    skeleton = scrambled(model)
    ranges = {s.name: symmetric(torch.full((s.channels,), 2.0)) for s in sites}
    smoothings = {s.name: Smoothing(scales=torch.linspace(0.5, 2, s.channels)) for s in sites}
    quantize_model(model, sites, smoothings=smoothings, ranges=ranges, scheme=Scheme())
    reloaded = restore(skeleton, *through_files(*payload(model)))
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(reloaded.get_submodule("rnn")(x)[0], model["rnn"](x)[0])


def test_one_module_under_two_names_reloads() -> None:
    def build() -> nn.Sequential:
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.ReLU(), shared).requires_grad_(False)

    model = build()
    sites = (site(model, ("0",), "left", reason="test"),)
    ranges = {"0": symmetric(torch.ones(4))}
    quantize_model(model, sites, smoothings={}, ranges=ranges, scheme=Scheme())
    reloaded = restore(build(), *through_files(*payload(model)))
    assert reloaded.get_submodule("0") is reloaded.get_submodule("2")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(reloaded(x), model(x))


def test_a_single_operator_is_a_model() -> None:
    inner = nn.Linear(4, 3).requires_grad_(False)
    skeleton = scrambled(inner)
    operator = QuantizedOperator.quantize(
        inner,
        OperatorTensors(weight=inner.weight, low=-torch.ones(()), high=torch.ones(())),
        scheme=Scheme(),
        kind="linear",
        transposed=False,
    )
    reloaded = restore(skeleton, *through_files(*payload(operator)))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reloaded(x), operator(x))


def test_what_does_not_fit_is_refused() -> None:
    made = block_example()
    tensors, structure = payload(quantized(made, Scheme()))

    def attempt(
        changed: dict[str, Tensor], described: dict[str, Any] = structure, model: nn.Module = made.model
    ) -> None:
        restore(copy.deepcopy(model), changed, described)

    without = {name: value for name, value in tensors.items() if name != "norm.weight"}
    with pytest.raises(InputError, match=r"norm\.weight: is not among"):
        attempt(without)
    with pytest.raises(InputError, match=r"norm\.weight: is stored with shape"):
        attempt({**without, "norm.weight": torch.ones(3)})
    with pytest.raises(InputError, match="extra: is stored"):
        attempt({**tensors, "extra": torch.ones(3)})
    with pytest.raises(InputError, match="quantized weight is not among"):
        attempt({name: value for name, value in tensors.items() if name != "q.weight_values"})
    with pytest.raises(InputError, match=r"structure\.format"):
        attempt(tensors, {**structure, "format": 0})
    with pytest.raises(InputError, match="no such operator"):
        attempt(tensors, structure, nn.Sequential(nn.Linear(2, 2)))


def test_names_that_would_collide_are_refused() -> None:
    inner = nn.Linear(4, 3)
    inner.register_buffer("weight_scale", torch.ones(1))
    operator = QuantizedOperator.quantize(
        inner,
        OperatorTensors(weight=inner.weight, low=-torch.ones(()), high=torch.ones(())),
        scheme=Scheme(),
        kind="linear",
        transposed=False,
    )
    with pytest.raises(InputError, match="two tensors of the model have this name"):
        payload(operator)
