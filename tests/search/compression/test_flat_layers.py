"""Layers with a flat spectrum become branches in place of truncation, one by one, and the result says which and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from alphasmith.dashboards.compression_report import fallen_back, render_compression
from alphasmith.objectives.joint.drop import DropCondition, Tolerance
from alphasmith.search.cli.answers import compression_text
from alphasmith.search.compression._cache import StageCache
from alphasmith.search.compression._space import Choice
from alphasmith.search.compression._stages import Compressed, ModelStages
from alphasmith.search.compression._study import DroppedError
from alphasmith.search.compression.config import CompressConfig
from alphasmith.search.interruption import never
from alphasmith.storage.output.compression_manifest import layer_entries
from tests.support.compressed_folders import made_manifest
from tests.support.compressed_models import listener, task

#: The convolutions keep nearly all of their energy, which no saving rank does; the others lose half of it.
DROPS = {"conv": 1e-7, "recurrent_ih": 0.5, "recurrent_hh": 0.5, "linear": 0.5}
CHOICE = Choice(
    encoder=0.0, recurrent=0.0, role="truncate", drops=DROPS, flat="branch", rank=4, alpha=0.5, residual="int4",
    clusters={"conv": 16, "recurrent": 16, "linear": 16},
)  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> ModelStages:
    config = CompressConfig.build(
        {
            "train": {"steps": 0},
            "rounds": {"steps": 0, "most": 1, "metric": "plain"},
            "branch": {"refits": 0},
            "clusters": {"finetune": 0},
        }
    )
    condition = DropCondition(tolerances=(Tolerance(metric="accuracy", drop=100.0),))
    cache = StageCache(tmp_path_factory.mktemp("stages"))
    return ModelStages(listener(), task(), condition, config, cache, stop=never)


@pytest.fixture(scope="module")
def made(stages: ModelStages) -> Compressed:
    return stages.compressed(CHOICE)


def forms(found: Compressed) -> dict[str, str]:
    return {entry.name: entry.form for entry in layer_entries(found.packed)}


def test_single_layers_become_branches_beside_factored_ones(made: Compressed) -> None:
    found = forms(made)
    assert found["convs.1"] == "branch"
    assert "linear" in found.values(), "others were truncated"
    assert set(made.facts["flat"]) >= {"convs.0", "convs.1"}
    (note,) = [note for note in made.facts["notes"] if "in place of truncation" in note]
    assert "convs.1" in note
    assert "rank 4 at alpha 0.50" in note


def test_every_layer_says_why_in_manifest_report_and_lines(stages: ModelStages, made: Compressed) -> None:
    layers = layer_entries(made.packed, reasons=dict(made.facts["reasons"]))
    manifest = made_manifest(made.packed, stages.float_bytes, layers=layers)
    branches = [entry for entry in layers if entry.form == "branch"]
    assert all(entry.reason.startswith("branch in place of truncate: rank ") for entry in branches)
    told = fallen_back(manifest)
    assert [line.partition(": ")[0] for line in told] == [entry.name for entry in branches]
    page = render_compression(manifest, [])
    text = compression_text(manifest.model_dump(mode="json"), "folder")
    for entry in branches:
        assert entry.reason in page
        assert f"{entry.name}: {entry.reason}" in text
    small = next(entry for entry in layers if entry.name == "convs.0")
    assert small.form == "branch" or "stays dense, with a flat spectrum" in small.reason


def test_they_stay_dense_where_that_was_chosen(stages: ModelStages) -> None:
    found = forms(stages.compressed(replace(CHOICE, flat="dense", rank=0, alpha=0.0, residual=None)))
    assert "branch" not in found.values()
    assert found["convs.1"] == "dense"


@pytest.mark.parametrize("flat", ["branch", "dense"])
def test_where_no_rank_falls_at_all_all_become_branches_or_the_trial_ends(stages: ModelStages, flat: Any) -> None:
    choice = replace(CHOICE, drops=dict.fromkeys(DROPS, 1e-7), flat=flat)
    if flat == "dense":
        with pytest.raises(DroppedError, match="no rank fell in round 1"):
            stages.compressed(choice)
        return
    found = stages.compressed(choice)
    assert [form for form in forms(found).values() if form not in ("dense", "branch")] == []
    assert list(forms(found).values()).count("branch") >= 3
    assert found.facts["rounds"]["status"] == "no_rank_fell"


def test_what_was_made_once_is_taken_from_the_cache(stages: ModelStages, made: Compressed) -> None:
    again = stages.compressed(CHOICE)
    assert again.packed.structure == made.packed.structure
    assert again.facts == made.facts
