"""Records as tensors and JSON: sites of real architectures and awkward values come back equal to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alphasmith.objectives.calibration.tensor_state import STRUCTURE, StateFormat, independent, prefixed, unprefixed
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from tests.support.architectures import ARCHITECTURES
from tests.support.equality import same

SITES = StateFormat(Site, version=3, what="site", remedy="discover again")


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A record inside a record."""

    values: torch.Tensor
    text: str
    none: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    """One field of every kind."""

    number: float
    count: int
    pairs: tuple[tuple[str, float], ...]
    flags: tuple[bool, ...]
    inner: Mapping[str, Inner]
    maybe: float | None
    tensors: Mapping[str, torch.Tensor]


OUTER = StateFormat(Outer, version=1, what="thing", remedy="make it again")


def outer(**values: Any) -> Outer:
    plain: dict[str, Any] = {"number": 0.1, "count": 2, "pairs": (("a", 1.0),), "flags": (True,), "maybe": None}
    return Outer(**plain | {"inner": {}, "tensors": {}} | values)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "conv-net", "torch-encoder-pre-norm", "swin"])
def test_sites_survive_a_file_to_the_bit(name: str, tmp_path: Path) -> None:
    (architecture,) = [a for a in ARCHITECTURES if a.name == name]
    found = discover(architecture.factory(), architecture.batch(torch.Generator().manual_seed(1), 2))
    for site in found.sites:
        save_file(SITES.state(site), tmp_path / "site.safetensors")
        assert same(SITES.record(load_file(tmp_path / "site.safetensors")), site)


numbers = st.floats(allow_nan=True, allow_infinity=True)
tensors = st.lists(numbers, max_size=4).map(lambda values: torch.tensor(values, dtype=torch.float64))
inners = st.builds(Inner, values=tensors, text=st.text(), none=st.none() | tensors)
outers = st.builds(
    Outer,
    number=numbers,
    count=st.integers(-(2**60), 2**60),
    pairs=st.lists(st.tuples(st.text(), numbers), max_size=3).map(tuple),
    flags=st.lists(st.booleans(), max_size=3).map(tuple),
    inner=st.dictionaries(st.text(alphabet="ab."), inners, max_size=3),
    maybe=st.none() | numbers,
    tensors=st.dictionaries(st.text(alphabet="ab."), tensors, max_size=3),
)


@settings(deadline=None, max_examples=60)
@given(record=outers)
def test_every_kind_of_field_comes_back_as_it_was(record: Outer) -> None:
    assert same(OUTER.record(OUTER.state(record)), record)


def test_tensors_whose_paths_read_alike_are_kept_apart() -> None:
    one, two = (Inner(values=torch.tensor([value]), text="") for value in (1.0, 2.0))
    record = outer(inner={"a": one, "a.values": two}, tensors={"": torch.zeros(1), "inner": torch.ones(1)})
    assert same(OUTER.record(OUTER.state(record)), record)


def test_states_share_no_memory_and_carry_no_more_than_they_need(tmp_path: Path) -> None:
    large = torch.arange(1000.0)
    shared = outer(tensors={"whole": large, "again": large, "part": large[3:5], "strided": large[::2]})
    state = OUTER.state(shared)
    save_file(state, tmp_path / "file")  # refuses tensors that share memory
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    assert same(OUTER.record(load_file(tmp_path / "file")), shared)
    assert independent({"whole": large})["whole"].data_ptr() == large.data_ptr()  # no copy where none is needed


def test_several_states_fit_into_one_file() -> None:
    one, two = outer(tensors={"b.x": torch.ones(2)}), outer(number=math.pi)
    together = prefixed("a.", OUTER.state(one)) | prefixed("b.", OUTER.state(two))
    assert same(OUTER.record(unprefixed("a.", together)), one)
    assert same(OUTER.record(unprefixed("b.", together)), two)


def test_another_version_is_refused() -> None:
    newer = StateFormat(Outer, version=2, what="thing", remedy="make it again")
    with pytest.raises(InputError, match="thing: has version 1, not 2; make it again"):
        newer.record(OUTER.state(outer()))


def edited(state: Mapping[str, torch.Tensor], field: str, value: Any) -> dict[str, torch.Tensor]:
    structure = json.loads(bytes(state[STRUCTURE].tolist()))
    structure["record"][field] = value
    return {**state, STRUCTURE: torch.tensor(list(json.dumps(structure).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", "much"),
        ("count", None),
        ("unknown", 1),
        ("tensors", {"x": 1.0}),
        ("tensors", {"x": {"$tensor": "gone"}}),
    ],
)
def test_fields_of_another_kind_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"thing: is incomplete .*; make it again"):
        OUTER.record(edited(OUTER.state(outer()), field, value))


def test_damaged_states_are_refused() -> None:
    state = OUTER.state(outer(tensors={"x": torch.ones(2)}))
    cut = {**state, STRUCTURE: state[STRUCTURE][:-5]}
    for damaged in ({}, cut, {name: v for name, v in state.items() if name != "tensors.x"}, {STRUCTURE: torch.ones(3)}):
        with pytest.raises(InputError, match="thing: is incomplete"):
            OUTER.record(damaged)


def test_what_cannot_be_kept_is_refused_when_it_is_written() -> None:
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        OUTER.state(outer(inner={1}))


def test_the_comparison_of_these_tests_sees_every_field() -> None:
    record = outer(inner={"a": Inner(values=torch.zeros(2), text="t")}, tensors={"x": torch.zeros(1)})
    changes: dict[str, Any] = {
        "number": math.nextafter(0.1, 1.0),
        "count": 3,
        "pairs": (("a", -1.0),),
        "flags": (),
        "inner": {"a": Inner(values=-torch.zeros(2), text="t")},
        "maybe": 0.0,
        "tensors": {"x": torch.zeros(1, dtype=torch.float64)},
    }
    assert set(changes) == {field.name for field in fields(Outer)}
    assert not any(same(record, replace(record, **{name: value})) for name, value in changes.items())
