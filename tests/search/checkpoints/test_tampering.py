"""A result is read only as it was written: each file that decides what is computed is held to its digest, links are not followed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphasmith.objectives.errors import IntegrityError
from alphasmith.search.checkpoints.load import load_quantized, load_smoothed
from alphasmith.search.checkpoints.verification import undo, verify
from tests.support.run_cases import Mlp, alphasmith, answer, launch, seeded, tiny_llama, tokens, vectors

#: What is read by whom; ``verify`` reads everything.
_READERS: dict[str, tuple[str, ...]] = {
    "load_quantized": ("quantized",),
    "load_smoothed": ("smoothed",),
    "undo": ("smoothed", "scales.safetensors"),
    "verify": ("quantized", "smoothed", "scales.safetensors", "report.html"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A result that says how to build its model, and one that does not."""
    llama = launch(tmp_path_factory.mktemp("llama"), tiny_llama(), tokens(), {"search": {"trials": 4}})
    plain = launch(tmp_path_factory.mktemp("plain"), seeded(Mlp), vectors(), {"search": {"trials": 4}})
    return {"llama": llama.folder, "plain": plain.folder}


@pytest.fixture(params=["llama", "plain"])
def case(request: pytest.FixtureRequest, results: dict[str, Path], tmp_path: Path) -> tuple[Path, nn.Module | None]:
    """A copy to be spoiled, and the architecture where it is needed."""
    shutil.copytree(results[request.param], tmp_path / "result")
    return tmp_path / "result", seeded(Mlp) if request.param == "plain" else None


def _readers(folder: Path, model: nn.Module | None) -> dict[str, Callable[[], object]]:
    return {
        "load_quantized": lambda: load_quantized(folder, model),
        "load_smoothed": lambda: load_smoothed(folder, model),
        "verify": lambda: verify(folder),
        "undo": lambda: undo(folder, folder.with_name("restored")),
    }


def _named(folder: Path) -> list[str]:
    return [entry["path"] for entry in json.loads((folder / "manifest.json").read_text())["artifacts"]]


def _changed_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 0x55
    (folder / name).write_bytes(data)


def _cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _unname(folder: Path, name: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["artifacts"] = [entry for entry in content["artifacts"] if entry["path"] != name]

    _changed_manifest(folder, change)


def _link(folder: Path, name: str) -> None:
    """The same content, elsewhere."""
    (folder / name).rename(folder.with_name("elsewhere"))
    (folder / name).symlink_to(folder.with_name("elsewhere"))


def _link_the_folder(folder: Path, name: str) -> None:
    top = name.partition("/")[0]
    (folder / top).rename(folder.with_name("elsewhere"))
    (folder / top).symlink_to(folder.with_name("elsewhere"))


def _spoilt(folder: Path, spoil: Callable[[Path, str], None]) -> Iterator[str]:
    """Every file that is read, one after the other spoilt; whole again in between."""
    whole = folder.with_name("whole")
    folder.rename(whole)
    for name in _named(whole):
        shutil.copytree(whole, folder)
        spoil(folder, name)
        yield name
        shutil.rmtree(folder)
        for left in ("elsewhere", "restored"):
            path = folder.with_name(left)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("spoil", [_flip, _remove, _link, _link_the_folder])
def test_no_reader_takes_a_file_that_is_not_as_it_was_written(
    case: tuple[Path, nn.Module | None], spoil: Callable[[Path, str], None]
) -> None:
    folder, model = case
    seen = set()
    for name in _spoilt(folder, spoil):
        top = name.partition("/")[0]
        for reader, read in _readers(folder, model).items():
            if top in _READERS[reader]:
                with pytest.raises(IntegrityError) as caught:
                    read()
                assert len(str(caught.value).splitlines()) == 1
                seen.add((reader, top))
    assert {reader for reader, _ in seen} == set(_READERS)
    assert not folder.with_name("restored").exists()


@pytest.mark.parametrize("reader", ["load_quantized", "load_smoothed", "verify", "undo"])
def test_a_file_without_a_digest_is_not_read(case: tuple[Path, nn.Module | None], reader: str) -> None:
    folder, model = case
    needed = {
        "load_quantized": ("quantized/model.safetensors", "quantized/quantization.json"),
        "load_smoothed": ("smoothed/model.safetensors",),
        "verify": ("quantized/model.safetensors", "quantized/quantization.json", "scales.safetensors"),
        "undo": ("smoothed/model.safetensors", "scales.safetensors"),
    }[reader]
    for name in _spoilt(folder, _unname):
        if name in needed:
            with pytest.raises(IntegrityError, match="does not name"):
                _readers(folder, model)[reader]()


def test_what_the_manifest_does_not_name_is_neither_read_nor_copied(case: tuple[Path, nn.Module | None]) -> None:
    folder, model = case
    secret = folder.with_name("secret")
    secret.write_text("private key")
    expected = load_smoothed(folder, model)
    for below in ("smoothed", "quantized"):
        (folder / below / "notes.txt").symlink_to(secret)
        (folder / below / "adapter_config.json").write_text("{}")  # transformers would load an adapter
        (folder / below / "mine.json").write_text("{}")
    undo(folder, folder.with_name("restored"))
    assert not {"notes.txt", "adapter_config.json", "mine.json"} & {
        p.name for p in folder.with_name("restored").iterdir()
    }
    value = tokens(seed=5)[0] if model is None else vectors(seed=5)[0]
    assert torch.equal(answer(load_smoothed(folder, model), value), answer(expected, value))
    load_quantized(folder, model)
    assert "skipped" in verify(folder)


@pytest.mark.parametrize("field", ["channel", "parameter"])
def test_an_edit_of_a_tensor_that_is_nowhere(case: tuple[Path, nn.Module | None], field: str) -> None:
    folder, _ = case

    def change(content: dict[str, Any]) -> None:
        for site in content["sites"]:
            for edit in site["edits"]:
                edit[field] = "nowhere"

    _changed_manifest(folder, change)
    with pytest.raises(IntegrityError, match="nowhere"):
        undo(folder, folder.with_name("restored"))
    assert [p.name for p in folder.parent.iterdir() if "restored" in p.name] == []


def test_the_command_line_says_it_in_one_line(results: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "result"
    shutil.copytree(results["plain"], folder)
    _cut(folder, "quantized/quantization.json")
    done = alphasmith("verify", str(folder), cwd=folder.parent)
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error"]
