"""Whole runs on networks with dead and near-dead channels, and in other units between their layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from alphasmith.search import RunResult, load_quantized
from tests.support.dead_channels import PLACES, dead_channel_net, pictures
from tests.support.run_cases import launch


def _run(
    folder: Path, granularity: str, *, seed: int = 4, near: bool = False, units: Mapping[str, float] | None = None
) -> RunResult:
    values = {
        "scheme": {"weights": "int8", "weight_granularity": granularity, "activations": "int8"},
        "search": {"trials": 6, "rows": 128, "refine": False},
        "groups": {"k": 3},
    }
    return launch(folder, dead_channel_net(seed, near=near, units=units), pictures(), values)


@pytest.mark.parametrize("near", [False, True], ids=["dead", "near-dead"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_dead_channels_do_no_harm(granularity: str, near: bool, tmp_path: Path) -> None:
    """Live channels whose scales are in the hundreds, through a chain of folds: better than no smoothing, without any guard."""
    result = _run(tmp_path, granularity, near=near, units=dict.fromkeys(PLACES, 300.0))
    output = result.manifest.output
    assert output.kept == "ours"
    assert output.ours is not None
    assert output.naive is not None
    assert output.ours < 0.95 * output.naive
    folded = [site for site in result.manifest.sites if site.mode == "fold"]
    assert [site.name for site in folded] == ["c2", "c3", "c4", "head"]
    scales = load_file(result.folder / "scales.safetensors")
    assert sum(float(scales[f"scale/{site.name}"].max()) > 20 for site in folded) >= 3
    # No row of a smoothed weight stands out by a dead channel, which is what the loss of the site before would look at.
    smoothed = load_file(result.folder / "smoothed" / "model.safetensors")
    for place in PLACES:
        rows = smoothed[f"{place}.weight"].flatten(1).abs().amax(1)
        assert float(rows.max() / rows.median()) < 12


@cache
def _reference(folder: Path, granularity: str) -> tuple[Tensor, tuple[float | None, ...]]:
    return _chosen(_run(folder, granularity))


def _chosen(result: RunResult) -> tuple[Tensor, tuple[float | None, ...]]:
    """Outputs of the quantized model, and the losses of all sites and of the output."""
    model = load_quantized(result.folder, model=dead_channel_net(4))
    with torch.no_grad():
        outputs = torch.cat([model(x) for x in pictures(2)])
    losses = [site.losses for site in result.manifest.sites if site.losses is not None]
    return outputs, (result.manifest.output.ours, *(of.ours for both in losses for of in (both.search, both.held_out)))


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["tensor", "channel"]),
    st.dictionaries(st.sampled_from(PLACES), st.integers(-5, 9), min_size=1),
)
@pytest.mark.slow
def test_the_unit_of_an_activation_changes_neither_the_choice_nor_its_loss(
    tmp_path_factory: pytest.TempPathFactory, granularity: str, powers: dict[str, int]
) -> None:
    """Rows of a layer times a constant, columns of the next by it; powers of two, which no arithmetic rounds, so that nothing but a rule can differ."""
    outputs, losses = _reference(tmp_path_factory.getbasetemp() / granularity, granularity)
    units = {place: math.ldexp(1.0, power) for place, power in powers.items()}
    scaled_outputs, scaled_losses = _chosen(_run(tmp_path_factory.mktemp("scaled"), granularity, units=units))
    assert torch.equal(scaled_outputs, outputs)
    assert scaled_losses == pytest.approx(losses, rel=1e-9)
