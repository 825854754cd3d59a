"""The smoothed checkpoint has the type and the shards that the model came in, and the proof is about what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge import equivalence
from alphasmith.search import RunResult, resume, run
from alphasmith.search.checkpoints.load import load_quantized, load_smoothed
from alphasmith.search.checkpoints.verification import undo, verify
from alphasmith.search.launch import _outcome
from alphasmith.search.progress import Silent
from tests.support.run_cases import (
    Mlp,
    answer,
    launch,
    saved_llama,
    seeded,
    settings,
    tiny_llama,
    vectors,
    with_loud_channels,
    written_texts,
)

#: With the guard at the output something is folded whatever the winners of so few trials and rows are worth.
_QUICK: dict[str, Any] = {"search": {"trials": 4, "guard": "output"}}
_HALVES = [torch.bfloat16, torch.float16]


def loud(dtype: torch.dtype) -> nn.Module:
    return with_loud_channels(seeded(Mlp)).to(dtype)


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def floating(folder: Path) -> set[torch.dtype]:
    return {value.dtype for value in weights(folder).values() if value.is_floating_point()}


def checked(result: RunResult) -> float:
    """What the proof says of what is stored."""
    proof = result.manifest.proof
    assert proof is not None
    assert proof.error <= proof.tolerance
    return proof.error


@pytest.mark.parametrize("dtype", _HALVES)
def test_a_module_is_kept_in_its_own_type_and_the_proof_is_of_that(tmp_path: Path, dtype: torch.dtype) -> None:
    model = loud(dtype)
    # A bias that took in a shift, and lost it again, keeps the rounding of that sum.
    result = launch(tmp_path, model, vectors(), {"search": {"trials": 4, "shift": ["none"], "guard": "output"}})
    assert floating(result.folder / "smoothed") == {dtype}
    assert result.manifest.model.stored == str(dtype).removeprefix("torch.")
    value = vectors(seed=5)[0]
    expected = answer(loud(torch.float32).to(dtype).float(), value)
    smoothed = answer(load_smoothed(result.folder, loud(torch.float32)), value)
    error = float((smoothed - expected).norm() / expected.norm())
    told, folding = checked(result), result.manifest.proof.folding  # type: ignore[union-attr]
    assert folding is not None
    assert folding < 1e-6 < error < 5 * told
    assert torch.isfinite(answer(load_quantized(result.folder, loud(torch.float32)), value)).all()
    assert undo(result.folder, tmp_path / "restored")["parameters"] > 0
    restored, original = weights(tmp_path / "restored"), model.state_dict()
    assert {name: tensor.dtype for name, tensor in restored.items()} == dict.fromkeys(original, dtype)
    for name, tensor in restored.items():
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(tensor.float(), original[name].float(), rtol=2 * rounding, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_float32_is_an_option_and_what_wider_types_become(tmp_path: Path, dtype: torch.dtype) -> None:
    result = launch(tmp_path, loud(dtype), vectors(), _QUICK | {"dtype": "float32"} if dtype in _HALVES else _QUICK)
    assert floating(result.folder / "smoothed") == {torch.float32}
    assert result.manifest.model.stored == "float32"
    assert checked(result) < 1e-6
    assert result.manifest.proof is not None
    assert result.manifest.proof.folding is None


def test_tensors_of_several_types_keep_each_its_own(tmp_path: Path) -> None:
    class Mixed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = with_loud_channels(seeded(Mixed))
    model.get_submodule("fc1").to(torch.bfloat16)
    model.get_submodule("fc2").to(torch.float16)
    result = launch(tmp_path, model, vectors(), _QUICK)
    kept = {name: tensor.dtype for name, tensor in weights(result.folder / "smoothed").items()}
    assert kept == {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert result.manifest.model.stored == "bfloat16, float16, float32"
    checked(result)


class Noted(Silent):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_what_the_type_cannot_hold_stays_float32_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "misfit", lambda _tensors, types: min(types))
    result = launch(tmp_path, loud(torch.float16), vectors(), _QUICK, progress=(noted := Noted()))
    assert [line for line in noted.lines if "kept in float32: float16 does not hold fc1.bias" in line]
    assert floating(result.folder / "smoothed") == {torch.float32}
    assert result.manifest.model.stored == "float32"
    assert checked(result) < 1e-6


def test_a_model_that_half_precision_changes_too_much_is_finished_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loud(torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(_outcome, "rounding_limit", lambda _types: 1e-9)
        with pytest.raises(InputError, match="--dtype float32") as caught:
            launch(tmp_path, model, vectors(), _QUICK)
        assert caught.value.field == "dtype"
    assert not (tmp_path / "out").exists()
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    result = resume("r-", storage=url, changes={"dtype": "float32"}, model=model, batches=vectors())
    assert floating(result.folder / "smoothed") == {torch.float32}


def test_shards_of_a_folder_stay_shards_and_its_type_stays(tmp_path: Path) -> None:
    source = saved_llama(tmp_path / "model")
    model: Any = tiny_llama()
    for file in source.glob("*.safetensors"):
        file.unlink()
    model.to(torch.bfloat16).save_pretrained(source, max_shard_size=3_000)
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(shards) > 2
    values = {"model": {"path": str(source)}, "data": {"path": str(written_texts(tmp_path / "texts.txt"))}, **_QUICK}
    result = run(settings(tmp_path, values))
    smoothed = result.folder / "smoothed"
    assert sorted(file.name for file in smoothed.glob("*.safetensors")) == shards
    assert floating(smoothed) == {torch.bfloat16}
    assert "bfloat16" in json.loads((smoothed / "config.json").read_text()).values()
    verify(result.folder)
    assert undo(result.folder, tmp_path / "restored")["parameters"] > 0
    assert floating(tmp_path / "restored") == {torch.bfloat16}
    assert weights(tmp_path / "restored").keys() == weights(source).keys()
    assert load_quantized(result.folder) is not None
    alone = tmp_path / "moved"
    (result.folder / "smoothed" / shards[1]).rename(alone)
    with pytest.raises(Exception, match="gone"):
        load_smoothed(result.folder)


def test_the_setting_takes_two_words(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        settings(tmp_path, {"dtype": "half"})
    assert caught.value.field == "dtype"
