"""The configuration of a run: frozen, validated, read from TOML, keyword arguments or both."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import (
    ChannelStatistic,
    GroupMethod,
    Kernel,
    MediaKind,
    MemoryMode,
    OutputLoss,
    ScaleRounding,
    Scope,
    SearchedRange,
    ShiftStatistic,
    SiteFormat,
    Target,
)
from alphasmith.objectives.quantization.scheme import (
    ActivationFormat,
    ActivationGranularity,
    Scheme,
    WeightFormat,
    WeightGranularity,
)
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.text import matches, one_line
from alphasmith.search.budget import BudgetConfig
from alphasmith.search.sections import MANY, CodeName, Configuration, Label, Section, UserPath, distinct, one_or_more
from alphasmith.search.toml_values import read_toml

#: Where a run goes unless a configuration says otherwise.
DEFAULT_STORAGE = "sqlite:///alphasmith.db"
DEFAULT_OUT = Path("alphasmith-runs")

SamplerName = Literal["tpe", "qmc", "random", "cmaes", "gp"]
PrunerName = Literal["paired", "none", "median", "successive_halving", "hyperband"]

#: Largest configuration file [bytes].
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(value: object) -> object:
    """``"8 GiB"``, ``"900 GB/s"`` or a number of bytes -> int [bytes or bytes/s]; other types pass through to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{0,30})?)\s*([KMGT]?I?)B?(/S)?\s*", value.upper(), re.ASCII)
    if match is None or match.group(2) not in _UNITS:
        raise ValueError(f"{one_line(value, 40)!r} is not a size; write 8589934592, '8 GiB' or '900 GB/s'")
    return int(Fraction(match.group(1).rstrip(".")) * _UNITS[match.group(2)])


GroupMethods = Annotated[tuple[GroupMethod, ...], BeforeValidator(one_or_more), AfterValidator(distinct)]
ChannelStatistics = Annotated[tuple[ChannelStatistic, ...], BeforeValidator(one_or_more), AfterValidator(distinct)]
ShiftStatistics = Annotated[tuple[ShiftStatistic, ...], BeforeValidator(one_or_more), AfterValidator(distinct)]
RangeStatistics = Annotated[tuple[SearchedRange, ...], BeforeValidator(one_or_more), AfterValidator(distinct)]
Bytes = Annotated[int, Field(gt=0, lt=2**63), BeforeValidator(parse_bytes)]


def _named_once(values: tuple[str, ...]) -> tuple[str, ...]:
    return distinct(values) if values else values


def scheme_fields(value: object) -> object:
    """The name of a scheme or a ``Scheme`` -> its fields; those already so pass through to pydantic.

    Raises:
        InputError: It is nothing of the kind, or no scheme has this name.
    """
    value = Scheme.parse(value) if isinstance(value, str) else value
    if not isinstance(value, (Scheme, SchemeConfig, Mapping)):
        raise InputError(
            "scheme", f"is a {type(value).__name__}", "give a name such as w8a8-channel-static, or its fields"
        )
    return asdict(value) if isinstance(value, Scheme) else value


class ModelConfig(Section):
    """Where the float model comes from: exactly one of ``path``, ``factory`` and ``demo``.

    Attributes:
        path: Hugging Face folder with config.json and safetensors, or, with ``factory``, the folder given to it.
        factory: ``module:function`` that returns an ``nn.Module``: runs the user's code, so it is never implied.
        factory_path: Folder put on the module search path for ``factory``.
        demo: An embedded demo model.
        trust_remote_code: Allow Python code that comes with the folder.
    """

    path: UserPath | None = None
    factory: CodeName | None = None
    factory_path: UserPath | None = None
    demo: Literal["image", "text"] | None = None
    trust_remote_code: bool = False


class DataConfig(Section):
    """Media: what kind, where, how many. Calibration, tuning, held-out and proof samples are disjoint.

    Attributes:
        kind: Kind of media; ``auto`` looks at the files.
        path: File or folder.
        column: Field of a jsonl line or column of a csv or parquet file that holds the text or a conversation; where there is
            none of the default name, conversations are found by the names that data sets use (``messages``, ...).
        files: Column of a jsonl, csv or parquet table that names media files, relative to it; then ``path`` is that table.
        label: Field or column that holds the class of a classifier or the text that a decoder writes; ``auto``: by the usual
            names, else a folder for each class, a text beside each file, or the columns of ``metadata.csv``; ``none``: neither.
        factory: ``module:function`` that returns argument tuples of the model, in place of ``path``.
        metric: ``module:function`` that scores a model: called with the model folder (if there is one) and the model;
            returns a number or a mapping of names to numbers.
        metric_name: Which of several numbers is the task metric; None: the first.
        metric_goal: Whether a higher (``max``) or a lower (``min``) metric is better.
        samples: Calibration samples.
        tuning: Samples on which choices at the model's output are made: their extremes set no range, so that a choice that clips
            unseen data is seen to. None: half as many as for calibration. 0: the calibration samples.
        held_out: Samples that judge the winner.
        proof: Samples on which float equivalence is proven; used for nothing else.
        batch_size: Samples per forward call at most. Changes memory and time only: a run continues with another one.
        max_length: Longest text [tokens].
        sampling_rate: Audio sampling rate [Hz]; None: the model's own.
        frames: Video frames per sample; None: the model's own.
        image_size: Height and width [pixels]; None: the model's own.
    """

    kind: Literal["auto", MediaKind] = "auto"
    path: UserPath | None = None
    column: Label = Field(default="text", max_length=512)
    files: Annotated[Label, Field(min_length=1, max_length=512)] | None = None
    label: Label = Field(default="auto", max_length=512)
    factory: CodeName | None = None
    metric: CodeName | None = None
    metric_name: Annotated[Label, Field(max_length=512)] | None = None
    metric_goal: Literal["max", "min"] = "max"
    samples: int = Field(default=64, gt=0, le=MANY)
    tuning: int | None = Field(default=None, ge=0, le=MANY)
    held_out: int = Field(default=32, gt=0, le=MANY)
    proof: int = Field(default=8, gt=0, le=MANY)
    batch_size: int = Field(default=8, gt=0, le=2**16)
    max_length: int = Field(default=256, gt=0, le=2**24)
    sampling_rate: int | None = Field(default=None, ge=1000, le=768_000)
    frames: int | None = Field(default=None, gt=0, le=3000)
    image_size: int | None = Field(default=None, gt=0, le=2**13)

    @property
    def tuned(self) -> int:
        """Samples for tuning: as many as given, or half as many as for calibration."""
        return self.samples // 2 if self.tuning is None else self.tuning


class SchemeConfig(Section):
    """The quantization scheme, see ``alphasmith.objectives.quantization.scheme.Scheme``.

    Attributes:
        sites: ``fnmatch`` pattern of site names -> name of the scheme of these sites, ``float`` to leave them in float; the first
            pattern that a name matches counts, and sites that match none have the scheme of the other fields.
    """

    weights: WeightFormat = "int8"
    weight_granularity: WeightGranularity = "channel"
    group_size: int | None = Field(default=None, gt=0, lt=2**31)
    activations: ActivationFormat = "int8"
    activation_granularity: ActivationGranularity = "static"
    kernel: Kernel = "exact"
    sites: dict[Label, Label] = Field(default={})

    def build(self) -> Scheme:
        """The validated scheme of the sites that are not named; InputError names a contradiction."""
        for name in self.sites.values():
            Scheme.parse(name)
        scheme = Scheme(**self.model_dump(exclude={"sites"}))
        if scheme.is_float and not self.sites:
            raise InputError(
                "scheme.weights", "'none' quantizes nothing", "use int8, int4 or fp8, or name sites in scheme.sites"
            )
        return scheme

    def of(self, site: str) -> Scheme:
        """The scheme of a site.

        Args:
            site: Its name.
        """
        named = next((name for pattern, name in self.sites.items() if matches(site, [pattern])), None)
        return self.build() if named is None else Scheme.parse(named)

    def by_site(self, sites: Iterable[str], *, part: bool = False) -> SiteSchemes:
        """The scheme of every site.

        Args:
            sites: Names of all sites.
            part: Whether these are some of the sites only, and a pattern may match none of them.

        Raises:
            InputError: A pattern matches none of them.
        """
        names = list(sites)
        for pattern in () if part else self.sites:
            if not any(matches(name, [pattern]) for name in names):
                raise InputError(
                    "scheme.sites",
                    f"no site matches {pattern!r}",
                    f"use names or patterns of sites such as {names[0]!r}",
                )
        return SiteSchemes.build(self.build(), {name: self.of(name) for name in names})


class GroupsConfig(Section):
    """How channels are grouped (claims A-6, A-8, A-10) and how wide each group's alpha range is (claim A-3).

    Attributes:
        method: ``kmeans`` on log magnitude, equal-width ``range`` bins, ``outlier``, ``multi_outlier``, ``mean_difference``;
            several: the study of a site chooses among them (scope ``site``; scope ``model`` takes the first).
        k: Groups per site (scope ``site``) or for the whole model (scope ``model``). ``auto``: at every site K is doubled from
            1 while the held-out loss of the noise model's proposal falls by more than its paired standard error.
        bins: Bins of the range methods.
        ranges: ``magnitude``: formula fA6 by the group's magnitude, widened where needed to hold the best single alpha.
            ``strict``: not widened. ``wide``: the overall range 0.1 to 0.9 for every group, widened likewise.
        offsets: Give every group its own factor, ``s = c_k a^alpha / w^(1-alpha)``, searched as its logarithm (scope
            ``site``).
        betas: Give every group its own exponent of w, ``s = a^alpha / w^beta`` (scope ``site``).
    """

    method: GroupMethods = ("kmeans",)
    k: Annotated[int, Field(gt=0, le=2**16)] | Literal["auto"] = 4
    bins: int = Field(default=10, gt=0, le=2**16)
    ranges: Literal["magnitude", "strict", "wide"] = "magnitude"
    offsets: bool = True
    betas: bool = False


class HardwareConfig(Section):
    """The machine that will run the model. Nothing given and nothing detected: rho = 0 (formula fA7).

    Attributes:
        memory: Memory for the model [bytes], ``"8 GiB"``.
        gpu_threads: Threads that run at once.
        bandwidth: Memory bandwidth [bytes/s], ``"900 GB/s"``.
        forwards_per_second: How often the target must run the model; turns weights into required bandwidth.
        detect: Take this machine as the target for every field not given.
        search_memory: Memory this search may use [bytes]; None: what is free now.
    """

    memory: Bytes | None = None
    gpu_threads: int | None = Field(default=None, gt=0, lt=2**31)
    bandwidth: Bytes | None = None
    forwards_per_second: float = Field(default=10.0, gt=0, le=1e9)
    detect: bool = False
    search_memory: Bytes | None = None


class SearchConfig(Section):
    """What is tried.

    Attributes:
        scope: ``site``: a study per site. ``model``: one study, K alphas over all channels of the model (claim A-2).
        trials: Trials per study, baselines included; at least 4.
        sampler: Optuna sampler.
        pruner: What stops a candidate on growing row subsets (scope ``site``) or samples (scope ``model``). ``paired``: a loss
            above the incumbent's by more than three paired standard errors; else an Optuna pruner.
        noise_model: Score the optimum of the rounding-noise model after the baselines, and let it find the best single alpha
            and the per-channel limit (scope ``site``). Off: the grid of ``single_alphas`` exact losses, then the sampler. Where the
            scheme's kernel saturates it proposes alone: the grid finds the single alpha, and there is no limit.
        tolerance: Stop a site's study once its best loss is at most this far above the per-channel limit, relative.
        patience: Stop a site's study after this many sampler trials without improvement.
        seed: Seed of sampling, grouping, calibration rows and samplers.
        rows: Rows of X kept per site and split.
        statistic: Channel statistic a_j used by smoothing; several: the study of a site chooses among them.
        percentile: The percentile when ``statistic`` is ``percentile``.
        shift: Subtract z from every channel before scaling and give it back through the biases, where a site allows it (scope
            ``site``): ``none``, the channel's ``mean`` over the search rows, or the ``middle`` (max + min) / 2 of its
            calibrated range; several: the study of a site chooses.
        range: How the static range of an activation is set (scope ``site``): so wide that rounding and the clipping expected of rows
            that calibration did not show cost least together (``tail``, formula fA11), ``absmax`` over calibration, ``percentile`` of it,
            with a ``margin`` on it; several: the best one on held-out rows, which are too few to show the rare rows that the first one allows for.
        range_percentile: Percentile of the largest magnitude of a row that the range ``percentile`` covers.
        range_margin: Factor of the range ``margin`` on the abs-max.
        objective: What the search at a site lowers (scope ``site``). ``site``: the error of its output, every row and output alike.
            ``output``: its predicted part of the error of the model's output, by weights of rows and outputs (formula fA10).
        loss: Loss at the model's output, scope ``model``: relative MSE, KL divergence, or the task metric (1 is as good
            as the float model, lower is better). A metric scores search and guard alike on its own data: keep a test set. Under scope
            ``site`` the output tells: KL divergence of logits for every token, relative MSE of anything else.
        single_alphas: Points of the single-alpha grid over [0, 1] that finds the best single alpha, where the noise model does
            not find it.
        device: Torch device of the search; None: the first GPU, else the CPU.
        threads: CPU threads of the search at most; None: as many as torch takes (``OMP_NUM_THREADS``). Small sites are searched on one in any case.
        guard: ``output``: the whole model falls back to a baseline (no smoothing, alpha 0.5, one alpha for the whole model,
            the best single alpha of every site) when that has a lower held-out loss at the output, by more than the paired
            standard error but for no smoothing. ``site``: it does only where the winners of the sites are worse than no
            smoothing.
        refine: After the sites (scope ``site``), two studies at the model's output over what site losses cannot see: of kinds of
            sites, then of the sites that add most to the output's error. What each finds is kept only if the held-out output loss falls by
            more than its paired standard error.
        refine_trials: Trials of each of them at most.
        reuse: Start the search at a site from the winner that an earlier run in the same storage recorded for it under the same
            scheme (scope ``site``).
    """

    scope: Scope = "site"
    trials: int = Field(default=24, ge=4, le=MANY)
    sampler: SamplerName = "tpe"
    pruner: PrunerName = "paired"
    noise_model: bool = True
    tolerance: float = Field(default=0.03, ge=0, lt=1)
    patience: int = Field(default=4, ge=1, le=MANY)
    seed: int = Field(default=0, ge=0, lt=2**32)
    rows: int = Field(default=1024, ge=16, le=MANY)
    statistic: ChannelStatistics = ("absmax",)
    percentile: float = Field(default=99.9, gt=0, le=100)
    shift: ShiftStatistics = ("none", "mean")
    range: RangeStatistics = ("tail",)
    range_percentile: float = Field(default=99.9, gt=0, le=100)
    range_margin: float = Field(default=1.1, ge=1, le=4)
    objective: Literal["site", "output"] = "site"
    loss: OutputLoss = "mse"
    single_alphas: int = Field(default=21, ge=3, le=10_001)
    device: Annotated[Label, Field(max_length=64)] | None = None
    threads: int | None = Field(default=None, ge=1, le=2**14)
    guard: Literal["site", "output"] = "output"
    refine: bool = True
    refine_trials: int = Field(default=60, ge=4, le=MANY)
    reuse: bool = True


class SitesConfig(Section):
    """Which sites take part.

    Attributes:
        exclude: fnmatch patterns of operators that are not smoothed.
        skip: fnmatch patterns of operators that are not quantized.
        explicit: ``auto``: sites whose scale cannot be folded divide their input by s inside its quantizer.
            ``never``: such sites keep s = 1.
        experts: Smooth the inputs of mixture-of-experts layers, too.
        formats: What a site may be quantized to, beside or in place of the scheme's own format; a choice for each site is made at the
            model's output, under ``budget``. Empty: the scheme's own, unless there is a budget: then all that ``target`` serves.
    """

    exclude: tuple[Label, ...] = ()
    skip: tuple[Label, ...] = ()
    explicit: Literal["auto", "never"] = "auto"
    experts: bool = False
    formats: Annotated[tuple[SiteFormat, ...], BeforeValidator(one_or_more), AfterValidator(_named_once)] = ()


class ProofConfig(Section):
    """Float equivalence before and after folding.

    Attributes:
        tolerance: Largest relative output error allowed.
    """

    tolerance: float = Field(default=1e-4, gt=0, lt=1)


#: Where candidates are evaluated.
EngineName = Literal["local", "ray"]


class WorkersConfig(Section):
    """Who evaluates candidates, and how dead workers are distinguished from slow ones. Nothing here changes the result of a run.

    Attributes:
        count: Engine ``local``: worker processes; 0 searches in this process, or, of a run on a machine with several GPUs, takes
            one process for each. Engine ``ray``: searches at once at most; 0: as many as the cluster takes.
        threads: CPU threads of each worker process; None: the cores of the machine, shared out.
        lease: Seconds after which a worker without a heartbeat counts as dead. Workers report four times as often.
        attempts: How often a site is tried before it counts as failed, where its worker died; of a compression, how many workers
            may die, one after the other, without a trial that ends in between.
        address: Engine ``ray``: address of a running cluster, ``auto`` to find it; None: the one in ``RAY_ADDRESS``, else a
            new one on this machine.
    """

    count: int = Field(default=0, ge=0, le=2**14)
    threads: int | None = Field(default=None, ge=1, le=2**14)
    lease: float = Field(default=60.0, ge=1, le=30 * 86_400)
    attempts: int = Field(default=3, ge=1, le=1000)
    address: Annotated[Label, Field(max_length=512)] | None = None


class MemoryConfig(Section):
    """How much of the model is in memory at a time.

    Attributes:
        mode: ``resident``: all of it. ``blockwise``: one of its repeated blocks (a Hugging Face folder with a list of layers of one
            class, each fed with what the one before returned), with its rows and activations; what goes from block to block is kept
            in files beside the output folder. ``auto``: blockwise where the whole model does not fit into the memory of the search.
    """

    mode: MemoryMode = "auto"


class RunConfig(Configuration):
    """One launch: model, data, scheme, budget and search settings.

    Attributes:
        name: Free name shown in lists.
        storage: SQLAlchemy URL of the trial database; None: ``alphasmith.db`` (SQLite) in the working directory.
        out: Output folder; None: ``alphasmith-runs/<run>``.
        engine: Where candidates are evaluated: ``local``, in this process or in worker processes; ``ray``, on a Ray cluster.
        artifacts: Where calibration rows and results of sites are kept while a run is not finished: a folder, or
            ``s3://bucket/prefix``; None: a folder beside an SQLite database, else ``alphasmith-artifacts``.
        dtype: Type of the weights in ``smoothed/``: ``own``, the type that the model came in (bfloat16, float16, else float32), or
            ``float32``.
        target: What will serve the model: ``any``, or a stack that limits the formats of sites to those that it serves.
        round_scales: ``pow2``: the scales of folded sites are rounded to powers of two in the end, and no shift goes into biases, so that
            folding changes exponents alone and ``alphasmith undo`` gives the original's bits; the cost is told. ``none``: as found.
    """

    name: Label = Field(default="", max_length=200)
    storage: Annotated[Label, Field(max_length=4096)] | None = None
    out: UserPath | None = None
    engine: EngineName = "local"
    artifacts: Annotated[Label, Field(max_length=4096)] | None = None
    dtype: Literal["own", "float32"] = "own"
    target: Target = "any"
    round_scales: ScaleRounding = "none"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    scheme: Annotated[SchemeConfig, BeforeValidator(scheme_fields)] = SchemeConfig()
    groups: GroupsConfig = GroupsConfig()
    hardware: HardwareConfig = HardwareConfig()
    memory: MemoryConfig = MemoryConfig()
    search: SearchConfig = SearchConfig()
    sites: SitesConfig = SitesConfig()
    proof: ProofConfig = ProofConfig()
    budget: BudgetConfig = BudgetConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self.budget.check(self.scheme.build(), self.sites.formats, self.target)
        if self.memory.mode == "blockwise" and (self.sites.formats or self.budget.given):
            problem = (
                "is 'blockwise', where formats of sites are not chosen: that needs the whole model again and again"
            )
            raise InputError("memory.mode", problem, "use 'resident', or leave sites.formats and budget out")
        if self.model.demo and (self.model.path or self.model.factory):
            raise InputError("model.demo", "given together with another model", "keep one of demo, path and factory")
        if self.model.factory_path and not self.model.factory:
            raise InputError("model.factory_path", "given without a factory", "add model.factory or remove it")
        if self.groups.k == "auto" and (self.search.scope == "model" or not self.search.noise_model):
            raise InputError("groups.k", "is 'auto' without the noise model of a site", "give a number of groups")
        if self.data.path and self.data.factory:
            raise InputError("data.factory", "given together with data.path", "keep one of them")
        return self

    @property
    def site_search(self) -> SearchConfig:
        """Settings of the search at a site: without shifts where folding has to be exact, since biases round."""
        return self.search if self.round_scales == "none" else self.search.model_copy(update={"shift": ("none",)})

    @classmethod
    def from_toml(cls, path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
        """Read a TOML file, then apply ``a.b=c`` overrides; relative paths are relative to the file.

        Raises:
            InputError: Missing file, broken TOML, unknown or invalid field.
        """
        paths = (("model", "path"), ("model", "factory_path"), ("data", "path"), ("budget", "latency"), (None, "out"))
        return cls.build(read_toml(path, paths, overrides))


def resume_command(run_id: str, storage: str) -> str:
    """The command that resumes a run.

    Args:
        run_id: The run.
        storage: Address of its database, passwords masked.
    """
    command = f"alphasmith resume {run_id}"
    return command if storage == DEFAULT_STORAGE else f"{command} --storage {shlex.quote(storage)}"
