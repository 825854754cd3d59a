"""A model that becomes candidates in place: what it is meanwhile, and that nothing of it is left afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.equivalence import fold_and_prove
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.operator import OperatorTensors, QuantizedOperator
from alphasmith.objectives.quantization.payload import payload
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folded_weights import FoldedWeights
from alphasmith.objectives.sites.folding import folded_parameters
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from tests.support.plain_forms import quantize_model, symmetric
from tests.support.quantized_models import Example, block_example, grow, operator, pixels_example
from tests.support.run_cases import Mlp, seeded, vectors

EXAMPLES = [block_example, pixels_example]
SCHEME = Scheme()


def candidate_of(example: Example, model: nn.Module, scheme: Scheme = SCHEME) -> CandidateModel:
    return CandidateModel(model, example.sites, example.ranges, scheme)


def registries(model: nn.Module) -> list[tuple[str, list[tuple[str, int]]]]:
    """Every module under every name with the identities of all it holds."""
    return [
        (name, [(n, id(v)) for part in (m._modules, m._parameters, m._buffers) for n, v in part.items()])
        for name, m in model.named_modules(remove_duplicate=False)
    ]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(value, right[name]) for name, value in left.items())


def shipped(example: Example, scheme: Scheme = SCHEME) -> nn.Module:
    model = copy.deepcopy(example.model)
    quantize_model(model, example.sites, smoothings=example.smoothings, ranges=example.ranges, scheme=scheme)
    return model


@pytest.mark.parametrize("made", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_very_modules_and_tensors_come_back(made: Callable[..., Example], dtype: torch.dtype) -> None:
    example = made(dtype=dtype) if made is block_example else made()
    model = copy.deepcopy(example.model)
    before, bits = registries(model), tensors(model)
    candidate = candidate_of(example, model)
    assert candidate.model is model
    for smoothings in (example.smoothings, {}, example.smoothings):
        candidate.apply(smoothings)
        assert registries(model) != before
    assert candidate.reset() is model
    assert registries(model) == before
    assert same(tensors(model), bits)
    candidate.check_pristine()


@pytest.mark.parametrize("made", EXAMPLES)
def test_a_candidate_copies_no_tensor_that_it_does_not_change(made: Callable[[], Example]) -> None:
    example = made()
    model = copy.deepcopy(example.model)
    original = {name: value.data_ptr() for name, value in model.state_dict().items()}
    candidate = candidate_of(example, model)
    candidate.apply({})  # nothing is smoothed: only the weights of operators are replaced
    kept = {name.replace(".inner.", "."): value.data_ptr() for name, value in model.state_dict().items()}
    assert all(kept[name] == pointer for name, pointer in original.items() if name in kept)


def test_the_block_ends_with_the_float_model_whatever_happens() -> None:
    example = block_example()
    model = copy.deepcopy(example.model)
    before, bits = registries(model), tensors(model)
    candidate = candidate_of(example, model)
    x = example.batches[0].args[0]
    with candidate.applied(example.smoothings) as applied:
        assert torch.equal(applied(x), shipped(example)(x))
    assert registries(model) == before
    with pytest.raises(RuntimeError), candidate.applied(example.smoothings) as applied:
        applied(torch.ones(2, 3))  # nine channels are expected
    assert registries(model) == before

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_submodule("out").register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), candidate.applied(example.smoothings) as applied:
        applied(x)
    handle.remove()
    assert registries(model) == before
    assert same(tensors(model), bits)
    assert torch.equal(candidate(x), example.model(x))


def test_a_candidate_that_cannot_be_built_leaves_the_float_model() -> None:
    example = block_example()
    model = copy.deepcopy(example.model)
    before = registries(model)
    candidate = candidate_of(example, model)
    huge = {s.name: Smoothing(scales=torch.full((s.channels,), 3e38)) for s in example.sites}
    for first in ({}, example.smoothings):
        candidate.apply(first)
        with pytest.raises(NonFiniteError, match="site"):
            candidate.apply(huge)
        assert registries(model) == before
    candidate.apply(example.smoothings)
    x = example.batches[0].args[0]
    assert torch.equal(candidate(x), shipped(example)(x))


def test_hooks_of_modules_go_on_working() -> None:
    example = block_example()
    model = copy.deepcopy(example.model)
    seen: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in ("norm", "q", "head")]
    candidate = candidate_of(example, model)
    x = example.batches[0].args[0]
    expected = shipped(example)(x)
    for apply in (lambda: candidate.apply(example.smoothings), candidate.reset, lambda: candidate.apply({})):
        apply()
        seen.clear()
        candidate(x)
        assert seen == ["norm", "q", "head"]
    handles[1].remove()  # taken off the module that is set aside
    candidate.apply(example.smoothings)
    seen.clear()
    # A watched operator runs on dequantized tensors instead of integers: the same product, summed in another order.
    torch.testing.assert_close(candidate(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == ["norm", "head"]


class Tied(nn.Module):
    """A table whose transpose is the head, and two linear operators that share one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.bias = self.a.bias
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return torch.as_tensor(self.head(self.a(h) + self.b(h)))


def test_tied_tensors_stay_tied() -> None:
    torch.manual_seed(0)  # module initialisers take no generator
    model = Tied().eval().requires_grad_(False)
    pristine = copy.deepcopy(model)
    before = registries(model)
    sites = tuple(
        Site(
            name=names[0],
            operators=tuple(operator(model, name) for name in names),
            channels=8,
            mode="explicit",
            reason="test",
            ties=torch.arange(8),
            edits=tuple(grow(model, name) for name in names),
            producers=(),
        )
        for names in (("a", "b"), ("head",))
    )
    ranges = {s.name: symmetric(torch.full((8,), 3.0)) for s in sites}
    smoothings = {s.name: Smoothing(scales=torch.linspace(0.5, 2, 8)) for s in sites}
    ids = torch.arange(12).reshape(2, 6)
    candidate = CandidateModel(model, sites, ranges, SCHEME)
    quantized = copy.deepcopy(pristine)
    summary = quantize_model(quantized, sites, smoothings=smoothings, ranges=ranges, scheme=SCHEME)
    candidate.apply(smoothings)
    assert torch.equal(candidate(ids), quantized(ids))
    assert same(tensors(model), tensors(quantized))
    assert candidate.summary() == summary
    assert payload(model)[1] == payload(quantized)[1]
    candidate.reset()
    assert registries(model) == before
    assert model.head.weight is model.table.weight
    assert same(tensors(model), tensors(pristine))


def test_a_write_to_the_float_weights_is_noticed() -> None:
    example = block_example()
    model = copy.deepcopy(example.model)
    candidate = candidate_of(example, model)
    weight = model.get_parameter("down.weight")
    candidate.apply(example.smoothings)
    candidate.check_pristine()
    with torch.no_grad():
        weight[0, 0] += 1e-3
    with pytest.raises(InputError, match=r"down\.weight changed"):
        candidate.check_pristine()


def assert_payload_outlives_folding(example: Example) -> None:
    model = copy.deepcopy(example.model)
    candidate = candidate_of(example, model)
    candidate.apply(example.smoothings)
    stored, structure = candidate.payload()
    kept = {name: value.clone() for name, value in stored.items()}
    candidate.reset()
    fold_and_prove(model, example.sites, example.smoothings, example.batches)
    assert same(stored, kept)
    expected, expected_structure = payload(shipped(example))
    assert same(stored, expected)
    assert structure == expected_structure
    assert not any(isinstance(module, QuantizedOperator) for module in model.modules())


@pytest.mark.parametrize("made", EXAMPLES)
def test_the_payload_outlives_the_candidate_and_the_folding(made: Callable[[], Example]) -> None:
    assert_payload_outlives_folding(made())


def test_the_payload_outlives_the_folding_of_shifts() -> None:
    # Folded shifts are written into biases that quantized operators hold unchanged, beside a correction of their own.
    model = seeded(Mlp)
    batches = tuple(Batch(args=(x,)) for x in vectors()[:2])
    sites = discover(model, batches[0].narrow(0, 1)).sites
    assert any(site.shift_edits for site in sites)
    generator = torch.Generator().manual_seed(0)
    smoothings = {
        site.name: Smoothing(
            scales=torch.rand(site.channels, generator=generator) + 0.5,
            shift=torch.randn(site.channels, generator=generator),
        )
        for site in sites
    }
    ranges = {site.name: symmetric(torch.full((site.channels,), 3.0)) for site in sites}
    assert_payload_outlives_folding(
        Example(model=model, sites=sites, smoothings=smoothings, ranges=ranges, batches=batches)
    )


def test_dequantized_weights_are_kept_only_if_asked_for() -> None:
    example = block_example()
    scheme = Scheme(activations="none")
    x = example.batches[0].args[0]
    outputs = []
    for keep in (True, False):
        model = copy.deepcopy(example.model)
        candidate = CandidateModel(model, example.sites, example.ranges, scheme, keep_dense=keep)
        candidate.apply(example.smoothings)
        outputs.append(candidate(x))
        operators = [module for module in model.modules() if isinstance(module, QuantizedOperator)]
        assert all((module._dense is not None) == keep for module in operators)
    assert torch.equal(*outputs)


def test_folded_weights_are_those_of_folding_one_site_after_the_other() -> None:
    example = block_example()
    pristine = dict(example.model.named_parameters())
    eager: dict[str, Tensor] = dict(pristine)
    lazy = FoldedWeights(pristine)
    assert set(lazy) == set(pristine)
    assert len(lazy) == len(pristine)
    for site in example.sites:
        smoothing = Smoothing(scales=example.smoothings[site.name].scales)
        lazy.fold(site, smoothing)
        if site.mode == "fold":
            changed = folded_parameters(eager, site, smoothing)
            consumers = {edit.parameter for edit in site.edits if edit.power > 0}
            eager |= {name: value for name, value in changed.items() if name not in consumers}
    assert all(torch.equal(lazy[name], value) for name, value in eager.items())
    assert lazy["out.weight"] is pristine["out.weight"]


@pytest.mark.parametrize("example", [block_example(), pixels_example()])
def test_the_way_back_to_the_favourite_quantizes_nothing(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme())
    candidate.apply(example.smoothings)
    expected = [candidate(*batch.args) for batch in example.batches]
    candidate.favour(example.smoothings, 2**20)
    quantized: list[QuantizedOperator] = []
    requantize = QuantizedOperator.requantize

    def counted(self: QuantizedOperator, tensors: OperatorTensors) -> None:
        quantized.append(self)
        requantize(self, tensors)

    monkeypatch.setattr(QuantizedOperator, "requantize", counted)
    for name in example.smoothings:
        others = {key: value for key, value in example.smoothings.items() if key != name}
        candidate.apply(others)
        assert 0 < len(quantized) < len(candidate.operators)  # the weights of one site, once
        assert candidate.favoured_bytes > 0
        quantized.clear()
        candidate.apply(example.smoothings)
        assert quantized == []
        assert candidate.favoured_bytes == 0
        assert all(
            torch.equal(candidate(*batch.args), before) for batch, before in zip(example.batches, expected, strict=True)
        )


@settings(deadline=None, max_examples=30)
@given(limit=st.integers(0, 600), order=st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_no_more_is_kept_for_the_favourite_than_allowed(limit: int, order: list[int]) -> None:
    example = block_example()
    candidate, fresh = (
        CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme()) for _ in range(2)
    )
    names = list(example.smoothings)
    candidate.favour(example.smoothings, limit)
    for position in order:
        # The favourite, one site less, none at all.
        kept = (
            {} if position == 0 else {n: s for n, s in example.smoothings.items() if n != names[position % len(names)]}
        )
        for smoothings in (example.smoothings, kept):
            candidate.apply(smoothings)
            fresh.reset()
            fresh.apply(smoothings)
            assert candidate.favoured_bytes <= limit
            assert torch.equal(candidate(*example.batches[0].args), fresh(*example.batches[0].args))
