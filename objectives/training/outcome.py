"""What a training came to: its curve, what was kept and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Why a training ended: all updates done, no better value for a while, a number that is not finite, or asked to stop.
Ending = Literal["finished", "patience", "diverged", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class TrainingPoint:
    """One look at the held-out samples.

    Attributes:
        step: Updates done.
        train_loss: Mean loss of the updates since the last look; None at the first, before any.
        held_out_loss: Mean loss on the held-out samples.
        metric: Mean metric on them; None where there is none.
        learning_rate: Of the last update.
    """

    step: int
    train_loss: float | None
    held_out_loss: float
    metric: float | None
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """What a training came to.

    Attributes:
        points: The curve, in the order of steps; the first is the untrained model.
        kept: Whether the trained model is better than the untrained one beyond the noise of the held-out samples.
        reason: Why it is kept or not, and why it ended where it did; one sentence.
        ending: Why it ended.
        steps: Updates done.
        best_step: The look at which the held-out samples were answered best; 0: the untrained model.
        gain: Mean improvement of the watched value on held-out samples, trained against untrained, above 0 where better.
        standard_error: Of ``gain``, from the differences of single samples.
        metric_name: Name of the metric; None where there is none.
        train_samples: Samples trained on.
        held_out_samples: Samples held out.
        seconds: Time of the training over all its attempts [s].
    """

    points: tuple[TrainingPoint, ...]
    kept: bool
    reason: str
    ending: Ending
    steps: int
    best_step: int
    gain: float
    standard_error: float
    metric_name: str | None
    train_samples: int
    held_out_samples: int
    seconds: float

    @property
    def untrained(self) -> TrainingPoint:
        """The curve's first point."""
        return self.points[0]

    @property
    def best(self) -> TrainingPoint:
        """The curve's point at ``best_step``."""
        return next(point for point in self.points if point.step == self.best_step)
