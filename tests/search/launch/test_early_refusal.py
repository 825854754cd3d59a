"""What can be refused is refused before the search, and what can be proven is not refused at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.errors import EquivalenceError, InputError
from tests.support.run_cases import VOCABULARY, Mlp, launch, seeded, tiny_llama, vectors

FAST: dict[str, Any] = {"search": {"trials": 4, "rows": 32}}


class Noisy(Mlp):
    """Dropout that does not know of eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """As its parent, with a third of the input lost."""
        return super().forward(F.dropout(x, 0.3))


def test_a_model_that_is_not_deterministic_is_refused_before_anything_is_on_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model: gives two answers to one batch in eval mode"):
        launch(tmp_path, seeded(Noisy), vectors(), FAST)
    assert not list(tmp_path.iterdir())


class Beside(Mlp):
    """A number in front of the scores, a constant behind them."""

    def forward(self, x: Tensor) -> Any:
        """Three outputs."""
        scores = super().forward(x)
        return {"aux_loss": scores.square().mean(), "scores": scores, "scale": torch.ones(len(x), 1)}


def test_losses_see_the_scores_and_the_proof_sees_everything(tmp_path: Path) -> None:
    manifest = launch(tmp_path, seeded(Beside), vectors(), FAST).manifest
    assert manifest.output.naive is not None
    assert manifest.output.naive > 0
    assert manifest.proof is not None
    assert manifest.proof.outputs == ("aux_loss", "scores", "scale")
    assert manifest.proof.dtype == "float64"
    told = " ".join(manifest.notes)
    assert "the output aux_loss is a single number" in told
    assert "the output scale is a constant" in told


def test_a_decoder_padded_on_the_left_is_proven_in_its_own_type(tmp_path: Path) -> None:
    def padded(seed: int) -> dict[str, Tensor]:
        mask = torch.ones(8, 12, dtype=torch.int64)
        mask[0, :3] = 0
        ids = torch.randint(1, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids * mask, "attention_mask": mask}

    model: nn.Module = tiny_llama()
    batches = [padded(seed) for seed in range(6)]
    with torch.no_grad():
        in_double = tiny_llama().double()(**batches[0]).logits
    result = launch(tmp_path, model, batches, FAST)
    assert result.manifest.proof is not None
    assert result.manifest.proof.error < 1e-4
    assert result.manifest.proof.dtype == ("float64" if bool(torch.isfinite(in_double).all()) else "float32")


class Weightless(Mlp):
    """Where the input is negative a ReLU becomes a tanh: a branch without weights, which only data can show."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, CLASSES)."""
        hidden = self.fc1(self.norm(x))
        hidden = F.relu(hidden) if bool(x.mean() > 0) else torch.tanh(hidden)
        return torch.as_tensor(self.head(self.last(x + self.fc2(hidden))))


def test_a_site_whose_fold_fails_on_other_batches_is_left_alone_and_the_run_goes_on(tmp_path: Path) -> None:
    batches = [batch + (0.5 if number % 2 else -0.5) for number, batch in enumerate(vectors())]
    manifest = launch(tmp_path, seeded(Weightless), batches, FAST).manifest
    modes = {site.name: site.mode for site in manifest.sites}
    reasons = {site.name: site.reason for site in manifest.sites}
    assert modes["fc1"] == modes["head"] == "fold"
    assert modes["fc2"] in ("left", "explicit")  # explicit where the traced batch took the tanh
    assert "on batches other than the traced one" in reasons["fc2"] or "tanh" in reasons["fc2"]
    assert manifest.proof is not None


def test_a_tolerance_that_rounding_alone_exceeds_is_refused_before_anything_is_on_record(tmp_path: Path) -> None:
    with pytest.raises(EquivalenceError, match=r"site \*"):
        launch(tmp_path, seeded(Mlp), vectors(), {**FAST, "proof": {"tolerance": 1e-13}})
    assert not list(tmp_path.iterdir())


def test_a_metric_that_changes_the_model_is_refused_before_anything_is_on_record(tmp_path: Path) -> None:
    def careless(model: nn.Module) -> float:
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        return 1.0

    with pytest.raises(InputError, match=r"norm\.weight changed while the metric"):
        launch(tmp_path, seeded(Mlp), vectors(), FAST, metric=careless)
    assert not list(tmp_path.iterdir())
