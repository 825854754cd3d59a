"""The section of a manifest that says how a compressed model was trained further. Units and shapes stand at the fields."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import JsonValue, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from alphasmith.storage.output.entries import Moment, Sha256
from alphasmith.storage.runs.entries import Part, Volatile


class CurvePointEntry(Part):
    """One look at the held-out samples while a model was trained."""

    step: NonNegativeInt
    """Updates done."""
    train_loss: float | None
    """Mean loss of the updates since the last look; null at the first, before any."""
    held_out_loss: float
    """Mean loss on the held-out samples."""
    metric: float | None
    """Mean metric on them; null where there is none."""
    learning_rate: NonNegativeFloat
    """Of the last update."""


class SettingsStudyEntry(Part):
    """A study over settings of a training, each judged on one half of the held-out samples; the other half decides what is kept."""

    study: Annotated[str, Volatile]
    """Optuna study."""
    trials: PositiveInt
    """Settings tried."""
    best_trial: NonNegativeInt
    """Number of the trial whose settings were taken."""
    loss: float
    """Its loss against the labels."""
    chosen: dict[str, JsonValue]
    """The settings that it found."""


class TrainingEntry(Part):
    """How a compressed model was trained further, and whether that was kept."""

    id: Annotated[str, Volatile]
    """Training id in the storage."""
    parent: Annotated[str, Volatile]
    """Run whose compressed model it started from."""
    parent_digest: Annotated[Sha256, Volatile]
    """Of that result's manifest."""
    created: Annotated[Moment, Volatile]
    """When it was begun, UTC."""
    finished: Annotated[Moment, Volatile]
    """When its result was complete, UTC."""
    equivalence: Literal["does not apply"] = "does not apply"
    """The proof of the run was about its float model; what training changes is meant to be another function."""
    kept: bool
    """Whether ``quantized/`` holds the trained model; else it holds the one that the training started from."""
    reason: str
    """Why it is kept or not, and why the training ended where it did."""
    ending: Literal["finished", "patience", "diverged"]
    """Why it ended."""
    settings: dict[str, JsonValue]
    """Settings as used."""
    study: SettingsStudyEntry | None = None
    """Where they come from; null: as they were given."""
    data: dict[str, JsonValue]
    """What was read, as asked for."""
    data_digest: Sha256
    """Over the samples that were used, with their labels."""
    samples: PositiveInt
    """Samples in the data."""
    classes: tuple[str, ...] = ()
    """Names of the model's classes, by number; empty where nobody says, and for language models."""
    trained: tuple[NonNegativeInt, ...]
    """Numbers of the samples that were trained on, in the order of the data from 0."""
    held_out: tuple[NonNegativeInt, ...]
    """Numbers of those that were held out, and decided when to stop and what is kept."""
    steps: NonNegativeInt
    """Updates done."""
    best_step: NonNegativeInt
    """Updates after which the held-out samples were answered best; 0: before any."""
    gain: float
    """Mean improvement on held-out samples, trained against untrained; above 0: better."""
    standard_error: NonNegativeFloat
    """Of the gain, paired over samples."""
    metric_name: str | None = None
    """The metric of the curve; null where there is none."""
    curve: tuple[CurvePointEntry, ...]
    """Losses by updates; the first point is the untrained model."""
    outputs_digest: Sha256
    """Over the integer model's outputs for the held-out samples."""
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time of the training over all its attempts [s]."""

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        if set(self.trained) & set(self.held_out):
            raise ValueError("a sample is trained on and held out")
        if self.kept and self.gain <= self.standard_error:
            raise ValueError(f"kept for a gain of {self.gain}, within its standard error {self.standard_error}")
        return self
