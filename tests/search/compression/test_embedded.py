"""The embedded default: deterministic signals, disjoint splits, a model that every stage finds its layers in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.low_rank.norms import fold_norms
from alphasmith.objectives.joint.rounds.regularised import train_regularised
from alphasmith.objectives.joint.sparsity.targets import find_targets
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.search.compression._signals import LENGTH, SNR, pairs
from alphasmith.search.compression.embedded import MEASURED, TRAINING, EnhancementTask, Enhancer, embedded_task

FEW = {"train": 12, "study": 4, "test": 4}


def test_signals_depend_on_the_seed_and_the_purpose_only() -> None:
    torch.manual_seed(0)
    first = pairs(3, "study", 3)
    torch.manual_seed(1)
    again = pairs(3, "study", 2)
    assert torch.equal(first[0][:2], again[0])
    assert torch.equal(first[1][:2], again[1])
    clips = [clip for seed in (3, 4) for purpose in ("train", "study", "test") for clip in pairs(seed, purpose, 2)[1]]
    assert all(not torch.equal(a, b) for place, a in enumerate(clips) for b in clips[:place])


def test_signals_are_finite_within_full_scale_and_as_noisy_as_told() -> None:
    noisy, clean = pairs(0, "test", 6)
    assert noisy.shape == clean.shape == (6, LENGTH)
    assert float(noisy.abs().max()) <= 0.9 + 1e-6
    ratio = 10 * torch.log10(clean.square().sum(1) / (noisy - clean).square().sum(1))
    assert bool(((ratio > SNR[0] - 0.01) & (ratio < SNR[1] + 0.01)).all())
    frames = clean.unfold(1, 400, 400).square().mean(2)
    assert float(frames.min()) < 1e-6 * float(frames.max()), "there are pauses"


def test_every_stage_finds_what_it_works_on() -> None:
    model = Enhancer().eval()
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 500_000
    example = EnhancementTask(0, FEW).train.batch([0, 1])
    targets = find_targets(model, example)
    assert len(targets.encoder) == 3
    assert len(targets.recurrent) == 1
    assert (targets.skipped, targets.warnings) == ({}, ())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.startswith("norms.") and name.endswith(("running_var", "weight")):
                tensor.uniform_(0.5, 1.5)
        before = model(*example.args)
        rewrite(model)
        folded = fold_norms(model, example)
        assert folded.left == {}
        torch.testing.assert_close(model(*example.args), before, rtol=1e-3, atol=1e-4)


def test_a_few_updates_enhance() -> None:
    make, _ = embedded_task(0)
    task = EnhancementTask(0, FEW)
    noisy = task.measure(torch.nn.Identity(), "study")
    settings = replace(TRAINING, updates=replace(TRAINING.updates, steps=12))
    model = train_regularised(make(), task, settings).model
    found = task.measure(model.train(), "study")
    assert all(module.training for module in model.modules()), "the mode stays"
    assert (found.values["si_sdr"] or 0) > (noisy.values["si_sdr"] or 0) + 1
    assert set(found.values) == set(MEASURED)
    assert found == task.measure(model.eval(), "study")
    assert found != task.measure(model, "test")


def test_the_model_depends_on_the_seed_only() -> None:
    first, again, other = (embedded_task(seed)[0]().state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(InputError, match="study has none"):
        EnhancementTask(0, {"train": 1, "study": 0, "test": 1})


def test_pesq_is_measured_only_when_it_is_asked_for_and_never_silently_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("alphasmith.objectives.joint.metrics.scores.find_spec", lambda name: None)
    task = EnhancementTask(0, FEW, ("snr", "pesq"))
    assert [metric.name for metric in task.metrics] == ["snr", "pesq"]
    found = task.measure(torch.nn.Identity(), "study")
    assert found.values["snr"] is not None
    assert found.values["pesq"] is None
    assert "pesq not measured (PESQ is not installed" in found.notes[0]
    for wrong in ((), ("mos",)):
        with pytest.raises(InputError, match="metrics"):
            EnhancementTask(0, FEW, wrong)  # type: ignore[arg-type]
