"""Flat layers are exactly those that truncation leaves dense for want of a rank, and they become branches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.branch.placement import branch_layers
from alphasmith.objectives.joint.branch.rows import collect_rows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.joint.low_rank.spectrum import fallback_layers
from alphasmith.objectives.media.batch import Batch
from tests.support.joint_branches import low_rank_under_noise


def made_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 40), nn.Linear(40, 32), nn.Conv1d(1, 6, 3)).eval()
    with torch.no_grad():
        first, second, third = (model.get_submodule(name).get_parameter("weight") for name in "012")
        first.copy_(low_rank_under_noise(40, 32, 3, 0.0, generator))
        second.copy_(torch.randn(40, 40, generator=generator))
        third.zero_()
    return model


@pytest.mark.parametrize(
    "settings",
    [
        LowRankSettings(energy=0.99),
        LowRankSettings(energy=0.3),
        LowRankSettings(rank=18),
        LowRankSettings(energy={"linear": 0.99}),
        LowRankSettings(rank=3),
        LowRankSettings(energy=0.99, exclude=["1"]),
        LowRankSettings(energy=0.9, metric="whitened", exclude=["3"]),
    ],
)
def test_flat_layers_are_those_that_no_rank_makes_smaller(settings: LowRankSettings) -> None:
    model = made_model()
    covariances = {name: torch.eye(n) for name, n in (("0", 32), ("1", 40), ("2", 40))}
    flat = fallback_layers(model, settings, covariances=covariances)
    report = factorize(copy.deepcopy(model), settings, covariances=covariances)
    assert [one.name for one in flat] == [one.name for one in report if one.reason.startswith("no rank ")]
    for one in flat:
        assert one.needed > one.saving
        assert 0 <= one.kept <= 1
        if settings.rank is None and isinstance(settings.energy, float):
            assert one.kept < settings.energy
        assert one.reason.startswith(f"branch in place of truncate: rank {one.needed}")


def test_a_flat_spectrum_becomes_a_branch_and_says_why() -> None:
    model = made_model()
    (flat, *_) = fallback_layers(model, LowRankSettings(energy=0.9, exclude=["3"]))
    assert flat.name == "1"
    rows = collect_rows(nn.Sequential(*list(model)[:3]), [Batch(args=(torch.randn(60, 32),))], count=50, seed=0)
    report = branch_layers(model, rows, BranchSettings(rank=4), why={flat.name: flat.reason})
    branched = [one for one in report if one.rank]
    assert [one.name for one in branched] == ["1"]
    assert branched[0].notes[0] == flat.reason
    assert {one.reason for one in report if one.name != "1"} == {"it was not asked for"}


@pytest.mark.parametrize(
    ("change", "field"), [({"metric": "spectral"}, "svd.metric"), ({"energy": None}, "svd"), ({"metric": "whitened"}, "svd.metric")]
)  # fmt: skip
def test_wrong_settings_are_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        fallback_layers(made_model(), LowRankSettings(**change))
    assert caught.value.field == field
