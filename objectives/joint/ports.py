"""What the stages of joint compression are given by others: a task with its loss, its data and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.training.ports import Samples

#: Data that judge: ``study`` decides what is kept, ``test`` is looked at once, when everything is decided.
Split = Literal["study", "test"]


@dataclass(frozen=True, kw_only=True)
class JointMetric:
    """A metric that a compressed model may lose some of.

    Attributes:
        name: What it is called in settings and tables, e.g. ``si_sdr``.
        goal: Whether larger or smaller is better.
        unit: Unit shown behind a value; empty: none.
    """

    name: str
    goal: Literal["max", "min"]
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model's metrics on one split.

    Attributes:
        values: Metric -> value; None where it could not be measured, which is shown as "not measured" and never passes silently.
        notes: What was left out, with counts, and why something was not measured.
    """

    values: Mapping[str, float | None]
    notes: tuple[str, ...] = ()


class JointTask(Protocol):
    """What a model is for."""

    @property
    def metrics(self) -> Sequence[JointMetric]:
        """What is measured, the one that matters most first; at least one."""
        ...

    @property
    def train(self) -> Samples:
        """Samples to train on; those of calibration, too."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar loss of a batch of ``train``, differentiable in the model's parameters.

        Args:
            model: In the mode that it is to run in.
            batch: On the model's device.
        """
        ...

    def measure(self, model: nn.Module, split: Split) -> Measured:
        """A model's metrics. Deterministic; the model's mode and parameters stay as they are.

        Args:
            model: Any form of the model that answers as the original does.
            split: Which data.
        """
        ...
