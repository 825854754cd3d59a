"""A judgement within its own noise: said always, and with few samples the simpler variant is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from alphasmith.objectives.literals import Variant
from alphasmith.search.cli.tables import result_text
from alphasmith.search.model.variants import FEW_SAMPLES, VARIANTS, ModelScores, within_noise
from tests.support.run_cases import Mlp, launch, seeded, vectors


def scores(*errors: list[float]) -> ModelScores:
    """Figures of the variants but ``one_alpha``, in their order, from the errors of every sample; fewer leave the last ones out."""
    tensors: dict[Variant, Tensor] = {
        v: torch.tensor(e, dtype=torch.float64)
        for v, e in zip((v for v in VARIANTS if v != "one_alpha"), errors, strict=False)
    }
    return ModelScores(loss="mse", losses={v: float(e.sum()) for v, e in tensors.items()}, metrics={}, errors=tensors)


LOW, HIGH, MIXED = [1.0, 1.1, 0.9], [3.0, 3.2, 2.9], [0.2, 2.4, 1.0]


def test_the_simplest_that_cannot_be_told_apart_is_named() -> None:
    doubt = within_noise(scores(HIGH, MIXED, LOW, [0.99, 1.12, 0.88]), "ours")
    assert doubt is not None
    assert (doubt.simpler, doubt.decides) == ("alpha_0.5", True)
    assert (
        "3 held-out samples cannot tell the model with the winners of the search from the one with alpha 0.5"
        in doubt.reason
    )
    assert "the simpler is kept" in doubt.reason


def test_clear_judgements_and_equal_models_raise_no_doubt() -> None:
    assert within_noise(scores(HIGH, HIGH, HIGH, LOW), "ours") is None
    assert within_noise(scores(LOW, HIGH, HIGH, LOW), "ours") is None  # nothing was smoothed
    assert within_noise(scores(HIGH, LOW), "identity") is None
    assert within_noise(scores(HIGH), "ours") is None  # a task metric has no samples
    # A simpler variant that is clearly better is for the guard to choose.
    assert within_noise(scores(LOW, LOW, LOW, HIGH), "ours") is None


def test_one_sample_tells_nothing() -> None:
    doubt = within_noise(scores([3.0], [3.0], [3.0], [1.0]), "ours")
    assert doubt is not None
    assert doubt.simpler == "identity"
    assert "1 held-out sample cannot" in doubt.reason
    assert "scatter is unknown" in doubt.reason


def test_few_samples_need_more_than_many() -> None:
    # The difference is 1.67 standard errors, over two samples and over a hundred.
    two = scores([1.0, 4.0], [9.0, 9.0], [9.0, 9.0], [0.0, 0.0])
    doubt = within_noise(two, "ours")
    assert doubt is not None
    assert doubt.simpler == "identity"
    many = scores([3.167, 1.167] * 50, [9.0] * 100, [9.0] * 100, [2.0] * 100)
    assert within_noise(many, "ours") is None


def test_many_samples_leave_the_winners_with_a_warning() -> None:
    errors = [[1.0 + 0.5 * (-1) ** i for i in range(FEW_SAMPLES)], [1.0] * FEW_SAMPLES]
    doubt = within_noise(
        scores(errors[0], errors[0], errors[0], [e - 0.001 * (i % 3 - 0.9) for i, e in enumerate(errors[1])]), "ours"
    )
    assert doubt is not None
    assert not doubt.decides
    assert "not certain" in doubt.reason


@pytest.mark.parametrize("samples", [4, 48])
def test_a_run_says_so_and_keeps_the_simpler(samples: int, tmp_path: Path) -> None:
    """What is kept is never a richer variant than few held-out samples can tell from a simpler one."""
    values = {"search": {"trials": 4, "rows": 32, "refine": False}}
    result = launch(tmp_path, seeded(Mlp), vectors(samples), values)
    manifest = result.manifest
    doubts = [note for note in manifest.notes if "cannot tell the model" in note]
    if samples == 48:
        assert not [note for note in doubts if "the simpler is kept" in note]
        return
    (doubt,) = doubts
    assert manifest.output.kept != "ours"
    assert manifest.guard[0].reason == doubt
    assert f"kept {manifest.output.kept}: {doubt}" in result_text(result, 1000)
