"""A training improves, is kept or not for good reason, goes on as if it had not been killed, and stops at trouble."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.payload import payload
from alphasmith.objectives.training.fake_quantized import FakeQuantized
from alphasmith.objectives.training.loop import TrainingData, train
from alphasmith.objectives.training.outcome import TrainingPoint
from alphasmith.objectives.training.ports import Checkpoint, Forgetful, SampleMetric
from alphasmith.objectives.training.settings import LossName, TrainingSettings
from tests.support.training import Folder, Material, Rows, classifier, reader

QUICK = TrainingSettings(
    learning_rate=5e-3, steps=60, batch_size=16, evaluate_every=10, checkpoint_every=15, patience=0
)


def data(material: Material) -> TrainingData:
    return TrainingData(samples=material.train, held_out=material.held_out, teacher=material.float_model)


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in payload(model)[0].items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n].float(), right[n].float()) for n in left)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "hinge"])
@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_it_improves_on_held_out_samples(loss: LossName, distill: float) -> None:
    material = classifier()
    twin = FakeQuantized(material.quantized)
    settings = replace(QUICK, loss=loss, distill=distill)
    seen: list[TrainingPoint] = []
    outcome = train(twin, data(material), settings, progress=seen.append)
    assert outcome.kept, outcome.reason
    assert outcome.best.held_out_loss < outcome.untrained.held_out_loss
    assert tuple(seen) == outcome.points
    assert [p.step for p in outcome.points] == [0, 10, 20, 30, 40, 50, 60]
    assert outcome.gain > outcome.standard_error > 0
    assert outcome.metric_name == "accuracy"
    assert not same(bits(twin.integers()), bits(material.quantized))


def test_a_language_model_learns_its_next_tokens() -> None:
    material = reader()
    twin = FakeQuantized(material.quantized)
    outcome = train(twin, data(material), replace(QUICK, learning_rate=0.02))
    assert outcome.kept, outcome.reason
    # Two of nine tokens are possible: no model does better than one bit.
    assert 0.69 < outcome.best.held_out_loss < 0.8 * outcome.untrained.held_out_loss
    assert outcome.untrained.metric is None


def test_values_without_labels_are_learned_from_the_float_model() -> None:
    material = classifier()
    unlabelled = TrainingData(
        samples=Rows(material.train.inputs, torch.zeros(len(material.train), 3)),
        held_out=Rows(material.held_out.inputs, torch.zeros(len(material.held_out), 3)),
        teacher=material.float_model,
    )
    outcome = train(FakeQuantized(material.quantized), unlabelled, replace(QUICK, loss="mse", distill=1.0))
    assert outcome.kept
    assert outcome.best.held_out_loss < 0.7 * outcome.untrained.held_out_loss


def test_what_is_not_better_is_not_kept() -> None:
    material = classifier()
    wrong = replace(material, train=Rows(material.train.inputs, (torch.as_tensor(material.train.labels) + 1) % 3))
    twin = FakeQuantized(wrong.quantized)
    outcome = train(twin, data(wrong), replace(QUICK, patience=2))
    assert not outcome.kept
    assert "the untrained model stays" in outcome.reason
    assert outcome.ending == "patience"
    assert same(bits(twin.integers()), bits(wrong.quantized))


def test_a_gain_within_its_noise_is_not_kept() -> None:
    material = classifier()
    twin = FakeQuantized(material.quantized)
    coin = torch.Generator().manual_seed(0)
    noise = SampleMetric(
        name="noise", goal="max", values=lambda output, batch: torch.randn(len(output), generator=coin)
    )
    outcome = train(twin, replace(data(material), metric=noise), replace(QUICK, watched="metric", steps=10))
    assert not outcome.kept
    assert abs(outcome.gain) <= 3 * outcome.standard_error


def test_only_settings_decide(tmp_path: Path) -> None:
    material = classifier()
    results = []
    for seed, others in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(others)  # what others draw must not matter
        twin = FakeQuantized(material.quantized)
        state = torch.get_rng_state()
        train(twin, data(material), replace(QUICK, seed=seed))
        assert torch.equal(state, torch.get_rng_state())
        results.append(bits(twin.integers()))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


class Interrupted(Exception):
    """Raised in the place of a crash."""


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_crash_after_any_checkpoint_changes_nothing(tmp_path: Path, after: int, accumulation: int) -> None:
    material = classifier()
    settings = replace(QUICK, accumulation=accumulation, freeze_norm_statistics=False, distill=0.3, weight_decay=0.01)
    undisturbed = FakeQuantized(material.quantized, freeze_norm_statistics=False)
    expected = train(undisturbed, data(material), settings, clock=lambda: 0.0)

    class Crashing(Folder):
        def save(self, checkpoint: Checkpoint) -> None:
            super().save(checkpoint)
            if self.saved == after:
                raise Interrupted

    with pytest.raises(Interrupted):
        train(
            FakeQuantized(material.quantized, freeze_norm_statistics=False),
            data(material),
            settings,
            checkpoints=Crashing(tmp_path),
        )
    again = FakeQuantized(material.quantized, freeze_norm_statistics=False)
    outcome = train(again, data(material), settings, checkpoints=Folder(tmp_path), clock=lambda: 0.0)
    assert replace(outcome, seconds=0.0) == replace(expected, seconds=0.0)
    assert same(bits(again.integers()), bits(undisturbed.integers()))


CHILD = """
import sys, time
from pathlib import Path
import torch
from alphasmith.objectives.quantization.payload import payload
from alphasmith.objectives.training.fake_quantized import FakeQuantized
from alphasmith.objectives.training.loop import TrainingData, train
from tests.objectives.training.test_loop import QUICK, data
from tests.support.training import Folder, classifier
import safetensors.torch

torch.set_num_threads(1)
pause = float(sys.argv[2])

class Slow(Folder):
    def save(self, checkpoint):
        super().save(checkpoint)
        time.sleep(pause)

material = classifier()
twin = FakeQuantized(material.quantized)
train(twin, data(material), QUICK, checkpoints=Slow(Path(sys.argv[1])))
tensors = payload(twin.integers())[0]
safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]

    def child(folder: Path, pause: float, result: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        given = [sys.executable, "-c", CHILD, str(folder), str(pause), str(result)]
        return subprocess.Popen(given, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert child(tmp_path / "whole", 0, tmp_path / "expected").wait() == 0
    killed, last = tmp_path / "killed", tmp_path / "killed" / "last"
    for _ in range(2):  # once after the first checkpoint, and once more after that of the second attempt
        before = last.stat().st_ino if last.exists() else None
        process = child(killed, 60, tmp_path / "never")
        while not last.exists() or last.stat().st_ino == before:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "never").exists()
    assert child(killed, 0, tmp_path / "result").wait() == 0
    assert (tmp_path / "result").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint() -> None:
    material = classifier()

    class Spoilt(Rows):
        calls = 0

        def batch(self, numbers: Sequence[int]) -> Batch:
            found = super().batch(numbers)
            Spoilt.calls += 1
            if Spoilt.calls <= 38:  # one call looks at what the model returns
                return found
            return replace(found, args=(torch.full_like(found.args[0], float("nan")),))

    spoilt = replace(material, train=Spoilt(material.train.inputs, material.train.labels))
    keep = Forgetful()
    twin = FakeQuantized(material.quantized)
    outcome = train(twin, data(spoilt), QUICK, checkpoints=keep)
    assert outcome.ending == "diverged"
    assert "the loss was nan at step 38; training stopped at the checkpoint of step 30" in outcome.reason
    assert outcome.steps == 30
    assert outcome.kept
    checkpoint = keep.load()
    assert checkpoint is not None
    assert checkpoint.state["step"] == 30
    assert all(bool(torch.isfinite(t).all()) for t in bits(twin.integers()).values())


def test_a_learning_rate_far_too_high_is_told() -> None:
    material = classifier()
    twin = FakeQuantized(material.quantized)
    outcome = train(twin, data(material), replace(QUICK, learning_rate=100.0, clip=0.0, warm_up=0.0))
    assert outcome.ending == "diverged"
    assert "at step" in outcome.reason
    assert not outcome.kept
    assert same(bits(twin.integers()), bits(material.quantized))


def test_asked_to_stop_it_leaves_a_checkpoint_and_goes_on_later(tmp_path: Path) -> None:
    material = classifier()
    whole = FakeQuantized(material.quantized)
    train(whole, data(material), QUICK)
    asked = iter([False] * 22 + [True])
    stopped = FakeQuantized(material.quantized)
    outcome = train(stopped, data(material), QUICK, checkpoints=Folder(tmp_path), stop=lambda: next(asked))
    assert (outcome.ending, outcome.steps, outcome.kept) == ("interrupted", 22, False)
    assert same(bits(stopped.integers()), bits(material.quantized))
    again = FakeQuantized(material.quantized)
    assert train(again, data(material), QUICK, checkpoints=Folder(tmp_path)).ending == "finished"
    assert same(bits(again.integers()), bits(whole.integers()))


def test_time_of_all_attempts_is_added_up(tmp_path: Path) -> None:
    material = classifier()
    ticks = iter(range(1000))
    asked = iter([False] * 15 + [True])
    first = train(
        FakeQuantized(material.quantized), data(material), QUICK, checkpoints=Folder(tmp_path),
        clock=lambda: float(next(ticks)), stop=lambda: next(asked),
    )  # fmt: skip
    later = iter(range(5000, 6000))
    second = train(
        FakeQuantized(material.quantized),
        data(material),
        QUICK,
        checkpoints=Folder(tmp_path),
        clock=lambda: float(next(later)),
    )
    assert 15 <= first.seconds < second.seconds < 200


def test_the_learning_rate_warms_up_and_falls() -> None:
    material = classifier()
    outcome = train(FakeQuantized(material.quantized), data(material), replace(QUICK, evaluate_every=3, warm_up=0.2))
    rates = [point.learning_rate for point in outcome.points]
    assert rates[:5] == sorted(rates[:5])
    assert max(rates) == pytest.approx(QUICK.learning_rate)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (replace(QUICK, loss="hinge"), "hinge compares the classes of a sample"),
        (replace(QUICK, watched="metric"), "there is no metric of single samples"),
    ],
)
def test_what_a_language_model_has_not_is_refused(settings: TrainingSettings, words: str) -> None:
    material = reader()
    with pytest.raises(InputError, match=words):
        train(FakeQuantized(material.quantized), data(material), settings)


def test_data_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    material = classifier()
    twin = FakeQuantized(material.quantized)
    good, settings = data(material), QUICK
    none, one = Rows(torch.zeros(0, 8)), Rows(torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64))
    for given, chosen, words in (
        (replace(good, samples=none), settings, "no sample to train on"),
        (replace(good, held_out=one), settings, "1 samples are held out"),
        (replace(good, teacher=None), replace(settings, distill=0.5), "there is no float model"),
        (replace(good, samples=Rows(material.train.inputs)), settings, "cross_entropy needs classes"),
        (replace(good, held_out=Rows(material.train.inputs, torch.full((120,), 3))), settings, "class 3 is none of"),
        (
            replace(good, samples=Rows(torch.randn(9, 5), torch.zeros(9, dtype=torch.int64))),
            settings,
            "cannot be run on it",
        ),
    ):
        with pytest.raises(InputError, match=words):
            train(twin, given, chosen)
    train(twin, good, replace(settings, steps=2), checkpoints=Folder(tmp_path))
    with pytest.raises(InputError, match="other settings or data"):
        train(twin, good, replace(settings, steps=3), checkpoints=Folder(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("learning_rate", 0.0), ("learning_rate", float("nan")), ("steps", 0), ("distill", 1.5), ("warm_up", -0.1)),
        *(("batch_size", 0), ("clip", float("inf")), ("loss", "huber"), ("schedule", "step"), ("patience", -1)),
    ],
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"training.{field}"):
        replace(QUICK, **{field: value})  # type: ignore[arg-type]  # that is the point


def test_updates_follow_from_epochs() -> None:
    settings = TrainingSettings(epochs=1.5, batch_size=4, accumulation=2)
    assert settings.updates(33) == 7
    assert replace(settings, steps=5).updates(33) == 5
