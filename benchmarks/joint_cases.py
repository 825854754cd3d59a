"""Shared models that are compressed: each with its task, its data in three parts, and what it may lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.joint.ports import JointTask
from alphasmith.objectives.joint.rounds.regularised import train_regularised
from alphasmith.objectives.joint.tasks import SampleTask
from alphasmith.search.compression.embedded import TRAINING, embedded_task
from benchmarks.training_cases import TensorSamples, parts_by_class, zoo_model


@dataclass(frozen=True, eq=False, kw_only=True)
class JointCase:
    """A model to compress.

    Attributes:
        name: Folder of the shared data, or ``embedded``.
        model: Trained.
        task: What it is for.
        drop: Section ``drop`` of its configuration.
        settings: Other sections.
        data: Which data are in which part, in words.
        wanted: Times smaller that is the goal.
    """

    name: str
    model: nn.Module
    task: JointTask
    drop: dict[str, Any]
    settings: dict[str, Any]
    data: str
    wanted: float


#: A point of accuracy, two percent of perplexity, what enhanced speech stands.
POINT = {"tolerances": {"accuracy": 1.0}}
PERCENT = {"relative": {"perplexity": 0.02}}
SPEECH = {"tolerances": {"si_sdr": 0.6, "stoi": 0.005}}
#: No data to train on: stages 2 to 6 alone.
UNTRAINED = {"train": {"steps": 0}, "rounds": {"steps": 0}, "clusters": {"finetune": 0}}


def load_joint_case(name: str, data: Path) -> JointCase:
    """One of :data:`JOINT_NAMES`.

    Args:
        name: Folder of the shared data, or ``embedded``.
        data: The shared data.
    """
    return _MAKERS[name](name, data)


def _embedded(name: str, _: Path) -> JointCase:
    make, task = embedded_task(0)
    model = train_regularised(make(), task, TRAINING).model
    told = "generated clips, 384 / 32 / 32"
    return JointCase(name=name, model=model, task=task, drop=SPEECH, settings={}, data=told, wanted=8)


def _classes(name: str, model: nn.Module, parts: list[tuple[Tensor, Tensor]], told: str, wanted: float) -> JointCase:
    train, study, test = (TensorSamples(*part) for part in parts)
    task = SampleTask(kind="classes", train=train, study=study, test=test, batch_size=50)
    settings = {"train": {"learning_rate": 3e-4}}
    return JointCase(name=name, model=model, task=task, drop=POINT, settings=settings, data=told, wanted=wanted)


def _split(name: str, data: Path) -> JointCase:
    model, _config, evaluation, context = zoo_model(name, data)
    task = evaluation.Keywords if name == "kwt1" else evaluation.Person
    inputs, labels = task.load(context)
    shares = (20, 15, 15) if name == "kwt1" else (80, 60, 60)
    parts = [(inputs[part], labels[part]) for part in parts_by_class(labels, shares)]
    told = "the shared evaluation set, cut by class into " + " / ".join(str(len(x)) for x, _ in parts)
    return _classes(name, model, parts, told, 6)


def _cifar(name: str, data: Path) -> JointCase:
    model, _config, evaluation, context = zoo_model(name, data)
    inputs, labels = evaluation.Cifar.load(context, "cifar10_jpeg1000")
    judged, classes = evaluation.Cifar.load(context, "cifar10_test200")
    train, study = parts_by_class(labels, (60, 40))
    parts = [(inputs[train], labels[train]), (inputs[study], labels[study]), (judged, classes)]
    return _classes(name, model, parts, "cifar10_jpeg1000 cut by class into 600 / 400; the 200 of cifar10_test200", 6)


def _shakespeare(name: str, data: Path) -> JointCase:
    model, _config, evaluation, context = zoo_model(name, data)
    ids = evaluation.Chars.ids(context)
    last = ids[-64 * 513 :].reshape(64, 513)[:, :129]
    before = ids[: -64 * 513]
    windows = before[: len(before) // 129 * 129].reshape(-1, 129)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    train, study = windows[order[:1200]], windows[order[1200:1328]]
    task = SampleTask(
        kind="tokens", train=TensorSamples(train), study=TensorSamples(study), test=TensorSamples(last), batch_size=16
    )
    told = "windows of 129 characters, 1200 / 128; 64 of the last part of the text, which is in neither"
    settings = {"train": {"learning_rate": 1e-3}}
    return JointCase(name=name, model=model, task=task, drop=PERCENT, settings=settings, data=told, wanted=5)


class _Clips:
    """Pairs of noisy and clean clips of different lengths; a batch holds clips of one length."""

    def __init__(self, noisy: list[Tensor], clean: list[Tensor]) -> None:
        self._samples = [TensorSamples(n[None], c[None]) for n, c in zip(noisy, clean, strict=True)]

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, numbers: Any) -> Any:
        """Some of them."""
        chosen = [self._samples[number] for number in numbers]
        shortest = min(one.inputs.shape[-1] for one in chosen)
        noisy = torch.cat([one.inputs[:, :shortest] for one in chosen])
        clean = torch.cat([torch.as_tensor(one.labels)[:, :shortest] for one in chosen])
        return TensorSamples(noisy, clean).batch(range(len(chosen)))


def _speech(name: str, data: Path) -> JointCase:
    model, _config, evaluation, context = zoo_model(name, data)
    pairs = [(torch.as_tensor(noisy), torch.as_tensor(clean)) for _, clean, noisy in evaluation.speech_pairs(context)]
    split = [pairs[:3], pairs[3:5], pairs[5:]]
    parts = [_Clips([noisy for noisy, _ in part], [clean for _, clean in part]) for part in split]
    task = SampleTask(kind="waveforms", train=parts[0], study=parts[1], test=parts[2], rate=16_000)
    told = f"clips of speech_pairs, {' / '.join(str(len(part)) for part in split)}; too few to train on: stages 2 to 6"
    return JointCase(name=name, model=model, task=task, drop=SPEECH, settings=UNTRAINED, data=told, wanted=5)


_MAKERS: dict[str, Callable[[str, Path], JointCase]] = {
    "embedded": _embedded,
    "dtln": _speech,
    "dtln_norm500h": _speech,
    "kwt1": _split,
    "charlstm_shakespeare": _shakespeare,
    "resnet8_cifar10": _cifar,
    "resnet20_cifar10": _cifar,
    "resnet56_cifar10": _cifar,
    "mobilenet_vww": _split,
}
#: What is measured, in this order.
JOINT_NAMES = tuple(_MAKERS)
