"""Stages that score candidates leave the float model behind, whatever happens in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.task import Metric
from alphasmith.search.launch import pipeline
from alphasmith.search.launch._outcome import produce
from alphasmith.search.model import refinement_stage
from alphasmith.search.model.variants import score_variants
from alphasmith.search.progress import Silent
from alphasmith.search.study.types import StudyContext
from tests.support.quantized_models import Example, block_example
from tests.support.run_cases import Mlp, launch, seeded, vectors

Stage = Callable[[Example, CandidateModel, pytest.MonkeyPatch], None]
UNUSED: Any = SimpleNamespace(sites=())


class Broken(Exception):
    """What a stage meets."""


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedOperator) for module in model.modules())


def broken(candidate: CandidateModel) -> NoReturn:
    assert is_quantized(candidate.model), "the stage was left while a candidate was applied"
    raise Broken


def scoring_variants(example: Example, candidate: CandidateModel, _: pytest.MonkeyPatch) -> None:
    def refused(model: nn.Module) -> float:
        assert is_quantized(model)
        raise InputError("data.metric", "is wrong", "mend it")

    reserve = ModelObjective(candidate, example.batches)
    metric = Metric("broken", True, refused)
    score_variants(candidate, reserve, "mse", {"ours": example.smoothings}, metric, 1.0, Silent())


def producing(example: Example, candidate: CandidateModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CandidateModel, "payload", broken)
    found: Any = SimpleNamespace(final=example.smoothings, formats=None)
    produce(RunConfig(), UNUSED, UNUSED, candidate, found, 0, Silent())


def refining(example: Example, candidate: CandidateModel, patch: pytest.MonkeyPatch) -> None:
    def refine(_: object, judge: ModelObjective, *__: object, **___: object) -> None:
        judge.loss(example.smoothings)
        broken(judge.candidate)

    patch.setattr(refinement_stage, "refine", refine)
    judge = ModelObjective(candidate, example.batches)
    refinement_stage.refine_sites(
        RunConfig(), UNUSED, {}, UNUSED, None, judge, judge, lambda _: StudyContext(), Silent()
    )


@pytest.mark.parametrize("stage", [scoring_variants, producing, refining])
def test_a_stage_that_raises_leaves_the_float_model(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    example = block_example()
    model = copy.deepcopy(example.model)
    modules = list(model.modules())
    candidate = CandidateModel(model, example.sites, example.ranges, Scheme())
    with pytest.raises((Broken, InputError)):
        stage(example, candidate, monkeypatch)
    assert list(model.modules()) == modules
    candidate.check_pristine()


def test_a_search_over_the_whole_model_that_raises_leaves_the_float_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges: list[ModelObjective] = []

    def search_model(_: object, judge: ModelObjective, *__: object, **___: object) -> None:
        judges.append(judge)
        judge.loss({})
        broken(judge.candidate)

    monkeypatch.setattr(pipeline, "search_model", search_model)
    with pytest.raises(Broken):
        launch(tmp_path, seeded(Mlp), vectors(), {"search": {"scope": "model"}})
    assert not is_quantized(judges[0].candidate.model)
    judges[0].candidate.check_pristine()
