"""Runs whose sites compute in formats of their own: from the configuration to files that are read and proven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.search import RunResult, load_quantized
from alphasmith.search.checkpoints.verification import verify
from alphasmith.storage.output.manifest import parse_manifest
from tests.support.run_cases import Mlp, answer, launch, seeded, vectors

FAST = {"search": {"noise_model": False}}
#: fc1 reads a norm, fc2 a ReLU, head a norm.
MIXED = {"weight_granularity": "tensor", "sites": {"fc2": "w8au8-channel-static", "he*": "float"}}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The user's model."""
    return seeded(Mlp)


def relative(result: RunResult, model: nn.Module) -> float:
    """Relative error of the reloaded integers on data of their own."""
    value = vectors(16, seed=6)[0]
    expected = answer(model, value)
    return float((answer(load_quantized(result.folder, model), value) - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["w8au8-channel-static", "w4au8-g8-token", "w8ai16-channel-static"])
def test_a_run_in_a_new_format_is_written_read_and_proven(name: str, tmp_path: Path, model: nn.Module) -> None:
    result = launch(tmp_path, model, vectors(), {"scheme": name, "search": {"trials": 6}})
    assert result.manifest.scheme.name == name
    smoothed = result.sites[result.sites["winner"].notna()]
    assert (smoothed["ours"] <= smoothed["identity"]).all()
    assert 0 < relative(result, model) < 0.5
    stored = load_file(result.folder / "quantized" / "model.safetensors")
    zeros = {key: tensor for key, tensor in stored.items() if key.endswith(".input_zero")}
    assert set(zeros) == ({f"{at}.input_zero" for at in ("fc1", "fc2", "head")} if "u8-channel" in name else set())
    if zeros:  # after a ReLU nothing is below 0, so all codes are above it
        assert {tensor.dtype for tensor in zeros.values()} == {torch.uint8}
        assert int(zeros["fc2.input_zero"]) == 0 < int(zeros["fc1.input_zero"])
    assert verify(result.folder)["artifacts"] == len(result.manifest.artifacts)


def test_sites_have_the_schemes_that_are_named(tmp_path: Path, model: nn.Module) -> None:
    result = launch(tmp_path, model, vectors(), {"scheme": MIXED, "search": {"trials": 6}})
    manifest = parse_manifest((result.folder / "manifest.json").read_text())
    assert manifest.scheme.name == "w8a8-tensor-static+2"
    assert manifest.scheme.sites == {"fc2": "w8au8-channel-static", "head": "float"}
    assert manifest.scheme.site_schemes().of("fc1").name == "w8a8-tensor-static"
    assert {site.name: site.winner is not None for site in manifest.sites} == {"fc1": True, "fc2": True, "head": False}
    assert [(entry.name, entry.reason) for entry in manifest.skipped] == [("head", "the scheme of its site is float")]
    quantized = load_quantized(result.folder, model)
    found = {name: m.scheme.name for name, m in quantized.named_modules() if isinstance(m, QuantizedOperator)}
    assert found == {"fc1": "w8a8-tensor-static", "fc2": "w8au8-channel-static"}
    assert torch.equal(quantized.get_parameter("head.weight"), model.get_parameter("head.weight"))
    assert 0 < relative(result, model) < 0.5
    assert verify(result.folder)["artifacts"] == len(result.manifest.artifacts)
    assert result.manifest.payload.weights_quantized == sum(
        m.weight.numel() for name, m in model.named_modules() if name in found
    )


def test_a_pattern_that_no_site_matches_is_named_before_anything_is_written(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"^scheme\.sites: no site matches 'fc3'.*'fc1'"):
        launch(tmp_path, model, vectors(), {"scheme": {"sites": {"fc3": "float"}}, **FAST})
    assert not list(tmp_path.rglob("manifest.json"))
