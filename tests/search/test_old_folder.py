"""The output folder of an earlier release is still good for what its commands promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.search.config import RunConfig
from alphasmith.search.reload import load_quantized, load_smoothed
from alphasmith.search.verification import undo, verify
from alphasmith.storage.manifest import read_manifest
from tests.search.run_cases import Mlp, answer, seeded, vectors, with_loud_channels

#: Written by the first release; its report was left out.
FOLDER = Path(__file__).parents[1] / "storage" / "data" / "run_version_1"


def test_undo_gives_the_original_weights(tmp_path: Path) -> None:
    assert undo(FOLDER, tmp_path / "undone")["parameters"] > 0
    undone = load_file(tmp_path / "undone" / "model.safetensors")
    for name, original in with_loud_channels(seeded(Mlp)).state_dict().items():
        torch.testing.assert_close(undone[name], original, rtol=1e-6, atol=0)


def test_both_models_load() -> None:
    model = with_loud_channels(seeded(Mlp))
    value = vectors(seed=5)[0]
    expected = answer(model, value)
    for load, tolerance in ((load_smoothed, 1e-5), (load_quantized, 3e-2)):
        got = answer(load(FOLDER, model), value)
        assert float((got - expected).norm() / expected.norm()) < tolerance


def test_verify_reads_it_and_misses_the_report() -> None:
    with pytest.raises(AlphasmithError, match=r"report\.html"):
        verify(FOLDER)


def test_its_configuration_is_still_understood() -> None:
    config = RunConfig.build(dict(read_manifest(FOLDER).config))
    assert config.search.trials == 4
