"""How a compressed model is trained: frozen, validated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from alphasmith.objectives.errors import InputError

#: What a sample costs: of class scores against labels.
LossName = Literal["cross_entropy", "mse", "hinge"]
#: How the learning rate goes after the warm-up; the names of transformers.
ScheduleName = Literal["cosine", "linear", "constant"]
#: What early stopping and the choice of the best weights look at, on held-out samples.
Watched = Literal["loss", "metric"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of one training, in terms of torch and transformers. Source: claim A-13.

    Attributes:
        learning_rate: Largest learning rate of AdamW, reached after the warm-up.
        weight_decay: Of AdamW, on weights only: not on biases, norms, step sizes and ranges.
        steps: Updates of the weights; None: as many as ``epochs`` ask for.
        epochs: Passes over the training samples, where ``steps`` is None.
        batch_size: Samples of one forward pass.
        accumulation: Forward passes of one update.
        warm_up: Share of the updates during which the learning rate rises from 0, in [0, 1].
        schedule: How it falls afterwards.
        clip: Largest norm of the gradient; 0: as it is.
        loss: What a sample costs.
        distill: Share of the distance from the float model's output in the loss, in [0, 1].
        temperature: By which scores are divided before two models' probabilities are compared; dimensionless.
        learn_steps: Learn the step sizes of weights (LSQ); else they stay.
        learn_ranges: Learn static ranges of activations; else they stay.
        step_rate: Learning rate of the logarithms of step sizes and ranges, as a multiple of ``learning_rate``.
        freeze_norm_statistics: Keep mean and variance of batch norms as they are.
        evaluate_every: Updates between two looks at the held-out samples.
        checkpoint_every: Updates between two checkpoints.
        patience: Looks without a better value after which training stops; 0: never.
        watched: What decides on held-out samples.
        seed: Of the order of samples and of dropout.
        mixed_precision: Multiply in bfloat16 where the device has it; a CPU computes in float32 in any case.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 16
    accumulation: int = 1
    warm_up: float = 0.1
    schedule: ScheduleName = "cosine"
    clip: float = 1.0
    loss: LossName = "cross_entropy"
    distill: float = 0.0
    temperature: float = 2.0
    learn_steps: bool = True
    learn_ranges: bool = True
    step_rate: float = 1.0
    freeze_norm_statistics: bool = True
    evaluate_every: int = 50
    checkpoint_every: int = 50
    patience: int = 5
    watched: Watched = "loss"
    seed: int = 0
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "temperature", "step_rate"):
            self._require(name, _finite(getattr(self, name)) and getattr(self, name) > 0, "give a number above 0")
        for name in ("weight_decay", "clip"):
            self._require(name, _finite(getattr(self, name)) and getattr(self, name) >= 0, "give 0 or more")
        for name in ("distill", "warm_up"):
            self._require(name, 0 <= getattr(self, name) <= 1, "give a number from 0 to 1")
        for name in ("batch_size", "accumulation", "evaluate_every", "checkpoint_every"):
            self._require(name, getattr(self, name) >= 1, "give a whole number above 0")
        self._require("steps", self.steps is None or self.steps >= 1, "give a whole number above 0, or epochs instead")
        for name in ("patience", "seed"):
            self._require(name, getattr(self, name) >= 0, "give 0 or more")
        for name, known in (("loss", LossName), ("schedule", ScheduleName), ("watched", Watched)):
            self._require(name, getattr(self, name) in get_args(known), f"use {', '.join(get_args(known))}")

    def updates(self, samples: int) -> int:
        """Updates of the weights that the settings ask for.

        Args:
            samples: Training samples.
        """
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * samples / (self.batch_size * self.accumulation)))

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise InputError(f"training.{name}", f"is {getattr(self, name)!r}", remedy)


def _finite(value: float) -> bool:
    return math.isfinite(value)
