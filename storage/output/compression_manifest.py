"""The manifest of a joint compression: the JSON that explains a compressed model completely.

The models below are the schema, ``compression_manifest.schema.json`` is the same as JSON Schema. Fields marked ``Volatile`` hold times and
names made from them. What it takes to build the model again is not in here but in ``structure.json`` and ``compressed.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.packed.packing import PackedModel, PackedTensor
from alphasmith.objectives.literals import StoredAs
from alphasmith.objectives.reading import parse_json, read_text
from alphasmith.storage.files.durable import ArtifactDigest, artifact_kind, canonical_json
from alphasmith.storage.output.entries import ArtifactEntry, ModelEntry, RunEntry, Sha256
from alphasmith.storage.output.manifest import FILE_NAME
from alphasmith.storage.runs.entries import Part

#: Raised when a reader of the previous version would misread a manifest.
SCHEMA_VERSION: Literal[1] = 1


class RoundEntry(Part):
    """One round of decomposition and training."""

    number: PositiveInt
    """From 1."""
    energy: dict[str, float] = Field(default={})
    """Class of layers -> share of the squared singular values asked for."""
    rank: dict[str, PositiveInt] = Field(default={})
    """Class of layers -> rank asked for in its place."""
    ranks: dict[str, PositiveInt] = Field(default={})
    """Layer -> its rank after the round; without those that are dense."""
    fallen: tuple[str, ...] = ()
    """Layers whose rank fell, or that became factored."""
    numbers: NonNegativeInt
    """Parameters of the whole model."""
    steps: NonNegativeInt = 0
    """Updates of its training."""
    metrics: dict[str, float | None] = Field(default={})
    """Metric -> value on the study split; null: not measured."""
    drops: dict[str, float | None] = Field(default={})
    """Metric -> what was lost against the baseline, in the unit of the metric; below 0: gained; null: not measured."""
    verdict: Literal["met", "violated", "not judged"]
    """What the performance-drop condition says of it."""
    reason: str = ""
    """The same in words, with the numbers."""


class RoundsEntry(Part):
    """Rounds of decomposition and training."""

    status: str
    """Why they ended."""
    reason: str = ""
    """The same in words."""
    kept: NonNegativeInt = 0
    """Number of the last round that met the condition; 0: the model as it was."""
    rounds: tuple[RoundEntry, ...] = ()
    """All of them, the one that broke the condition included."""


class TrialEntry(Part):
    """The trial of the study that was written."""

    number: NonNegativeInt
    """In the study."""
    parameters: dict[str, JsonValue] = Field(default={})
    """What it chose."""
    objectives: dict[str, float] = Field(default={})
    """Objective -> value."""
    constraints: dict[str, float] = Field(default={})
    """Constraint -> value; at most 0 is within the limits."""
    trials: NonNegativeInt = 0
    """All trials of the study."""


class FrontEntry(Part):
    """A trial within the limits that no other one beats."""

    number: NonNegativeInt
    """In the study."""
    stored_bytes: PositiveInt
    milliseconds: NonNegativeFloat | None = None
    """Of a forward call on one thread; null: not asked for."""
    study: dict[str, float | None] = Field(default={})
    """Metric -> value on the split that decided; null: not measured."""
    drops: dict[str, float] = Field(default={})
    """Metric -> how much worse than the original, on this split."""
    test: dict[str, float | None] = Field(default={})
    """Metric -> value on the split that was looked at once."""


class MetricEntry(Part):
    """A metric of the float model and of the compressed one; null: not measured."""

    name: str
    goal: Literal["max", "min"]
    """Whether larger or smaller is better."""
    unit: str = ""
    """Empty: none."""
    tolerance: str = ""
    """What may be lost, in words; empty: nothing is asked."""
    study_float: float | None = None
    """On the split that decided."""
    study_compressed: float | None = None
    test_float: float | None = None
    """On the split that was looked at once."""
    test_compressed: float | None = None
    notes: tuple[str, ...] = ()
    """What was left out, with counts, and why something was not measured."""


class BytesEntry(Part):
    """Bytes by part; the header of ``compressed.safetensors``, of names and places, comes on top."""

    original: NonNegativeInt
    """Tensors of the float model, tied ones once."""
    tables: NonNegativeInt
    """Entries of all tables, and how many each has."""
    indices: NonNegativeInt
    """Packed or coded, with what it takes to read the code."""
    floats: NonNegativeInt
    """Tensors that stay float."""
    integers: NonNegativeInt
    """All other tensors."""
    structure: NonNegativeInt
    """``structure.json``."""
    stored: NonNegativeInt
    """The five parts together."""

    @model_validator(mode="after")
    def _summed(self) -> Self:
        if self.tables + self.indices + self.floats + self.integers + self.structure != self.stored:
            raise ValueError(f"the parts do not make {self.stored} stored bytes")
        return self

    @classmethod
    def of(cls, packed: PackedModel, original: int) -> Self:
        """Those of a packed model.

        Args:
            packed: What is stored.
            original: Bytes of the float model.
        """
        parts = packed.bytes()
        return cls(original=original, stored=parts.total, **vars(parts))


class CompressedTensorEntry(Part):
    """What became of one tensor."""

    name: str
    stored: StoredAs
    """As a codebook, in its own type, or a float32 one as float16."""
    numbers: NonNegativeInt
    """Its elements."""
    entries: NonNegativeInt = 0
    """Entries of its largest table; 0: it has none."""
    requested: NonNegativeInt = 0
    """Entries asked for."""
    bits: NonNegativeInt = 0
    """Bits of a packed index."""
    coding: str = ""
    """How its indices are stored."""
    float_bytes: NonNegativeInt
    stored_bytes: NonNegativeInt
    packed_bytes: NonNegativeInt = 0
    """What packed indices take, tables included."""
    huffman_bytes: NonNegativeInt = 0
    """What a Huffman code takes, likewise."""
    sqnr: float | None = None
    """Energy of the tensor over that of what was lost [dB]; null: nothing was lost, or the tensor is zero."""
    reason: str = ""
    """Why it is no codebook."""
    notes: tuple[str, ...] = ()


class CompressedLayerEntry(Part):
    """What became of one module that has tensors."""

    name: str
    """Empty: the model itself."""
    kind: str
    """Class of the layer."""
    form: str = "dense"
    """``dense``; ``linear`` and ``conv``: factors that run in two steps; ``product``: factors that are multiplied at every call;
    ``branch``: factors of the smoothed weight beside a quantized residual."""
    rank: NonNegativeInt = 0
    """Of its factors or its branch; 0: none."""
    kept: Annotated[float | None, Field(ge=0, le=1)] = None
    """Share of the squared singular values that its factors have; null: not known."""
    reason: str = ""
    """Why it is a branch in place of truncation, or in no other form."""
    tensors: tuple[CompressedTensorEntry, ...]


class FormEntry(Part):
    """How a layer runs where its result was measured; every reader measures on its own machine."""

    layer: str
    runs: str
    """``factored``, ``dense``, ``cell`` or ``fused``."""
    seconds: dict[str, NonNegativeFloat] = Field(default={})
    """Form -> seconds of one call."""
    reason: str = ""


class CompressionManifest(Part):
    """Everything that explains one compressed model."""

    kind: Literal["compression"] = "compression"
    schema_version: Literal[1] = SCHEMA_VERSION
    run: RunEntry
    versions: dict[str, str]
    """Of alphasmith, torch, optuna, python."""
    config: dict[str, JsonValue]
    """The configuration as used, defaults filled in, passwords masked."""
    seeds: dict[str, int] = Field(default={})
    """Every seed by purpose."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
    model: ModelEntry
    data_digest: Sha256 | None = None
    """Over the content of all samples; null: not known."""
    rounds: RoundsEntry | None = None
    """Null: there were none."""
    trial: TrialEntry | None = None
    """Null: no study chose it."""
    front: tuple[FrontEntry, ...] = ()
    """Smallest first; empty: no study."""
    metrics: tuple[MetricEntry, ...] = ()
    bytes: BytesEntry
    folded: tuple[str, ...] = ()
    """Normalizations that became part of the layer before them."""
    taken_apart: tuple[str, ...] = ()
    """Recurrent layers and attention modules that are stored as linear layers."""
    layers: tuple[CompressedLayerEntry, ...]
    forms: tuple[FormEntry, ...] = ()
    artifacts: tuple[ArtifactEntry, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [tensor.name for layer in self.layers for tensor in layer.tensors]
        if len(set(names)) != len(names):
            raise ValueError("a tensor occurs twice")
        stored = sum(tensor.stored_bytes for layer in self.layers for tensor in layer.tensors)
        if stored != self.bytes.stored - self.bytes.structure:
            raise ValueError(f"the tensors take {stored} bytes, not {self.bytes.stored - self.bytes.structure}")
        try:
            canonical_json(self.config)  # numbers too large for a float arrive as infinity in free values
        except NonFiniteError as error:
            raise ValueError(f"config is not finite: {error}") from error
        return self

    def with_artifacts(self, written: Iterable[ArtifactDigest]) -> CompressionManifest:
        """The same manifest listing these files; reports show times, so their digests do not count as reproducible."""
        entries = tuple(
            ArtifactEntry(
                kind=artifact_kind(a.path), path=a.path, sha256=a.sha256, bytes=a.bytes,
                reproducible=artifact_kind(a.path) != "report",
            )
            for a in written
        )  # fmt: skip
        return self.model_copy(update={"artifacts": entries})

    def to_json(self) -> str:
        """Canonical text: keys sorted, UTF-8, one newline at the end."""
        return canonical_json(self.model_dump(mode="json"))


def layer_entries(
    packed: PackedModel, *, kept: dict[str, float] | None = None, reasons: dict[str, str] | None = None
) -> tuple[CompressedLayerEntry, ...]:
    """What became of every layer of a packed model, in its order.

    Args:
        packed: With its report.
        kept: Layer -> share of the squared singular values that its factors have.
        reasons: Layer -> why it is a branch in place of truncation, or in no other form.
    """
    of_layer: dict[str, list[PackedTensor]] = {}
    for tensor in packed.report:
        of_layer.setdefault(tensor.layer, []).append(tensor)
    found = []
    for name, tensors in of_layer.items():
        form = packed.structure.layout.factored.get(name)
        branch = packed.structure.layout.branches.get(name)
        entry = CompressedLayerEntry(
            name=name,
            kind=tensors[0].kind,
            form="branch" if branch is not None else "dense" if form is None else form.kind,
            rank=branch.rank if branch is not None else 0 if form is None else form.rank,
            kept=(kept or {}).get(name),
            reason=(reasons or {}).get(name, ""),
            tensors=tuple(_tensor(tensor) for tensor in tensors),
        )
        found.append(entry)
    return tuple(found)


def compression_schema() -> dict[str, Any]:
    """The manifest as JSON Schema (draft 2020-12), as it is written."""
    made = CompressionManifest.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def parse_compression_manifest(text: str, *, name: str = FILE_NAME) -> CompressionManifest:
    """Read a manifest.

    Args:
        text: JSON.
        name: What to call it in errors.

    Raises:
        InputError: Not JSON, of another schema version, or no manifest of a compression; names the first field at fault.
    """
    content = parse_json(text, field=name, what="the manifest", remedy="restore the file")
    if not isinstance(content, dict) or content.get("kind") != "compression":
        raise InputError(name, "is no manifest of a joint compression", "give the output folder of one")
    if content.get("schema_version") != SCHEMA_VERSION:
        problem = f"has schema_version {content.get('schema_version')!r}, not {SCHEMA_VERSION}"
        raise InputError(name, problem, "read it with the Alphasmith that wrote it")
    try:
        return CompressionManifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise InputError(name, f"{where}: {first['msg']}", "restore the file") from error


def read_compression_manifest(path: Path) -> CompressionManifest:
    """Read a manifest from a file, or from the output folder that holds it.

    Raises:
        InputError: The file is missing or unreadable; or as :func:`parse_compression_manifest`.
    """
    file = path / FILE_NAME if path.is_dir() else path
    text = read_text(file, field=str(file), remedy="give the output folder of a joint compression")
    return parse_compression_manifest(text, name=str(file))


def _tensor(tensor: PackedTensor) -> CompressedTensorEntry:
    return CompressedTensorEntry(**{k: v for k, v in vars(tensor).items() if k not in ("layer", "kind")})
