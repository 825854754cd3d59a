"""Trained tables lower the loss while every weight keeps its entry, and are kept only where the judge says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.codebook.tensors import indices_of
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedModel, PackedSettings, pack
from alphasmith.objectives.joint.packed.restoring import restore, unpack
from alphasmith.objectives.joint.packed.tuning import TunedTables, TuningSettings, finetune_tables, task_steps
from alphasmith.objectives.joint.ports import JointMetric, Measured, Split
from alphasmith.objectives.media.batch import Batch
from tests.support.packed_models import TOKENS, made, mixed

SETTINGS = TuningSettings(steps=12, learning_rate=3e-3)
CLUSTERS = ClassClusters(conv=4, recurrent=4, linear=4, embedding=8)


def target() -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(mixed()(TOKENS))


def loss(model: nn.Module, step: int) -> Tensor:
    """How far the model is from the one that was packed."""
    return torch.as_tensor((model(TOKENS) - target()).square().mean())


def judge(model: nn.Module) -> float:
    with torch.no_grad():
        return -float(loss(model, 0))


@pytest.fixture
def packed() -> PackedModel:
    return pack(made(mixed(), (True, False, 2, "channel")), PackedSettings(clusters=CLUSTERS))


def tuned(packed: PackedModel, settings: TuningSettings = SETTINGS, **changes: Any) -> TunedTables:
    given: dict[str, Any] = {"loss": loss, "judge": judge} | changes
    return finetune_tables(restore(mixed(), packed), packed, given.pop("loss"), settings, **given)


def indices(packed: PackedModel) -> dict[str, Tensor]:
    books = packed.structure.codebooks
    parts = ("table", "sizes", "indices", "lengths", "blocks")
    stored = {
        n: {p: packed.tensors[f"codebook/{n}/{p}"] for p in parts if f"codebook/{n}/{p}" in packed.tensors}
        for n in books
    }
    return {name: indices_of(name, entry, stored[name]) for name, entry in books.items()}


def test_the_loss_falls_and_only_entries_move(packed: PackedModel) -> None:
    model = restore(mixed(), packed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tuned(packed)
    assert found.kept
    assert found.after is not None
    assert found.after > found.before
    assert found.losses[-1] < found.losses[0]
    assert len(found.losses) == 12
    assert found.packed.stored_bytes == packed.stored_bytes
    for name, places in indices(packed).items():
        assert torch.equal(indices(found.packed)[name], places)
    for key, value in packed.tensors.items():
        moved = not torch.equal(value, found.packed.tensors[key])
        assert not moved or key.endswith("/table"), key
    restored = restore(mixed(), found.packed)
    assert judge(restored) == found.after
    assert any(not torch.equal(before[n], v) for n, v in restored.state_dict().items())
    assert all(one.notes[-1] == "its table was trained" for one in found.packed.report if one.stored == "codebook")


def test_the_gradient_of_an_entry_is_the_sum_over_its_weights() -> None:
    layer = nn.Linear(16, 16, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 16, generator=generator))
    model = nn.Sequential(layer)
    packed = pack(model, PackedSettings(clusters=ClassClusters(linear=4)))
    slope = torch.randn(16, 16, generator=generator)
    places = indices(packed)["0.weight"]
    sums = torch.stack([slope[places == entry].sum() for entry in range(4)])
    rate = 0.01

    def linear(model: nn.Module, step: int) -> Tensor:
        return (model.get_parameter("0.weight") * slope).sum()

    found = finetune_tables(
        model,
        packed,
        linear,
        TuningSettings(steps=1, learning_rate=rate, clip=0),
        judge=lambda m: -float(linear(m, 0).detach()),
    )
    moved = found.packed.tensors["codebook/0.weight/table"] - packed.tensors["codebook/0.weight/table"]
    # The first step of AdamW goes against the sign of the gradient, by the learning rate.
    torch.testing.assert_close(moved, -rate * sums.sign(), rtol=1e-3, atol=1e-6)


def test_tables_of_a_worse_model_are_not_kept(packed: PackedModel) -> None:
    found = tuned(packed, judge=lambda model: -judge(model))
    assert not found.kept
    assert found.packed is packed
    assert found.after is not None
    assert found.after < found.before


def test_the_same_seed_gives_the_same_tables(packed: PackedModel) -> None:
    first, second = tuned(packed), tuned(packed)
    assert first.losses == second.losses
    for key, value in first.packed.tensors.items():
        assert torch.equal(value, second.packed.tensors[key])


def breaking(at: int, bad: float) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, step: loss(model, step) * (bad if step == at else 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_at_the_last_good_tables(packed: PackedModel, bad: float) -> None:
    found = tuned(packed, loss=breaking(5, bad))
    assert found.trouble.startswith(f"the loss was {bad} at update 6")
    assert len(found.losses) == 5
    # The loss of update 5 was finite: its tables are those after four updates.
    good = tuned(packed, TuningSettings(steps=4, learning_rate=3e-3))
    for key, value in good.packed.tensors.items():
        assert torch.equal(value, found.packed.tensors[key])


def test_a_gradient_that_is_not_finite_ends_likewise(packed: PackedModel) -> None:
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * float("inf")

    def bad(model: nn.Module, step: int) -> Tensor:
        value = loss(model, step)
        broken: Tensor = Infinite.apply(value)  # type: ignore[no-untyped-call]
        return broken if step == 2 else value

    found = tuned(packed, loss=bad)
    assert found.trouble.startswith("the gradient was")
    good = tuned(packed, TuningSettings(steps=2, learning_rate=3e-3))
    assert found.after == good.after


def test_zeros_are_held_and_floats_move_only_when_asked() -> None:
    model = mixed()
    with torch.no_grad():
        model.get_parameter("mix.weight")[::2] = 0.0
    packed = pack(model, PackedSettings(clusters=CLUSTERS))
    zeros = unpack(packed)["mix.weight"] == 0
    later = itertools.count()
    held = unpack(tuned(packed, judge=lambda model: float(next(later))).packed)["mix.weight"]
    assert zeros.any()
    assert torch.equal(held == 0, zeros)
    found = tuned(packed, TuningSettings(steps=3, learning_rate=1e-2, floats=True, hold_zero=False))
    changed = {key for key, value in packed.tensors.items() if not torch.equal(value, found.packed.tensors[key])}
    assert "plain/mix.bias" in changed
    assert "plain/steps" not in changed


def test_half_tables_stay_half() -> None:
    packed = pack(mixed(), PackedSettings(clusters=CLUSTERS, float16=True))
    found = tuned(packed)
    assert found.kept
    assert {key: value.dtype for key, value in found.packed.tensors.items()} == {
        key: value.dtype for key, value in packed.tensors.items()
    }
    assert judge(restore(mixed(), found.packed)) == found.after


def test_stopping_keeps_what_was_reached(packed: PackedModel) -> None:
    left = iter([False, False, True])
    found = tuned(packed, stop=lambda: next(left))
    assert len(found.losses) == 2
    assert found.kept


class Copying:
    """A task whose samples are sequences of tokens: the model's output on them is to be that of the original."""

    metrics = (JointMetric(name="mse", goal="min"),)

    def __init__(self, count: int) -> None:
        self.train = self
        self.count = count
        self.asked: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return self.count

    def batch(self, numbers: Sequence[int]) -> Batch:
        self.asked.append(tuple(numbers))
        return Batch(args=(TOKENS[[number % 2 for number in numbers]],))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = mixed()(*batch.args)
        return torch.as_tensor((model(*batch.args) - wanted).square().mean())

    def measure(self, model: nn.Module, split: Split) -> Measured:
        return Measured(values={"mse": -judge(model)})


def test_a_task_gives_its_samples_pass_after_pass(packed: PackedModel) -> None:
    task = Copying(5)
    steps = task_steps(task, batch_size=2, seed=3)
    found = tuned(packed, TuningSettings(steps=5, learning_rate=3e-3), loss=steps)
    assert found.kept
    drawn = [number for numbers in task.asked for number in numbers]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    again = Copying(5)
    model = restore(mixed(), packed)
    for step in (3, 0):
        task_steps(again, batch_size=2, seed=3)(model, step)
    assert again.asked == [task.asked[3], task.asked[0]], "an update has its samples whatever was drawn before"


@pytest.mark.parametrize(("count", "size"), [(0, 2), (3, 0)])
def test_a_task_without_batches_is_refused(count: int, size: int) -> None:
    with pytest.raises(InputError, match="make no batches"):
        task_steps(Copying(count), batch_size=size, seed=0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": -1}, "tuning.steps"),
        ({"learning_rate": float("nan")}, "tuning.learning_rate"),
        ({"weight_decay": -1.0}, "tuning.weight_decay"),
        ({"clip": float("inf")}, "tuning.clip"),
    ],
)
def test_settings_out_of_range_are_refused(packed: PackedModel, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        tuned(packed, TuningSettings(**changes))


def test_what_cannot_be_trained_is_refused(packed: PackedModel) -> None:
    plain = pack(mixed(), PackedSettings(clusters=ClassClusters(**dict.fromkeys(vars(CLUSTERS)))))
    with pytest.raises(InputError, match="has no codebook"):
        tuned(plain)
    with pytest.raises(InputError, match="is no scalar that depends on the parameters"):
        tuned(packed, loss=lambda model, step: torch.zeros(()))
    with pytest.raises(NonFiniteError, match="the judge says nan"):
        tuned(packed, judge=lambda model: float("nan"))
