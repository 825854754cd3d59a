"""Budgets of formats: what goes together, what no choice meets, what a target holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.formats import FORMATS, fitting, format_of, is_dearer, scheme_of, served, told
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.config import RunConfig

TIMES = {"int8-static": 1.0, "int8-token": 1.25, "float": 4.0}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sites": {"formats": ["int7"]}}, "int8-static"),
        ({"sites": {"formats": ["float", "float"]}}, "twice"),
        ({"sites": {"formats": ["fp8-token"]}}, "does not go with int8 weights; use int8-static"),
        ({"target": "tensorrt", "sites": {"formats": ["int8-token"]}}, "use int8-static, float, or another target"),
        (
            {"target": "openvino", "scheme": "w8a8-channel-token"},
            "target: 'int8-token' is nothing that openvino serves",
        ),
        ({"sites": {"formats": ["int8-token"]}, "budget": {"share_of_macs": 0.5}}, "the nearest is 1, int8-token"),
        ({"budget": {"latency": TIMES, "latency_factor": 0.9}}, "0.9 is met by no choice of formats; the nearest is 1"),
        ({"budget": {"latency": TIMES}}, "without a limit"),
        ({"budget": {"latency": TIMES, "latency_factor": 1.1, "share_of_macs": 0.1}}, "keep one of them"),
        ({"budget": {"latency": {"float": 2.0}, "latency_factor": 1.1}}, "says nothing of 'int8-static'"),
        ({"budget": {"latency": {"float": -1.0}, "latency_factor": 1.1}}, "budget.latency.float"),
        ({"budget": {"latency": "nowhere.toml", "latency_factor": 1.1}}, "budget.latency: no file"),
        ({"budget": {"share_of_macs": 0.1}, "scheme": "w4a16-g64"}, "quantizes no activations"),
        ({"budget": {"share_of_macs": 0.2}, "memory": {"mode": "blockwise"}}, "memory.mode: is 'blockwise'"),
        ({"budget": {"share_of_macs": 1.5}}, "budget.share_of_macs"),
    ],
)
def test_what_cannot_be_is_named_at_the_start(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig.build(values)
    told_line = str(caught.value)
    assert words in told_line or words.replace(":", "") in told_line
    assert "\n" not in told_line


def test_a_table_of_times_is_read_from_a_file_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "times.toml").write_text("int8-static = 2e-12\nint8-token = 3e-12\n")
    (tmp_path / "run.toml").write_text('[budget]\nlatency = "times.toml"\nlatency_factor = 1.2\n')
    config = RunConfig.from_toml(tmp_path / "run.toml")
    assert config.budget.cost("int8-token", "int8-static") == pytest.approx(1.5)
    assert config.budget.choices(Scheme(), (), "any") == ("int8-static", "int8-token")
    assert RunConfig.build(config.model_dump(mode="json")) == config


def test_without_a_budget_or_formats_there_is_no_choice() -> None:
    config = RunConfig()
    assert config.budget.choices(config.scheme.build(), config.sites.formats, config.target) == ()


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int7-weights"])
def test_a_format_is_that_of_its_scheme(name: Any) -> None:
    base = Scheme(weights="fp8", activations="fp8") if name.startswith("fp8") else Scheme()
    assert name in fitting(base)
    assert format_of(scheme_of(name, base)) == name
    assert not is_dearer(name, name)


@pytest.mark.parametrize("target", ["vllm", "onnxruntime", "openvino", "tensorrt"])
def test_every_target_serves_less_than_there_is_and_float_always(target: Any) -> None:
    assert set(served(target, Scheme())) < set(served("any", Scheme()))
    assert "float" in served(target, Scheme(weights="int4", weight_granularity="group", group_size=32))


def test_a_plan_is_told_by_its_formats() -> None:
    assert told({}, 3, "int8-static") == "int8-static at every site"
    assert told({"a": "float"}, 3, "int8-static") == "float at 1 of 3 sites: a; int8-static at the rest"
    assert told({"a": "float", "b": "float"}, 2, "int8-static", named=False) == "float at 2 of 2 sites"
