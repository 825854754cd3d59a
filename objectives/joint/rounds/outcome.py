"""What a training of a float model and the rounds came to. Source: claim B-1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from alphasmith.objectives.joint.drop import Verdict
from alphasmith.objectives.joint.low_rank.factorization import FactoredLayer
from alphasmith.objectives.joint.low_rank.norms import FoldedNorms
from alphasmith.objectives.joint.low_rank.spectrum import FlatLayer
from alphasmith.objectives.joint.ports import Measured
from alphasmith.objectives.joint.sparsity.targets import SparsityTargets
from alphasmith.objectives.literals import LayerClass
from alphasmith.objectives.model.plain_operators import Rewriting

#: How updates ended: all were made, the caller asked to stop, or a loss or gradient was not finite.
UpdatesEnding = Literal["finished", "interrupted", "diverged"]
#: Why the rounds ended.
RoundsStatus = Literal[
    "violated",  # a round lost too much, the one before is the result
    "violated_at_first",  # the first round did: the model as it was given is the result
    "violated_before",  # the model lost too much before any round, against the baseline that was given
    "round_cap",  # all rounds were made and met the condition
    "no_rank_fell",  # a round had nothing to take
    "diverged",  # a round's training or metrics were not finite
    "interrupted",  # the caller asked to stop
    "ended",  # the caller wanted no more rounds
]


@dataclass(frozen=True, kw_only=True)
class UpdatePoint:
    """Means over the updates since the last point.

    Attributes:
        step: Updates done.
        steps: All updates.
        task: Task loss, in its unit.
        first: Sparsity term of the encoder layers.
        second: That of the recurrent layers.
        learning_rate: At the last of these updates.
    """

    step: int
    steps: int
    task: float
    first: float
    second: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What some updates came to.

    Attributes:
        steps: Updates that the weights have.
        points: The curve.
        ending: How they ended.
        trouble: What was not finite, at which update, and which state the model went back to; empty where nothing was.
    """

    steps: int
    points: tuple[UpdatePoint, ...]
    ending: UpdatesEnding
    trouble: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Regularised:
    """A model trained with the sparsity terms.

    Attributes:
        model: In evaluation mode; shares nothing with the model given.
        training: Its updates.
        targets: What the terms were put on, what was skipped and what people should know.
    """

    model: nn.Module
    training: Trained
    targets: SparsityTargets


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of decomposition and training.

    Attributes:
        number: From 1.
        energy: Class of layers -> share of the squared singular values asked for.
        rank: Class -> rank asked for in its place.
        layers: Every linear layer and convolution, with its rank.
        fallen: Layers whose rank fell, or that became factored.
        numbers: Parameters of the whole model.
        finetune: The updates; None where no rank fell.
        measured: Metrics on the study split; None where none were taken.
        verdict: What the condition says of them; None likewise.
        trouble: What was not finite; empty where nothing was.
    """

    number: int
    energy: Mapping[LayerClass, float]
    rank: Mapping[LayerClass, int]
    layers: tuple[FactoredLayer, ...]
    fallen: tuple[str, ...]
    numbers: int
    finetune: Trained | None = None
    measured: Measured | None = None
    verdict: Verdict | None = None
    trouble: str = ""

    @property
    def met(self) -> bool:
        """Whether the model was measured and lost no more than is tolerated."""
        return self.verdict is not None and not self.verdict.violated and not self.trouble


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundsOutcome:
    """What the rounds came to.

    Attributes:
        model: Of the last round that met the condition; the very model given where none did.
        kept: Number of that round; 0: the model given.
        rounds: All of them, the one that broke the condition included.
        status: Why they ended.
        reason: The same in words, with the numbers of the round that ended them.
        baseline: Metrics that drops are counted from.
        start: Metrics of the model given.
        rewriting: How the tensors of the rounds' models relate to those of the model given.
        folded: What became of normalizations; None where they stay.
        flat: Layers of ``model`` that stay dense because no saving rank keeps the energy of its round; those of the first round
            where no rank fell in it, of the model given with recurrent layers and attention modules taken apart.
        notes: What people should know, a line each.
    """

    model: nn.Module
    kept: int
    rounds: tuple[Round, ...]
    status: RoundsStatus
    reason: str
    baseline: Measured
    start: Measured
    rewriting: Rewriting
    folded: FoldedNorms | None
    flat: tuple[FlatLayer, ...] = ()
    notes: tuple[str, ...] = ()
