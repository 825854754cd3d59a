"""Exports in the layout of compressed-tensors: transformers computes what our module computes, and what cannot be held is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.text import number
from alphasmith.search import export, load_quantized, load_smoothed, recipe, run
from alphasmith.search.exports._card import CARD
from alphasmith.search.exports._compressed_tensors import layout_of, packed, unpacked
from alphasmith.search.exports.verification import verify_export
from alphasmith.storage.output.export_record import read_export_record
from alphasmith.storage.output.result_folder import ResultFolder
from tests.support.run_cases import Mlp, alphasmith, launch, seeded, settings, tokens, vectors
from tests.support.streamed_models import deep_llama, saved

Results = Callable[[str], Path]

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs pip install compressed-tensors"
)
#: What is equal to the bit after a reload; per-token steps are another library's own.
EXACT = ("w8a8-channel-static", "w4a16-g8")
SLOW = (
    "w8au8-channel-static",
    "w8a8-tensor-static",
    "wfp8afp8-channel-static",
    "wfp8afp8-channel-token",
    "w8a16-channel",
    "w4a16-channel",
)
IDS = torch.arange(24).reshape(2, 12) % 27


def reloaded(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    return model.eval(), {name: found for name, found in told.items() if found}


def logits(model: nn.Module) -> torch.Tensor:
    for module in model.modules():
        if isinstance(module, QuantizedOperator):
            module.execution = "simulated"
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


RENAMED = {"search": {"trials": 4, "shift": ["none"]}, "sites": {"explicit": "never"}}


def renamed_model(folder: Path) -> dict[str, Any]:
    """A small DINOv2, saved under the names that its checkpoints have."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "model")
    stored = load_file(folder / "model" / "model.safetensors")
    assert any("attention.attention.query" in name for name in stored)
    return {"model": {"path": folder / "model"}}


def pixels() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(12)]


@contextmanager
def untouched_mappings() -> Iterator[None]:
    """What a card changes in transformers is taken back afterwards."""
    from transformers import PreTrainedModel

    mappings = importlib.import_module("transformers.conversion_mapping")
    known, own = mappings.get_checkpoint_conversion_mapping("Dinov2Model"), vars(PreTrainedModel).copy()
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = own["_initialize_weights"]
        mappings.register_checkpoint_conversion_mapping("Dinov2Model", known, overwrite=True)


@hypothesis.settings(deadline=None)  # the first example imports the library
@given(
    bits=st.sampled_from((4, 8)),
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_packed_words_give_the_codes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = packed(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpacked(words, bits, columns), codes)
    if importlib.util.find_spec("compressed_tensors") is not None:
        helpers = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
        assert torch.equal(helpers.unpack_from_int32(words, bits, codes.shape), codes)


@needs_library
@pytest.mark.parametrize("scheme", [*EXACT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_transformers_computes_the_bits_of_our_module(result_of: Results, scheme: str, tmp_path: Path) -> None:
    result = result_of(scheme)
    export(result, "compressed-tensors", tmp_path / "out")
    model, told = reloaded(tmp_path / "out")
    assert told == {}
    ours, theirs = logits(load_quantized(result)), logits(model)
    if scheme.startswith("wfp8") and scheme.endswith("token"):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(theirs, ours)


@needs_library
@pytest.mark.slow
def test_per_token_differs_by_the_step_of_the_library_alone(result_of: Results, tmp_path: Path) -> None:
    result = result_of("w8a8-channel-token")
    record = export(result, "compressed-tensors", tmp_path / "out").record
    assert any("127.5" in note for note in record.notes)
    ours, theirs = logits(load_quantized(result)), logits(reloaded(tmp_path / "out")[0])
    assert 0 < float((ours - theirs).norm() / ours.norm()) < 0.1


def test_the_folder_says_what_it_is(result_of: Results, tmp_path: Path) -> None:
    result = result_of("w8a8-channel-static")
    made = export(result, "compressed-tensors", tmp_path / "out")
    out = tmp_path / "out"
    assert {"config.json", "tokenizer.json", "LICENSE", f"ORIGINAL_{CARD}", "export.json"} <= {
        f.name for f in out.iterdir()
    }
    card = (out / CARD).read_text()
    assert "license: mit" in card
    assert "LlamaForCausalLM" in card
    assert made.record.run in card
    manifest = ResultFolder(result).manifest
    alphas = [group.alpha for site in manifest.sites for group in site.groups if group.alpha is not None]
    told = [
        manifest.data_digest,
        manifest.model.digest,
        f"torch {manifest.versions['torch']}",
        "exact products of integers",
    ]
    told += ["LlamaForCausalLM.from_pretrained", "vllm serve", "alphasmith verify", "with saturation", "see LICENSE"]
    told += [f"from {min(alphas):.2f} to {max(alphas):.2f}"] if alphas else ["No site has an alpha"]
    assert [words for words in told if words not in card] == []
    assert f"| {number(manifest.output.naive, 4)} |" in card
    assert str(tmp_path) not in card + (out / "export.json").read_text() + (out / "config.json").read_text()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    linear = {name for name, module in load_quantized(result).named_modules() if isinstance(module, nn.Linear)}
    assert set(config["ignore"]) == {name for name in linear if not name.endswith(".inner")}
    # For vLLM the layer that makes logits is no linear layer.
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear", "lm_head"]]
    stored = load_file(out / "model.safetensors")
    for fused in ("self_attn.q_proj", "self_attn.v_proj"):
        layer = "model.layers.0.self_attn.k_proj.input_scale"
        assert torch.equal(stored[f"model.layers.0.{fused}.input_scale"], stored[layer])


def test_the_same_result_gives_the_same_bytes(result_of: Results, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(result_of("w4a16-g8"), "compressed-tensors", tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_result_in_several_files_is_exported_and_has_a_recipe(tmp_path: Path) -> None:
    values = {
        "model": {"path": saved(deep_llama(2), tmp_path / "model", torch.bfloat16)},
        "memory": {"mode": "blockwise"},
        "search": {"trials": 4, "shift": ["none"]},
        "sites": {"explicit": "never"},
    }
    result = run(settings(tmp_path, values), batches=[{"input_ids": ids} for ids in tokens()]).folder
    assert len(ResultFolder(result).weight_files("quantized")) > 1
    record = export(result, "compressed-tensors", tmp_path / "served").record
    assert len(record.operators) > 7
    assert verify_export(tmp_path / "served", run=result)["compared"] == "run"
    assert "LlamaForCausalLM" in recipe("torchao", result)


@needs_library
@pytest.mark.parametrize("scheme", ["w8a8-channel-static", "w4a16-g8"])
def test_a_class_that_renames_weights_on_loading_is_exported_whole_and_loads_as_its_card_says(
    scheme: str, tmp_path: Path
) -> None:
    """DINOv2: checkpoints have other names for q, k and v, and may hold two weights of an MLP in one, which transformers then splits.

    It also initializes a weight of every linear layer, and packed ones have none.
    """
    values = {**renamed_model(tmp_path), **RENAMED, "scheme": asdict(Scheme.parse(scheme))}
    result = run(settings(tmp_path, values), batches=pixels()).folder
    out = tmp_path / "served"
    record = export(result, "compressed-tensors", out).record
    linear = [n for n, m in load_smoothed(result).named_modules() if isinstance(m, nn.Linear)]
    assert sorted(operator.name for operator in record.operators) == sorted(linear)
    assert verify_export(out, run=result)["compared"] == "run"
    lines = (out / CARD).read_text().split("```python\n")[1].split("```")[0]
    script = tmp_path / "card.py"
    script.write_text(lines.replace('"FOLDER"', repr(str(out))))
    with untouched_mappings():
        theirs = runpy.run_path(str(script))["model"].eval()
    ours = load_quantized(result)
    for module in ours.modules():
        if isinstance(module, QuantizedOperator):
            module.execution = "simulated"
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs(**pixels()[0])  # the library unpacks on the first call of the whole model
        # What comes before is a convolution, which the format keeps in float.
        models: list[Any] = [theirs, ours, load_smoothed(result)]
        seen = [m.encoder(hidden).last_hidden_state for m in models]
    lost = float((seen[1] - seen[2]).norm())
    assert float((seen[0] - seen[1]).norm()) < 1e-5 * lost, (float((seen[0] - seen[1]).norm()), lost)


def test_what_the_format_has_no_place_for_is_refused_by_name_or_written_without(
    explicit_result: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"output\.dense.*unsmoothed-sites"):
        export(explicit_result, "compressed-tensors", out)
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []
    record = export(explicit_result, "compressed-tensors", out, unsmoothed_sites=True).record
    told = {site.name: site for site in record.unsmoothed}
    name = next(name for name in told if name.endswith("output.dense"))
    assert all(site.loss_unsmoothed is not None for site in told.values())
    assert verify_export(out, run=explicit_result)["compared"] == "run"
    stored = load_file(out / "model.safetensors")
    smoothed = load_file(explicit_result / "smoothed" / "model.safetensors")
    back = stored[f"{name}.weight"] * stored[f"{name}.weight_scale"]
    assert (
        float((back - smoothed[f"{name}.weight"]).abs().max())
        <= float(stored[f"{name}.weight_scale"].max()) / 2 * 1.001
    )


@pytest.mark.parametrize(
    "scheme", ["w8ai16-channel-static", "w4a8-g32-token", "w4a8-channel-static", "w8a8-g64-token", "w8a16-tensor"]
)
def test_schemes_that_the_format_lacks_are_named(scheme: str) -> None:
    with pytest.raises(InputError, match=f"cannot hold {scheme}"):
        layout_of(Scheme.parse(scheme))


def test_a_model_of_a_script_is_refused(tmp_path: Path) -> None:
    folder = launch(tmp_path, seeded(Mlp), vectors(), {"search": {"trials": 4}}).folder
    with pytest.raises(InputError, match="no model of transformers"):
        export(folder, "compressed-tensors", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_taken_target_stays_as_it_is(result_of: Results, tmp_path: Path) -> None:
    result, out = result_of("w8a8-channel-static"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    for overwrite, problem in ((False, "not empty"), (True, "holds no export")):
        with pytest.raises(InputError, match=problem):
            export(result, "compressed-tensors", out, overwrite=overwrite)
    assert (out / "mine").read_text() == "keep"
    shutil.rmtree(out)
    export(result, "compressed-tensors", out)
    with pytest.raises(InputError, match="--overwrite"):
        export(result, "compressed-tensors", out)
    (out / "config.json").write_text("{}")
    export(result, "compressed-tensors", out, overwrite=True)
    assert verify_export(out, run=result)["operators"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_verify_names_a_changed_file_and_changed_codes(result_of: Results, tmp_path: Path) -> None:
    result, out = result_of("w8a8-channel-static"), tmp_path / "out"
    export(result, "compressed-tensors", out)
    assert verify_export(out)["compared"] == "record"
    weights = out / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"] = -tensors[f"{name}.weight"]
    save_file(tensors, weights)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        verify_export(out)
    # Someone who wrote the digest of the file anew is still found out.
    record = read_export_record(out)
    from alphasmith.storage.files.durable import digest_file

    entries = [
        entry.model_copy(update={"sha256": digest_file(weights).sha256}) if entry.path == weights.name else entry
        for entry in record.artifacts
    ]
    (out / "export.json").write_text(record.model_copy(update={"artifacts": tuple(entries)}).to_json())
    with pytest.raises(IntegrityError, match="q_proj"):
        verify_export(out)


@pytest.mark.slow
def test_the_command_line(result_of: Results, tmp_path: Path) -> None:
    result = result_of("w8a8-channel-static")
    bad = alphasmith("export", str(result), "--format", "gguf", "--out", str(tmp_path / "o"), cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "compressed-tensors" in bad.stderr
    good = alphasmith(
        "export", str(result), "--format", "compressed-tensors", "--out", str(tmp_path / "o"), "--json", cwd=tmp_path
    )
    assert json.loads(good.stdout)["record"]["format"] == "compressed-tensors"
    checked = alphasmith("verify", str(tmp_path / "o"), "--run", str(result), cwd=tmp_path)
    assert "8 operators" in checked.stdout
