"""What goes wrong with an export, through the command line: one line, exit code 2, and nothing half-written; verify finds what was changed."""

from __future__ import annotations

import importlib.util
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphasmith.search import RunConfig, export, run
from alphasmith.search.cli.main import main
from alphasmith.storage.files.durable import digest_file
from alphasmith.storage.output.export_record import read_export_record

Results = Callable[[str], Path]
#: How every kind of export is asked for.
KINDS = {
    "compressed-tensors": ["--format", "compressed-tensors"],
    "ort-u8": ["--format", "onnx"],
    "qdq": ["--format", "onnx", "--layout", "qdq"],
}
#: Those that a whole export is made of in a test: one of the two of ONNX is enough for every change.
EXPORTS = ("compressed-tensors", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ort-u8", "qdq")))
SCHEME = "w8a8-channel-static"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def exported(result_of: Results, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export of every kind, not to be changed."""

    @cache
    def made(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind) / "out"
        if kind == "compressed-tensors":
            export(result_of(SCHEME), kind, out)
        else:
            pytest.importorskip("onnxscript", reason="needs pip install 'alphasmith[onnx]'")
            export(result_of(SCHEME), "onnx", out, layout=kind)
        return out

    return made


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command: exit code, and what it says of an error."""

    def run_command(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        code = caught.value.code
        assert isinstance(code, int)
        return code, capsys.readouterr().err

    return run_command


@contextmanager
def no_larger_files(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_full_disk(kind: str, result_of: Results, told: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    result = result_of(SCHEME)
    with no_larger_files(2048):
        code, error = told("export", str(result), *KINDS[kind], "--out", str(tmp_path / "new/out"))
    assert code == 2
    assert error.count("\n") == 1
    assert "no space left" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_taken_target(
    kind: str, result_of: Results, exported: Callable[[str], Path], told: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported(kind), out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    arguments = ["export", str(result_of(SCHEME)), *KINDS[kind], "--out", str(out)]
    code, error = told(*arguments)
    assert code == 2
    assert error.count("\n") == 1
    assert "--overwrite" in error
    # One that fails while it is replaced stays what it was.
    with no_larger_files(2048):
        assert told(*arguments, "--overwrite")[0] == 2
    (out / "export.json").rename(tmp_path / "away")
    assert "holds no export" in told(*arguments, "--overwrite")[1]
    (tmp_path / "away").rename(out / "export.json")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["export", "verify"])
def test_a_missing_extra(
    command: str,
    result_of: Results,
    exported: Callable[[str], Path],
    told: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = exported("qdq")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "out"
    arguments = [str(folder)] if command == "verify" else [str(result_of(SCHEME)), *KINDS["qdq"], "--out", str(out)]
    code, error = told(command, *arguments)
    assert code == 2
    assert error.count("\n") == 1
    assert "pip install 'alphasmith[onnx]'" in error
    assert not out.exists()


UNTRACEABLE = """
import torch
from torch import nn

class Half(nn.Module):
    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x

def build(*path):
    torch.manual_seed(0)
    layers = [nn.LayerNorm(16), nn.Linear(16, 16), nn.Sequential(nn.ReLU(), Half()), nn.Linear(16, 4)]
    return nn.Sequential(*layers).eval()

def batches(*path):
    return list(torch.randn(104, 16, generator=torch.Generator().manual_seed(1)).split(8))
"""


def test_an_operation_that_cannot_be_traced(
    told: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason="needs pip install 'alphasmith[onnx]'")
    monkeypatch.delitem(sys.modules, "untraceable_code", raising=False)
    (tmp_path / "untraceable_code.py").write_text(UNTRACEABLE)
    values = {
        "model": {"factory": "untraceable_code:build", "factory_path": tmp_path},
        "data": {"factory": "untraceable_code:batches"},
        "search": {"trials": 4, "refine": False, "rows": 32},
        "storage": f"sqlite:///{tmp_path}/a.db",
        "out": tmp_path / "result",
    }
    result = run(RunConfig.build(values)).folder
    allowed = [
        part
        for one in ("untraceable_code:build", "untraceable_code:batches", str(tmp_path))
        for part in ("--allow-code", one)
    ]
    code, error = told("export", str(result), *KINDS["qdq"], "--out", str(tmp_path / "out"), *allowed)
    assert code == 2
    assert error.count("\n") == 1
    assert "cannot trace 2.1 (" in error
    assert not (tmp_path / "out").exists()


def change(folder: Path, leaf: str) -> None:
    """Change an element of a stored tensor of an operator, and write the digest of its file anew."""
    file = folder / ("model.safetensors" if (folder / "model.safetensors").exists() else "model.onnx")
    if file.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(file)
        stored = next(one for one in model.graph.initializer if one.name == f"{Q}.{leaf}")
        stored.raw_data = bytes([stored.raw_data[0] ^ 1]) + stored.raw_data[1:]
        onnx.save(model, file)
    else:
        tensors = load_file(file)
        flat = tensors[f"{Q}.{leaf}"].view(-1)
        flat[:1] = flat[:1] + 1 if flat.dtype == torch.int8 else flat[:1] * 2
        save_file(tensors, file, {"format": "pt"})
    record = read_export_record(folder)
    changed = {"sha256": digest_file(file).sha256, "bytes": file.stat().st_size}
    entries = [entry.model_copy(update=changed if entry.path == file.name else {}) for entry in record.artifacts]
    (folder / "export.json").write_text(record.model_copy(update={"artifacts": tuple(entries)}).to_json())


LEAVES = {
    "compressed-tensors": ("weight", "weight_scale", "input_scale"),
    "ort-u8": ("weight_codes", "weight_scale", "input_scale"),
    "qdq": ("weight_codes", "weight_scale", "input_scale"),
}


@pytest.mark.parametrize(("kind", "leaf"), [(kind, leaf) for kind, leaves in LEAVES.items() for leaf in leaves])
def test_verify_finds_a_changed_code_or_scale(
    kind: str, leaf: str, exported: Callable[[str], Path], told: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported(kind), out)
    assert told("verify", str(out))[0] == 0
    change(out, leaf)
    code, error = told("verify", str(out))
    assert code != 0
    assert error.count("\n") == 1
    assert Q in error


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_a_missing_file_and_another_run(
    kind: str, result_of: Results, exported: Callable[[str], Path], told: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported(kind), out)
    assert told("verify", str(out), "--run", str(result_of(SCHEME)))[0] == 0
    code, error = told("verify", str(out), "--run", str(result_of("w8a8-channel-token")))
    assert code != 0
    assert error.count("\n") == 1
    assert "was not exported from" in error
    name = "model.safetensors" if kind == "compressed-tensors" else "model_with_past.onnx"
    (out / name).unlink()
    code, error = told("verify", str(out))
    assert code != 0
    assert error.count("\n") == 1
    assert name in error


def test_verify_finds_an_operator_that_the_run_stored_otherwise(
    result_of: Results, exported: Callable[[str], Path], told: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """An export whose codes were changed and whose record was, too, is not the run's."""
    out = tmp_path / "out"
    shutil.copytree(exported("compressed-tensors"), out)
    change(out, "weight")
    from alphasmith.objectives.quantization.scheme import Scheme
    from alphasmith.search.exports._compressed_tensors import read_operator

    found = read_operator(Q, load_file(out / "model.safetensors"), Scheme.parse(SCHEME))
    record = read_export_record(out)
    forged: Any = [one.model_copy(update={"digest": found.digest} if one.name == Q else {}) for one in record.operators]
    (out / "export.json").write_text(record.model_copy(update={"operators": tuple(forged)}).to_json())
    assert told("verify", str(out))[0] == 0
    code, error = told("verify", str(out), "--run", str(result_of(SCHEME)))
    assert code != 0
    assert f"{Q} is not the run's" in error
