"""A compressed model is read by one call, bit by bit, or refused with what is wrong with its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import alphasmith
from alphasmith.objectives.errors import AlphasmithError, InputError, IntegrityError
from alphasmith.objectives.joint.packed.forms import LayerForm
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedModel, PackedSettings, model_bytes, pack
from alphasmith.objectives.joint.packed.restoring import load_packed
from alphasmith.search.compression.artifact import load_compressed, manifest_of
from alphasmith.storage.files.tensors import read_tensors, write_tensors
from alphasmith.storage.output.compressed_folder import STRUCTURE, TENSORS, CompressedFolder, compression_in
from alphasmith.storage.output.output_folder import OutputFolder
from tests.support.compressed_folders import made_manifest, write_folder
from tests.support.packed_models import BATCH, TOKENS, made, mixed
from tests.support.site_cases import relaxed

SETTINGS = PackedSettings(clusters=ClassClusters(conv=8, recurrent=8, linear=8, embedding=8), float16=True)


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    return pack(made(mixed(), (True, True, 2, "channel")), SETTINGS)


@pytest.fixture(scope="module")
def whole(packed: PackedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    write_folder(out, packed, model_bytes(mixed()))
    return out


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def write_half(folder: OutputFolder, packed: PackedModel) -> None:
    folder.write_tensors(TENSORS, packed.tensors)
    folder.write_text("../elsewhere", "")


def damaged(folder: Path, key: str) -> None:
    """Change the first byte of a tensor, and write the file anew."""
    # Tensors that are read are maps of the file.
    tensors = {name: value.clone() for name, value in read_tensors(folder / TENSORS).items()}
    tensors[key].view(torch.uint8)[0] ^= 1
    write_tensors(folder / TENSORS, tensors)


def test_one_call_gives_the_bits_that_were_packed(whole: Path, packed: PackedModel) -> None:
    model = made(mixed(), (True, True, 2, "channel"))
    load_packed(model, packed)
    loaded = alphasmith.load_compressed(str(whole), mixed(seed=5))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == value.dtype
        assert found.numpy().tobytes() == value.numpy().tobytes(), name
    with torch.no_grad():
        assert loaded(TOKENS).numpy().tobytes() == model(TOKENS).numpy().tobytes()
    assert not loaded.training


def test_layers_run_in_the_form_that_is_faster_on_a_batch(whole: Path) -> None:
    told: list[LayerForm] = []
    plain = load_compressed(whole, mixed())
    seconds = iter([1.0, 0.5] * 20)

    def timer(work: Callable[[], object]) -> float:
        work()
        return next(seconds)

    fast = load_compressed(whole, mixed(), batch=BATCH, timer=timer, on_form=told.append)
    assert {form.layer: form.runs for form in told} == {"conv": "dense", "rnn": "fused", "mix": "dense"}
    assert isinstance(fast.get_submodule("rnn"), nn.LSTM)
    with torch.no_grad():
        torch.testing.assert_close(fast(TOKENS), plain(TOKENS), rtol=1e-4, atol=1e-4)


def test_the_files_are_as_large_as_the_manifest_says(whole: Path) -> None:
    manifest = CompressedFolder(whole).manifest
    assert manifest_of(whole) == manifest
    sizes = {entry.path: entry.bytes for entry in manifest.artifacts}
    assert sizes == {name: (whole / name).stat().st_size for name in (TENSORS, STRUCTURE, "report.html")}
    assert sizes[STRUCTURE] == manifest.bytes.structure
    header = int.from_bytes((whole / TENSORS).read_bytes()[:8], "little") + 8
    assert sizes[TENSORS] == manifest.bytes.stored - manifest.bytes.structure + header


def test_nothing_appears_when_writing_fails(packed: PackedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="leaves the output folder"), OutputFolder(out) as folder:
        write_half(folder, packed)
    assert list(tmp_path.iterdir()) == []
    assert compression_in(out) is None
    write_folder(out, packed, 10)
    assert compression_in(out) == made_manifest(packed, 10).run.id


@pytest.mark.parametrize("part", ["table", "indices", "sizes"])
def test_a_changed_codebook_is_named_with_tensor_and_digests(folder: Path, packed: PackedModel, part: str) -> None:
    name = "rnn.layers.0.ih.left"
    damaged(folder, f"codebook/{name}/{part}")
    with pytest.raises(IntegrityError, match=f"{name}: its codebook has the digest") as raised:
        load_compressed(folder, mixed())
    assert packed.structure.codebooks[name].digest in str(raised.value)


def test_any_other_change_is_named_with_the_file(folder: Path) -> None:
    damaged(folder, "plain/conv.bias")
    with pytest.raises(IntegrityError, match=TENSORS):
        load_compressed(folder, mixed())


@pytest.mark.parametrize("name", [TENSORS, STRUCTURE, "report.html"])
@pytest.mark.parametrize("damage", ["cut", "gone", "longer", "linked"])
def test_damaged_files_are_named(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "longer":
        file.write_bytes(content + b" ")
    elif damage == "linked":
        (folder.parent / "elsewhere").write_bytes(content)
        file.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(IntegrityError, match=name) as raised:
        load_compressed(folder, mixed())
    assert "\n" not in str(raised.value)


@relaxed
@given(
    st.sampled_from([TENSORS, STRUCTURE, "manifest.json"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 255),
    st.booleans(),
)
def test_any_damage_is_refused_or_without_effect(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, place: float, change: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(whole, folder)
    content = bytearray((folder / name).read_bytes())
    at = int(place * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= change
    (folder / name).write_bytes(content)
    told, loaded = "", None
    try:
        loaded = load_compressed(folder, mixed())
    except AlphasmithError as error:
        told = str(error)
    assert "\n" not in told
    assert bool(told) is (loaded is None)
    if loaded is not None:  # what explains the model may have changed, the model may not
        assert name == "manifest.json"
        expected = load_compressed(whole, mixed()).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_files_that_nobody_names_are_named(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "code.py").write_text("")
    with pytest.raises(IntegrityError, match=r"more/code\.py is named by nobody"):
        load_compressed(folder, mixed())


def test_a_structure_written_anew_does_not_pass(folder: Path) -> None:
    content = json.loads((folder / STRUCTURE).read_text())
    content["halves"] = ["nothing"]
    (folder / STRUCTURE).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=STRUCTURE):
        load_compressed(folder, mixed())


def test_another_architecture_is_refused(whole: Path) -> None:
    with pytest.raises(InputError, match=r"rnn\.layers\.0\.ih\.left has shape 18x2, 24x2 is stored"):
        load_compressed(whole, mixed(rnn="GRU"))
    with pytest.raises(InputError, match="architecture: is str, no module; pass the float model"):
        load_compressed(whole, "model")  # type: ignore[arg-type]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        load_compressed(tmp_path, mixed())
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is no manifest of a joint compression"):
        load_compressed(tmp_path, mixed())
