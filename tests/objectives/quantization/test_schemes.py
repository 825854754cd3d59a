"""Names of schemes, what contradicts itself, and schemes site by site."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import Kernel, Target
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.formats import fitting, is_dearer, scheme_of, served
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.scheme import (
    FLOAT,
    ActivationFormat,
    ActivationGranularity,
    Scheme,
    WeightFormat,
    WeightGranularity,
)
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from tests.support.quantized_models import block_example


def every_scheme() -> list[Scheme]:
    """All combinations of fields that a scheme accepts."""
    made = []
    literals = (WeightFormat, WeightGranularity, ActivationFormat, ActivationGranularity, Kernel)
    for weights, of_weights, activations, of_activations, kernel in product(*map(get_args, literals)):
        try:
            made.append(
                Scheme(
                    weights=weights,
                    weight_granularity=of_weights,
                    group_size=32 if of_weights == "group" else None,
                    activations=activations,
                    activation_granularity=of_activations,
                    kernel=kernel,
                )
            )
        except InputError:
            continue
    return made


def test_every_scheme_has_its_own_name_and_is_found_by_it() -> None:
    made = [s for s in every_scheme() if s.activations != "none" or s.activation_granularity == "static"]
    assert len({scheme.name for scheme in made}) == len(made)
    for scheme in made:
        assert Scheme.parse(scheme.name) == scheme
    assert {"w8au8-channel-static", "w4au8-g32-token", "w8ai16-channel-static", "w8a16-channel", "float"} <= {
        scheme.name for scheme in made
    }


@pytest.mark.parametrize(
    "name",
    [
        "w8au4-channel-static",
        "w8a8-channel",
        "w8a16-channel-static",
        "w9a8-channel-static",
        "w8au8-channel-row",
        "none",
        "",
    ],
)
def test_an_unknown_name_is_answered_with_what_exists(name: str) -> None:
    with pytest.raises(InputError, match=r"^scheme: no scheme is named .*u8.*i16"):
        Scheme.parse(name)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"weights": "fp8", "activations": "uint8"}, "activations"),
        ({"weights": "fp8", "activations": "int16"}, "activations"),
        ({"weights": "int8", "activations": "fp8"}, "activations"),
        ({"activations": "int16", "activation_granularity": "token"}, "activation_granularity"),
        ({"weights": "none"}, "weights"),
        ({"weights": "none", "activations": "none", "weight_granularity": "tensor"}, "weights"),
    ],
)
def test_contradictions_name_their_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"^scheme\.{field}: "):
        Scheme(**fields)


def test_schemes_by_site_name_the_others_and_know_what_is_used() -> None:
    token, same = Scheme(activation_granularity="token"), Scheme()
    schemes = SiteSchemes.build(Scheme(), {"b": token, "a": token, "c": same})
    assert schemes.of("a") == schemes.of("b") == token
    assert schemes.of("c") == schemes.of("elsewhere") == Scheme()
    assert schemes.name == "w8a8-channel-static+2"
    assert schemes.used == (Scheme(), token)
    assert schemes.static
    assert not SiteSchemes.given(token).static
    assert schemes.changed({"a": same, "b": same}) == SiteSchemes.given(Scheme())
    schemes.require_sites(["a", "b"])
    with pytest.raises(InputError, match="no site is named 'b'"):
        schemes.require_sites(["a", "c"])


def test_a_candidate_computes_every_site_in_its_own_scheme() -> None:
    example = block_example()
    sites = {site.name: site for site in example.sites}
    first, *rest = sites
    mixed = SiteSchemes.build(
        Scheme(), {first: FLOAT, **{name: Scheme.parse("w8au8-channel-static") for name in rest[:1]}}
    )
    candidate = CandidateModel(example.model, example.sites, example.ranges, mixed)
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    plain = candidate(x)
    with candidate.applied({}) as model:
        for name, site in sites.items():
            for operator in site.operators:
                module = model.get_submodule(operator.name)
                assert isinstance(module, QuantizedOperator) == (name != first)
                if isinstance(module, QuantizedOperator):
                    assert module.scheme == mixed.of(name)
        error = float((model(x) - plain).norm() / plain.norm())
        assert 0 < error < 0.05
        skipped = dict(candidate.summary().skipped)
        assert {o.name for o in sites[first].operators} <= set(skipped)
        assert {record.scheme for record in candidate.summary().operators} == {mixed.of(n).name for n in rest}
    candidate.use(SiteSchemes.given(FLOAT))
    candidate.apply({})
    assert torch.equal(candidate(x), plain)
    candidate.check_pristine()
    with pytest.raises(InputError, match="no site is named"):
        candidate.use(SiteSchemes.build(Scheme(), {"elsewhere": FLOAT}))


@pytest.mark.parametrize("target", ["any", "onnxruntime", "openvino", "vllm"])
def test_seven_bits_are_a_choice_where_eight_saturate(target: Target) -> None:
    saturating, exact = Scheme(kernel="u8s8-pairs16"), Scheme()
    assert "int7-weights" in served(target, saturating)
    assert "int7-weights" not in served(target, exact)
    assert "int7-weights" not in served("tensorrt", saturating)
    given = scheme_of("int7-weights", saturating)
    assert (given.weights, given.activations, given.saturates) == ("int7", "int8", False)
    assert not is_dearer("int7-weights", "int8-static")


def test_every_format_of_a_saturating_scheme_is_a_scheme() -> None:
    base = Scheme(kernel="u8s8-pairs16")
    kernels = {name: scheme_of(name, base).kernel for name in fitting(base)}
    assert kernels["uint8-static"] == kernels["int8-token"] == kernels["int8-static"] == "u8s8-pairs16"
    assert kernels["int16-static"] == kernels["float"] == "exact"


@pytest.mark.parametrize(
    "name", ["w8a16-channel", "w8ai16-channel-static", "w8a8-g64-static", "wfp8afp8-channel-static"]
)
def test_kernels_for_bytes_multiply_nothing_else(name: str) -> None:
    with pytest.raises(InputError, match=r"scheme.kernel: .*'u8s8-pairs16' multiplies bytes"):
        replace(Scheme.parse(name), kernel="u8s8-pairs16")
