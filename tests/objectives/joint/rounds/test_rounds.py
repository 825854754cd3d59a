"""The rounds: the result is the last model that met the condition, ranks never rise, and the same seed gives the same bits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.drop import DropCondition, Tolerance
from alphasmith.objectives.joint.ports import Measured
from alphasmith.objectives.joint.rounds.loop import run_rounds
from alphasmith.objectives.joint.rounds.outcome import Round, RoundsOutcome
from alphasmith.objectives.joint.rounds.regularised import train_regularised
from alphasmith.objectives.joint.rounds.settings import RegularisedSettings, RoundsSettings, Updates
from alphasmith.objectives.joint.sparsity.terms import SparsitySettings
from alphasmith.objectives.literals import LayerClass
from alphasmith.objectives.media.batch import Batch
from tests.support.joint_tasks import TinyCrn, TinyTask

LOOSE = DropCondition(tolerances=(Tolerance(metric="snr", drop=100.0),))
TRAINING = RegularisedSettings(updates=Updates(steps=30, learning_rate=1e-2))
ROUNDS = RoundsSettings(energy=0.9, step=0.3, max_rounds=3, finetune=Updates(steps=4, learning_rate=1e-3))


def untrained() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyCrn()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return train_regularised(untrained(), TinyTask(), TRAINING).model


def same(left: nn.Module, right: nn.Module) -> bool:
    """Whether two models have the same tensors, to the bit."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ranks(done: Round) -> dict[str, float]:
    """Rank of every layer, above all others where it is dense."""
    return {layer.name: layer.rank or math.inf for layer in done.layers}


def check(outcome: RoundsOutcome, given: nn.Module) -> None:
    """What holds of every outcome."""
    met = [done.number for done in outcome.rounds if done.met]
    assert outcome.kept == max(met, default=0)
    assert [done.number for done in outcome.rounds] == list(range(1, len(outcome.rounds) + 1))
    assert all(done.met for done in outcome.rounds[:-1]), "a round that broke the condition is the last"
    for before, after in zip(outcome.rounds, outcome.rounds[1:], strict=False):
        assert after.numbers <= before.numbers
        lower, higher = ranks(after), ranks(before)
        assert not after.layers or all(lower[name] <= higher[name] for name in higher)
    assert not outcome.model.training
    if not outcome.kept:
        assert outcome.model is given


def test_all_rounds_meet_a_loose_condition(model: nn.Module) -> None:
    seen: list[tuple[int, dict[str, Tensor]]] = []
    task = TinyTask()
    before = copy.deepcopy(model)
    outcome = run_rounds(
        model,
        task,
        ROUNDS,
        LOOSE,
        on_round=lambda done, made: seen.append((done.number, copy.deepcopy(made.state_dict()))),
    )
    check(outcome, model)
    assert outcome.status == "round_cap"
    assert same(model, before), "the model given stays as it is"
    assert [number for number, _ in seen] == [1, 2, 3]
    kept, last = outcome.model.state_dict(), seen[-1][1]
    assert all(torch.equal(kept[name], last[name]) for name in last)
    assert outcome.rounds[-1].numbers == sum(p.numel() for p in outcome.model.parameters()) < 1000
    assert outcome.rounds[0].finetune is not None
    again = task.measure(outcome.model, "study").values["snr"]
    assert outcome.rounds[-1].measured is not None
    assert outcome.rounds[-1].measured.values["snr"] == again
    assert outcome.folded is not None
    assert set(outcome.folded.rows) == {"norm1"}


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_the_round_before_the_one_that_broke_the_condition_is_the_result(broken: int, model: nn.Module) -> None:
    """Measurement 0 is that of the model given, the others those of the rounds."""
    kept: list[dict[str, Tensor]] = [model.state_dict()]
    outcome = run_rounds(
        model,
        TinyTask(snr=lambda number, value: -150.0 if number == broken else value),
        ROUNDS,
        LOOSE,
        on_round=lambda done, made: kept.append(copy.deepcopy(made.state_dict())),
    )
    check(outcome, model)
    assert outcome.status == ("violated_at_first" if broken == 1 else "violated")
    assert outcome.kept == broken - 1
    last = outcome.rounds[-1]
    assert last.number == broken
    assert last.measured is not None
    assert last.measured.values["snr"] == -150.0, "the round that broke it is on record with its numbers"
    assert "-150 dB" in outcome.reason
    assert "more than tolerated" in outcome.reason
    found = outcome.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept[broken - 1].items())


@pytest.mark.parametrize(
    "settings", [ROUNDS, replace(ROUNDS, metric="whitened", norms="weight")], ids=["fold", "weight"]
)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(settings: RoundsSettings, model: nn.Module) -> None:
    torch.manual_seed(1)
    first = run_rounds(model, TinyTask(), settings, LOOSE)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = run_rounds(model, TinyTask(), settings, LOOSE)
    assert torch.equal(torch.random.get_rng_state(), state), "the generator of the process is left alone"
    assert same(first.model, second.model)
    assert first.rounds == second.rounds
    other = run_rounds(model, TinyTask(), replace(settings, finetune=replace(settings.finetune, seed=1)), LOOSE)
    assert not same(first.model, other.model)


@pytest.mark.parametrize("metric", ["plain", "activation", "whitened"])
def test_every_metric_lowers_every_class(metric: Any, model: nn.Module) -> None:
    rank: dict[LayerClass, int] = {"conv": 2, "recurrent_ih": 3, "recurrent_hh": 4, "linear": 2}
    outcome = run_rounds(model, TinyTask(), replace(ROUNDS, energy=None, rank=rank, metric=metric, max_rounds=2), LOOSE)
    check(outcome, model)
    found = [ranks(done) for done in outcome.rounds]
    assert found[0] == {"conv": 2, "rnn.layers.0.ih": 3, "rnn.layers.0.hh": 4, "out": 2}
    assert found[1] == {"conv": 1, "rnn.layers.0.ih": 1, "rnn.layers.0.hh": 2, "out": 1}


def test_normalizations_that_stay_are_pushed_on(model: nn.Module) -> None:
    settings = replace(ROUNDS, norms="weight", sparsity=SparsitySettings(encoder=10.0, recurrent=10.0), max_rounds=1)
    settings = replace(settings, finetune=replace(settings.finetune, steps=40, learning_rate=1e-2))
    outcome = run_rounds(model, TinyTask(), settings, LOOSE)
    assert outcome.kept == 1
    assert outcome.folded is None
    for name in ("norm1.weight", "norm2.weight"):
        assert float(outcome.model.get_parameter(name).abs().sum()) < float(model.get_parameter(name).abs().sum())
    done = outcome.rounds[0].finetune
    assert done is not None
    assert done.points[0].first > done.points[-1].first > 0


def test_it_ends_when_no_rank_fell(model: nn.Module) -> None:
    outcome = run_rounds(model, TinyTask(), replace(ROUNDS, energy=None, rank=1), LOOSE)
    check(outcome, model)
    assert outcome.status == "no_rank_fell"
    assert outcome.kept == 1
    assert outcome.rounds[1].fallen == ()
    nothing = run_rounds(model, TinyTask(), replace(ROUNDS, exclude=["*"]), LOOSE)
    check(nothing, model)
    assert (nothing.status, nothing.kept) == ("no_rank_fell", 0)


@pytest.mark.parametrize("bad", [2, 6])
def test_a_training_that_diverges_ends_the_rounds_with_the_step_named(bad: int, model: nn.Module) -> None:
    """Four updates a round: call 2 is in the first round, call 6 in the second."""
    task = TinyTask(spoil=lambda number, loss: loss * math.nan if number == bad else loss)
    outcome = run_rounds(model, task, ROUNDS, LOOSE)
    check(outcome, model)
    assert outcome.status == "diverged"
    assert outcome.kept == (bad - 1) // 4
    assert "the loss was nan at step 2" in outcome.reason
    assert all(bool(torch.isfinite(p).all()) for p in outcome.model.parameters())


def test_metrics_that_are_not_finite_end_the_rounds(model: nn.Module) -> None:
    outcome = run_rounds(model, TinyTask(snr=lambda number, value: math.nan if number == 2 else value), ROUNDS, LOOSE)
    check(outcome, model)
    assert (outcome.status, outcome.kept) == ("diverged", 1)
    assert "snr of the model is nan" in outcome.reason


def test_the_caller_can_stop_and_end(model: nn.Module) -> None:
    ended = run_rounds(model, TinyTask(), ROUNDS, LOOSE, on_round=lambda done, made: done.number == 2)
    check(ended, model)
    assert (ended.status, ended.kept) == ("ended", 2)
    polls = iter(range(1000))
    stopped = run_rounds(model, TinyTask(), ROUNDS, LOOSE, stop=lambda: next(polls) >= 7)
    check(stopped, model)
    assert (stopped.status, stopped.kept) == ("interrupted", 1)


def test_drops_count_from_the_baseline_that_is_given(model: nn.Module) -> None:
    high = Measured(values={"snr": 500.0, "pesq": None})
    outcome = run_rounds(model, TinyTask(), ROUNDS, LOOSE, baseline=high)
    check(outcome, model)
    assert (outcome.status, outcome.rounds) == ("violated_before", ())
    with pytest.raises(InputError, match=r"tolerances\.pesq: the metric was not measured \(pesq is not installed\)"):
        run_rounds(model, TinyTask(), ROUNDS, DropCondition(tolerances=(Tolerance(metric="pesq", drop=0.1),)))


def test_training_lowers_the_loss_and_the_scales() -> None:
    task = TinyTask()
    given = untrained()
    before = copy.deepcopy(given)
    plain = train_regularised(given, task, replace(TRAINING, sparsity=SparsitySettings(encoder=0, recurrent=0)))
    sparse = train_regularised(given, task, replace(TRAINING, sparsity=SparsitySettings(encoder=0.1, recurrent=0)))
    assert same(given, before)
    assert plain.training.ending == "finished"
    assert plain.training.points[-1].task < plain.training.points[0].task
    assert plain.targets.encoder == ("norm1.weight",)
    assert plain.targets.recurrent == ("norm2.weight",)
    size = [float(made.model.get_parameter("norm1.weight").abs().sum()) for made in (plain, sparse)]
    assert size[1] < size[0]
    assert {point.first for point in plain.training.points} == {0.0}
    assert min(point.first for point in sparse.training.points) > 0
    assert same(
        plain.model,
        train_regularised(given, task, replace(TRAINING, sparsity=SparsitySettings(encoder=0, recurrent=0))).model,
    )


def test_whole_numbers_among_the_parameters_stay() -> None:
    given = untrained()
    given.register_parameter("version", nn.Parameter(torch.tensor([3]), requires_grad=False))
    trained = train_regularised(given, TinyTask(), replace(TRAINING, updates=Updates(steps=2))).model
    assert torch.equal(trained.get_parameter("version"), torch.tensor([3]))
    assert not torch.equal(trained.get_parameter("out.weight"), given.get_parameter("out.weight"))
    assert run_rounds(trained, TinyTask(), replace(ROUNDS, energy=None, rank=2, max_rounds=1), LOOSE).kept == 1


def test_what_cannot_be_trained_is_refused() -> None:
    class Silent(TinyTask):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            return super().loss(model, batch).detach()

    with pytest.raises(InputError, match="no scalar that depends on the parameters"):
        train_regularised(untrained(), Silent(), TRAINING)
    empty = TinyTask()
    empty.train.given = empty.train.given[:0]
    with pytest.raises(InputError, match="no sample to train on"):
        train_regularised(untrained(), empty, TRAINING)


@pytest.mark.parametrize("bad", [1, 4, 25])
def test_a_training_goes_back_to_the_last_good_weights(bad: int) -> None:
    """Copies are taken before updates 1, 11 and 21, once their loss is finite."""
    task = TinyTask(spoil=lambda number, loss: loss * math.inf if number == bad else loss)
    found = train_regularised(untrained(), task, TRAINING)
    good = max(0, (bad - 1) // 10 * 10)
    assert found.training.ending == "diverged"
    assert f"inf at step {bad}; the model is that of step {good}" in found.training.trouble
    assert found.training.steps == good
    polls = iter(range(100))
    straight = train_regularised(untrained(), TinyTask(), TRAINING, stop=lambda: next(polls) >= good)
    assert straight.training.ending == "interrupted"
    assert all(
        torch.equal(tensor, straight.model.state_dict()[name]) for name, tensor in found.model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"energy": 1.0}, "rounds.energy"),
        ({"energy": None}, "rounds.energy"),
        ({"energy": None, "rank": 0}, "rounds.rank"),
        ({"energy": {"gru": 0.9}}, "rounds.energy"),
        ({"step": 0.0}, "rounds.step"),
        ({"max_rounds": 0}, "rounds.max_rounds"),
        ({"metric": "exact"}, "rounds.metric"),
        ({"sparsity": SparsitySettings()}, "rounds.sparsity"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        RoundsSettings(**settings)
    with pytest.raises(InputError, match="updates"):
        Updates(learning_rate=math.nan)
