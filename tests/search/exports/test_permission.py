"""Code that a manifest names runs for an export only where the caller names it, too."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from alphasmith.search import RunConfig, export, run
from alphasmith.search.inputs.permission import CodeNotAllowedError
from alphasmith.storage.output.manifest import FILE_NAME

MODULE = """
import torch
from pathlib import Path
from torch import nn

def build(*path):
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

def batches(*path):
    return list(torch.randn(104, 16, generator=torch.Generator().manual_seed(1)).split(8))

def trap(*anything):
    Path(__file__).with_name("sprung").touch()
    raise SystemExit("sprung")
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of functions that build, and of one that leaves a file where it is called."""
    monkeypatch.delitem(sys.modules, "exported_code", raising=False)
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "exported_code.py").write_text(MODULE)
    return folder


def forged(result: Path, code: Path) -> None:
    """Let a manifest name another builder of the model."""
    manifest = json.loads((result / FILE_NAME).read_text())
    manifest["config"]["model"] |= {"factory": "exported_code:trap", "factory_path": str(code)}
    (result / FILE_NAME).write_text(json.dumps(manifest))


def test_an_onnx_export_runs_what_builds_the_model_only_if_allowed(code: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs pip install 'alphasmith[onnx]'")
    values = {
        "model": {"factory": "exported_code:build", "factory_path": code},
        "data": {"factory": "exported_code:batches"},
        "search": {"trials": 4, "refine": False, "rows": 32},
        "storage": f"sqlite:///{tmp_path}/a.db",
        "out": tmp_path / "result",
    }
    result = run(RunConfig.build(values)).folder
    data = "exported_code:batches"
    with pytest.raises(CodeNotAllowedError, match=r"model\.factory = 'exported_code:build'"):
        export(result, "onnx", tmp_path / "out", allow_code=[data, code])
    assert not (tmp_path / "out").exists()
    assert export(result, "onnx", tmp_path / "out", allow_code=["exported_code:build", data, code]).record.operators
    forged(result, code)
    with pytest.raises(CodeNotAllowedError, match="exported_code:trap"):
        export(result, "onnx", tmp_path / "again", allow_code=["exported_code:build", data, code])
    assert not (code / "sprung").exists()


def test_calibrating_plain_sites_again_builds_the_model_from_the_result_alone(
    explicit_result: Path, code: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result"
    shutil.copytree(explicit_result, result)
    expected = export(result, "compressed-tensors", tmp_path / "first", unsmoothed_sites=True).record
    forged(result, code)
    found = export(result, "compressed-tensors", tmp_path / "second", unsmoothed_sites=True).record
    assert not (code / "sprung").exists()
    assert found.operators == expected.operators
