"""Tasks of labelled samples: their losses are lowered by training, their metrics are those of single samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.tasks import SampleTask
from alphasmith.objectives.media.batch import Batch


@dataclass(frozen=True, eq=False)
class Given:
    inputs: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, numbers: Sequence[int]) -> Batch:
        chosen = list(numbers)
        return Batch(args=(self.inputs[chosen],), labels=None if self.labels is None else self.labels[chosen])


def points(count: int, seed: int) -> Given:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return Given(x, (x[:, 0] > 0).long())


def clips(count: int, seed: int) -> Given:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.sin(torch.arange(16000) * 0.05) * torch.rand(count, 1, generator=generator)
    return Given(clean + 0.1 * torch.randn(count, 16000, generator=generator), clean)


def tokens(count: int, seed: int) -> Given:
    return Given(torch.randint(0, 7, (count, 9), generator=torch.Generator().manual_seed(seed)), None)


class NextToken(nn.Module):
    """Scores of the next token, the same at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(7))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scores.expand(*ids.shape, 7)


def task_of(kind: Any, made: Any, **settings: Any) -> SampleTask:
    return SampleTask(kind=kind, train=made(12, 0), study=made(10, 1), test=made(11, 2), **settings)


def test_accuracy_is_the_share_of_right_answers_and_batches_change_nothing() -> None:
    task, model = task_of("classes", points, batch_size=3), nn.Linear(4, 2)
    found = task.measure(model, "study").values["accuracy"]
    study = points(10, 1)
    right = (model(study.inputs).argmax(-1) == study.labels).float().mean()
    assert found == pytest.approx(100 * float(right))
    assert found == task_of("classes", points, batch_size=32).measure(model, "study").values["accuracy"]
    assert [(metric.name, metric.goal) for metric in task.metrics] == [("accuracy", "max")]


def test_perplexity_of_a_uniform_guess_is_the_number_of_tokens() -> None:
    task = task_of("tokens", tokens, batch_size=4)
    assert task.measure(NextToken(), "test").values["perplexity"] == pytest.approx(7, rel=1e-6)
    assert float(task.loss(NextToken(), task.train.batch(range(3)))) == pytest.approx(math.log(7), rel=1e-6)


def test_waveforms_are_measured_by_signal_metrics_against_labels() -> None:
    task = task_of("waveforms", clips, rate=16_000)
    found = task.measure(nn.Identity(), "study")
    assert set(found.values) == {"si_sdr", "stoi"} == {metric.name for metric in task.metrics}
    assert found.values["si_sdr"] == pytest.approx(
        -float(task.loss(nn.Identity(), clips(10, 1).batch(range(10)))), abs=0.05
    )


@pytest.mark.parametrize(("kind", "made"), [("classes", points), ("tokens", tokens), ("waveforms", clips)])
def test_the_loss_is_lowered_by_its_gradient_and_the_mode_stays(kind: str, made: Any) -> None:
    task = task_of(kind, made, rate=16_000)
    model: nn.Module = {"classes": nn.Linear(4, 2), "tokens": NextToken(), "waveforms": nn.Conv1d(1, 1, 5, padding=2)}[
        kind
    ]
    if kind == "waveforms":
        model = nn.Sequential(nn.Unflatten(1, (1, 16000)), model, nn.Flatten(1))
    batch = task.train.batch(range(8))
    before = task.loss(model, batch)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = torch.as_tensor(parameter.grad)
            parameter.sub_(1e-2 * gradient / gradient.norm())
    assert task.loss(model, batch) < before
    model.train()
    model[0].eval() if isinstance(model, nn.Sequential) else None
    modes = [module.training for module in model.modules()]
    task.measure(model, "test")
    assert modes == [module.training for module in model.modules()]


def test_what_is_not_finite_is_an_error() -> None:
    model = nn.Linear(4, 2)
    nn.init.constant_(model.bias, math.nan)
    with pytest.raises(NonFiniteError):
        task_of("classes", points).measure(model, "study")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "pictures"}, "kind"),
        ({"study": points(0, 0)}, "study"),
        ({"batch_size": 0}, "batch_size"),
        ({"kind": "waveforms", "signals": ()}, "signals"),
    ],
)
def test_bad_input_names_the_field(changes: dict[str, Any], field: str) -> None:
    given: dict[str, Any] = {"kind": "classes", **{name: points(3, 0) for name in ("train", "study", "test")}}
    with pytest.raises(InputError) as caught:
        SampleTask(**{**given, **changes})
    assert caught.value.field == field


def test_missing_labels_are_named() -> None:
    task = task_of("waveforms", lambda count, seed: Given(clips(count, seed).inputs, None), rate=16_000)
    with pytest.raises(InputError, match="no labels"):
        task.measure(nn.Identity(), "study")
