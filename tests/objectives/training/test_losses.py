"""Losses of single samples: by their formulas, whatever the padding, and what fits no task is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.training.losses import Objective, SampleLosses, answers, default_metric, task_of
from alphasmith.objectives.training.settings import LossName, TrainingSettings

SETTINGS = TrainingSettings()


def scores(rows: int, classes: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labelled(rows: int, classes: int) -> Batch:
    return Batch(args=(torch.zeros(rows, 1),), labels=torch.arange(rows) % classes)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 7))
def test_each_loss_is_its_formula(seed: int, classes: int) -> None:
    z, batch = scores(5, classes, seed), labelled(5, classes)
    y = torch.as_tensor(batch.labels)
    hot = torch.eye(classes, dtype=z.dtype)[y]
    p = z.exp() / z.exp().sum(1, keepdim=True)
    right = (z * hot).sum(1, keepdim=True)
    expected: dict[LossName, Tensor] = {
        "cross_entropy": -(p * hot).sum(1).log(),
        "mse": (p - hot).square().sum(1) / classes,
        "hinge": ((z - right + 1).clamp_min(0) * (1 - hot)).sum(1) / classes,
    }
    for loss, value in expected.items():
        objective = Objective(settings=replace(SETTINGS, loss=loss), task="classes")
        found = objective.losses(answers(z, batch, "classes"), None)
        torch.testing.assert_close(found.totals, value)
        assert torch.equal(found.weights, torch.ones(5, dtype=z.dtype))


@settings(deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1), heat=st.floats(0.5, 8))
def test_the_mix_and_the_distance(seed: int, share: float, heat: float) -> None:
    z, teacher, batch = scores(6, 4, seed), scores(6, 4, seed + 1), labelled(6, 4)
    objective = Objective(settings=replace(SETTINGS, distill=share, temperature=heat), task="classes")
    theirs, ours = (torch.softmax(rows / heat, 1) for rows in (teacher, z))
    divergence = (theirs * (theirs.log() - ours.log())).sum(1).mean() * heat**2
    wanted = (1 - share) * functional.cross_entropy(z, torch.as_tensor(batch.labels)) + share * divergence
    torch.testing.assert_close(objective.losses(answers(z, batch, "classes"), teacher).mean, wanted)
    at_the_goal = replace(SETTINGS, distill=1.0, temperature=heat)
    same = Objective(settings=at_the_goal, task="classes").losses(answers(z, batch, "classes"), z)
    assert float(same.mean) == pytest.approx(0, abs=1e-9)


def test_probabilities_are_taken_as_such() -> None:
    z, batch = scores(5, 3), labelled(5, 3)
    for name in ("cross_entropy", "mse"):
        loss: LossName = "cross_entropy" if name == "cross_entropy" else "mse"
        chosen = replace(SETTINGS, loss=loss)
        of_scores = Objective(settings=chosen, task="classes").losses(answers(z, batch, "classes"), None)
        of_shares = Objective(settings=chosen, task="classes", probabilities=True).losses(
            answers(z.softmax(1), batch, "classes"), None
        )
        torch.testing.assert_close(of_shares.totals, of_scores.totals)


def test_padding_on_either_side_changes_no_loss() -> None:
    ids = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([2, 7])]
    table = scores(9, 9)
    objective = Objective(settings=replace(SETTINGS, distill=0.5), task="tokens")
    teacher_table = scores(9, 9, 5)
    found = []
    for left in (False, True):
        padded = torch.zeros(2, 6, dtype=torch.int64)
        mask = torch.zeros(2, 6, dtype=torch.bool)
        for row, text in enumerate(ids):
            where = slice(6 - len(text), 6) if left else slice(0, len(text))
            padded[row, where], mask[row, where] = text, True
        batch = Batch(kwargs={"input_ids": padded}, mask=mask)
        output, theirs = table[padded], teacher_table[padded]
        assert task_of(output, batch) == "tokens"
        rows = answers(theirs, batch, "tokens").scores
        found.append(objective.losses(answers(output, batch, "tokens"), rows))
    torch.testing.assert_close(found[0].totals, found[1].totals)
    assert found[0].weights.tolist() == [4, 1]
    alone = Batch(kwargs={"input_ids": ids[0][None]})
    rows = answers(teacher_table[ids[0]][None], alone, "tokens").scores
    single = objective.losses(answers(table[ids[0]][None], alone, "tokens"), rows)
    torch.testing.assert_close(single.totals, found[0].totals[:1])


def test_tokens_may_have_labels_of_their_own() -> None:
    output = scores(6, 5).reshape(2, 3, 5)
    batch = Batch(args=(torch.zeros(2, 3),), labels=torch.tensor([[0, 4, -100], [2, -100, -100]]))
    assert task_of(output, batch) == "tokens"
    found = Objective(settings=SETTINGS, task="tokens").losses(answers(output, batch, "tokens"), None)
    expected = functional.cross_entropy(output.flatten(0, 1), torch.as_tensor(batch.labels).flatten())
    torch.testing.assert_close(found.mean, expected)
    assert found.weights.tolist() == [2, 1]


def test_values_are_compared_with_what_they_should_be() -> None:
    output, labels = scores(4, 6), scores(4, 6, 1)
    batch = Batch(args=(torch.zeros(4, 1),), labels=labels)
    assert task_of(output, batch) == "values"
    objective = Objective(settings=replace(SETTINGS, loss="mse"), task="values")
    found = objective.losses(answers(output, batch, "values"), None)
    torch.testing.assert_close(found.mean, (output - labels).square().sum() / labels.square().sum())
    halves = [objective.losses(answers(output[i : i + 2], batch.narrow(i, i + 2), "values"), None) for i in (0, 2)]
    torch.testing.assert_close(SampleLosses.joined(halves).mean, found.mean)


def test_what_fits_no_output_is_refused() -> None:
    z = scores(4, 3)
    batch = labelled(4, 3)
    for labels, words in (
        (torch.zeros(4, 2, dtype=torch.int64), r"have shape \(4, 2\), the model's output has \(4, 3\)"),
        (torch.zeros(4, 2), r"have shape \(4, 2\)"),
    ):
        with pytest.raises(InputError, match=words):
            task_of(z, replace(batch, labels=labels))
    for wrong in (3, -1):
        with pytest.raises(InputError, match=f"class {wrong} is none of the model's 3"):
            answers(z, replace(batch, labels=torch.tensor([0, 1, wrong, 2])), "classes")
    for loss in ("cross_entropy", "hinge"):
        name: LossName = "hinge" if loss == "hinge" else "cross_entropy"
        with pytest.raises(InputError, match="needs classes"):
            Objective(settings=replace(SETTINGS, loss=name), task="values")
    unlabelled = answers(z, replace(batch, labels=None), "classes")
    with pytest.raises(InputError, match="there are none"):
        Objective(settings=SETTINGS, task="classes").losses(unlabelled, None)
    with pytest.raises(InputError, match="missing or of another shape"):
        Objective(settings=replace(SETTINGS, distill=0.5), task="classes").losses(answers(z, batch, "classes"), z[:3])
    with pytest.raises(InputError, match="no position has a next token"):
        answers(torch.zeros(1, 1, 5), Batch(args=(torch.zeros(1, 1, dtype=torch.int64),)), "tokens")


def test_accuracy_gives_ties_to_the_lowest_index() -> None:
    metric = default_metric("classes")
    assert metric is not None
    output = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    assert metric.values(output, Batch(args=(output,), labels=torch.tensor([0, 2]))).tolist() == [1.0, 0.0]
    assert default_metric("tokens") is None
    assert default_metric("values") is None
