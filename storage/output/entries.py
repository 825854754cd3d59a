"""The parts of a manifest; ``manifest`` puts them together. Units and shapes stand at the fields."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import (
    CandidateKind,
    ChannelStatistic,
    Kernel,
    ModelKind,
    OutputLoss,
    Variant,
    WeightStatus,
)
from alphasmith.objectives.quantization.scheme import (
    ActivationFormat,
    ActivationGranularity,
    Scheme,
    WeightFormat,
    WeightGranularity,
)
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.storage.runs.entries import Losses, Part, SiteRecord, Volatile


def _relative(path: str) -> str:
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{path!r} is not a path inside the output folder")
    return path


def _scheme_name(name: str) -> str:
    try:
        return Scheme.parse(name).name
    except InputError as error:
        raise ValueError(error.problem) from error


def _to_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="sha256, hexadecimal")]
Moment = Annotated[AwareDatetime, AfterValidator(_to_utc)]


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


class PieceEntry(Part):
    """A tensor of the model that was searched that is rows of one of the model that came in."""

    name: str
    """Name of the piece."""
    whole: str
    """Name of the tensor that came in."""
    start: NonNegativeInt
    """First row."""
    stop: PositiveInt
    """Row after the last."""


class BakedEntry(Part):
    """A plain weight of the model that was searched, which the model that came in computes from others."""

    name: str
    """Name of the plain weight."""
    kind: str
    """What computes it."""
    originals: tuple[str, ...] = ()
    """For weight norm, names of magnitude and direction; empty where ``smoothed/`` holds the plain weight."""
    magnitude: tuple[PositiveInt, ...] = ()
    """Shape of the magnitude."""


class ModelEntry(Part):
    """The float model that came in."""

    kind: ModelKind
    """Hugging Face folder, factory function, in-memory module, or embedded demo."""
    name: str
    """Folder name, factory or class, without the path of the machine."""
    digest: Sha256
    """Over all parameters."""
    parameter_count: NonNegativeInt
    """Number of parameters, tied ones once."""
    stored: str = "float32"
    """Types of the weights in ``smoothed/``: those that the model came in, unless float32 was asked for or needed."""
    pieces: tuple[PieceEntry, ...] = ()
    """Tensors of which parts are named in the edits of sites."""
    baked: tuple[BakedEntry, ...] = ()
    """Weights that were computed and are plain in the edits of sites and in ``quantized/``."""


class SchemeEntry(Part):
    """The quantization scheme, see ``objectives.scheme.Scheme``, and those of sites that have another one."""

    name: str
    """Short name; where sites have another scheme, with their number, e.g. ``w8a8-channel-static+4``."""
    weights: WeightFormat
    weight_granularity: WeightGranularity
    group_size: PositiveInt | None = None
    activations: ActivationFormat
    activation_granularity: ActivationGranularity
    kernel: Kernel = "exact"
    """What products of 8-bit integers were taken to be; before it was recorded, exact."""
    sites: dict[str, Annotated[str, AfterValidator(_scheme_name)]] = Field(default_factory=dict)
    """Site -> name of its scheme, of the sites that have another one than the other fields say; ``float`` is left in float."""

    @classmethod
    def of(cls, schemes: Scheme | SiteSchemes) -> Self:
        """Entry for a scheme, or for those of the sites."""
        schemes = SiteSchemes.given(schemes)
        scheme = schemes.default
        return cls(
            name=schemes.name,
            weights=scheme.weights,
            weight_granularity=scheme.weight_granularity,
            group_size=scheme.group_size,
            activations=scheme.activations,
            activation_granularity=scheme.activation_granularity,
            kernel=scheme.kernel,
            sites={site: other.name for site, other in schemes.others},
        )

    def site_schemes(self) -> SiteSchemes:
        """The scheme of every site.

        Raises:
            InputError: The fields contradict each other.
        """
        return SiteSchemes.build(self.scheme(), {site: Scheme.parse(name) for site, name in self.sites.items()})

    def scheme(self) -> Scheme:
        """The scheme of the sites that are not named.

        Raises:
            InputError: The fields contradict each other.
        """
        return Scheme(
            weights=self.weights,
            weight_granularity=self.weight_granularity,
            group_size=self.group_size,
            activations=self.activations,
            activation_granularity=self.activation_granularity,
            kernel=self.kernel,
        )


class ConventionsEntry(Part):
    """What an alpha means here; the same alpha under other conventions is another scale."""

    statistic: ChannelStatistic
    """Channel statistic a_j; a site where the search chose another one names it."""
    percentile: float | None = Field(default=None, gt=0, le=100)
    """Which percentile, where that statistic was used."""
    clamp: NonNegativeFloat
    """Smallest scale s_j; smaller ones are raised to it. 0 = no clamp."""
    clamp_max: PositiveFloat | None = None
    """Largest s_j; larger ones are lowered to it. Null: not recorded (before version 3: 1e5)."""
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
    """One sentence."""


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
    """A layer left in float."""

    name: str
    reason: str


class WeightEntry(Part):
    """One parameter of two or more dimensions, and what became of it."""

    name: str
    """Its full name."""
    aliases: tuple[str, ...] = ()
    """Its other names, where it is tied."""
    shape: tuple[NonNegativeInt, ...]
    share: NonNegativeFloat
    """Its part of all parameters of the model, 0 to 1; tied parameters count once."""
    status: WeightStatus
    """``float``: it stays as it was."""
    reason: str = ""
    """Why it stays float; empty where it is quantized."""


class SiteEntry(SiteRecord):
    """One site, and what is needed to take its scales out again; a shift is ``shift/SITE`` in ``scales.safetensors``."""

    producers: tuple[str, ...] = ()
    """Modules that took in 1/s."""
    edits: tuple[EditEntry, ...] = ()
    """How its scales went into parameters; empty unless folded."""
    shift_edits: tuple[ShiftEditEntry, ...] = ()
    """How its shift went into biases; empty where there is none or it stays in the quantizer of the input."""
    labels: tuple[NonNegativeInt, ...] = ()
    """(C,) group of every channel; empty when the site has no groups."""

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.labels and len(self.labels) != self.channels:
            raise ValueError(f"{len(self.labels)} labels for {self.channels} channels")
        counted = Counter(self.labels)
        sizes = {group.index: group.size for group in self.groups}
        if sizes and (set(counted) - set(sizes) or any(counted[index] != size for index, size in sizes.items())):
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
    one_alpha: float | None = None
    best_single: float | None = None
    ours: float | None = None


class SweepEntry(Part):
    """One alpha for the whole model, tried at its output as people do by hand."""

    alpha: float
    """The one with the lowest loss on the search data."""
    loss: NonNegativeFloat
    """That loss."""
    trials: NonNegativeInt
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent [s]."""
    study: Annotated[str | None, Volatile] = None
    """Optuna study."""


class OutputEntry(Part):
    """Losses at the output of the whole model on held-out data, and task metrics; null where one failed."""

    loss: OutputLoss = "mse"
    """Relative MSE, KL divergence [nats], or the task metric as a loss that is 1 for the float model."""

    naive: NonNegativeFloat | None = None
    """Quantized without smoothing."""
    alpha_half: NonNegativeFloat | None = Field(default=None, alias="alpha_0.5")
    """With alpha 0.5 everywhere."""
    one_alpha: NonNegativeFloat | None = None
    """With one alpha for the whole model, the best of a sweep at the output (scope ``site``)."""
    sweep: SweepEntry | None = None
    """How that alpha was found; null where there was no sweep."""
    best_single: NonNegativeFloat | None = None
    """With the best single alpha of every site (scope ``site``) or of the model (scope ``model``)."""
    ours: NonNegativeFloat | None = None
    """With the winners of the search."""
    kept: Variant = "ours"
    """What was written: ``ours`` unless the guard at the output chose a baseline."""
    search: Losses | None = None
    """Scope ``model``: losses on the search data."""
    held_out: Losses | None = None
    """Scope ``model``: losses on the held-out data."""
    metrics: tuple[MetricEntry, ...] = ()
    """Task metrics."""


class ProofEntry(Part):
    """Proof that folding left the float model as it was."""

    tolerance: NonNegativeFloat
    """Largest relative output error allowed of the checkpoint that is stored: more where that is of a type of half precision."""
    error: NonNegativeFloat
    """Relative output error measured of the checkpoint that is stored."""
    folding: NonNegativeFloat | None = None
    """The same before the folded weights were rounded to the type of the model, within the tolerance of the configuration; null where
    they were not."""
    batches: PositiveInt
    """Batches it was measured on, used for nothing else."""
    dtype: str | None = None
    """What the models were run in: float64 measures the folding alone, the model's own type rounding too. Null: not recorded."""
    outputs: tuple[str, ...] = ()
    """Floating tensors of the model's output that were compared: all that it returns. Empty: not recorded, the main one only."""


class PayloadEntry(Part):
    """Bytes of the checkpoints."""

    weights_float: NonNegativeInt
    """Quantized operators' weights as float32 [bytes]."""
    weights_quantized: NonNegativeInt
    """The same weights quantized [bytes], without scales."""
    other: NonNegativeInt
    """Scales, norms, biases and skipped layers [bytes]."""
    model_float: NonNegativeInt | None = None
    """The whole model as float32 [bytes]: parameters and buffers, tied ones once. Null: not recorded."""
    model_given: NonNegativeInt | None = None
    """The whole model as it came, in its own types [bytes]. Null: not recorded."""


class GuardEntry(Part):
    """A decision of the guard that compares a winner with the baselines on held-out rows."""

    site: str | None = None
    """Site, or null for the whole model."""
    proposed: CandidateKind | Literal["ours"]
    """Kind of the trial that won the search; ``ours`` stands for the winners of all sites together."""
    kept: CandidateKind
    """Kind of the trial that was kept."""
    reason: str
    """One sentence."""
    proposed_trial: NonNegativeInt | None = None
    """Number of that trial in its study; null at the model's output, and where an earlier version wrote the entry."""
    proposed_loss: NonNegativeFloat | None = None
    """Its loss on held-out rows; null where it is not finite, and as above."""
    kept_trial: NonNegativeInt | None = None
    """Number of the trial that was kept."""
    kept_loss: NonNegativeFloat | None = None
    """Its loss on held-out rows."""


class Judged(Part):
    """Two models at the output on held-out samples; the second is kept only if its loss is lower beyond the paired standard error."""

    accepted: bool
    before: NonNegativeFloat | None
    """Held-out loss at the model's output before; null where it is not finite."""
    after: NonNegativeFloat | None
    """With what was proposed."""
    difference: float | None
    """``before`` minus ``after``, paired over held-out samples; null where one of them is not finite or nothing was proposed."""
    standard_error: NonNegativeFloat | None
    """Of the difference; null with it, or for one sample."""
    reason: str
    """Why it was accepted or not."""


class StepEntry(Judged):
    """One study of the refinement."""

    name: Literal["kinds", "sites"]
    """What got settings of its own: kinds of sites, or single sites."""
    units: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Each of them -> its sites, in the order in which they were moved."""
    trials: NonNegativeInt = 0
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent [s]."""
    study: Annotated[str | None, Volatile] = None
    """Optuna study."""


class RefinementEntry(Judged):
    """Small studies at the model's output, after the sites: the winners of the sites before, what is kept after."""

    steps: tuple[StepEntry, ...] = ()
    """The studies, from coarse to fine; empty where an earlier version wrote the entry."""
    deltas: dict[str, float] = Field(default_factory=dict)
    """Kind of site -> accepted shift of its alphas, where an earlier version wrote the entry."""
    changed: dict[str, str] = Field(default_factory=dict)
    """Site -> what it has now, where that is not its winner: another candidate, other alphas, a factor on its range."""
    trials: NonNegativeInt = 0
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent [s]."""
    study: Annotated[str | None, Volatile] = None
    """Optuna study."""


class RoundingEntry(Part):
    """Scales rounded after the search; losses of sites are those before."""

    to: Literal["pow2"]
    """Powers of two."""
    sites: PositiveInt
    """Folded sites that were rounded."""
    inexact: tuple[str, ...] = ()
    """Those whose fold is not exact all the same: weights that are stored less 1."""
    before: NonNegativeFloat | None
    """Held-out loss at the model's output with the scales as found; null where it is not finite."""
    after: NonNegativeFloat | None
    """With the rounded ones."""
    difference: float | None
    """``before`` minus ``after``, paired over held-out samples."""
    standard_error: NonNegativeFloat | None
    """Of the difference."""


class MemoryEntry(Part):
    """Peak memory of the search."""

    predicted: NonNegativeInt
    """Known before the run [bytes]."""
    measured: Annotated[NonNegativeInt | None, Volatile] = None
    """High-water mark of the process [bytes]."""
    mode: Literal["resident", "blockwise"] = "resident"
    """``blockwise``: one block of the model was in memory at a time."""
    blocks: NonNegativeInt = 0
    """How many blocks there were; 0 where the whole model was in memory."""


class ArtifactEntry(Part):
    """A file of the output folder, apart from the manifest itself."""

    kind: str
    path: Annotated[str, AfterValidator(_relative)]
    """Relative to the manifest."""
    sha256: Sha256
    bytes: NonNegativeInt
    reproducible: bool = True
    """False for files that show times (a report): their digest is left out of comparisons."""
