"""What is kept is at the model's output never worse than a plain choice beyond the scatter of the held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.search import RunConfig, run
from alphasmith.search.launch import pipeline
from alphasmith.search.model.variants import VARIANTS, ModelScores, score_variants

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[ModelScores]:
    """Scores of the whole models of every run, with the errors of their samples."""
    heard: list[ModelScores] = []

    def scored(*given: Any) -> ModelScores:
        heard.append(score_variants(*given))
        return heard[-1]

    monkeypatch.setattr(pipeline, "score_variants", scored)
    return heard


def keeps_its_promise(folder: Path, judged: list[ModelScores], values: Mapping[str, Any]) -> None:
    config = RunConfig.build({"storage": f"sqlite:///{folder / 'runs.db'}", "out": str(folder / "out"), **values})
    kept = run(config).manifest.output.kept
    (scores,) = judged
    assert set(scores.errors) == set(VARIANTS)
    for variant, errors in scores.errors.items():
        worse, standard_error = paired_difference(scores.errors[kept], errors, scores.weight)
        assert worse <= standard_error, f"{kept} is above {variant}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("demo", ["image", "text"])
@pytest.mark.slow
def test_the_demos(demo: str, seed: int, tmp_path: Path, judged: list[ModelScores]) -> None:
    keeps_its_promise(tmp_path, judged, {"model": {"demo": demo}, "search": {"seed": seed}})


@pytest.mark.skipif(not (SHARED / "zoo.py").is_file(), reason="the shared models are not beside the checkout")
@pytest.mark.parametrize("model", ["kwt1", "resnet8_cifar10", "ad_autoencoder", "retsim", "stories260k_outlier"])
@pytest.mark.slow
def test_shared_models(model: str, tmp_path: Path, judged: list[ModelScores]) -> None:
    values = {
        "model": {
            "path": str(SHARED / model),
            "factory": "zoo:load_model",
            "factory_path": str(SHARED),
        },
        "data": {"factory": "zoo_eval:calib_batches", "samples": 32, "tuning": 16, "held_out": 16, "proof": 4},
        "search": {"trials": 12, "refine_trials": 24},
    }
    keeps_its_promise(tmp_path, judged, values)
