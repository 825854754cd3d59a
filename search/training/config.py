"""What a training is asked for: labelled data, settings, a study of these, where the result goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.training.settings import TrainingSettings
from alphasmith.search.sections import MANY, Configuration, Label, Section, UserPath

_SETTINGS = TypeAdapter(TrainingSettings)
_KNOWN = tuple(item.name for item in fields(TrainingSettings))


def _settings(value: object) -> object:
    """Settings, or their names with values, as settings."""
    if isinstance(value, TrainingSettings):
        return value
    if not isinstance(value, Mapping):
        raise InputError("", f"is a {type(value).__name__}", "give TrainingSettings or a mapping of its fields")
    unknown = [str(name) for name in value if name not in _KNOWN]
    if unknown:
        raise InputError(unknown[0], "unknown field", f"known fields here are {', '.join(_KNOWN)}")
    try:
        return _SETTINGS.validate_python(dict(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise InputError(cause.field.removeprefix("training."), cause.problem, cause.remedy) from error
        name = next((str(part) for part in first["loc"] if part in _KNOWN), "settings")
        told = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {str(first.get('input'))[:60]!r}"
        raise InputError(name, told, "correct the value") from error


class LabelledDataConfig(Section):
    """Labelled media, and how much of them is used.

    Attributes:
        path: File or folder.
        kind: Kind of media; ``auto`` looks at the files.
        column: Field or column that holds the text.
        files: Column of a table that names media files, relative to it; then ``path`` is that table.
        label: Field or column that holds the class; ``auto``: by the usual names, else a folder for each class.
        labels: File that names the model's classes in the order of its outputs, where the model does not.
        partial_classes: Allow that classes of the model are missing in the data.
        fraction: Share of the data that is trained on, drawn class by class.
        held_out: Share that is held out, drawn likewise from the rest.
        max_length: Longest text [tokens].
        sampling_rate: Audio sampling rate [Hz]; None: the model's own.
        frames: Video frames per sample; None: the model's own.
        image_size: Height and width [pixels]; None: the model's own.
    """

    path: UserPath | None = None
    kind: Literal["auto", MediaKind] = "auto"
    column: Label = Field(default="text", min_length=1, max_length=512)
    files: Annotated[Label, Field(min_length=1, max_length=512)] | None = None
    label: Label = Field(default="auto", min_length=1, max_length=512)
    labels: UserPath | None = None
    partial_classes: bool = False
    fraction: float = Field(default=0.05, gt=0, lt=1)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    max_length: int = Field(default=256, gt=0, le=2**24)
    sampling_rate: int | None = Field(default=None, ge=1000, le=768_000)
    frames: int | None = Field(default=None, gt=0, le=3000)
    image_size: int | None = Field(default=None, gt=0, le=2**13)

    @model_validator(mode="after")
    def _disjoint(self) -> LabelledDataConfig:
        if self.fraction + self.held_out > 1:
            problem = f"{self.fraction} is trained on and {self.held_out} held out, more than there is"
            raise InputError("held_out", problem, "lower one of them")
        return self


class FinetuneConfig(Configuration):
    """One training of a compressed model.

    Attributes:
        storage: SQLAlchemy URL of the database; None: ``alphasmith.db`` (SQLite) in the working directory.
        out: Output folder; None: beside that of the run, named by the training's id.
        device: Torch device; None: the first GPU, else the CPU.
        data: Labelled data.
        training: Settings of the training.
        study: Trials of a study over learning rate, loss, distillation and steps; 0: the settings as they are.
    """

    storage: Annotated[Label, Field(max_length=4096)] | None = None
    out: UserPath | None = None
    device: Annotated[Label, Field(max_length=64)] | None = None
    data: LabelledDataConfig = LabelledDataConfig()
    training: Annotated[TrainingSettings, BeforeValidator(_settings)] = TrainingSettings()
    study: int = Field(default=0, ge=0, le=MANY)

    def deciding(self) -> dict[str, Any]:
        """The part that decides the result, as JSON values: neither where it goes nor where the data lie, which have a digest."""
        values = self.model_dump(mode="json", exclude={"storage", "out", "device"})
        values["data"] = {name: value for name, value in values["data"].items() if name not in ("path", "labels")}
        return values


def as_recorded(config: FinetuneConfig) -> dict[str, Any]:
    """A configuration as JSON values, paths absolute, so that it can be resumed from anywhere; without the database's address.

    Args:
        config: The configuration.
    """
    values = config.model_dump(mode="json", exclude={"storage", "out"})
    for name in ("path", "labels"):
        given = values["data"][name]
        values["data"][name] = None if given is None else str(Path(given).absolute())
    return values
