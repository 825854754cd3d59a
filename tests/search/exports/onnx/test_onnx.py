"""ONNX exports: ONNX Runtime and OpenVINO compute what our module computes, at sizes that were not traced, from the run's integers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.media.batch import Batch
from alphasmith.search import export, load_quantized
from alphasmith.search.exports._card import CARD
from alphasmith.search.exports.verification import verify_export
from tests.support.onnx_runtime import (
    CLOSE,
    difference,
    kinds,
    numbers,
    openvino_layers,
    session,
    simulated,
    texts,
)
from tests.support.run_cases import alphasmith

onnx = pytest.importorskip("onnx", reason="needs pip install 'alphasmith[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'alphasmith[onnx]'")

Results = Callable[[str], Path]


@pytest.mark.parametrize(
    ("scheme", "layout", "product"),
    [
        ("w8a8-channel-static", "ort-u8", "MatMulIntegerToFloat"),
        ("w8a8-channel-static", "qdq", "MatMulIntegerToFloat"),
        # Of 7 bits, for which every processor is exact: without VNNI, products of signed weights of 8 bits saturate.
        pytest.param("w7a8-channel-static", "ort-s8", "MatMulIntegerToFloat", marks=pytest.mark.slow),
        pytest.param("w8au8-channel-static", "qdq", "MatMulIntegerToFloat", marks=pytest.mark.slow),
        pytest.param("w8a8-channel-token", "ort-u8", "MatMulInteger", marks=pytest.mark.slow),
    ],
)
def test_a_language_model(result_of: Results, scheme: str, layout: str, product: str, tmp_path: Path) -> None:
    result = result_of(scheme)
    made = export(result, "onnx", tmp_path / "out", layout=layout)
    file = tmp_path / "out/model.onnx"
    onnx.checker.check_model(str(file), full_check=layout == "qdq")
    opened = session(file)
    for samples, length in ((3, 5), (1, 11)):
        given = texts(samples, length, "input_ids", "attention_mask")
        expected = simulated(load_quantized(result), Batch(kwargs=given))
        assert difference(opened.run(["logits"], numbers(given))[0], expected) < CLOSE
    assert kinds(file)[product] == len(made.record.operators) == 8
    assert verify_export(tmp_path / "out", run=result)["operators"] == 8


@pytest.mark.parametrize("layout", ["ort-u8", pytest.param("qdq", marks=pytest.mark.slow)])
def test_a_text_goes_on_with_the_keys_and_values_that_are_kept(result_of: Results, layout: str, tmp_path: Path) -> None:
    result = result_of("w8a8-channel-static")
    export(result, "onnx", tmp_path / "out", layout=layout)
    opened = session(tmp_path / "out/model_with_past.onnx")
    whole = texts(2, 11, "input_ids", "attention_mask")
    expected = simulated(load_quantized(result), Batch(kwargs=whole))
    names = [value.name for value in opened.get_outputs()]
    kept = {
        value.name: np.zeros([2, *(size if isinstance(size, int) else 0 for size in value.shape[1:])], np.float32)
        for value in opened.get_inputs()
        if value.name.startswith("past_")
    }
    found, done = [], 0
    for more in (6, 1, 4):  # nothing before, one token, several
        ids = whole["input_ids"][:, done : done + more].numpy()
        done += more
        output = opened.run(None, {"input_ids": ids, "attention_mask": np.ones((2, done), np.int64), **kept})
        told = dict(zip(names, output, strict=True))
        found.append(told["logits"])
        kept = {name: told[name.replace("past", "present")] for name in kept}
    assert difference(np.concatenate(found, 1), expected) < CLOSE


def test_a_division_at_run_time_is_a_product_with_the_reciprocal(explicit_result: Path, tmp_path: Path) -> None:
    export(explicit_result, "onnx", tmp_path / "out", layout="qdq")
    file = tmp_path / "out/model.onnx"
    given = texts(3, 9, "input_ids", "attention_mask", "token_type_ids")
    expected = simulated(load_quantized(explicit_result), Batch(kwargs=given))
    opened = session(file)
    assert difference(opened.run(["logits"], numbers(given))[0], expected) < CLOSE
    names = {initializer.name for initializer in onnx.load(file).graph.initializer}
    assert any(name.endswith("output.dense.inverse") for name in names)
    assert [str(axis) for axis in opened.get_inputs()[0].shape] == ["batch", "length"]
    # The weights travel as integers alone.
    assert not {name for name in names if name.endswith(("query.weight", "dense.weight"))}


def test_openvino_reads_the_portable_layout(explicit_result: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    record = export(explicit_result, "onnx", tmp_path / "out", layout="qdq").record
    compiled = openvino.Core().compile_model(str(tmp_path / "out/model.onnx"), "CPU")
    given = texts(3, 9, "input_ids", "attention_mask", "token_type_ids")
    expected = simulated(load_quantized(explicit_result), Batch(kwargs=given))
    found = next(iter(compiled(numbers(given)).values()))
    assert difference(found, expected) < 0.1  # kernels of processors without VNNI saturate
    assert openvino_layers(compiled)["FullyConnected", "i8"] == len(record.operators)


def check_the_same(first: Path, second: Path, *places: Path) -> None:
    """The same files to the byte, which name none of these places."""
    told = [place for path in (*places, Path.home(), Path(sys.prefix)) for place in (f"{path}/", f"{path.resolve()}/")]
    told += ["site-packages", "stack_trace", str(Path(__file__).resolve().parents[4])]
    for file in first.iterdir():
        content = file.read_bytes()
        assert content == (second / file.name).read_bytes()
        assert [place for place in told if place.encode() in content] == []
    assert len(list(first.iterdir())) == len(list(second.iterdir()))


@pytest.mark.slow
def test_the_same_result_gives_the_same_bytes_and_none_of_the_machine(result_of: Results, tmp_path: Path) -> None:
    result = result_of("w8a8-channel-static")
    for name in ("a", "b"):
        export(result, "onnx", tmp_path / name)
    check_the_same(tmp_path / "a", tmp_path / "b", tmp_path, result)


WRITING = """
import sys
from alphasmith.search import export
export(sys.argv[1], "onnx", "out", layout=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["ort-u8", "qdq"])
def test_processes_whose_hashes_differ_write_the_same_bytes(result_of: Results, layout: str, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        work = tmp_path / f"process-{seed}"
        shutil.copytree(result_of("w8a8-channel-static"), work / "result")
        command = [sys.executable, "-W", "ignore", "-c", WRITING, str(work / "result"), layout]
        done = subprocess.run(
            command, cwd=work, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
    check_the_same(tmp_path / "process-1/out", tmp_path / "process-2/out", tmp_path)


@pytest.mark.slow
def test_many_weights_lie_beside_the_model(result_of: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphasmith.search.exports.onnx import models

    result = result_of("w8a8-channel-static")
    write = models.OnnxModels.write
    monkeypatch.setattr(models.OnnxModels, "write", lambda self, folder: write(self, folder, inside=0))
    export(result, "onnx", tmp_path / "out")
    assert (tmp_path / "out/model.onnx.data").stat().st_size > 1000
    given = texts(2, 6, "input_ids", "attention_mask")
    expected = simulated(load_quantized(result), Batch(kwargs=given))
    assert difference(session(tmp_path / "out/model.onnx").run(["logits"], numbers(given))[0], expected) < CLOSE
    assert verify_export(tmp_path / "out", run=result)["operators"] == 8
    beside = tmp_path / "out/model.onnx.data"
    beside.write_bytes(beside.read_bytes()[::-1])
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data"):
        verify_export(tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"layout": "s8"}, "ort-u8, ort-s8, qdq"),
        ({"unsmoothed_sites": True}, "every site is written"),
        ({"batch": "text"}, "batch"),
    ],
)
def test_what_does_not_belong_to_the_format_is_refused(
    result_of: Results, given: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        export(result_of("w8a8-channel-static"), "onnx", tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_line(result_of: Results, tmp_path: Path) -> None:
    result = result_of("w8a8-channel-token")
    out = str(tmp_path / "o")
    bad = alphasmith("export", str(result), "--format", "onnx", "--layout", "qdq", "--out", out, cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "cannot hold w8a8-channel-token" in bad.stderr
    good = alphasmith("export", str(result), "--format", "onnx", "--out", out, "--json", cwd=tmp_path)
    assert json.loads(good.stdout)["record"]["layout"] == "ort-u8"
    checked = alphasmith("verify", out, "--run", str(result), cwd=tmp_path)
    assert "8 operators" in checked.stdout
    card = (tmp_path / "o" / CARD).read_text()
    assert "onnxruntime" in card
    assert "model.onnx" in card
