"""Data, models and settings that a compression cannot work with: one line with field and remedy, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.joint.tasks import SampleTask
from alphasmith.objectives.media.batch import Batch
from alphasmith.search import CompressionResult, compress

RATE = 16_000


class Denoiser(nn.Module):
    """Waveform to waveform, without normalization and without recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Conv1d(1, 24, 9, padding=4), nn.Conv1d(24, 1, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T)."""
        return torch.as_tensor(x + 0.1 * self.out(torch.tanh(self.inner(x[:, None])))[:, 0])


class Clips:
    """Noisy clips and clean ones."""

    def __init__(self, noisy: Tensor, clean: Tensor) -> None:
        self.noisy, self.clean = noisy, clean

    def __len__(self) -> int:
        return len(self.noisy)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some of them."""
        return Batch(args=(self.noisy[list(numbers)],), labels=self.clean[list(numbers)])


def clips(seed: int, length: int = RATE, change: Callable[[Tensor], Tensor] = lambda x: x, count: int = 3) -> Clips:
    """Tones with pauses, as speech has, and noise on them."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(length) / RATE
    tones = torch.sin(6.28 * (200 + 300 * torch.rand(count, 1, generator=generator)) * steps)
    clean = tones * (torch.sin(6.28 * 3 * steps) > -0.5)
    return Clips(clean + 0.1 * torch.randn(count, length, generator=generator), change(clean))


def denoising(change: Callable[[Tensor], Tensor] = lambda x: x, length: int = RATE, **given: Any) -> SampleTask:
    """A task whose study clips are ``length`` samples long and whose references are changed."""
    parts = {"train": clips(0), "study": clips(1, length, change), "test": clips(2, length, change)}
    return SampleTask(**{"kind": "waveforms", **parts, "rate": RATE, **given})


def denoiser() -> nn.Module:
    """Weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser().eval()


def tried(folder: Path, model: nn.Module, task: Any, **changes: Any) -> CompressionResult:
    """A compression of two trials without training."""
    given: dict[str, Any] = {
        "storage": f"sqlite:///{folder / 'studies.db'}",
        "out": str(folder / "out"),
        "drop": {"tolerances": {"si_sdr": 30.0}},
        "train": {"steps": 0},
        "rounds": {"steps": 0, "most": 1},
        "clusters": {"finetune": 0, "k": [4, 16]},
        "study": {"trials": 2, "roles": ["off"]},
    }
    return compress(model, task, {**given, **changes})


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (lambda: denoising(length=3000), r"^data: stoi cannot be measured on any output \(shorter than 0.4 s: 3\); give other"),
        (lambda: denoising(torch.zeros_like), r"^data: si_sdr cannot be measured on any output \(silent reference: 3\); give"),
        (lambda: denoising(lambda x: x[:, 1:]), r"^data: si_sdr .* \(another shape than the reference: 3\); give other data"),
        (lambda: denoising(lambda x: x[:, None]), r"^data: si_sdr .* \(another shape than the reference: 3\); give other data"),
        (lambda: denoising(lambda x: x * torch.nan), r"^data: si_sdr .* \(reference not finite: 3\); give other data"),
        (lambda: denoising(rate=None), r"^data.rate: stoi needs the sampling rate; give it in Hz"),
    ],
    ids=["short", "silent", "length", "channels", "nan", "rate"],
)  # fmt: skip
def test_clips_that_no_metric_can_judge_are_refused(task: Callable[[], SampleTask], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told) as caught:
        tried(tmp_path, denoiser(), task())
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("studies.db")] == []


def test_single_clips_that_cannot_be_judged_are_counted(tmp_path: Path) -> None:
    def one_silent(clean: Tensor) -> Tensor:
        return clean * torch.tensor([[0.0], [1.0], [1.0]])

    manifest = tried(tmp_path, denoiser(), denoising(one_silent)).manifest
    (told,) = [note for note in manifest.notes if note.startswith("si_sdr ")]
    assert told.endswith("of 2 outputs, 1 left out (silent reference)")


def test_a_model_that_violates_a_limit_before_anything_is_refused(tmp_path: Path) -> None:
    floors = {"floors": {"si_sdr": 60.0}}
    with pytest.raises(
        InputError, match=r"si_sdr\.floor: the model is at 15\.4 before anything is taken from it; set a floor"
    ) as caught:
        tried(tmp_path, denoiser(), denoising(), drop=floors)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_terms_that_a_model_has_no_layer_for_are_warned_of(tmp_path: Path) -> None:
    manifest = tried(tmp_path, denoiser(), denoising(), train={"steps": 1, "encoder": [1e-4]}).manifest
    notes = " ".join(manifest.notes)
    assert "has no recurrent layer: the second sparsity term is empty" in notes
    assert "has no normalization" in notes


@pytest.mark.parametrize("k", [1, 0, -4, 65537])
def test_tables_of_impossible_sizes_are_refused(k: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clusters\.k"):
        tried(tmp_path, denoiser(), denoising(), clusters={"k": [k]})


def test_more_entries_than_distinct_values_are_shrunk_and_noted(tmp_path: Path) -> None:
    model = denoiser()
    with torch.no_grad():
        for name in ("inner", "out"):
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(torch.sign(weight) * 0.1)
    manifest = tried(tmp_path, model, denoising(), clusters={"finetune": 0, "k": [16]}, study={"trials": 1}).manifest
    tensors = [tensor for layer in manifest.layers for tensor in layer.tensors if tensor.stored == "codebook"]
    assert {tensor.entries for tensor in tensors} == {2}
    assert all("2 distinct values, 16 entries asked for" in " ".join(tensor.notes) for tensor in tensors)


@pytest.mark.parametrize("weights", ["zero", "singular"])
@pytest.mark.parametrize("role", ["off", "truncate", "branch"])
def test_zero_and_singular_matrices_are_compressed_like_others(weights: str, role: str, tmp_path: Path) -> None:
    model = denoiser()
    with torch.no_grad():
        weight = model.get_parameter("inner.weight")
        weight.copy_(0 * weight if weights == "zero" else weight[:1].expand_as(weight).clone())
    study = {"trials": 1, "roles": [role]}
    found = tried(tmp_path, model, denoising(), study=study, branch={"ranks": [0, 2], "refits": 0})
    assert found.manifest.bytes.stored < found.manifest.bytes.original


def test_singular_values_that_do_not_converge_are_a_trial_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "svd", never)
    monkeypatch.setattr(torch.linalg, "eigh", never)
    with pytest.raises(AlphasmithError, match=r"converge") as caught:
        tried(tmp_path, denoiser(), denoising(), study={"trials": 1, "roles": ["truncate"]})
    assert "inner.weight" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
