"""The manifest: the JSON that explains a result completely.

The models below are the schema, ``manifest.schema.json`` is the same as JSON Schema, and ``schema_version`` counts changes
that a reader must know about. Fields marked ``Volatile`` hold times, measurements and names made from them; without them
(``Manifest.without_times``) equal inputs and an equal seed give equal bytes.

Tensors are not in here: ``scales.safetensors`` holds ``scale/SITE`` (C,) float32, ``shift/SITE`` (C,) where there is one, and,
for folded sites, ``channel/SITE/I``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, JsonValue, ValidationError, model_validator

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.literals import Scope
from alphasmith.objectives.reading import parse_json, read_text
from alphasmith.storage.files.durable import ArtifactDigest, artifact_kind, canonical_json
from alphasmith.storage.output.entries import (
    ArtifactEntry,
    ConventionsEntry,
    GuardEntry,
    HardwareEntry,
    MemoryEntry,
    ModelEntry,
    OutputEntry,
    PayloadEntry,
    ProofEntry,
    RefinementEntry,
    RoundingEntry,
    RunEntry,
    SchemeEntry,
    Sha256,
    SiteEntry,
    SkippedEntry,
    WeightEntry,
)
from alphasmith.storage.output.format_entries import FormatAdvice, FormatsEntry
from alphasmith.storage.output.training_entry import TrainingEntry
from alphasmith.storage.runs.entries import Group, Part, Volatile, VolatileMark

#: Raised when a reader of the previous version would misread a manifest.
SCHEMA_VERSION: Literal[3] = 3

#: Versions that can be read: what came later has defaults that mean what the earlier ones meant.
READABLE_VERSIONS = (1, 2, SCHEMA_VERSION)

#: File name inside the output folder of a run.
FILE_NAME = "manifest.json"


class Manifest(Part):
    """Everything that explains one result."""

    schema_version: Literal[3] = SCHEMA_VERSION
    run: RunEntry
    versions: dict[str, str]
    """Of alphasmith, torch, optuna, python, transformers."""
    config: dict[str, JsonValue]
    """The configuration as used, defaults filled in, passwords masked."""
    seeds: dict[str, int]
    """Every seed by purpose."""
    notes: tuple[str, ...] = ()
    """What a reader should know of model and data."""
    model: ModelEntry
    data_digest: Sha256
    """Over the content of all batches."""
    scheme: SchemeEntry
    conventions: ConventionsEntry
    hardware: HardwareEntry
    scope: Scope
    space_hash: str
    """Digest of the search space."""
    study: Annotated[str | None, Volatile] = None
    """Optuna study of the whole model, in scope ``model``."""
    groups: tuple[Group, ...] = ()
    """Groups over the whole model, in scope ``model``."""
    sites: tuple[SiteEntry, ...]
    skipped: tuple[SkippedEntry, ...] = ()
    """Layers left in float, with reasons: the names and aliases of ``weights`` that are."""
    weights: tuple[WeightEntry, ...] = ()
    """Every parameter of two or more dimensions. Empty: not recorded."""
    output: OutputEntry = OutputEntry()
    proof: ProofEntry | None = None
    """Null when no scale was folded, or where the model was trained further: then it does not apply."""
    payload: PayloadEntry
    guard: tuple[GuardEntry, ...] = ()
    refinement: RefinementEntry | None = None
    """Null where there was none."""
    formats: FormatsEntry | None = None
    """Formats of sites that were chosen among. Null: the scheme's own at every site."""
    format_advice: FormatAdvice | None = None
    """What other formats at a few sites would bring. Null: nothing was tried, or the error comes from many sites."""
    rounding: RoundingEntry | None = None
    """Scales of folded sites that were rounded, and what that cost at the output. Null: they are as they were found."""
    training: TrainingEntry | None = None
    """Where the compressed model was trained further: all else in this manifest is about the run that it comes from. Null: it was not."""
    memory: MemoryEntry
    artifacts: tuple[ArtifactEntry, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = Counter(site.name for site in self.sites)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"site {twice[0]!r} occurs twice")
        known = {group.index for group in self.groups}
        for site in self.sites:
            if not site.groups and set(site.labels) - known:
                raise ValueError(f"site {site.name!r} has labels of groups that are nowhere described")
        if self.proof is not None and self.proof.error > self.proof.tolerance:
            raise ValueError(f"proof error {self.proof.error} is above its tolerance {self.proof.tolerance}")
        if self.training is not None and self.proof is not None:
            raise ValueError("a trained model has a proof of equivalence, which does not apply to it")
        try:
            canonical_json(self.config)  # numbers too large for a float arrive as infinity in free values
        except NonFiniteError as error:
            raise ValueError(f"config is not finite: {error}") from error
        return self

    def with_artifacts(self, written: Iterable[ArtifactDigest]) -> Manifest:
        """The same manifest listing these files; reports show times, so their digests do not count as reproducible."""
        entries = (
            ArtifactEntry(
                kind=artifact_kind(a.path),
                path=a.path,
                sha256=a.sha256,
                bytes=a.bytes,
                reproducible=artifact_kind(a.path) != "report",
            )
            for a in written
        )
        return self.model_copy(update={"artifacts": tuple(entries)})

    def to_json(self) -> str:
        """Canonical text: keys sorted, UTF-8, one newline at the end."""
        return canonical_json(self.model_dump(mode="json"))

    def without_times(self) -> str:
        """The same without everything volatile: equal for equal inputs, seed and machine."""
        return canonical_json(_stable(self))


def schema() -> dict[str, Any]:
    """The manifest as JSON Schema (draft 2020-12), as it is written."""
    made = Manifest.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def schema_text() -> str:
    """Content of ``manifest.schema.json``."""
    return canonical_json(schema())


def parse_manifest(text: str, *, name: str = FILE_NAME) -> Manifest:
    """Read a manifest of this or an earlier version; an earlier one becomes one of this version, defaults filled in.

    Args:
        text: JSON.
        name: What to call it in errors.

    Raises:
        InputError: Not JSON, of another schema version, or not a manifest; names the first field at fault.
    """
    content = parse_json(text, field=name, what="the manifest", remedy="restore the file")
    if isinstance(content, dict) and content.get("kind") == "compression":
        raise InputError(name, "is the manifest of a joint compression", "read its folder with load_compressed")
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in READABLE_VERSIONS:
        raise InputError(
            name,
            f"has schema_version {version!r}, not one of {', '.join(map(str, READABLE_VERSIONS))}",
            "read it with the Alphasmith that wrote it",
        )
    try:
        return Manifest.model_validate_json(json.dumps(_brought_up(content)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise InputError(name, f"{where}: {first['msg']}", "restore the file") from error


def _brought_up(content: dict[str, Any]) -> dict[str, Any]:
    """The same as of this version: sites of the earlier ones had no number, only their order."""
    sites = content.get("sites")
    if isinstance(sites, list) and content["schema_version"] < SCHEMA_VERSION:
        numbered = [{"position": i, **site} if isinstance(site, dict) else site for i, site in enumerate(sites)]
        content = content | {"sites": numbered}
    return content | {"schema_version": SCHEMA_VERSION}


def read_manifest(path: Path) -> Manifest:
    """Read a manifest from a file, or from the output folder that holds it.

    Raises:
        InputError: The file is missing or unreadable; or as ``parse_manifest``.
    """
    file = path / FILE_NAME if path.is_dir() else path
    text = read_text(file, field=str(file), remedy="give the output folder of a run")
    return parse_manifest(text, name=str(file))


def _stable(part: BaseModel) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, info in type(part).model_fields.items():
        if any(isinstance(mark, VolatileMark) for mark in info.metadata):
            continue
        if isinstance(part, ArtifactEntry) and not part.reproducible and name in {"sha256", "bytes"}:
            continue
        kept[info.alias or name] = _stable_value(getattr(part, name))
    return kept


def _stable_value(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _stable(value)
    if isinstance(value, tuple):
        return [_stable_value(item) for item in value]
    return value
