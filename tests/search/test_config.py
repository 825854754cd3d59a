"""Configuration: round trips, overrides, and errors that name the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.config import RunConfig, SchemeConfig, parse_bytes
from alphasmith.search.toml_values import apply_overrides


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [
        ({"serach": {}}, "serach", "'search'"),
        ({"search": {"trails": 3}}, "search.trails", "'trials'"),
        ({"search": {"trials": "many"}}, "search.trials", "integer"),
        ({"search": {"trials": 1}}, "search.trials", "4"),
        ({"search": {"sampler": "tpee"}}, "search.sampler", "tpe"),
        ({"scheme": {"weights": "fp8"}}, "scheme.activations", "fp8"),
        ({"scheme": {"group_size": 64}}, "scheme.group_size", "group"),
        ({"hardware": {"memory": "8 Gx"}}, "hardware.memory", "8 GiB"),
        ({"model": {"demo": "image", "path": "x"}}, "model.demo", "one of"),
        ({"model": {"factory_path": "x"}}, "model.factory_path", "factory"),
        ({"data": {"path": "a", "factory": "b:c"}}, "data.factory", "one of"),
        ({"engine": "rya"}, "engine", "local"),
        ({"search": 3}, "search", "dictionary"),
        ({"search": {1: 2}}, "search.1", "trials"),
        ({"name": np.zeros((50, 50))}, "name", "string"),
        ({"scheme": "w8a9"}, "scheme", "w8a8-channel-static"),
        ({"scheme": {"weights": "int3"}}, "scheme.weights", "int4"),
        ({"scheme": 8}, "scheme", "w8a8-channel-static"),
        ({"scheme": None}, "scheme", "w8a8-channel-static"),
        ({"scheme": Scheme}, "scheme", "w8a8-channel-static"),
        ({"scheme": {"activations": "uint4"}}, "scheme.activations", "uint8"),
        ({"scheme": {"weights": "fp8", "activations": "uint8"}}, "scheme.activations", "uint8"),
        (
            {"scheme": {"activations": "int16", "activation_granularity": "token"}},
            "scheme.activation_granularity",
            "static",
        ),
        ({"scheme": "float"}, "scheme.weights", "quantizes nothing"),
        ({"scheme": {"sites": {"a": "w8au4-channel-static"}}}, "scheme", "u8"),
        ({"scheme": {"sites": ["a"]}}, "scheme.sites", "dictionary"),
    ],
)
@pytest.mark.parametrize("make", [RunConfig.build, lambda values: RunConfig(**values)], ids=["build", "RunConfig"])
def test_errors_name_the_field_and_a_remedy(
    make: Callable[[Any], RunConfig], values: dict[str, object], field: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        make(values)
    assert caught.value.field == field
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_sites_have_the_scheme_of_the_first_pattern_that_matches() -> None:
    config = RunConfig.build({"scheme": {"sites": {"*.down": "w8au8-channel-static", "a.*": "float"}}}).scheme
    assert config.of("a.down").name == "w8au8-channel-static"
    assert config.of("a.up").is_float
    assert config.of("b.up") == Scheme()
    by_site = config.by_site(["a.down", "a.up", "b.up"])
    assert [by_site.of(site) for site in ("a.down", "a.up", "b.up")] == [
        config.of(s) for s in ("a.down", "a.up", "b.up")
    ]
    with pytest.raises(InputError, match=r"scheme\.sites: no site matches 'a\.\*'"):
        config.by_site(["b.down"])


def test_a_section_alone_is_refused_likewise() -> None:
    with pytest.raises(InputError, match="weigths: unknown field; did you mean 'weights'"):
        SchemeConfig(weigths="int8")  # type: ignore[call-arg]


@pytest.mark.parametrize("values", [[1], "run.toml", 3, RunConfig])
def test_what_is_no_configuration_is_refused(values: Any) -> None:
    with pytest.raises(InputError, match=r"config: is a .*; give a RunConfig or a mapping"):
        RunConfig.build(values)


@pytest.mark.parametrize(
    "given",
    [
        "w4a16-g128",
        Scheme.parse("w4a16-g128"),
        SchemeConfig(weights="int4", weight_granularity="group", group_size=128, activations="none"),
        {"weights": "int4", "weight_granularity": "group", "group_size": 128, "activations": "none"},
        MappingProxyType(asdict(Scheme.parse("w4a16-g128"))),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_scheme_in_every_form(given: Any) -> None:
    config = RunConfig(scheme=given)
    assert config.scheme.build() == Scheme.parse("w4a16-g128")
    assert RunConfig.build({"scheme": given}) == config
    assert RunConfig.build(config) is config


def test_toml_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('out = "result"\n[model]\npath = "model"\n[search]\ntrials = 12\n')
    config = RunConfig.from_toml(file, ["search.trials=16", "name=a b", "data.samples=8"])
    assert config.model.path == tmp_path / "model"
    assert config.out == tmp_path / "result"
    assert (config.search.trials, config.name, config.data.samples) == (16, "a b", 8)


@pytest.mark.parametrize(("text", "hint"), [("[search\n", "not valid TOML"), (None, "no file")])
def test_broken_files(tmp_path: Path, text: str | None, hint: str) -> None:
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=hint):
        RunConfig.from_toml(file)


def test_overrides_leave_their_input_alone() -> None:
    values = {"search": {"trials": 8}}
    assert apply_overrides(values, ["search.trials=9", "sites.exclude=['a*']"]) == {
        "search": {"trials": 9},
        "sites": {"exclude": ["a*"]},
    }
    assert values == {"search": {"trials": 8}}
    with pytest.raises(InputError, match="no '='"):
        apply_overrides({}, ["search.trials"])
    with pytest.raises(InputError, match="not a section"):
        apply_overrides({"name": "x"}, ["name.y=1"])


@given(
    st.integers(1, 4095), st.sampled_from([("KiB", 2**10), ("MiB", 2**20), ("GiB/s", 2**30), ("GB", 10**9), ("", 1)])
)
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{number} {unit[0]}") == number * unit[1]


def test_configuration_survives_json() -> None:
    config = RunConfig.build({"hardware": {"memory": "8 GiB"}, "model": {"demo": "text"}})
    assert RunConfig.build(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (f'hardware.memory="{"9" * 400}"', "hardware.memory"),
        ("hardware.memory=9223372036854775808", "hardware.memory"),
        ('hardware.bandwidth="1.2.3"', "hardware.bandwidth"),
        ('hardware.bandwidth="8I"', "hardware.bandwidth"),
        ("hardware.forwards_per_second=inf", "hardware.forwards_per_second"),
        ("workers.lease=nan", "workers.lease"),
        ("workers.lease=1e300", "workers.lease"),
        ("search.trials=1000000000000", "search.trials"),
        ("search.rows=9223372036854775808", "search.rows"),
        ("data.sampling_rate=1", "data.sampling_rate"),
        ("data.sampling_rate=4294967296", "data.sampling_rate"),
        ("data.image_size=1000000", "data.image_size"),
        ("model.path=~nobodyatall/x", "model.path"),
        (f"out={'x' * 300}", "out"),
        ('out="a\\u0000b"', "out"),
        ('name="a\\u001b[2Jb"', "name"),
        ('name="a\\u202eb"', "name"),
        ('search.device="cpu\\n"', "search.device"),
        ('model.factory="os:system\\u0007"', "model.factory"),
        (f"search.seed={'9' * 5000}", "--set"),
        (f"search.seed={'[' * 5000}", "--set"),
        (f"search.seed={'[' * 100}{']' * 100}", "--set"),
        ("search.seed=1\nsearch.trials=5", "--set"),
        ("search.seed=1\r", "--set"),
        ("name=a\u2028b", "--set"),
    ],
)
def test_an_override_that_nothing_below_can_hold(override: str, field: str) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig.build(apply_overrides({}, [override]))
    assert caught.value.field == field
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_every_number_has_both_bounds() -> None:
    """A float in ``ge=1`` alone lets 1e300 through, an int in ``gt=0`` what no column of a database takes."""
    open_ended = []
    sections = [
        RunConfig,
        *(f.annotation for f in RunConfig.model_fields.values() if hasattr(f.annotation, "model_fields")),
    ]
    for section in sections:
        for name, described in section.model_json_schema()["properties"].items():  # type: ignore[union-attr]
            for choice in described.get("anyOf", [described]):
                if choice.get("type") in ("integer", "number"):
                    low = {"minimum", "exclusiveMinimum"} & set(choice)
                    high = {"maximum", "exclusiveMaximum"} & set(choice)
                    open_ended += [] if low and high else [f"{section}.{name}"]
    assert open_ended == []


def test_a_script_may_give_anything() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    odd: tuple[Any, ...] = (Odd(), 10**5000, [[]] * 3, {"a": Odd()}, b"\xff", "\ud800", float("nan"))
    for value in odd:
        for values in (
            {"name": value},
            {"search": {"seed": value}},
            {"out": value},
            {"model": value},
            {"scheme": value},
        ):
            with pytest.raises(InputError):
                RunConfig.build(values)


@pytest.mark.parametrize("content", ["a = " + "[" * 50_000, "a = 1\x00", "a = '\ud800'", "search.seed = 1e400"])
def test_a_file_that_is_no_configuration(content: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError):
        RunConfig.from_toml(file)
