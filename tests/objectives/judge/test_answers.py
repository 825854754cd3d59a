"""All floating outputs are seen, however they are returned, and what carries nothing is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.answers import (
    answer,
    check_repeatable,
    distance,
    farthest,
    loss_of_answers,
    silent_outputs,
)
from alphasmith.objectives.media.batch import Batch, floating_outputs, main_output


@dataclass
class Record:
    """What some models return."""

    aux_loss: Tensor
    scores: Tensor


class Answers(nn.Module):
    """Returns whatever ``shape`` makes of scores and their mean."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self._shape = shape

    def forward(self, x: Tensor) -> Any:
        scores = self.linear(x)
        return self._shape(scores, scores.mean())


def batch(seed: int, samples: int = 3) -> Batch:
    return Batch(args=(torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed)),))


@pytest.mark.parametrize(
    ("shape", "names", "main"),
    [
        (lambda scores, mean: scores, ["output"], "output"),
        (lambda scores, mean: (mean, scores), ["output[0]", "output[1]"], "output[1]"),
        (lambda scores, mean: {"aux_loss": mean, "scores": scores}, ["aux_loss", "scores"], "scores"),
        (lambda scores, mean: {"states": [scores, mean], "logits": scores * 2}, ["states[0]", "states[1]", "logits"], "logits"),
        (lambda scores, mean: (Record(mean, scores), scores.argmax(-1)), ["output[0].aux_loss", "output[0].scores"], "output[0].scores"),
        (lambda scores, mean: {"count": torch.tensor(3), "mean": mean}, ["mean"], "mean"),
    ],
)  # fmt: skip
def test_every_floating_tensor_is_found_and_a_number_is_never_the_answer_where_there_is_another(
    shape: Callable[[Tensor, Tensor], Any], names: list[str], main: str
) -> None:
    model = Answers(shape).eval()
    found = answer(model, batch(0))
    assert list(found) == names
    assert torch.equal(main_output(model(*batch(0).args)), found[main])
    assert all(torch.equal(tensor, found[name]) for name, tensor in floating_outputs(model(*batch(0).args)))


def test_a_model_without_floating_output_has_no_answer() -> None:
    with pytest.raises(ValueError, match="no floating tensor"):
        main_output((torch.tensor([1]), None, {"state": object()}))


def test_distance_is_relative_and_knows_masks() -> None:
    reference = torch.tensor([3.0, 4.0, -math.inf])
    assert distance(reference, reference) == 0.0
    assert distance(torch.tensor([3.0, 4.5, -math.inf]), reference) == pytest.approx(0.1)
    for other in ([3.0, 4.0, 0.0], [3.0, 4.0, math.inf], [math.nan, 4.0, -math.inf]):
        assert distance(torch.tensor(other), reference) == math.inf
    assert distance(torch.zeros(2), torch.zeros(3)) == math.inf
    assert farthest({"a": torch.ones(1), "b": torch.zeros(1)}, {"a": torch.ones(1), "b": torch.ones(1)}) == (1.0, "b")
    assert farthest({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}) == (math.inf, "b")


class Dropping(nn.Module):
    """Forgets that it is evaluated, in its second output only."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, F.dropout(x, 0.5)


class Counting(nn.Module):
    """Remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(("model", "name"), [(Dropping(), "output[1]"), (Counting(), "output")])
def test_two_answers_to_one_batch_are_refused_in_these_words(model: nn.Module, name: str) -> None:
    with pytest.raises(InputError, match=r"two answers to one batch in eval mode .*dropout") as refusal:
        check_repeatable(model.eval(), [batch(0)], 1e-4)
    assert f"({name} differs by" in str(refusal.value)
    check_repeatable(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval(), [batch(0), batch(1)], 1e-4)


def test_what_carries_nothing_is_named() -> None:
    batches = [batch(0), batch(1), batch(2, samples=2)]
    assert silent_outputs(Answers(lambda scores, mean: (scores, scores * 2)), batches) == ()
    (note,) = silent_outputs(Answers(lambda scores, mean: {"aux_loss": mean, "scores": scores}), batches)
    assert note.startswith("the output aux_loss is a single number")
    (note,) = silent_outputs(Answers(lambda scores, mean: (scores, torch.ones_like(scores))), batches)
    assert note == "the output output[1] is a constant: it carries nothing"
    (note,) = silent_outputs(Answers(lambda scores, mean: mean), batches)
    assert "losses are computed from one number a batch" in note


def test_a_constant_main_output_is_refused_unless_the_data_are_constant() -> None:
    model = Answers(lambda scores, mean: (torch.zeros_like(scores), scores))
    with pytest.raises(InputError, match=r"answers all batches alike in output\[0\].*return output\[1\] first"):
        silent_outputs(model, [batch(0), batch(1)])
    same = [batch(0, 1), replace(batch(0, 1), labels=None)]
    assert len(silent_outputs(Answers(lambda scores, mean: scores), same)) == 0


@pytest.mark.parametrize(
    ("shape", "places", "loss"),
    [
        (lambda scores, _: {"logits": scores}, 3, "kl"),
        (lambda scores, _: {"logits": scores}, 2, "mse"),  # one class a sample
        (lambda scores, _: {"last_hidden_state": scores, "logits_of_something": scores}, 3, "mse"),
        (lambda scores, _: scores, 3, "mse"),
    ],
)
def test_logits_of_tokens_are_judged_by_their_divergence(
    shape: Callable[[Tensor, Tensor], Any], places: int, loss: str
) -> None:
    x = torch.randn(*(2, 5, 4)[3 - places :])
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2) if places == 3 else None
    assert loss_of_answers(Answers(shape), Batch(args=(x,), mask=mask)) == loss
