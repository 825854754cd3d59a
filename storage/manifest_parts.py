"""The parts of a manifest; ``manifest`` puts them together. Units and shapes stand at the fields."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from alphasmith.objectives.scheme import Scheme


class VolatileMark:
    """Marks a field that differs between two runs of equal inputs."""


#: The one mark: ``Annotated[float, Volatile]``.
Volatile = VolatileMark()


def _relative(path: str) -> str:
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{path!r} is not a path inside the output folder")
    return path


def _to_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="sha256, hexadecimal")]
Moment = Annotated[AwareDatetime, AfterValidator(_to_utc)]
Winner = Literal["identity", "alpha_0.5", "best_single", "noise_model", "sampler", "refined", "reused"]


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


class RunEntry(Part):
    """Which run this was."""

    id: Annotated[str, Volatile]
    """Run id in the storage."""
    name: str
    """Name the user gave."""
    created: Annotated[Moment, Volatile]
    """When it was created, UTC."""
    started: Annotated[Moment, Volatile]
    """When it was started or last resumed, UTC."""
    finished: Annotated[Moment, Volatile]
    """When the result was complete, UTC."""


class ModelEntry(Part):
    """The float model that came in."""

    kind: Literal["hf", "factory", "module", "demo"]
    """Hugging Face folder, factory function, in-memory module, or embedded demo."""
    name: str
    """Folder name, factory or class, without the path of the machine."""
    digest: Sha256
    """Over all parameters."""
    parameter_count: NonNegativeInt
    """Number of parameters, tied ones once."""


class SchemeEntry(Part):
    """The quantization scheme, see ``objectives.scheme.Scheme``."""

    name: str
    """Short name."""
    weights: Literal["int8", "int4", "fp8"]
    weight_granularity: Literal["tensor", "channel", "group"]
    group_size: PositiveInt | None = None
    activations: Literal["int8", "fp8", "none"]
    activation_granularity: Literal["static", "token"]

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """Entry for a scheme."""
        return cls(
            name=scheme.name,
            weights=scheme.weights,
            weight_granularity=scheme.weight_granularity,
            group_size=scheme.group_size,
            activations=scheme.activations,
            activation_granularity=scheme.activation_granularity,
        )

    def scheme(self) -> Scheme:
        """The scheme it stands for.

        Raises:
            InputError: The fields contradict each other.
        """
        return Scheme(
            weights=self.weights,
            weight_granularity=self.weight_granularity,
            group_size=self.group_size,
            activations=self.activations,
            activation_granularity=self.activation_granularity,
        )


class ConventionsEntry(Part):
    """What an alpha means here; the same alpha under other conventions is another scale (style.md section 2)."""

    statistic: Literal["absmax", "percentile", "rms"]
    """Channel statistic a_j; a site where the search chose another one names it."""
    percentile: float | None = Field(default=None, gt=0, le=100)
    """Which percentile, where that statistic was used."""
    clamp: NonNegativeFloat
    """Smallest a_j, w_j and s_j; smaller ones are raised to it. 0 = no clamp."""
    dead_channels: str
    """Rule for channels with a_j = 0 or w_j = 0, e.g. ``s = 1``."""

    @model_validator(mode="after")
    def _percentile_belongs(self) -> Self:
        if self.statistic == "percentile" and self.percentile is None:
            raise ValueError("percentile must be given for the statistic 'percentile'")
        return self


class Budget(Part):
    """Hardware budget of a machine; null where it was neither given nor detected."""

    memory: NonNegativeInt | None = None
    """Memory [bytes]."""
    threads: NonNegativeInt | None = None
    """GPU thread count."""
    bandwidth: NonNegativeFloat | None = None
    """Memory bandwidth [bytes/s]."""


class HardwareEntry(Part):
    """The budget and what it did to the alpha ranges (formula fA7)."""

    budget: Budget
    """Of the machine that will run the model."""
    required: Budget
    """What the quantized model needs."""
    rho: float
    """Hardware term of the ranges."""
    explanation: str
    """In words."""


class GroupEntry(Part):
    """A group of channels that share one alpha."""

    index: NonNegativeInt
    """Label used in ``labels``."""
    size: NonNegativeInt
    """Number of channels."""
    magnitude: NonNegativeFloat
    """Magnitude the group was formed by."""
    low: float
    """Lower end of the alpha range."""
    high: float
    """Upper end of the alpha range."""
    alpha: float | None
    """The chosen alpha; outside the range when a baseline won, null when identity won."""
    explanation: str = ""
    """Why the range is what it is."""
    beta: float | None = None
    """The chosen exponent of w; null: 1 - alpha."""
    offset: float | None = None
    """Natural logarithm of the group's own factor of its scales; null: none."""

    @model_validator(mode="after")
    def _range_in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class LossesEntry(Part):
    """Relative squared quantization errors on one set of rows (dimensionless); null where a baseline failed."""

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
    """Per-channel limit; null when it was not computed."""


class LossPair(Part):
    """Losses on the rows that were searched on and on rows that were not."""

    search: LossesEntry
    held_out: LossesEntry


class EditEntry(Part):
    """One parameter that took in a site's scales: ``p' = (p + offset) * s[channel]**power - offset``."""

    parameter: str
    """Name in the smoothed checkpoint."""
    power: Literal[-1, 1]
    """1 for consumers, -1 for producers."""
    offset: float
    """1.0 for norms that multiply by (1 + w), else 0.0."""
    channel: str
    """Tensor in ``scales.safetensors``: site channel of every element, -1 where it is not touched."""


class ShiftEditEntry(Part):
    """One bias that took in a site's shift z, before any scale: a producer's loses z, a consumer's gains its weight times z."""

    parameter: str
    """The bias, named as in the smoothed checkpoint."""
    channel: str
    """Tensor in ``scales.safetensors``: site channel of every element (of the bias, or of the consumer's weight), -1 for none."""
    weight: str = ""
    """The consumer's weight; empty for producers."""
    transposed: bool = False
    """True where that weight is stored (in, out)."""


class SkippedEntry(Part):
    """An operator left in float."""

    name: str
    reason: str


class NoiseModelFacts(Part):
    """How far the rounding-noise model could be trusted at a site, against the exact losses of its trials."""

    median_log_ratio: float
    """Median of log(predicted / exact), natural logarithm; 0 is exact on the median."""
    kendall_tau: float | None = None
    """Rank correlation of predicted and exact losses; null where too few candidates were scored."""
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent in it [s]."""
    proposals: NonNegativeInt = 0
    """Trials it proposed."""
    evaluations_saved: int = 0
    """Exact evaluations of the grid of single alphas and of all trials, less those that were made."""
    seconds_saved: Annotated[float, Volatile] = 0.0
    """Those at the median time of a trial, less ``seconds`` [s]; negative where it cost more than it spared."""


class SearchFacts(Part):
    """How the search of a site went."""

    stopped: str = ""
    """Why it ended, in words."""
    noise_model: NoiseModelFacts | None = None
    """Null where it was switched off or not finite."""
    noise_reason: str = ""
    """Why it failed; empty otherwise."""
    k_tried: tuple[PositiveInt, ...] = ()
    """Numbers of groups that were compared, where K was ``auto``."""
    range_losses: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Range statistic -> held-out loss of the winner under it, where several were compared."""


class SiteEntry(Part):
    """One site."""

    name: str
    mode: Literal["fold", "explicit", "left"]
    reason: str = ""
    """Why it is not folded."""
    channels: NonNegativeInt
    operators: tuple[str, ...]
    """Operators that read the tensor."""
    producers: tuple[str, ...] = ()
    """Modules that took in 1/s."""
    edits: tuple[EditEntry, ...] = ()
    """How its scales went into parameters; empty unless folded."""
    shift_edits: tuple[ShiftEditEntry, ...] = ()
    """How its shift went into biases; empty where there is none or it stays in the quantizer of the input."""
    study: Annotated[str | None, Volatile] = None
    """Optuna study, when the site has one of its own."""
    groups: tuple[GroupEntry, ...] = ()
    """Empty in scope ``model``: see the groups of the whole model."""
    labels: tuple[NonNegativeInt, ...] = ()
    """(C,) group of every channel; empty when the site has no groups."""
    losses: LossPair | None = None
    """Null for sites left alone and where only the model's output was scored."""
    winner: Winner | None = None
    """Kind of the trial that won after the guard."""
    trials: NonNegativeInt = 0
    exact_evaluations: NonNegativeInt = 0
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent [s]."""
    shift: bool = False
    """Whether a shift is subtracted from every channel before it is scaled; the shift is ``shift/SITE`` in ``scales.safetensors``."""
    range_statistic: Literal["absmax", "percentile", "margin"] = "absmax"
    """How the static range of the activation was set."""
    range_factor: PositiveFloat = 1.0
    """That range over the calibrated abs-max (dimensionless)."""
    grouping: str = ""
    """Grouping method; empty for sites left alone."""
    statistic: str = ""
    """Channel statistic a_j; empty for sites left alone."""
    facts: SearchFacts | None = None
    """How the search went; null where there was none."""

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.labels and len(self.labels) != self.channels:
            raise ValueError(f"{len(self.labels)} labels for {self.channels} channels")
        if self.groups:
            sizes = {group.index: group.size for group in self.groups}
            if len(sizes) != len(self.groups):
                raise ValueError("two groups have the same index")
            counted = Counter(self.labels)
            if set(counted) - set(sizes) or any(counted[index] != size for index, size in sizes.items()):
                raise ValueError(f"labels count {dict(sorted(counted.items()))}, groups say {sizes}")
        return self


class MetricEntry(Part):
    """A task metric of the whole model under each candidate; null where it was not measured."""

    name: str
    higher_is_better: bool
    float_model: float | None = Field(default=None, alias="float")
    """Before quantization."""
    naive: float | None = None
    """Quantized without smoothing."""
    alpha_half: float | None = Field(default=None, alias="alpha_0.5")
    best_single: float | None = None
    ours: float | None = None


class OutputEntry(Part):
    """Losses at the output of the whole model on held-out data, and task metrics; null where one failed."""

    loss: Literal["mse", "kl", "task"] = "mse"
    """Relative MSE, KL divergence [nats], or the task metric as a loss that is 1 for the float model."""

    naive: NonNegativeFloat | None = None
    """Quantized without smoothing."""
    alpha_half: NonNegativeFloat | None = Field(default=None, alias="alpha_0.5")
    """With alpha 0.5 everywhere."""
    best_single: NonNegativeFloat | None = None
    """With the best single alpha of every site (scope ``site``) or of the model (scope ``model``)."""
    ours: NonNegativeFloat | None = None
    """With the winners of the search."""
    kept: Literal["identity", "alpha_0.5", "best_single", "ours"] = "ours"
    """What was written: ``ours`` unless the guard at the output chose a baseline."""
    search: LossesEntry | None = None
    """Scope ``model``: losses on the search data."""
    held_out: LossesEntry | None = None
    """Scope ``model``: losses on the held-out data."""
    metrics: tuple[MetricEntry, ...] = ()
    """Task metrics."""


class ProofEntry(Part):
    """Proof that folding left the float model as it was."""

    tolerance: NonNegativeFloat
    """Largest relative output error allowed."""
    error: NonNegativeFloat
    """Relative output error measured."""
    batches: PositiveInt
    """Batches it was measured on, used for nothing else."""


class PayloadEntry(Part):
    """Bytes of the checkpoints."""

    weights_float: NonNegativeInt
    """Quantized operators' weights as float32 [bytes]."""
    weights_quantized: NonNegativeInt
    """The same weights quantized [bytes], without scales."""
    other: NonNegativeInt
    """Scales, norms, biases and skipped layers [bytes]."""


class GuardEntry(Part):
    """A decision of the guard that compares a winner with the baselines on held-out rows."""

    site: str | None = None
    """Site, or null for the whole model."""
    proposed: Winner | Literal["ours"]
    """Kind of the trial that won the search; ``ours`` stands for the winners of all sites together."""
    kept: Winner
    """Kind of the trial that was kept."""
    reason: str
    """In words."""


class RefinementEntry(Part):
    """A small study at the model's output, after the sites; kept only if the held-out loss falls beyond its standard error."""

    accepted: bool
    before: NonNegativeFloat | None
    """Held-out loss at the model's output with the winners of the sites; null where it is not finite."""
    after: NonNegativeFloat | None
    """With what is kept; the same unless accepted."""
    difference: float | None
    """``before`` minus the loss of the best trial, paired over held-out samples; null where no trial was better in the search."""
    standard_error: NonNegativeFloat | None
    """Of the difference; null with it, or for one sample."""
    reason: str
    """Why it was accepted or not, in words."""
    deltas: dict[str, float] = Field(default_factory=dict)
    """Kind of site -> accepted shift of its alphas; kinds without one are left out."""
    changed: dict[str, str] = Field(default_factory=dict)
    """Site -> what it has now, where that is not its winner: another candidate, or its winner with other alphas."""
    trials: NonNegativeInt = 0
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent [s]."""
    study: Annotated[str | None, Volatile] = None
    """Optuna study."""


class MemoryEntry(Part):
    """Peak memory of the search."""

    predicted: NonNegativeInt
    """Known before the run [bytes]."""
    measured: Annotated[NonNegativeInt | None, Volatile] = None
    """High-water mark of the process [bytes]."""


class ArtifactEntry(Part):
    """A file of the output folder, apart from the manifest itself."""

    kind: str
    path: Annotated[str, AfterValidator(_relative)]
    """Relative to the manifest."""
    sha256: Sha256
    bytes: NonNegativeInt
    reproducible: bool = True
    """False for files that show times (a report): their digest is left out of comparisons."""
