"""The output folder of an earlier release is still good for what its commands promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.search.checkpoints.load import load_quantized, load_smoothed
from alphasmith.search.checkpoints.verification import undo, verify
from alphasmith.search.config import RunConfig
from alphasmith.storage.output.manifest import read_manifest
from tests.support.run_cases import Mlp, answer, seeded, vectors, with_loud_channels

DATA = Path(__file__).parents[2] / "storage" / "data"


@pytest.fixture(params=["run_version_1", "run_version_2"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Written with an earlier version of the manifest; the report was left out."""
    return DATA / str(request.param)


def test_undo_gives_the_original_weights(folder: Path, tmp_path: Path) -> None:
    assert undo(folder, tmp_path / "undone")["parameters"] > 0
    shifted = any(site.shift_edits for site in read_manifest(folder).sites)
    # A bias that took in weight times shift, and lost it again, keeps the rounding of that sum.
    assert shifted == (folder.name != "run_version_1")
    undone = load_file(tmp_path / "undone" / "model.safetensors")
    for name, original in with_loud_channels(seeded(Mlp)).state_dict().items():
        torch.testing.assert_close(undone[name], original, rtol=1e-6, atol=2e-5 if shifted else 0)


def test_both_models_load(folder: Path) -> None:
    model = with_loud_channels(seeded(Mlp))
    value = vectors(seed=5)[0]
    expected = answer(model, value)
    for load, tolerance in ((load_smoothed, 1e-5), (load_quantized, 3e-2)):
        got = answer(load(folder, model), value)
        assert float((got - expected).norm() / expected.norm()) < tolerance


def test_verify_reads_it_and_misses_the_report(folder: Path) -> None:
    with pytest.raises(AlphasmithError, match=r"report\.html"):
        verify(folder)


def test_its_configuration_is_still_understood(folder: Path) -> None:
    config = RunConfig.build(dict(read_manifest(folder).config))
    assert config.search.trials == 4
