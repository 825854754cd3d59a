"""What a joint compression is asked for: model and task, the drop that is tolerated, what a study chooses from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import (
    CodebookMatch,
    CodebookStart,
    ConvForm,
    FlatForm,
    PackedCoding,
    ResidualForm,
    SignalMetric,
    SparsityKind,
    SvdMetric,
)
from alphasmith.search.config import DEFAULT_OUT, EngineName, WorkersConfig
from alphasmith.search.sections import CodeName, Configuration, Label, Section, UserPath
from alphasmith.search.toml_values import read_toml

#: What may become of the weights beside their codebooks. ``off``: nothing; ``truncate``: factors alone (claim B-5), in rounds
#: with training; ``branch``: factors of the smoothed weights beside what is left of these.
Role = Literal["off", "truncate", "branch"]

#: Ends of log10(1 - kept energy), trained models in between.
_LOG_DROP = (-4.0, -0.7)


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or list(values) != sorted(set(values)):
        raise ValueError(f"{list(values)} is not ascending, or empty")
    return values


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{list(values)} is empty or names a choice twice")
    return values


Strengths = Annotated[tuple[Annotated[float, Field(ge=0, le=10)], ...], AfterValidator(_ascending)]
Drops = dict[Annotated[Label, Field(min_length=1, max_length=64)], Annotated[float, Field(gt=-1e9, lt=1e9)]]


class TaskConfig(Section):
    """Model and task. Without ``model`` and ``factory``: the embedded speech enhancement.

    Attributes:
        model: Folder of a Hugging Face model: a classifier, or one that predicts the next token.
        data: Media for it, a file or folder: with labels for a classifier, texts for the other; cut into training, study and test.
        column: Field or column that holds the text.
        label: Field or column that holds the class; ``auto``: by the usual names, else a folder for each class.
        max_length: Longest text [tokens].
        factory: ``module:function`` that returns (model, task): an ``nn.Module`` and what
            :class:`~alphasmith.objectives.joint.ports.JointTask` asks for. Naming it runs it.
        factory_path: Folder put on the module search path for it.
        path: Given to it as text.
        metrics: What the embedded task measures, the one that matters most first; None: ``si_sdr``, ``stoi`` and ``snr``. ``pesq``
            needs the extra of that name.
    """

    model: UserPath | None = None
    data: UserPath | None = None
    column: Label = Field(default="text", min_length=1, max_length=512)
    label: Label = Field(default="auto", min_length=1, max_length=512)
    max_length: int = Field(default=256, gt=0, le=2**24)
    factory: CodeName | None = None
    factory_path: UserPath | None = None
    path: UserPath | None = None
    metrics: Annotated[tuple[SignalMetric, ...], AfterValidator(_distinct)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        if self.metrics is not None and self.factory is not None:
            raise InputError("metrics", "given together with a factory", "let its task name them")
        if self.model is not None and self.factory is not None:
            raise InputError("factory", "given together with a model", "remove one of them")
        if self.model is not None and self.metrics is not None:
            raise InputError(
                "metrics", "given together with a model", "remove them: accuracy or perplexity is measured"
            )
        if (self.model is None) != (self.data is None):
            missing, there = ("data", "model") if self.data is None else ("model", "data")
            raise InputError(missing, f"is missing beside task.{there}", "give both")
        for name in ("factory_path", "path"):
            if getattr(self, name) is not None and self.factory is None:
                raise InputError(name, "given without a factory", "add task.factory or remove it")
        return self


class DropConfig(Section):
    """The performance-drop condition (claims B-1 to B-3). These are limits, never chosen by the study.

    Attributes:
        tolerances: Metric -> how much worse than the original a model may be, in the metric's unit.
        relative: Likewise, as a share of the original's value.
        floors: Metric -> value that a model may not be worse than. With all three empty: ``si_sdr`` 0.6 [dB] and ``stoi`` 0.005
            where the task measures these, else 1 % of the first metric's value.
        rule: ``any``: one metric beyond its limit is a drop; ``all``: only if all are.
    """

    tolerances: Drops = Field(default={})
    relative: Drops = Field(default={})
    floors: Drops = Field(default={})
    rule: Literal["any", "all"] = "any"


class RegularisedConfig(Section):
    """Training with sparsity terms on normalizations (claim B-4, fB1 to fB3), and every other training of a compression.

    Attributes:
        kind: Of the terms.
        encoder: Strengths of the first term to choose from, ascending; 0: without it.
        recurrent: Strengths of the second term, likewise.
        steps: Updates of a training.
        learning_rate: Largest learning rate of AdamW.
        batch_size: Samples of an update.
        clip: Largest norm of the gradient; 0: as it is.
    """

    kind: SparsityKind = "l1"
    encoder: Strengths = (0.0, 1e-4)
    recurrent: Strengths = (0.0, 1e-4)
    steps: int = Field(default=200, ge=0, le=10**7)
    learning_rate: float = Field(default=5e-4, gt=0, lt=1)
    batch_size: int = Field(default=16, gt=0, le=2**16)
    clip: float = Field(default=1.0, ge=0, le=1e6)


class RoundsConfig(Section):
    """Decomposition back into training, round after round (claim B-1).

    Attributes:
        most: Rounds at most.
        steps: Updates after every truncation.
        step: By how much log10 of the energy that may be lost rises from round to round.
        metric: By what singular values are weighed.
        conv_form: How kernels of two axes become matrices.
        log_drop: Range of log10 of the share of energy that the first round may lose.
        flat: What becomes of layers that no saving rank keeps the energy of, to choose from: ``branch``: as in role ``branch``;
            ``dense``: nothing.
    """

    most: int = Field(default=4, ge=1, le=100)
    steps: int = Field(default=100, ge=0, le=10**7)
    step: float = Field(default=0.3, gt=0, le=10)
    metric: SvdMetric = "whitened"
    conv_form: ConvForm = "channel"
    log_drop: tuple[float, float] = _LOG_DROP
    flat: Annotated[tuple[FlatForm, ...], AfterValidator(_distinct)] = ("branch", "dense")

    @model_validator(mode="after")
    def _ordered(self) -> RoundsConfig:
        low, high = self.log_drop
        if not -12 <= low <= high < 0:
            raise InputError(
                "log_drop", f"({low:g}, {high:g}) is no range within -12 and 0", "give low and high, e.g. [-4, -0.7]"
            )
        return self


class BranchConfig(Section):
    """Role ``branch``: y = X' L + Q(X') Q(R) of smoothed weights (fB11).

    Attributes:
        ranks: Of the branch, to choose from.
        alpha: Range of the smoothing coefficient.
        residuals: Forms of what is left, to choose from; ``codebook`` takes the clusters of its layer.
        bits: Bits of the branch.
        activations: Bits of the activations that meet the residual; 0: float.
        refits: Rounds of refitting at most.
    """

    ranks: Annotated[tuple[Annotated[int, Field(ge=0, le=4096)], ...], AfterValidator(_distinct)] = (0, 4, 8, 16, 32)
    alpha: tuple[float, float] = (0.0, 0.9)
    residuals: Annotated[tuple[ResidualForm, ...], AfterValidator(_distinct)] = (
        "int4",
        "codebook",
    )
    bits: Literal[8, 16] = 16
    activations: Literal[0, 4, 8] = 8
    refits: int = Field(default=10, ge=0, le=1000)

    @model_validator(mode="after")
    def _ordered(self) -> BranchConfig:
        low, high = self.alpha
        if not 0 <= low <= high <= 1:
            raise InputError(
                "alpha", f"({low:g}, {high:g}) is no range within 0 and 1", "give low and high, e.g. [0, 0.9]"
            )
        return self

    @property
    def middle_rank(self) -> int:
        """What is tried first."""
        return sorted(self.ranks)[len(self.ranks) // 2]

    @property
    def middle_alpha(self) -> float:
        """0.5, or the end of the range that is nearest to it."""
        low, high = self.alpha
        return min(max(0.5, low), high)


class ClustersConfig(Section):
    """Clustering and codebooks (claims B-6, B-7; fB8 to fB10).

    Attributes:
        k: Entries of a table to choose from, for every class of layer by itself.
        start: Where the clustering starts from.
        match: How a weight finds its entry: the ``nearest``, or ``compensated``: errors make up for each other on what the layer reads
            of the training samples (fB12).
        coding: How indices are stored; ``smallest``: for every tensor the way that takes fewer bytes.
        halves: Store tables, and what stays float, in 16 bits where these are fine enough for them.
        channels: Output channels that share a table; None: one table a tensor.
        finetune: Updates of the tables and of what stays float afterwards, indices fixed; kept where they help. 0: none.
    """

    k: Annotated[tuple[Annotated[int, Field(ge=2, le=65536)], ...], AfterValidator(_distinct)] = (4, 8, 16, 32, 64, 256)
    start: CodebookStart = "optimal"
    match: CodebookMatch = "compensated"
    coding: PackedCoding = "smallest"
    halves: bool = True
    channels: int | None = Field(default=None, gt=0, lt=2**31)
    finetune: int = Field(default=100, ge=0, le=10**7)


class StudyConfig(Section):
    """The study over all of it.

    Attributes:
        trials: How many, the plain ones included that every study begins with.
        inner: Trials that share the costly stages (training, rounds, branch) and differ in clusters alone.
        roles: What may become of the weights beside their codebooks.
        latency: Whether the time of a forward call is a second objective.
        seed: Of everything.
        cache: Folder of finished stages; None: ``.stages`` beside the output folder. May be deleted at any time.
    """

    trials: int = Field(default=24, ge=1, le=10**6)
    inner: int = Field(default=4, ge=1, le=10**4)
    roles: Annotated[tuple[Role, ...], AfterValidator(_distinct)] = ("off", "truncate", "branch")
    latency: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    cache: UserPath | None = None


class CompressConfig(Configuration):
    """One joint compression.

    Attributes:
        storage: SQLAlchemy URL of the database; None: ``alphasmith.db`` (SQLite) in the working directory.
        out: Output folder; None: ``alphasmith-runs/<id>``.
        device: Torch device; None: the first GPU, else the CPU.
        engine: Where trials are worked on: ``local``, in this process or in worker processes; ``ray``, on a Ray cluster.
        task: Model and task.
        drop: How much worse the model may become.
        train: Training with sparsity terms.
        rounds: Decomposition back into training.
        branch: Low-rank branches beside smoothed weights.
        clusters: Codebooks.
        study: How much is tried.
        workers: Who works on it. One worker finds the same every time; of several, what is tried depends on who is faster.
    """

    storage: Annotated[Label, Field(max_length=4096)] | None = None
    out: UserPath | None = None
    device: Annotated[Label, Field(max_length=64)] | None = None
    engine: EngineName = "local"
    task: TaskConfig = TaskConfig()
    drop: DropConfig = DropConfig()
    train: RegularisedConfig = RegularisedConfig()
    rounds: RoundsConfig = RoundsConfig()
    branch: BranchConfig = BranchConfig()
    clusters: ClustersConfig = ClustersConfig()
    study: StudyConfig = StudyConfig()
    workers: WorkersConfig = WorkersConfig()

    @classmethod
    def from_toml(cls, path: Path | str, overrides: Iterable[str] = ()) -> CompressConfig:
        """Read a TOML file, then apply ``a.b=c`` overrides; relative paths are relative to the file.

        Args:
            path: The file.
            overrides: What is set over it.

        Raises:
            InputError: Missing file, broken TOML, unknown or invalid field.
        """
        paths = (
            ("task", "model"),
            ("task", "data"),
            ("task", "path"),
            ("task", "factory_path"),
            ("study", "cache"),
            (None, "out"),
        )
        return cls.build(read_toml(path, paths, overrides))

    def deciding(self) -> dict[str, Any]:
        """The part that decides the result, as JSON values; more trials go on with the same study."""
        values = self.model_dump(mode="json", exclude={"storage", "out", "device", "engine", "workers"})
        values["study"] = {name: value for name, value in values["study"].items() if name not in ("trials", "cache")}
        return values

    def folder_of(self, compression: str) -> Path:
        """Where the result goes.

        Args:
            compression: Its id.
        """
        return self.out or DEFAULT_OUT / compression
