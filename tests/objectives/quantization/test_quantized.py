"""The quantized operator, the shipped model and the working copy that becomes candidate after candidate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.quantization import integer_product as integers
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.operator import Execution, OperatorPayload, OperatorTensors, QuantizedOperator
from alphasmith.objectives.quantization.quantizers import (
    activation_grid,
    fake_quantize_activation,
)
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from tests.support.plain_forms import fake_quantize_weight, quantize_model, symmetric
from tests.support.quantized_models import SCHEMES, Example, block_example, pixels_example, shifted, site

EXAMPLES = [block_example, pixels_example]
WEIGHT_ONLY = Scheme(activations="none")


def relative_error(out: Tensor, ref: Tensor) -> float:
    out, ref = out.detach().double(), ref.detach().double()
    return float((out - ref).norm() / ref.norm())


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def shipped(
    example: Example, scheme: Scheme, *, skip: Sequence[str] = (), execution: Execution = "integer"
) -> nn.Module:
    model = copy.deepcopy(example.model)
    quantize_model(
        model,
        example.sites,
        smoothings=example.smoothings,
        ranges=example.ranges,
        scheme=scheme,
        skip=skip,
        execution=execution,
    )
    return model


# The operator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("smooth", [False, True])
def test_linear_is_the_product_of_fake_quantized_tensors(scheme: Scheme, smooth: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    inner = nn.Linear(13, 6)
    w, b = torch.randn(6, 13, generator=generator), torch.randn(6, generator=generator)
    inner.bias.data.copy_(b)
    x = torch.randn(2, 5, 13, generator=generator)
    s = torch.rand(13, generator=generator) + 0.5 if smooth else None
    divided = x if s is None else x / s
    operator = QuantizedOperator.quantize(
        inner,
        OperatorTensors(weight=w, low=divided.min(), high=divided.max(), smooth=s),
        scheme=scheme,
        kind="linear",
        transposed=False,
    )
    static = scheme.activation_granularity == "static"
    if scheme.activations != "none":
        edges = (divided.min(), divided.max()) if static else (divided.amin(-1, True), divided.amax(-1, True))
        scale, zero = activation_grid(*edges, scheme.activations)
        divided = fake_quantize_activation(divided, scale, scheme.activations, zero)
    expected = divided.double() @ fake_quantize_weight(w, scheme).double().t() + b
    assert relative_error(operator(x), expected) < 1e-6
    assert torch.allclose(operator.weight, fake_quantize_weight(w, scheme), atol=0, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_padding_convolution_pads_the_quantized_input_with_zeros(scheme: Scheme) -> None:
    example = pixels_example()
    inner = copy.deepcopy(example.model.get_submodule("second"))
    w = inner.get_parameter("weight").clone()
    x = torch.randn(3, 8, 5, 4, generator=torch.Generator().manual_seed(1))
    operator = QuantizedOperator.quantize(
        inner, OperatorTensors(weight=w, low=x.min(), high=x.max()), scheme=scheme, kind="conv", transposed=False
    )
    xq = x
    if scheme.activations != "none":
        static, every = scheme.activation_granularity == "static", (1, 2, 3)
        edges = (x.min(), x.max()) if static else (x.amin(every, True), x.amax(every, True))
        scale, zero = activation_grid(*edges, scheme.activations)
        xq = fake_quantize_activation(x, scale, scheme.activations, zero)
    wq = fake_quantize_weight(w.flatten(1), scheme).reshape(w.shape)
    bias = example.model.get_parameter("second.bias")
    expected = functional.conv2d(functional.pad(xq, (1, 1, 1, 1)), wq, bias, stride=2, groups=2)
    assert relative_error(operator(x), expected) < 1e-6


@pytest.mark.parametrize("example", EXAMPLES)
def test_dynamic_scales_make_samples_independent(example: Callable[[], Example]) -> None:
    made = example()
    model = shipped(made, Scheme(activation_granularity="token"))
    x = made.batches[0].args[0].clone()
    x[1] *= 50  # a loud neighbour would change a shared scale
    together = model(x)
    for index in range(3):
        assert relative_error(model(x[index : index + 1]), together[index : index + 1]) < 1e-6


def test_unbatched_convolution_input_is_one_sample() -> None:
    made = pixels_example()
    model = shipped(made, Scheme(activation_granularity="token"))
    operator = model.get_submodule("second")
    x = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(operator(x), operator(x[None])[0])


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.activations == "int8"], ids=lambda s: s.name)
def test_integer_and_simulated_execution_agree_to_rounding(scheme: Scheme) -> None:
    made = block_example()
    x = made.batches[0].args[0]
    integer, simulated = shipped(made, scheme), shipped(made, scheme, execution="simulated")
    first, second = integer.get_submodule("q"), simulated.get_submodule("q")
    assert isinstance(first, QuantizedOperator)
    assert isinstance(second, QuantizedOperator)
    assert first.uses_integers == (scheme.weight_granularity != "group")
    assert not second.uses_integers
    # One operator, since a rounding difference may tip a later quantizer over to the next code.
    assert relative_error(first(x), second(x)) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 20), st.booleans(), st.integers(0, 2**31))
def test_integer_product_is_exact(rows: int, channels: int, outputs: int, native: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, channels), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (outputs, channels), dtype=torch.int8, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(integers, "integer_gemm_pays", lambda *_: False)
        product = integers.integer_product(x, w)
    assert torch.equal(product.to(torch.int64), x.to(torch.int64) @ w.to(torch.int64).t())


def test_fallback_product_is_exact_beyond_the_bits_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "integer_gemm_pays", lambda *_: False)
    x = torch.full((1, 4001), 127, dtype=torch.int8)  # 4001 * 127^2 is odd and above 2^24: float32 cannot hold it
    assert int(integers.integer_product(x, x)) == 4001 * 127 * 127


def test_device_without_an_integer_product_is_found_out() -> None:
    assert not integers.integer_gemm_works("meta")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting_a_quantized_model_keeps_the_payload(dtype: torch.dtype) -> None:
    made = block_example()
    for scheme in SCHEMES:
        model = shipped(made, scheme)
        x = made.batches[0].args[0]
        operator = model.get_submodule("q")
        before, output = bits(operator), operator(x)
        model.to(dtype)
        after = bits(operator)
        for name in {"weight_values", "weight_scale", "input_scale"} & before.keys():
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name].float(), before[name].float())
        cast = operator(x.to(dtype))
        assert cast.dtype == dtype
        assert relative_error(cast, output) < (1e-6 if dtype == torch.float64 else 2e-2)


def test_operator_stands_in_for_the_module_it_replaced() -> None:
    made = pixels_example()
    model = shipped(made, Scheme())
    conv, original = model.get_submodule("second"), made.model.get_submodule("second")
    assert conv.stride == original.stride
    assert torch.equal(torch.as_tensor(conv.bias), torch.as_tensor(original.bias))
    assert torch.as_tensor(conv.weight).shape == torch.as_tensor(original.weight).shape
    assert "w8a8-channel-static" in repr(conv)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = conv.no_such_thing
    assert torch.equal(copy.deepcopy(model)(made.batches[0].args[0]), model(made.batches[0].args[0]))


def test_hooks_on_the_inner_module_still_run() -> None:
    model = shipped(block_example(), Scheme())
    operator = model.get_submodule("q")
    assert isinstance(operator, QuantizedOperator)
    seen: list[tuple[int, ...]] = []
    operator.inner.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    operator(torch.ones(2, 9))
    assert seen == [(2, 7)]


def test_input_may_come_by_name() -> None:
    operator = shipped(block_example(), Scheme()).get_submodule("q")
    x = torch.ones(2, 9)
    assert torch.equal(operator(input=x), operator(x))


def test_weight_survives_a_forward_that_raises() -> None:
    operator = shipped(block_example(), WEIGHT_ONLY).get_submodule("q")
    expected = operator(torch.ones(2, 9))
    with pytest.raises(RuntimeError):
        operator(torch.ones(2, 8))
    assert torch.equal(operator(torch.ones(2, 9)), expected)


def test_operator_refuses_what_does_not_fit() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    w, one = torch.ones(3, 4), torch.ones(())

    def build(inner: nn.Module, high: Tensor | None = one, **vectors: Tensor) -> QuantizedOperator:
        return QuantizedOperator.quantize(
            inner,
            OperatorTensors(weight=w, low=-w.max(), high=high, **vectors),
            scheme=Scheme(),
            kind="linear",
            transposed=False,
        )

    with pytest.raises(InputError, match="owns no weight"):
        build(parametrized)
    with pytest.raises(InputError, match="low, high"):
        build(nn.Linear(4, 3), high=None)
    for name, wrong in (("smooth", 3), ("shift", 3), ("correction", 4)):
        with pytest.raises(InputError, match=name):
            build(nn.Linear(4, 3), **{name: torch.ones(wrong)})
    with pytest.raises(InputError, match="payload"):
        build(nn.Linear(5, 3))
    operator = build(nn.Linear(4, 3))
    for scheme, scale in ((Scheme(), None), (WEIGHT_ONLY, one), (Scheme(activation_granularity="token"), one)):
        with pytest.raises(InputError, match="input_scale"):
            QuantizedOperator(
                nn.Linear(4, 3),
                OperatorPayload(
                    weight_values=operator.weight_values, weight_scale=operator.weight_scale, input_scale=scale
                ),
                scheme=scheme,
                kind="linear",
                transposed=False,
            )
    with pytest.raises(InputError, match="weight"):
        operator.requantize(OperatorTensors(weight=torch.ones(3, 5), low=-one, high=one))
    with pytest.raises(InputError, match="input: has 8 channels"):
        operator(torch.ones(2, 8))
    with pytest.raises(NonFiniteError):
        operator(torch.full((2, 4), float("nan")))


# The shipped model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES)
def test_smoothing_alone_changes_nothing(example: Callable[[], Example]) -> None:
    # Every operator skipped: fold sites fold, explicit sites must stay out of weights nobody divides for.
    made = example()
    x = made.batches[0].args[0]
    model = shipped(made, Scheme(), skip=["*"])
    assert relative_error(model(x), made.model(x)) < 1e-6
    # One explicit operator in float beside quantized ones: only their rounding is left.
    explicit = [s.name for s in made.sites if s.mode == "explicit"]
    model = shipped(made, WEIGHT_ONLY, skip=explicit[:1])
    assert relative_error(model(x), made.model(x)) < 0.03


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_quantized_model_stays_near_the_float_model(example: Callable[[], Example], scheme: Scheme) -> None:
    made = example()
    x = made.batches[0].args[0]
    # 4 bits leave up to 1/14 of a row's largest weight per element; 8 bits and e4m3's 3 mantissa bits far less.
    bound = 0.4 if scheme.weights == "int4" else 0.15
    assert 0 < relative_error(shipped(made, scheme)(x), made.model(x)) < bound


@pytest.mark.parametrize("change", [lambda made: made, shifted], ids=["", "shifted"])
def test_static_range_is_the_largest_smoothed_magnitude(change: Callable[[Example], Example]) -> None:
    made = change(block_example())
    clipped = {name: replace(s, range_factor=0.75) for name, s in made.smoothings.items()}
    made = replace(made, smoothings=clipped)
    model = shipped(made, Scheme())
    for found in made.sites:
        for op in found.operators:
            scale = model.get_submodule(op.name).input_scale
            smoothing = made.smoothings[found.name]
            expected = 0.75 * (made.ranges[found.name].peaks(smoothing.shift) / smoothing.scales).max() / 127
            assert torch.allclose(torch.as_tensor(scale), expected)


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_summary_accounts_for_every_byte(example: Callable[[], Example], scheme: Scheme) -> None:
    made = example()
    model = copy.deepcopy(made.model)
    skipped = made.sites[0].operators[-1].name
    summary = quantize_model(
        model, made.sites, smoothings=made.smoothings, ranges=made.ranges, scheme=scheme, skip=[skipped]
    )
    assert summary.total_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert [name for name, _ in summary.skipped] == [skipped]
    assert summary.skipped_bytes == sum(p.nbytes for p in made.model.get_submodule(skipped).parameters())
    if scheme.weights != "int4":
        assert 4 * summary.payload_bytes == summary.float_bytes  # formula fA4: float32 -> int8 = 1/4
    else:
        assert 8 * summary.payload_bytes >= summary.float_bytes
    modes = {s.name: s.mode for s in made.sites}
    assert all((r.smoothing == "explicit") == (modes[r.site] == "explicit") for r in summary.operators)
    assert summary.norm_bytes == sum(
        m.weight.nbytes + m.bias.nbytes for m in model.modules() if isinstance(m, nn.LayerNorm)
    )


def test_weights_used_by_functional_calls_stay_float_but_fold() -> None:
    made = block_example()
    raw = replace(made.sites[1].operators[0], raw=True)
    sites = (made.sites[0], replace(made.sites[1], operators=(raw,)), *made.sites[2:])
    model = copy.deepcopy(made.model)
    summary = quantize_model(model, sites, smoothings=made.smoothings, ranges=made.ranges, scheme=WEIGHT_ONLY)
    assert [name for name, _ in summary.skipped] == ["down"]
    assert isinstance(model.get_submodule("down"), nn.Linear)
    x = made.batches[0].args[0]
    assert relative_error(model(x), made.model(x)) < 0.03


def test_one_module_under_two_names_is_replaced_under_both() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    sites = (site(model, ("a",), "explicit", reason="test"),)
    quantize_model(model, sites, smoothings={}, ranges={"a": symmetric(torch.ones(4))}, scheme=Scheme())
    assert isinstance(model["a"], QuantizedOperator)
    assert model["b"] is model["a"]


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("nobody", torch.ones(9), InputError, "no site is named"),
        ("q", torch.ones(8), InputError, "shape"),
        ("q", -torch.ones(9), InputError, "not positive"),
        ("q", torch.tensor([1.0] * 8 + [float("nan")]), NonFiniteError, "site q"),
        ("q", torch.tensor([1.0] * 8 + [2.0]), InputError, "tied"),
        ("head", torch.full((6,), 2.0), InputError, "takes no scales"),
    ],
)
def test_smoothings_that_do_not_fit_are_refused(name: str, value: Tensor, error: type[Exception], words: str) -> None:
    made = block_example()
    tied = replace(made.sites[0], ties=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7]))
    sites = (tied, *made.sites[1:3], site(made.model, ("head",), "left", reason="excluded"))
    candidate = CandidateModel(copy.deepcopy(made.model), sites, made.ranges, Scheme())
    with pytest.raises(error, match=words):
        candidate.apply({name: Smoothing(scales=value)})
    candidate.apply(
        {
            "q": Smoothing(scales=torch.tensor([2.0] * 7 + [3.0, 3.0])),
            "head": Smoothing(scales=torch.ones(6), shift=torch.zeros(6), range_factor=0.5),
        }
    )


def test_ranges_and_sites_that_do_not_fit_are_refused() -> None:
    made = block_example()
    without = {name: value for name, value in made.ranges.items() if name != "down"}
    with pytest.raises(InputError, match=r"ranges\[down\]: is missing"):
        CandidateModel(made.model, made.sites, without, Scheme())
    with pytest.raises(InputError, match=r"ranges\[down\]: has shape"):
        CandidateModel(made.model, made.sites, {**without, "down": symmetric(torch.ones(3))}, Scheme())
    infinite = symmetric(torch.full((7,), float("inf")))
    with pytest.raises(NonFiniteError, match="site down"):
        CandidateModel(made.model, made.sites, {**without, "down": infinite}, Scheme())
    upside_down = symmetric(-torch.ones(7))
    with pytest.raises(InputError, match="smallest value is above"):
        CandidateModel(made.model, made.sites, {**without, "down": upside_down}, Scheme())
    CandidateModel(made.model, made.sites, {}, Scheme(activation_granularity="token"))
    with pytest.raises(InputError, match="two sites"):
        CandidateModel(made.model, (*made.sites, made.sites[0]), made.ranges, Scheme())
    normless = nn.ModuleDict({"q": nn.Linear(9, 7), "k": nn.Linear(9, 11)})
    with pytest.raises(InputError, match="no tensor"):
        CandidateModel(normless, made.sites[:1], made.ranges, Scheme())
    with pytest.raises(InputError, match="no such operator"):
        CandidateModel(nn.ModuleDict({"q": nn.Linear(9, 7)}), made.sites, made.ranges, Scheme())


# The working copy ---------------------------------------------------------------------------------------------------


def random_smoothings(made: Example, seed: int) -> dict[str, Smoothing]:
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: Smoothing(
            scales=torch.exp2(torch.rand(s.channels, generator=generator) * 6 - 3),
            shift=torch.randn(s.channels, generator=generator) if s.shiftable else None,
        )
        for s in made.sites
    }


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_candidate_has_the_bits_of_the_shipped_model(example: Callable[[], Example], scheme: Scheme) -> None:
    made = example()
    pristine = bits(made.model)
    candidate = CandidateModel(copy.deepcopy(made.model), made.sites, made.ranges, scheme)
    x = made.batches[1].args[0]
    first, second = random_smoothings(made, 1), random_smoothings(made, 2)
    # Everything, then one site, then nothing, then back: what was applied before must leave no trace.
    one = dict(first, **{made.sites[1].name: second[made.sites[1].name]})
    for smoothings in (first, one, {}, second, made.smoothings, first):
        candidate.apply(smoothings)
        model = shipped(replace(made, smoothings=smoothings), scheme)
        assert torch.equal(candidate(x), model(x))
        assert same_bits(candidate.model.state_dict(), model.state_dict())
    assert candidate.summary().total_bytes == sum(t.nbytes for t in bits(model).values())
    assert same_bits(bits(made.model), pristine)
    assert same_bits(bits(candidate.reset()), pristine)
    assert torch.equal(candidate(x), made.model(x))
    candidate.apply(second)
    assert torch.equal(candidate(x), shipped(replace(made, smoothings=second), scheme)(x))


def test_half_precision_model_is_folded_before_it_is_rounded() -> None:
    made = block_example(dtype=torch.bfloat16)
    pristine = bits(made.model)
    candidate = CandidateModel(copy.deepcopy(made.model), made.sites, made.ranges, Scheme())
    candidate.apply(made.smoothings)
    x = made.batches[0].args[0]
    model = shipped(made, Scheme())
    assert candidate(x).dtype == torch.bfloat16
    assert torch.equal(candidate(x), model(x))
    w = made.model.get_parameter("k.weight").float() * made.smoothings["q"].scales
    assert torch.equal(torch.as_tensor(model.get_submodule("k").weight), fake_quantize_weight(w, Scheme()))
    assert same_bits(bits(candidate.reset()), pristine)


def test_double_model_keeps_its_precision_outside_the_quantizers() -> None:
    made = block_example(dtype=torch.float64)
    output = shipped(made, Scheme())(made.batches[0].args[0])
    assert output.dtype == torch.float64
    assert relative_error(output, made.model(made.batches[0].args[0])) < 0.15


def test_failed_candidate_leaves_no_trace() -> None:
    made = block_example()
    candidate = CandidateModel(copy.deepcopy(made.model), made.sites, made.ranges, Scheme())
    candidate.apply(made.smoothings)
    expected = candidate(made.batches[0].args[0])
    huge = {s.name: Smoothing(scales=torch.full((s.channels,), 3e38)) for s in made.sites}
    with pytest.raises(NonFiniteError, match="site"):
        candidate.apply(huge)
    with pytest.raises(InputError, match="applied; call apply"):
        candidate.summary()
    candidate.apply(made.smoothings)
    assert torch.equal(candidate(made.batches[0].args[0]), expected)


def test_only_tensors_of_changed_sites_are_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    made = block_example()
    candidate = CandidateModel(copy.deepcopy(made.model), made.sites, made.ranges, Scheme())
    candidate.apply(made.smoothings)
    rebuilt: list[QuantizedOperator] = []
    original = QuantizedOperator.requantize

    def spy(self: QuantizedOperator, tensors: OperatorTensors) -> None:
        rebuilt.append(self)
        original(self, tensors)

    monkeypatch.setattr(QuantizedOperator, "requantize", spy)
    candidate.apply(made.smoothings)
    assert not rebuilt
    candidate.apply({**made.smoothings, "down": Smoothing(scales=made.smoothings["down"].scales * 2)})
    names = {name for name, module in candidate.model.named_modules() if any(module is r for r in rebuilt)}
    assert names == {"q", "down"}  # q produces what down reads
