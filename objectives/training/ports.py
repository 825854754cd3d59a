"""What a training is given by others: samples, a metric of single samples, a place for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from alphasmith.objectives.media.batch import Batch


class Samples(Protocol):
    """Labelled samples that are read by number, in any order and as often as asked for."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some samples as one batch, in the order given, with ``labels`` unless the task needs none.

        Deterministic. Labels are (B,) int64 classes; float tensors of the output's shape for what is no class; None for a
        language model, where the class of each position is its next token.

        Args:
            numbers: 0 to the number of samples, exclusive; not empty.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SampleMetric:
    """A task metric of single samples, so that two models can be compared sample by sample.

    Attributes:
        name: What it is called in tables.
        goal: Whether larger or smaller is better.
        values: (main output of the model, batch) -> (B,) values, one a sample.
    """

    name: str
    goal: Literal["max", "min"]
    values: Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A training as it was after some update.

    Attributes:
        tensors: By name; dense, on the CPU, and nobody else's.
        state: JSON types only.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


class Checkpoints(Protocol):
    """Keeps the last checkpoint of one training."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Take the place of the last one, whole or not at all: a crash at any moment leaves this one or the one before.

        Args:
            checkpoint: Not changed afterwards.
        """
        ...

    def load(self) -> Checkpoint | None:
        """The last one; None where there is none."""
        ...


class Forgetful:
    """Checkpoints of a training that need not outlive its process: the last one stays in memory."""

    def __init__(self) -> None:
        self._last: Checkpoint | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep it in memory.

        Args:
            checkpoint: See :class:`Checkpoints`.
        """
        self._last = checkpoint

    def load(self) -> Checkpoint | None:
        """The last one of this object."""
        return self._last
