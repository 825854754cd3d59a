"""ONNX exports: ONNX Runtime and OpenVINO compute what our module computes, at sizes that were not traced, from the run's integers."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.media.batch import Batch
from alphasmith.search import export, load_quantized
from alphasmith.search.exports._card import CARD
from alphasmith.search.exports.verification import verify_export
from tests.support.onnx_runtime import (
    CLOSE,
    PLAIN,
    difference,
    kinds,
    numbers,
    openvino_layers,
    session,
    simulated,
    texts,
)
from tests.support.run_cases import Mlp, alphasmith, launch, seeded, vectors

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


def test_a_text_goes_on_with_the_keys_and_values_that_are_kept(result_of: Results, tmp_path: Path) -> None:
    result = result_of("w8a8-channel-static")
    export(result, "onnx", tmp_path / "out")
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


def test_the_same_result_gives_the_same_bytes_and_none_of_the_machine(result_of: Results, tmp_path: Path) -> None:
    result = result_of("w8a8-channel-static")
    for name in ("a", "b"):
        export(result, "onnx", tmp_path / name)
    root = str(Path(__file__).resolve().parents[4]).encode()
    for file in (tmp_path / "a").iterdir():
        content = file.read_bytes()
        assert content == (tmp_path / "b" / file.name).read_bytes()
        for place in (root, str(tmp_path).encode(), b"site-packages", b"stack_trace"):
            assert place not in content


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


def test_a_changed_integer_is_found(result_of: Results, tmp_path: Path) -> None:
    from alphasmith.storage.files.durable import digest_file
    from alphasmith.storage.output.export_record import read_export_record

    out = tmp_path / "out"
    export(result_of("w8a8-channel-static"), "onnx", out)
    file = out / "model.onnx"
    model = onnx.load(file)
    codes = next(i for i in model.graph.initializer if i.name.endswith("q_proj.weight_codes"))
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    onnx.save(model, file)
    record = read_export_record(out)
    anew = [
        entry.model_copy(update={"sha256": digest_file(file).sha256, "bytes": file.stat().st_size})
        if entry.path == file.name
        else entry
        for entry in record.artifacts
    ]
    (out / "export.json").write_text(record.model_copy(update={"artifacts": tuple(anew)}).to_json())
    with pytest.raises(IntegrityError, match="q_proj"):
        verify_export(out)


class Untraceable(Mlp):
    """Its second half asks for the numbers of a tensor."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Any shape, doubled where its sum is positive."""
            return x * 2 if float(x.sum()) > 0 else x

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Half()

    def forward(self, x: Tensor) -> Tensor:
        """As of :class:`Mlp`."""
        return super().forward(self.part(x))


def test_what_cannot_be_traced_is_named(tmp_path: Path) -> None:
    model, batches = seeded(Untraceable), vectors()
    result = launch(tmp_path / "run", model, batches, PLAIN).folder
    with pytest.raises(InputError, match=r"cannot trace part \(") as caught:
        export(result, "onnx", tmp_path / "out", model=model, batch=batches[0])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(result_of: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(InputError, match="no space left"):
        export(result_of("w8a8-channel-static"), "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


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


def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'alphasmith\[onnx\]'"):
        export(tmp_path, "onnx", tmp_path / "out")


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
