"""What is known of a site, once: the winner carries these parts, the database and the manifest keep them, figures show them.

A new field of a site is a field of :class:`SiteRecord`: tables, data frames, the manifest and ``alphasmith show`` are made from
its fields. Units stand at the fields.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from alphasmith.objectives.literals import CandidateKind, RangeStatistic, SiteMode


def prose(text: str) -> str:
    """Text as every database can hold it: NUL and lone surrogates are written out instead of stored."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _storable(text: str) -> str:
    if prose(text) != text:
        raise ValueError(f"{text!r} holds characters no database keeps")
    return text


class VolatileMark:
    """Marks a field that differs between two runs of equal inputs."""


#: The one mark: ``Annotated[float, Volatile]``.
Volatile = VolatileMark()

#: Free text, and names that must stay as they are.
Prose = Annotated[str, AfterValidator(prose)]
Name = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_storable)]


class Part(BaseModel):
    """Frozen, nothing unknown, nothing non-finite, names of the JSON when written."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Losses(Part):
    """Relative squared quantization errors on one set of rows (dimensionless), formula fA5; null where a baseline failed."""

    identity: NonNegativeFloat | None
    """Without smoothing."""
    alpha_half: NonNegativeFloat | None = Field(alias="alpha_0.5")
    """With alpha 0.5 everywhere."""
    best_single: NonNegativeFloat | None
    """With the best single alpha."""
    best_single_alpha: float
    """That alpha."""
    ours: NonNegativeFloat
    """Of the winner."""
    limit: NonNegativeFloat | None = None
    """Of scales chosen freely per channel; null when it was not computed."""


class LossPair(Part):
    """Losses on the rows that were searched on and on rows that were not."""

    search: Losses
    held_out: Losses


class Group(Part):
    """A group of channels that share one alpha."""

    index: NonNegativeInt
    """Label of the group within its site, or within the model."""
    size: NonNegativeInt
    """Number of channels."""
    magnitude: NonNegativeFloat
    """Magnitude the group was formed by."""
    low: float
    """Lower end of the alpha range."""
    high: float
    """Upper end of the alpha range."""
    alpha: float | None
    """The chosen alpha; outside the range when a baseline won, null when identity won (no alpha gives s = 1)."""
    explanation: Prose = ""
    """Why the range is what it is."""
    beta: float | None = None
    """The chosen exponent of w; null: 1 - alpha (formula fA1)."""
    offset: float | None = None
    """Natural logarithm of the group's own factor of its scales; null: none."""

    @model_validator(mode="after")
    def _range_in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class NoiseFacts(Part):
    """How the rounding-noise model did at a site, against the exact losses of its trials."""

    median_log_ratio: float
    """Median of log(predicted / exact), natural logarithm; 0 is exact on the median."""
    kendall_tau: float | None = None
    """Rank correlation of predicted and exact losses; null for fewer than 4 candidates."""
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent in it [s]."""
    proposals: NonNegativeInt = 0
    """Trials it proposed."""
    evaluations_saved: Annotated[int, Volatile] = 0
    """Exact evaluations of the grid of single alphas and of all trials, less those that the last process made."""
    seconds_saved: Annotated[float, Volatile] = 0.0
    """Those at the median time of a trial, less ``seconds`` [s]; negative where it cost more than it spared."""

    @property
    def trusted(self) -> bool:
        """Whether its limit may end a study: its order of the candidates agrees with the exact one, as far as known."""
        return self.kendall_tau is None or self.kendall_tau >= 0.6


class SearchFacts(Part):
    """How the search of a site went."""

    stopped: Prose = ""
    """Why it ended."""
    noise_model: NoiseFacts | None = None
    """Null where it was switched off or not finite."""
    noise_reason: Prose = ""
    """Why it failed; empty otherwise."""
    k_tried: tuple[PositiveInt, ...] = ()
    """Numbers of groups that were compared, where K was ``auto``."""
    range_losses: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Range statistic -> held-out loss of the winner under it, where several were compared."""


class SiteRecord(Part):
    """One site of a run."""

    name: Name
    """Unique in the run."""
    position: NonNegativeInt
    """Its place in forward order, from 0."""
    mode: SiteMode
    reason: Prose = ""
    """Why it is not folded."""
    channels: NonNegativeInt
    operators: tuple[Annotated[str, AfterValidator(_storable)], ...] = ()
    """Operators that read the tensor."""
    kind: str = Field(default="", max_length=32)
    """Kinds of these operators: ``linear``, ``conv`` or ``conv, linear``; empty where an earlier version recorded the site."""
    losses: LossPair | None = None
    """Null for sites left alone and where only the model's output was scored."""
    winner: CandidateKind | None = None
    """Kind of the trial that won after the guard."""
    trials: NonNegativeInt = 0
    exact_evaluations: Annotated[NonNegativeInt, Volatile] = 0
    """Candidates scored exactly by the process that ended the search; one counts once, on however many rows. What a resumed
    search took from the record is not in it."""
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent [s]."""
    study: Annotated[Name | None, Volatile] = None
    """Optuna study, when the site has one."""
    groups: tuple[Group, ...] = ()
    """Empty in scope ``model``: see the groups of the whole model."""
    shift: bool = False
    """Whether a shift is subtracted from every channel before it is scaled."""
    range_statistic: RangeStatistic = "absmax"
    """How the static range of the activation was set."""
    range_factor: PositiveFloat = 1.0
    """That range over the calibrated abs-max (dimensionless)."""
    grouping: str = Field(default="", max_length=32)
    """Grouping method; empty for sites left alone."""
    statistic: str = Field(default="", max_length=16)
    """Channel statistic a_j; empty for sites left alone."""
    facts: SearchFacts | None = None
    """How the search went; null where there was none."""
    share: NonNegativeFloat | None = None
    """Predicted part of the loss at the model's output that quantizing this site makes, 0 to 1 over all sites (formula fA9); null
    where it was not predicted, or nothing is quantized."""
    share_measured: NonNegativeFloat | None = None
    """Loss at the model's output with only this site quantized, over the sum of all predicted contributions, or over the loss with
    all sites quantized where nothing was predicted; null where it was not measured."""

    @model_validator(mode="after")
    def _groups_differ(self) -> Self:
        if len({group.index for group in self.groups}) != len(self.groups):
            raise ValueError("two groups have the same index")
        return self
