"""Scope ``model``: one study for the whole model, the guard at its output, and what happens when variants break down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.literals import Variant
from alphasmith.search import RunResult, load_quantized
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.task import Metric, score_float
from alphasmith.search.launch import pipeline
from alphasmith.search.model.search import ModelScales, SiteStatistics, search_model
from alphasmith.search.model.variants import VARIANTS, ModelScores, best_variant, kept_variant, task_loss
from alphasmith.search.progress import Silent
from alphasmith.storage.database.connection import open_optuna
from tests.support.run_cases import Likeness, Mlp, answer, launch, rows, seeded, vectors


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The user's model."""
    return seeded(Mlp)


@pytest.mark.parametrize("loss", ["mse", "kl", "task"])
def test_one_study_for_the_whole_model(loss: str, tmp_path: Path, model: nn.Module) -> None:
    metric = Likeness(model, vectors(seed=9)) if loss == "task" else None
    values = {"search": {"scope": "model", "loss": loss, "trials": 7}, "groups": {"k": 3}}
    result = launch(tmp_path, model, vectors(), values, metric=metric)
    manifest = result.manifest
    assert manifest.scope == "model"
    assert len(manifest.groups) == 3
    assert rows(tmp_path / "runs.db", "select study_name from studies") == [(manifest.study,)]
    study = optuna.load_study(study_name=manifest.study, storage=open_optuna(result.storage))
    assert len(study.trials) == len(result.trials) == 7
    assert [t.user_attrs["candidate"] for t in study.trials[:4]] == ["identity", "alpha_0.5", "best_single", "sampler"]
    for trial in study.trials[3:]:
        assert {n for n in trial.params if n.startswith("alpha_")} == {"alpha_0", "alpha_1", "alpha_2"}
        assert not trial.params.get("shift")  # only alphas are searched over the whole model
        assert all(g.low <= trial.params[f"alpha_{g.index}"] <= g.high for g in manifest.groups)
    # Every channel of every site has a group of the whole model; no site has a study of its own.
    assert {label for s in manifest.sites for label in s.labels} == {0, 1, 2}
    assert all(len(s.labels) == s.channels and s.study is None and s.groups == () for s in manifest.sites)
    held_out = manifest.output.held_out
    assert held_out is not None
    for baseline in (held_out.identity, held_out.alpha_half, held_out.best_single):
        assert baseline is not None
        assert held_out.ours <= baseline
    loaded = load_quantized(result.folder, model)
    assert torch.isfinite(answer(loaded, vectors(seed=4)[0])).all()


def test_the_task_loss_follows_the_direction_of_the_metric(tmp_path: Path, model: nn.Module) -> None:
    likeness = Likeness(model, vectors(seed=9))
    values: dict[str, Any] = {"search": {"scope": "model", "loss": "task", "trials": 4, "single_alphas": 3}}
    up = launch(tmp_path / "up", model, vectors(), values, metric=likeness)
    values["data"] = {"metric_goal": "min"}
    down = launch(tmp_path / "down", model, vectors(), values, metric=lambda m: 1 - likeness(m))
    # Maximising agreement (1 for the float model) and minimising disagreement (0 for it) are the same search.
    assert list(down.trials["loss"]) == pytest.approx(list(up.trials["loss"]))
    naive = up.manifest.output.metrics[0].naive
    assert naive is not None
    assert up.trials["loss"][0] == pytest.approx(2 - naive)


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("reference", [-3.0, 0.0, 1e-3, 40.0])
def test_the_task_loss_is_positive_and_keeps_the_order(higher: bool, reference: float) -> None:
    told = [-1e4, -50.0, -3.1, -3.0, -0.5, 0.0, 0.001, 2.0, 39.9, 40.0, 55.0, 1e4]

    def loss(value: float) -> float:
        return task_loss(Metric("m", higher, lambda _: value), reference)(nn.Identity(), ())

    losses = [loss(value) for value in (reversed(told) if higher else told)]
    assert all(a <= b for a, b in itertools.pairwise(losses))
    assert loss(reference) == 1.0
    assert 0 <= min(losses) < 1 < max(losses) < math.inf


# ------------------------------------------------------------------------------------------------ the output's guard


def test_what_is_kept_is_the_winners_or_has_the_lowest_output_loss(tmp_path: Path, model: nn.Module) -> None:
    values = {"search": {"noise_model": False, "guard": "output"}}
    output = launch(tmp_path, model, vectors(), values).manifest.output
    losses: dict[str, float | None] = {
        "identity": output.naive,
        "alpha_0.5": output.alpha_half,
        "one_alpha": output.one_alpha,
        "best_single": output.best_single,
        "ours": output.ours,
    }
    assert all(loss is not None for loss in losses.values())
    kept = losses[output.kept]
    assert kept is not None
    assert losses["identity"] is not None
    assert kept <= losses["identity"]
    assert output.kept == "ours" or all(kept <= loss for loss in losses.values() if loss is not None)


#: All but the sweep's.
FOUR: tuple[Variant, ...] = ("identity", "alpha_0.5", "best_single", "ours")
#: Held-out output losses of these, the guard, and what is kept then.
DECISIONS: list[tuple[tuple[float | None, ...], Literal["site", "output"], Variant]] = [
    ((3.0, 2.0, 1.0, 0.5), "site", "ours"),
    ((3.0, 2.0, 1.0, 1.5), "site", "ours"),
    ((3.0, 2.0, 1.0, 1.5), "output", "best_single"),
    ((1.0, 2.0, 3.0, 1.5), "site", "identity"),
    ((1.4, 2.0, 1.0, 1.5), "site", "identity"),
    ((1.0, 2.0, 3.0, 1.5), "output", "identity"),
    ((1.5, 2.0, 3.0, 1.5), "site", "ours"),
    ((3.0, 2.0, 4.0, None), "site", "alpha_0.5"),
    ((None, 2.0, 4.0, 5.0), "site", "ours"),
]


@pytest.mark.parametrize(("losses", "guard", "kept"), DECISIONS)
def test_what_is_kept(losses: tuple[float | None, ...], guard: Literal["site", "output"], kept: Variant) -> None:
    scores = ModelScores(loss="mse", losses=dict(zip(FOUR, losses, strict=True)), metrics={})
    assert kept_variant(scores, guard) == kept


def test_within_the_scatter_of_the_samples_the_winners_stay_but_never_above_no_smoothing() -> None:
    def kept(errors: Mapping[Variant, list[float]]) -> Variant:
        tensors = {v: torch.tensor(e, dtype=torch.float64) for v, e in errors.items()}
        losses = {v: float(e.sum()) for v, e in tensors.items()}
        return kept_variant(ModelScores(loss="mse", losses=losses, metrics={}, errors=tensors), "output")

    ours, close, clear = [1.0, 1.0, 1.0, 1.0], [0.5, 1.4, 0.4, 1.5], [0.9, 0.8, 0.9, 0.8]
    far = [9.0] * 4
    assert kept({"identity": far, "one_alpha": close, "ours": ours}) == "ours"
    assert kept({"identity": far, "one_alpha": clear, "ours": ours}) == "one_alpha"
    # One that is clearly better is enough: then the lowest of all is kept.
    lowest = [0.0, 1.6, 0.0, 1.6]
    assert kept({"identity": far, "alpha_0.5": clear, "one_alpha": lowest, "ours": ours}) == "one_alpha"
    assert kept({"identity": close, "ours": ours}) == "identity"


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize(("losses", "guard", "kept"), [DECISIONS[1], DECISIONS[3], DECISIONS[5]])
def test_what_is_kept_is_written_and_said(
    losses: tuple[float, ...],
    guard: str,
    kept: Variant,
    refine: bool,
    tmp_path: Path,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[str] = []

    class MessageLog(Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    def scored(*_: Any) -> ModelScores:
        return ModelScores(loss="mse", losses=dict(zip(FOUR, losses, strict=True)), metrics={})

    monkeypatch.setattr(pipeline, "score_variants", scored)
    values = {"search": {"noise_model": False, "guard": guard, "refine": refine, "refine_trials": 4}}
    result: RunResult = launch(tmp_path, model, vectors(), values, progress=MessageLog())
    scales = [n for n in load_file(result.folder / "scales.safetensors") if n.startswith("scale/")]
    smoothed = load_file(result.folder / "smoothed" / "model.safetensors")
    original = model.state_dict()
    assert result.manifest.output.kept == kept
    if kept == "identity":
        assert not scales
        assert all(torch.equal(smoothed[n], original[n]) for n in original)
        assert result.manifest.proof is None
        why = "no site is smoothed: with the winners of the search the loss at the model's output is 1.5"
        assert any(line.startswith(why) for line in result.manifest.notes)
        assert any(f"warning: {why}" in line for line in heard)
    else:
        assert scales
        assert any("best_single has the lowest held-out loss" in line for line in heard)


def test_the_best_variant() -> None:
    def best(**losses: float | None) -> Variant:
        return best_variant(
            ModelScores(loss="mse", losses={v: losses.get(v.replace(".", "_")) for v in VARIANTS}, metrics={})
        )

    assert best(identity=3.0, alpha_0_5=2.0, best_single=1.0, ours=0.5) == "ours"
    assert best(identity=3.0, alpha_0_5=2.0, best_single=1.0, ours=1.0) == "ours"
    assert best(identity=1.0, alpha_0_5=1.0, best_single=1.0, ours=2.0) == "identity"
    assert best(identity=3.0, alpha_0_5=2.0, ours=None) == "alpha_0.5"
    assert best() == "ours"


def test_a_metric_that_breaks_before_quantization_stops_the_run(model: nn.Module) -> None:
    def broken(_: nn.Module) -> float:
        raise NonFiniteError("the metric is nan")

    assert score_float(model, None, Silent()) is None
    with pytest.raises(InputError, match="before any quantization"):
        score_float(model, Metric("broken", True, broken), Silent())


# -------------------------------------------------------------------------------------------------- the search itself


def test_scales_of_the_whole_model() -> None:
    sites = {
        "a": SiteStatistics(
            activation=torch.tensor([1.0, 4.0, 9.0]), weight=torch.ones(3), ties=torch.arange(3, dtype=torch.int64)
        ),
        "b": SiteStatistics(
            activation=torch.tensor([16.0, 0.0]), weight=torch.ones(2), ties=torch.arange(2, dtype=torch.int64)
        ),
    }
    labels = {"a": torch.tensor([0, 0, 1]), "b": torch.tensor([1, 0])}
    scales = ModelScales(sites, labels)
    assert scales.k == 2
    assert all(bool((s.scales == 1).all()) for s in scales(None).values())
    mixed = scales((0.5, 1.0))
    torch.testing.assert_close(mixed["a"].scales, torch.tensor([1.0, 2.0, 9.0]))
    torch.testing.assert_close(mixed["b"].scales, torch.tensor([16.0, 16.0]))  # a dead channel takes the mean
    single = scales.single(0.5)
    torch.testing.assert_close(single["b"].scales, torch.tensor([4.0, 4.0]))


def test_nothing_to_search_is_refused() -> None:
    judge: Any = None  # never reached
    with pytest.raises(InputError, match="no site can be smoothed"):
        search_model({}, judge, judge, RunConfig(), rho=0.0)
