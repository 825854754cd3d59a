"""How a model in float is trained, and how its rank falls from round to round: frozen, validated. Source: claims B-1, B-4, B-5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.sparsity.terms import SparsitySettings
from alphasmith.objectives.literals import ConvForm, LayerClass, SvdMetric
from alphasmith.objectives.training.settings import ScheduleName

#: What becomes of normalizations before a decomposition: their scales go into the weights around them, or they stay and are trained on, and
#: batch normalizations weight the rows of the layer before them.
NormUse = Literal["fold", "weight"]
#: Largest share of the squared singular values that a round may drop.
_MOST_DROPPED = 0.95


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Updates of a float model's weights by AdamW.

    Attributes:
        steps: How many; 0: none.
        learning_rate: The largest, reached after the warm-up.
        batch_size: Samples of one update.
        weight_decay: On weights only: not on biases and normalizations.
        warm_up: Share of the updates during which the learning rate rises from 0, in [0, 1].
        schedule: How it falls afterwards.
        clip: Largest norm of the gradient; 0: as it is.
        seed: Of the order of samples and of dropout.
        check_every: Updates between two copies of the weights, to which a training that diverges goes back, and between two
            points of the curve.
    """

    steps: int = 100
    learning_rate: float = 1e-3
    batch_size: int = 16
    weight_decay: float = 0.0
    warm_up: float = 0.1
    schedule: ScheduleName = "cosine"
    clip: float = 1.0
    seed: int = 0
    check_every: int = 10

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("seed", 0), ("check_every", 1)):
            self._require(name, getattr(self, name) >= least, f"give a whole number, {least} or more")
        for name in ("weight_decay", "clip"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "give 0 or more")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "give a number above 0")
        self._require("warm_up", 0 <= self.warm_up <= 1, "give a number from 0 to 1")
        known = get_args(ScheduleName)
        self._require("schedule", self.schedule in known, f"use {', '.join(known)}")

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise InputError(f"updates.{name}", f"is {getattr(self, name)!r}", remedy)


@dataclass(frozen=True, kw_only=True)
class RegularisedSettings:
    """Training with both sparsity terms.

    Attributes:
        updates: Of the weights.
        sparsity: Kind and strengths of the terms; strengths of 0 leave them out.
    """

    updates: Updates = field(default_factory=lambda: Updates(steps=500))
    sparsity: SparsitySettings = field(default_factory=SparsitySettings)


@dataclass(frozen=True, kw_only=True)
class RoundsSettings:
    """The rounds of decomposition and training.

    Attributes:
        energy: eta of the first round, below 1: share of the squared singular values to keep, one for all layers or one a class.
        rank: Rank of the first round in its place, likewise. Layers of a class that has neither stay dense.
        step: By how much log10(1 - eta) rises from round to round, and log10 of a given rank falls; above 0. At 0.3 a round drops twice
            the energy of the one before, or keeps half of its rank.
        max_rounds: Most rounds.
        metric: What a decomposition keeps most of: ``plain``, ``activation`` or ``whitened``.
        calibration: Training samples that the inputs of layers are taken from for the last two.
        conv_form: How kernels of two axes become matrices.
        exclude: ``fnmatch`` patterns of layers that stay dense.
        norms: Whether normalizations go into the weights before the first decomposition, or stay and weight it.
        sparsity: Terms that go on during the rounds, with ``norms`` at ``weight`` only; None: none.
        finetune: Updates after every decomposition; every round has an order of its own under its seed.
    """

    energy: float | Mapping[LayerClass, float] | None = 0.99
    rank: int | Mapping[LayerClass, int] | None = None
    step: float = 0.3
    max_rounds: int = 4
    metric: SvdMetric = "plain"
    calibration: int = 64
    conv_form: ConvForm = "channel"
    exclude: Sequence[str] = ()
    norms: NormUse = "fold"
    sparsity: SparsitySettings | None = None
    finetune: Updates = field(default_factory=lambda: Updates(steps=100, learning_rate=5e-4))

    def __post_init__(self) -> None:
        for kind, eta in per_class(self.energy).items():
            self._require(f"energy.{kind}", 0 < eta < 1, eta, "give a share above 0 and below 1")
        for kind, rank in per_class(self.rank).items():
            self._require(f"rank.{kind}", rank >= 1, rank, "give a whole number above 0")
        for name, given in (("energy", self.energy), ("rank", self.rank)):
            if unknown := set(per_class(given)) - set(get_args(LayerClass)):
                self._require(name, False, min(unknown), f"use some of {', '.join(get_args(LayerClass))}")
        self._require("energy", bool(per_class(self.energy) or per_class(self.rank)), None, "give it, or rank")
        self._require("step", 0 < self.step < math.inf, self.step, "give a number above 0, such as 0.3")
        self._require("max_rounds", self.max_rounds >= 1, self.max_rounds, "give a whole number above 0")
        self._require("calibration", self.calibration >= 1, self.calibration, "give a whole number above 0")
        for name, known in (("metric", SvdMetric), ("conv_form", ConvForm), ("norms", NormUse)):
            value = getattr(self, name)
            self._require(name, value in get_args(known), value, f"use {', '.join(get_args(known))}")
        if self.sparsity is not None:
            self._require("sparsity", self.norms == "weight", "given", "leave norms unfolded: norms = weight")

    def energies(self, number: int) -> dict[LayerClass, float]:
        """Class -> energy of a round.

        Args:
            number: Of the round, from 1.
        """
        factor = 10 ** (self.step * (number - 1))
        return {kind: 1 - min(_MOST_DROPPED, (1 - eta) * factor) for kind, eta in per_class(self.energy).items()}

    def ranks(self, number: int) -> dict[LayerClass, int]:
        """Class -> rank of a round.

        Args:
            number: Of the round, from 1.
        """
        factor = 10 ** (-self.step * (number - 1))
        return {kind: max(1, math.floor(rank * factor + 1e-9)) for kind, rank in per_class(self.rank).items()}

    @staticmethod
    def _require(name: str, holds: bool, value: object, remedy: str) -> None:
        if not holds:
            raise InputError(f"rounds.{name}", f"is {value!r}", remedy)


Number = TypeVar("Number", int, float)


def per_class(given: Number | Mapping[LayerClass, Number] | None) -> dict[LayerClass, Number]:
    """Class -> number, of one number for all classes or of one a class.

    Args:
        given: Either, or None: nothing.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    kinds: tuple[LayerClass, ...] = get_args(LayerClass)
    return dict.fromkeys(kinds, given)
