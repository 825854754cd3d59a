"""What records are made of: frozen, validated, free of SQL and of torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.storage.files import canonical_json

RunStatus = Literal["created", "running", "finished", "failed", "interrupted"]
Scope = Literal["site", "model"]
SiteMode = Literal["fold", "explicit", "left"]
TrialKind = Literal["identity", "alpha_0.5", "best_single", "noise_model", "sampler", "refined", "reused"]
RangeStatistic = Literal["absmax", "percentile", "margin"]
TrialState = Literal["complete", "pruned", "failed"]
ParamValue = float | int | str | bool

#: Significant digits in which two parameter values count as the same trial.
PARAM_DIGITS = 9


def params_hash(params: Mapping[str, ParamValue]) -> str:
    """Digest of canonical parameters: the key under which a repeated proposal is recognised.

    Numbers are compared at ``PARAM_DIGITS`` significant digits, 1 equals 1.0 and -0.0 equals 0.0, as they do after a
    journey through a database. The order of the names does not matter.

    Args:
        params: Parameter values by name.

    Returns:
        64 hexadecimal digits.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    canonical = {name: _canonical(name, value) for name, value in params.items()}
    return hashlib.sha256(canonical_json(canonical, indent=None).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Relative squared quantization errors on one set of rows (dimensionless), formula fA5; None: that baseline failed.

    Attributes:
        identity: Without smoothing.
        alpha_half: With alpha 0.5 everywhere.
        best_single: With the best single alpha.
        best_single_alpha: That alpha.
        ours: Of the winner.
        limit: The per-channel limit, or None when it was not computed.
    """

    identity: float | None
    alpha_half: float | None
    best_single: float | None
    best_single_alpha: float
    ours: float
    limit: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            _finite(item.name, getattr(self, item.name), at_least=None if item.name == "best_single_alpha" else 0.0)


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """One group of channels and its alpha.

    Attributes:
        index: Label of the group within its site, or within the model.
        size: Number of channels.
        low: Lower end of the alpha range.
        high: Upper end of the alpha range.
        alpha: The chosen alpha; outside the range when a baseline won, None when identity won (no alpha gives s = 1).
        magnitude: The magnitude the group was formed by (its centre).
        explanation: Why the range is what it is.
        beta: The chosen exponent of w; None: 1 - alpha (formula fA1).
        offset: Natural logarithm of the group's own factor of its scales; None: none.
    """

    index: int
    size: int
    low: float
    high: float
    alpha: float | None
    magnitude: float
    explanation: str = ""
    beta: float | None = None
    offset: float | None = None

    def __post_init__(self) -> None:
        _count("groups.index", self.index)
        _count("groups.size", self.size)
        for name in ("low", "high", "alpha", "magnitude", "beta", "offset"):
            _finite(f"groups.{name}", getattr(self, name))
        if self.low > self.high:
            raise InputError("groups.low", f"{self.low} is above high {self.high}", "exchange the ends of the range")
        object.__setattr__(self, "explanation", prose(self.explanation))


@dataclass(frozen=True, kw_only=True)
class TrialDigest:
    """What is kept of an Optuna trial. ``TrialDigest.of`` fills in the hash.

    Attributes:
        study_name: Optuna's study name.
        trial_number: Optuna's trial number in it.
        kind: Who proposed it.
        params: Parameter values.
        params_hash: ``params_hash(params)``.
        state: How it ended.
        loss: Its loss; None for a failed trial, and for a pruned one without any intermediate value.
        seconds: How long it took [s].
        reason: Why it failed or was pruned; empty otherwise.
    """

    study_name: str
    trial_number: int
    kind: TrialKind
    params: Mapping[str, ParamValue]
    params_hash: str
    state: TrialState
    loss: float | None
    seconds: float
    reason: str = ""

    @classmethod
    def of(
        cls,
        *,
        study_name: str,
        trial_number: int,
        kind: TrialKind,
        params: Mapping[str, ParamValue],
        state: TrialState,
        loss: float | None,
        seconds: float,
        reason: str = "",
    ) -> TrialDigest:
        """A digest with the hash computed from ``params``."""
        return cls(
            study_name=study_name,
            trial_number=trial_number,
            kind=kind,
            params=params,
            params_hash=params_hash(params),
            state=state,
            loss=loss,
            seconds=seconds,
            reason=reason,
        )

    def __post_init__(self) -> None:
        _name("trials.study_name", self.study_name)
        _count("trials.trial_number", self.trial_number)
        _choice("trials.kind", self.kind, TrialKind)
        _choice("trials.state", self.state, TrialState)
        _finite("trials.loss", self.loss, at_least=0.0)
        _finite("trials.seconds", self.seconds, at_least=0.0)
        check_json("trials.params", self.params)
        if (self.loss is None) != (self.state == "failed") and self.state != "pruned":
            raise InputError(
                "trials.loss", f"{self.loss} contradicts state {self.state!r}", "give a loss to complete trials only"
            )
        if self.state == "failed" and not self.reason:
            raise InputError("trials.reason", "is empty for a failed trial", "say why it failed")
        object.__setattr__(self, "reason", prose(self.reason))


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """One site of a run.

    Attributes:
        name: Site name, unique in the run.
        position: Its place in forward order, from 0.
        mode: What was done with it.
        reason: Why it is not folded; empty when it is.
        channels: C.
        operators: Names of the operators that read it.
        study_name: Optuna study of this site; None in scope ``model`` and for sites left alone.
        search: Losses on the calibration rows; None for sites left alone.
        held_out: Losses on rows the search never saw.
        winner: Kind of the winning trial.
        trials: Number of trials.
        exact_evaluations: Number of exact losses computed, all row subsets counted.
        seconds: Time spent on the site [s].
        groups: Its groups; empty in scope ``model``.
        shift: Whether a shift is subtracted from every channel before it is scaled.
        range_statistic: How the static range of the activation was set.
        range_factor: That range over the calibrated abs-max (dimensionless).
        grouping: Grouping method; empty for sites left alone.
        statistic: Channel statistic a_j; empty for sites left alone.
        facts: How the search went, JSON-able, see ``manifest_parts.SearchFacts``; None where nothing was searched.
    """

    name: str
    position: int
    mode: SiteMode
    reason: str = ""
    channels: int
    operators: tuple[str, ...] = ()
    study_name: str | None = None
    search: Losses | None = None
    held_out: Losses | None = None
    winner: TrialKind | None = None
    trials: int = 0
    exact_evaluations: int = 0
    seconds: float = 0.0
    groups: tuple[GroupRecord, ...] = ()
    shift: bool = False
    range_statistic: RangeStatistic = "absmax"
    range_factor: float = 1.0
    grouping: str = ""
    statistic: str = ""
    facts: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _name("sites.name", self.name)
        if self.study_name is not None:
            _name("sites.study_name", self.study_name)
        _choice("sites.mode", self.mode, SiteMode)
        if self.winner is not None:
            _choice("sites.winner", self.winner, TrialKind)
        for counted in ("position", "channels", "trials", "exact_evaluations"):
            _count(f"sites.{counted}", getattr(self, counted))
        _finite("sites.seconds", self.seconds, at_least=0.0)
        _choice("sites.range_statistic", self.range_statistic, RangeStatistic)
        _finite("sites.range_factor", self.range_factor, at_least=0.0)
        _name("sites.grouping", self.grouping, longest=32, empty=True)
        _name("sites.statistic", self.statistic, longest=16, empty=True)
        check_json("sites.operators", list(self.operators))
        check_json("sites.facts", self.facts)
        _distinct("sites.groups", [group.index for group in self.groups])
        object.__setattr__(self, "reason", prose(self.reason))


@dataclass(frozen=True, kw_only=True)
class ArtifactRecord:
    """One file of a run's output folder.

    Attributes:
        kind: ``manifest``, ``smoothed``, ``quantized``, ``scales``, ``report``, ...
        path: Relative to the output folder, with ``/``.
        sha256: 64 hexadecimal digits.
        bytes: Size [bytes].
    """

    kind: str
    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        _name("artifacts.kind", self.kind, longest=32)
        _name("artifacts.path", self.path)
        _count("artifacts.bytes", self.bytes)
        if len(self.sha256) != 64:
            raise InputError("artifacts.sha256", f"{self.sha256!r} is no sha256", "give 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything about a run that is known before it starts and never changes.

    Attributes:
        name: Free text chosen by the user.
        model_digest: sha256 over the parameters.
        data_digest: sha256 over the batches.
        config: The configuration, JSON-able. Addresses in it must be masked by the caller.
        scheme: Name of the quantization scheme.
        hardware: The hardware budget, JSON-able.
        scope: Groups per site, or over the whole model.
        versions: Library versions.
        space_hash: Digest of the search space; a resumed run with another one must be refused.
        config_digest: sha256 over the part of the configuration that decides the result.
        artifacts: Address of the artifact store; it holds no password.
    """

    name: str
    model_digest: str
    data_digest: str
    config: Mapping[str, Any]
    scheme: str
    hardware: Mapping[str, Any]
    scope: Scope
    versions: Mapping[str, str]
    space_hash: str
    config_digest: str = ""
    artifacts: str = ""

    def __post_init__(self) -> None:
        _name("run.name", self.name, empty=True)
        _name("run.scheme", self.scheme, longest=64)
        _choice("run.scope", self.scope, Scope)
        for digest in ("model_digest", "data_digest", "space_hash", "config_digest"):
            _name(f"run.{digest}", getattr(self, digest), longest=64, empty=True)
        _name("run.artifacts", self.artifacts, empty=True)
        for content in ("config", "hardware", "versions"):
            check_json(f"run.{content}", getattr(self, content))


@dataclass(frozen=True, kw_only=True)
class RunRecord(RunSpec):
    """A run as stored.

    Attributes:
        id: Short and unique, e.g. ``r-20260131-1f9c3a``.
        status: See the states in ``tables``.
        reason: Why it failed or was interrupted; empty otherwise.
        created: When the record was made, zone-aware UTC.
        started: When it last started or resumed.
        finished: When it finished, failed or was interrupted.
        folder: Output folder, absolute; empty until it is written.
        refinement: What the refinement at the model's output did, JSON-able, see ``manifest_parts.RefinementEntry``; None
            where there was none.
        driver: Who records it, or did until it vanished; None: nobody, as after an orderly end.
        driver_until: When the driver counts as dead unless it is heard of again, by the database's clock.
    """

    id: str
    status: RunStatus = "created"
    reason: str = ""
    created: datetime
    started: datetime | None = None
    finished: datetime | None = None
    folder: str = ""
    refinement: Mapping[str, Any] | None = None
    driver: str | None = None
    driver_until: datetime | None = None


def utc(moment: datetime) -> datetime:
    """The same moment in UTC.

    Raises:
        InputError: The time has no zone.
    """
    if moment.tzinfo is None:
        raise InputError("clock", f"{moment.isoformat()} has no time zone", "use datetime.now(UTC)")
    return moment.astimezone(UTC)


def prose(text: str) -> str:
    """Text as every database can hold it: NUL and lone surrogates are written out instead of stored."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def check_json(name: str, value: Any) -> None:
    """Refuse what a JSON column of some database cannot hold.

    Args:
        name: What to call it in errors.
        value: Mappings with text keys, lists, tuples, text, numbers, booleans, None.

    Raises:
        NonFiniteError: A number is NaN or infinite.
        InputError: Something JSON or a database cannot hold.
    """
    text = canonical_json(value, indent=None)
    if "\\u0000" in text or prose(text) != text:
        raise InputError(name, "holds characters no database keeps", "use printable Unicode text")


def _canonical(name: str, value: ParamValue) -> str | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return f"text {value}"
    if isinstance(value, int):
        value = float(value) if abs(value) < 10**PARAM_DIGITS else value
    _finite(f"params.{name}", value)
    return str(value) if isinstance(value, int) else format(value + 0.0, f".{PARAM_DIGITS}g")


def _finite(name: str, value: float | None, *, at_least: float | None = None) -> None:
    if value is None:
        return
    if not math.isfinite(value):
        raise NonFiniteError(f"{name} is {value}; a candidate without a finite value is a failed trial with a reason")
    if at_least is not None and value < at_least:
        raise InputError(name, f"{value} is negative", "errors and durations are at least 0")


def _count(name: str, value: int) -> None:
    if value < 0 or value != int(value):
        raise InputError(name, f"{value} is not a count", "give a whole number of at least 0")


def _choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise InputError(name, f"{value!r} is unknown", f"use one of {', '.join(get_args(choices))}")


def _name(name: str, value: str, *, longest: int = 512, empty: bool = False) -> None:
    if not value and not empty:
        raise InputError(name, "is empty", "give it a name")
    if len(value) > longest:
        raise InputError(name, f"has {len(value)} characters", f"use at most {longest}")
    if prose(value) != value:
        raise InputError(name, f"{value!r} holds characters no database keeps", "use printable Unicode text")


def _distinct(name: str, values: Sequence[int]) -> None:
    if len(set(values)) != len(values):
        raise InputError(name, f"{sorted(values)} holds an index twice", "number the groups once each")
