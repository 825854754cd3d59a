"""Results whose sites compute in formats of their own, in ONNX: weights of 7 bits, a zero point, scales found at run time, float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.search import export, load_quantized
from alphasmith.search.exports.verification import verify_export
from tests.support.onnx_runtime import CLOSE, PLAIN, difference, kinds, session, simulated
from tests.support.run_cases import Mlp, launch, seeded, vectors

onnx = pytest.importorskip("onnx", reason="needs pip install 'alphasmith[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'alphasmith[onnx]'")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The float architecture: fc1 reads a norm, fc2 a ReLU, head a norm."""
    return seeded(Mlp)


def result(folder: Path, model: nn.Module, sites: dict[str, str]) -> Path:
    """Of a run whose sites have these schemes, the others that of 8 bits."""
    return launch(folder, model, vectors(), {**PLAIN, "scheme": {"sites": sites}}).folder


MIXED = {"fc1": "w7a8-channel-static", "fc2": "w8au8-tensor-static"}


@pytest.mark.parametrize(
    ("layout", "sites", "nodes"),
    [
        ("qdq", {**MIXED, "head": "float"}, {"MatMulIntegerToFloat": 2}),
        ("ort-u8", {**MIXED, "head": "w8a8-channel-token"}, {"MatMulIntegerToFloat": 2, "MatMulInteger": 1}),
        pytest.param(
            "ort-u8",
            {"fc1": "w7a8-channel-token", "fc2": "float"},
            {"MatMulIntegerToFloat": 1, "MatMulInteger": 1},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_formats_stand_side_by_side(
    layout: str, sites: dict[str, str], nodes: dict[str, int], model: nn.Module, tmp_path: Path
) -> None:
    folder = result(tmp_path / "run", model, sites)
    record = export(folder, "onnx", tmp_path / "out", layout=layout, model=model, batch=vectors()[0]).record
    quantized = {name for name in ("fc1", "fc2", "head") if sites.get(name) != "float"}
    assert {operator.name: operator.scheme for operator in record.operators} == {
        name: sites.get(name, "w8a8-channel-static") for name in quantized
    }
    file = tmp_path / "out/model.onnx"
    opened = session(file)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(4))
    expected = simulated(load_quantized(folder, model), Batch(args=(x,)))
    assert difference(opened.run(None, {"x": x.numpy()})[0], expected) < CLOSE
    made = kinds(file)
    assert {name: made[name] for name in nodes} == nodes
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(file).graph.initializer}
    codes = stored["fc1.weight_codes"].astype(int) - (128 if layout == "ort-u8" else 0)
    assert codes.min() >= -64
    assert codes.max() == 63
    assert {f"{name}.weight_codes" for name in quantized} == {name for name in stored if name.endswith("weight_codes")}
    assert verify_export(tmp_path / "out", run=folder)["operators"] == len(quantized)


@pytest.mark.parametrize(
    ("site", "scheme", "layout", "told"),
    [
        ("head", "w8a8-channel-token", "qdq", "--layout ort-u8"),
        pytest.param("fc2", "w4a16-g8", "ort-u8", "weights are held with 8 bits", marks=pytest.mark.slow),
        pytest.param("fc2", "w8ai16-channel-static", "qdq", "activations are held with 8 bits", marks=pytest.mark.slow),
    ],
)
def test_a_format_that_a_layout_lacks_is_named_with_its_operator(
    site: str, scheme: str, layout: str, told: str, model: nn.Module, tmp_path: Path
) -> None:
    folder = result(tmp_path / "run", model, {site: scheme})
    with pytest.raises(InputError, match=rf"layout {layout} cannot hold {scheme} \({site}\).*{told}") as caught:
        export(folder, "onnx", tmp_path / "out", layout=layout, model=model, batch=vectors()[0])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
