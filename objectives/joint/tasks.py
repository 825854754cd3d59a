"""Tasks of samples with labels, as joint compression asks for them: classes, next tokens, waveforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.losses import task_loss
from alphasmith.objectives.joint.metrics.scores import score
from alphasmith.objectives.joint.ports import JointMetric, Measured, Split
from alphasmith.objectives.literals import SignalMetric
from alphasmith.objectives.media.batch import Batch, call, device_of, main_output
from alphasmith.objectives.training.losses import Objective, SampleLosses, answers
from alphasmith.objectives.training.ports import Samples
from alphasmith.objectives.training.settings import TrainingSettings

#: What a model answers with: scores of classes, scores of the next token at every position, or a waveform.
TaskKind = Literal["classes", "tokens", "waveforms"]

_SIGNALS: dict[SignalMetric, JointMetric] = {
    "si_sdr": JointMetric(name="si_sdr", goal="max", unit="dB"),
    "stoi": JointMetric(name="stoi", goal="max"),
    "pesq": JointMetric(name="pesq", goal="max"),
    "snr": JointMetric(name="snr", goal="max", unit="dB"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleTask:
    """A task of labelled samples. See :class:`~alphasmith.objectives.joint.ports.JointTask`.

    ``classes``: cross-entropy; ``accuracy`` [%], of which a point is one percent of the samples. ``tokens``: cross-entropy of the next
    token; ``perplexity``. ``waveforms``: negative SI-SDR; the signal metrics named, of outputs against labels.

    Attributes:
        kind: What the model answers with.
        train: Samples to train on, and to calibrate with.
        study: Samples that decide.
        test: Samples that are looked at once.
        signals: Metrics of waveforms.
        rate: Sampling rate of waveforms [Hz].
        batch_size: Samples of a call while a model is measured; waveforms are measured one by one.

    Raises:
        InputError: A split is empty, the kind is unknown, or waveforms have no metric.
    """

    kind: TaskKind
    train: Samples
    study: Samples
    test: Samples
    signals: tuple[SignalMetric, ...] = ("si_sdr", "stoi")
    rate: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.kind not in get_args(TaskKind):
            raise InputError("kind", f"{self.kind!r} is unknown", f"use one of {', '.join(get_args(TaskKind))}")
        for name in ("train", "study", "test"):
            if not len(getattr(self, name)):
                raise InputError(name, "holds no sample", "give at least one")
        if self.kind == "waveforms" and not self.signals:
            raise InputError("signals", "names no metric", f"use some of {', '.join(_SIGNALS)}")
        if self.batch_size < 1:
            raise InputError("batch_size", f"is {self.batch_size}", "give at least 1")

    @property
    def metrics(self) -> tuple[JointMetric, ...]:
        """What is measured."""
        match self.kind:
            case "classes":
                return (JointMetric(name="accuracy", goal="max", unit="%"),)
            case "tokens":
                return (JointMetric(name="perplexity", goal="min"),)
            case "waveforms":
                return tuple(_SIGNALS[name] for name in self.signals)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """() mean loss of a batch.

        Args:
            model: In the mode that it is to run in.
            batch: On its device.

        Raises:
            InputError: Labels are missing or none of the model's.
        """
        output = main_output(call(model, batch))
        if self.kind == "waveforms":
            return self._compare(output, _labels(batch))
        return self._label_losses(output, batch).mean

    def measure(self, model: nn.Module, split: Split) -> Measured:
        """A model's metrics; its mode stays.

        Args:
            model: Any form of it.
            split: Which data.

        Raises:
            NonFiniteError: It answers with NaN or infinity.
        """
        samples: Samples = getattr(self, split)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                return self._measured(model, samples)
        finally:
            for module, training in modes.items():
                module.training = training

    @cached_property
    def _compare(self) -> Callable[[Tensor, Tensor], Tensor]:
        return task_loss("si_sdr")

    @cached_property
    def _objective(self) -> Objective:
        task: Literal["classes", "tokens"] = "classes" if self.kind == "classes" else "tokens"
        settings = replace(TrainingSettings(), loss="cross_entropy", distill=0.0)
        return Objective(settings=settings, task=task, probabilities=False)

    def _label_losses(self, output: Tensor, batch: Batch) -> SampleLosses:
        return self._objective.label_losses(answers(output, batch, self._objective.task))

    def _measured(self, model: nn.Module, samples: Samples) -> Measured:
        if self.kind == "waveforms":
            pairs = [(output[0], _labels(batch)[0]) for output, batch in _answered(model, samples, 1)]
            found = [score(name, *map(list, zip(*pairs, strict=True)), rate=self.rate) for name in self.signals]
            notes = tuple(str(one) for one in found if one.left_out or one.note)
            return Measured(values={one.metric: one.value for one in found}, notes=notes)
        right, count, parts = 0, 0, []
        for output, batch in _answered(model, samples, self.batch_size):
            if self.kind == "classes":
                labels = _labels(batch)
                right, count = right + int((output.argmax(-1) == labels).sum()), count + len(labels)
            else:
                parts.append(self._label_losses(output, batch))
        if self.kind == "classes":
            return Measured(values={"accuracy": 100 * right / count})
        loss = float(SampleLosses.joined(parts).mean)
        return Measured(values={"perplexity": math.exp(min(loss, 700.0))})


def _answered(model: nn.Module, samples: Samples, size: int) -> Iterator[tuple[Tensor, Batch]]:
    """A model's answers to all samples, on the CPU, with their batches."""
    device = device_of(model)
    for start in range(0, len(samples), size):
        batch = samples.batch(range(start, min(start + size, len(samples))))
        output = main_output(call(model, batch.to(device))).cpu()
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteError("the model answers with NaN or infinity")
        yield output, batch


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise InputError("data", "has no labels", "give batches with labels")
    return batch.labels
