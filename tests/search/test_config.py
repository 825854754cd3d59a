"""Configuration: round trips, overrides, and errors that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from alphasmith.search.config import RunConfig, apply_overrides, parse_bytes


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
    ],
)
def test_errors_name_the_field_and_a_remedy(values: dict[str, object], field: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig.build(values)
    assert caught.value.field == field
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


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
