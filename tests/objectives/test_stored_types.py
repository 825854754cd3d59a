"""Types that tensors came in: found, held or not held by what folding makes of a tensor, given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from alphasmith.objectives.judge.equivalence import fold_and_prove
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.objectives.stored_types import (
    cast_to,
    checkpoint_types,
    half_types,
    misfit,
    round_to,
    rounding_limit,
    told,
)
from tests.support.run_cases import Mlp, seeded, vectors, with_loud_channels

HALVES = [torch.bfloat16, torch.float16]


def model() -> nn.Module:
    return with_loud_channels(seeded(Mlp)).requires_grad_(False)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_checkpoint_of_one_type_tells_it_under_any_names(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"other.{name}": value.to(dtype) for name, value in model().state_dict().items()}
    save_file(tensors | {"steps": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.safetensors")
    assert checkpoint_types([tmp_path / "a.safetensors"], model()) == dict.fromkeys(model().state_dict(), dtype)


def test_of_several_types_only_names_that_agree_count(tmp_path: Path) -> None:
    state = model().state_dict()
    save_file(
        {"fc1.weight": state["fc1.weight"].half(), "x.bias": state["fc1.bias"].bfloat16()}, tmp_path / "a.safetensors"
    )
    save_file({"fc2.weight": state["fc2.weight"]}, tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert checkpoint_types(files, model()) == {"fc1.weight": torch.float16}


def test_rounding_keeps_the_type_and_casting_keeps_ties() -> None:
    made = model()
    made.register_parameter("tied", made.get_parameter("fc1.weight"))
    types = {"fc1.weight": torch.bfloat16, "tied": torch.bfloat16}
    before = made.get_parameter("fc1.weight").clone()
    round_to(made.state_dict(), {"fc1.weight": torch.bfloat16})
    rounded = made.get_parameter("fc1.weight")
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, before)
    assert torch.equal(rounded, before.bfloat16().float())
    cast_to(made, types)
    assert made.get_parameter("tied") is made.get_parameter("fc1.weight")
    assert half_types(made.state_dict()) == types
    assert told(types, made.state_dict()) == "bfloat16, float32"
    assert rounding_limit(types) > rounding_limit({"a": torch.float16}) > rounding_limit({}) == 0


@pytest.mark.parametrize(
    ("values", "held"), [([6e4, 1.0], True), ([7e4, 1.0], False), ([1e-9, 1e-9], False), ([0.0, 0.0], True)]
)
def test_what_float16_holds(values: list[float], held: bool) -> None:
    assert misfit({"a": torch.tensor(values)}, {"a": torch.float16}) == ("" if held else "a")
    assert misfit({"a": torch.tensor(values)}, {"a": torch.bfloat16}) == ""


@pytest.mark.parametrize(("scale", "fits"), [(2.0, True), (1e-4, False)])
def test_the_proof_is_of_what_is_stored_if_it_can_be(scale: float, fits: bool) -> None:
    made = model()
    batches = [Batch(args=(value,)) for value in vectors()[:2]]
    sites = discover(made, batches[0]).sites
    types = dict.fromkeys(made.state_dict(), torch.float16)
    round_to(made.state_dict(), types)
    smoothings = {site.name: Smoothing(scales=torch.full((site.channels,), scale)) for site in sites}
    proven = fold_and_prove(made, sites, smoothings, batches, stored=types)
    state = made.state_dict()
    exact = all(torch.equal(value, value.half().float()) for value in state.values())
    assert (proven.misfit == "", proven.stored is not None, exact) == (fits, fits, fits)
    assert proven.error < 1e-6
    assert proven.stored is None or proven.stored <= rounding_limit(types)
