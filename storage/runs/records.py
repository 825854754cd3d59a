"""Records of runs, sites, groups and trials: frozen, validated, free of SQL and of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import CandidateKind, Scope
from alphasmith.objectives.reading import value_problem
from alphasmith.objectives.text import is_control
from alphasmith.storage.files.durable import canonical_json
from alphasmith.storage.runs.entries import prose

RunStatus = Literal["created", "running", "finished", "failed", "interrupted"]
TrialState = Literal["complete", "pruned", "failed"]
ParamValue = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """An ended trial as Optuna's tables hold it.

    Attributes:
        study_name: Optuna's study name: the run, a slash, the site, ``model`` or ``refinement``.
        number: Optuna's trial number in it.
        kind: Who proposed it.
        params: Parameter values, those with a choice.
        state: How it ended.
        loss: Its loss; None unless complete.
        seconds: How long it took [s].
        reason: Why it failed; empty otherwise.
    """

    study_name: str
    number: int
    kind: CandidateKind
    params: Mapping[str, ParamValue]
    state: TrialState
    loss: float | None
    seconds: float
    reason: str = ""

    @property
    def site(self) -> str:
        """What it is a trial of: a site, ``model`` or ``refinement``."""
        return self.study_name.partition("/")[2]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is known about a run before it starts.

    Attributes:
        name: Free text chosen by the user.
        model_digest: sha256 over the parameters.
        data_digest: sha256 over the batches.
        config: The configuration, JSON-able. Addresses in it must be masked by the caller.
        scheme: Name of the quantization scheme.
        hardware: The hardware budget, JSON-able.
        scope: Groups per site, or over the whole model.
        versions: Library versions.
        space_hash: Digest of the search space; empty until the run has finished.
        config_digest: sha256 over the part of the configuration that decides the result.
        artifacts: Address of the artifact store, without password; a launch that goes on may name another.
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
        refinement: What the refinement at the model's output did, JSON-able, see ``output.entries.RefinementEntry``; None
            where there was none.
        driver: Who records it, or did until it vanished; None: nobody, as after an orderly end.
        driver_until: When the driver counts as dead unless it sends a heartbeat, by the database's clock.
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


@dataclass(frozen=True, kw_only=True)
class UnreadableRun:
    """A row of the table of runs that holds no record.

    Attributes:
        id: Its id.
        reason: What is wrong with it, in one clause.
    """

    id: str
    reason: str


def utc(moment: datetime) -> datetime:
    """The same moment in UTC.

    Raises:
        InputError: The time has no zone.
    """
    if moment.tzinfo is None:
        raise InputError("clock", f"{moment.isoformat()} has no time zone", "use datetime.now(UTC)")
    return moment.astimezone(UTC)


def check_json(name: str, value: Any) -> None:
    """Refuse what a JSON column of some database cannot hold.

    Args:
        name: What to call it in errors.
        value: Mappings with text keys, lists, tuples, text, numbers, booleans, None.

    Raises:
        NonFiniteError: A number is NaN or infinite.
        InputError: Something JSON or a database cannot hold.
    """
    problem = value_problem(value)
    if problem:
        raise InputError(name, problem, "use plain nested values of printable text")
    text = canonical_json(value, indent=None)
    if "\\u0000" in text or prose(text) != text:
        raise InputError(name, "holds characters no database keeps", "use printable Unicode text")


def _choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise InputError(name, f"{value!r} is unknown", f"use one of {', '.join(get_args(choices))}")


def check_label(name: str, value: str) -> None:
    """Refuse a free text that would steer the terminal it is shown on.

    Args:
        name: What to call it in errors.
        value: The text.

    Raises:
        InputError: It holds control characters.
    """
    if any(is_control(character) for character in value):
        raise InputError(name, f"{value!r} holds control characters", "use printable text in one line")


def _name(name: str, value: str, *, longest: int = 512, empty: bool = False) -> None:
    if not value and not empty:
        raise InputError(name, "is empty", "give it a name")
    if len(value) > longest:
        raise InputError(name, f"has {len(value)} characters", f"use at most {longest}")
    if prose(value) != value:
        raise InputError(name, f"{value!r} holds characters no database keeps", "use printable Unicode text")
