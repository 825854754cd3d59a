"""What a training lowers: losses of claim A-13 of single samples, the distance from the float model, and their mix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.training.ports import SampleMetric
from alphasmith.objectives.training.settings import TrainingSettings

#: What an output is: scores of the classes of a sample, of the next token at every position, or values that are no scores.
Task = Literal["classes", "tokens", "values"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleLosses:
    """Losses of single samples as sums and what they are divided by; of a set it is one sum divided by the other.

    Attributes:
        totals: (B,) summed loss of every sample.
        weights: (B,) positions of it; of values the energy of what they should be, by which errors become relative.
    """

    totals: Tensor
    weights: Tensor

    @property
    def mean(self) -> Tensor:
        """() the loss of all samples together."""
        return self.totals.sum() / self.weights.sum()

    @classmethod
    def joined(cls, parts: Sequence[SampleLosses]) -> SampleLosses:
        """Several sets as one.

        Args:
            parts: At least one.
        """
        return cls(totals=torch.cat([p.totals for p in parts]), weights=torch.cat([p.weights for p in parts]))

    def mixed(self, other: SampleLosses, share: float) -> SampleLosses:
        """Losses whose mean is the mix of both means.

        Args:
            other: Of the same samples.
            share: Of the other, in [0, 1].
        """
        unit = self.weights.sum() / other.weights.sum()
        return SampleLosses(
            totals=(1 - share) * self.totals + share * unit * other.totals, weights=self.weights
        )  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Answers:
    """Rows of scores in an output, and what they should say.

    Attributes:
        scores: (N, K) rows; of values one row a sample.
        owners: (N,) int64, the sample of every row.
        classes: (N,) int64; None where nothing is known or for values.
        values: (N, K) what values should be; None where nothing is known or for scores.
        samples: B.
    """

    scores: Tensor
    owners: Tensor
    classes: Tensor | None
    values: Tensor | None
    samples: int


def task_of(output: Tensor, batch: Batch) -> Task:
    """What the labels of a batch, or without labels its inputs, make of a model's output.

    Args:
        output: The model's main output for the batch.
        batch: With or without labels.

    Raises:
        InputError: The labels fit no output of this shape.
    """
    labels = batch.labels
    if labels is None:
        ids = token_ids(batch)
        return "tokens" if ids is not None and output.shape[:2] == ids.shape and output.dim() == 3 else "values"
    if labels.is_floating_point():
        if labels.shape != output.shape:
            problem = f"have shape {tuple(labels.shape)}, the model's output has {tuple(output.shape)}"
            raise InputError("labels", problem, "give one class for each sample, or values of the output's shape")
        return "values"
    if labels.dim() == 1 and output.dim() == 2:
        return "classes"
    if output.dim() == labels.dim() + 1 and output.shape[:-1] == labels.shape:
        return "tokens"
    problem = f"have shape {tuple(labels.shape)}, the model's output has {tuple(output.shape)}"
    raise InputError("labels", problem, "give one class for each sample, or values of the output's shape")


def token_ids(batch: Batch) -> Tensor | None:
    """(B, L) ids that a language model reads; None where the batch holds none."""
    ids = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    whole = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    return ids if whole and isinstance(ids, Tensor) else None


def answers(output: Tensor, batch: Batch, task: Task) -> Answers:
    """The rows of an output that count, in an order that depends on the samples only, not on their padding.

    Args:
        output: The model's main output.
        batch: What it was called with.
        task: See :func:`task_of`.

    Raises:
        InputError: A label is none of the classes, or no position has a next token.
    """
    samples, labels = output.shape[0], batch.labels
    if task == "values":
        rows, whole = torch.arange(samples, device=output.device), output.flatten(1)
        values = None if labels is None else labels.flatten(1).to(output.dtype)
        return Answers(scores=whole, owners=rows, classes=None, values=values, samples=samples)
    if task == "classes":
        rows = torch.arange(samples, device=output.device)
        return Answers(scores=output, owners=rows, classes=_known(labels, output), values=None, samples=samples)
    if labels is not None:  # what a decoder writes, or a tag for every token; negative where there is none
        keep, scores, follows = labels >= 0, output, labels
    else:
        ids = token_ids(batch)
        if ids is None:
            raise InputError("data", "holds no token ids", "give input_ids, or labels")
        real = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask.bool()
        keep, scores, follows = real[:, 1:] & real[:, :-1], output[:, :-1], ids[:, 1:]
    if not bool(keep.any()):
        raise InputError("data", "no position has a next token", "give texts of at least two tokens")
    owners = torch.arange(samples, device=output.device)[:, None].expand(keep.shape)[keep]
    return Answers(
        scores=scores[keep], owners=owners, classes=_known(follows[keep], output), values=None, samples=samples
    )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a training lowers. Source: claim A-13, formulas fA14 and fA15.

    Attributes:
        settings: Loss, share of the distillation, temperature.
        task: What the model's output is.
        probabilities: The model ends in probabilities, not in scores before a softmax.
    """

    settings: TrainingSettings
    task: Task
    probabilities: bool = False

    def __post_init__(self) -> None:
        loss, distill = self.settings.loss, self.settings.distill
        if distill == 1:
            return
        if self.task == "tokens" and loss == "hinge":
            remedy = "use cross_entropy or mse"
            raise InputError(
                "training.loss", "hinge compares the classes of a sample, a language model has none", remedy
            )
        if self.task == "values" and loss != "mse":
            problem = f"{loss} needs classes, the labels hold none"
            raise InputError("training.loss", problem, "use mse, or distill = 1 without labels")

    def losses(self, found: Answers, teacher: Tensor | None) -> SampleLosses:
        """The loss of every sample.

        Args:
            found: Of the model that is trained.
            teacher: (N, K) the float model's rows where ``distill`` is above 0.

        Raises:
            InputError: Labels or the float model's outputs are missing.
        """
        share = self.settings.distill
        if share == 0:
            return self.label_losses(found)
        if teacher is None or teacher.shape != found.scores.shape:
            problem = "the float model's outputs are missing or of another shape"
            raise InputError("training.distill", problem, "give the float model that the run started from")
        distances = self.distances(found, teacher)
        return distances if share == 1 else self.label_losses(found).mixed(distances, share)

    def label_losses(self, found: Answers) -> SampleLosses:
        """The loss against labels: formula fA14.

        Args:
            found: Of the model that is trained.

        Raises:
            InputError: There are no labels.
        """
        if self.task == "values":
            if found.values is None:
                raise InputError("labels", "there are none", "give labels, or distill = 1")
            return _relative(found.scores, found.values)
        scores, classes, loss = found.scores, found.classes, self.settings.loss
        if classes is None:
            raise InputError("labels", "there are none", "give labels, or distill = 1")
        if loss == "cross_entropy":
            rows = functional.nll_loss(self._log_probabilities(scores), classes, reduction="none")
        elif loss == "hinge":
            rows = functional.multi_margin_loss(scores, classes, reduction="none")
        else:
            hot = functional.one_hot(classes, scores.shape[1]).to(scores.dtype)
            rows = functional.mse_loss(self._log_probabilities(scores).exp(), hot, reduction="none").mean(1)
        return _summed(rows, found)

    def distances(self, found: Answers, teacher: Tensor) -> SampleLosses:
        """The distance from the float model's output: formula fA15.

        Args:
            found: Of the model that is trained.
            teacher: (N, K) the float model's rows.
        """
        if self.task == "values":
            return _relative(found.scores, teacher.to(found.scores.dtype))
        heat = self.settings.temperature
        ours, theirs = (self._log_probabilities(rows, heat) for rows in (found.scores, teacher.to(found.scores.dtype)))
        rows = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * heat**2
        return _summed(rows, found)

    def guess(self, classes: int) -> float:
        """The loss of a model that knows nothing, about.

        Args:
            classes: K.
        """
        return 1.0 if self.task == "values" or self.settings.loss != "cross_entropy" else math.log(max(classes, 2))

    def _log_probabilities(self, rows: Tensor, heat: float = 1.0) -> Tensor:
        single = rows if rows.dtype == torch.float64 else rows.float()
        # Logarithms of probabilities are scores like any others.
        scores = single.clamp_min(torch.finfo(single.dtype).tiny).log() if self.probabilities else single
        return functional.log_softmax(scores / heat, dim=1)


def default_metric(task: Task) -> SampleMetric | None:
    """The metric that a task has by itself: accuracy of classes, else none; of tokens the loss says all.

    Args:
        task: What the model's output is.
    """
    return SampleMetric(name="accuracy", goal="max", values=_right) if task == "classes" else None


def _right(output: Tensor, batch: Batch) -> Tensor:
    # argmax takes the lowest index of equal ones (claim A-14)
    return torch.eq(output.argmax(-1), torch.as_tensor(batch.labels)).double()


def _known(labels: Tensor | None, output: Tensor) -> Tensor | None:
    if labels is None:
        return None
    classes = output.shape[-1]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        found = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        problem = f"class {found} is none of the model's {classes}"
        raise InputError("labels", problem, f"number the classes from 0 to {classes - 1}")
    return labels


def _summed(rows: Tensor, found: Answers) -> SampleLosses:
    zeros = rows.new_zeros(found.samples)
    return SampleLosses(
        totals=zeros.index_add(0, found.owners, rows),
        weights=zeros.index_add(0, found.owners, torch.ones_like(rows)),
    )


def _relative(ours: Tensor, target: Tensor) -> SampleLosses:
    squares = functional.mse_loss(ours, target, reduction="none").sum(1)
    return SampleLosses(totals=squares, weights=target.detach().square().sum(1))
