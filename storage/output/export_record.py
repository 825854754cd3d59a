"""``export.json``: what an exported folder is, and what it was made from.

The models below are the schema, ``export_record.schema.json`` is the same as JSON Schema. Nothing in it depends on the machine or the
time: the same result gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import ExportFormat, OnnxLayout
from alphasmith.objectives.reading import parse_json, read_text
from alphasmith.storage.files.durable import ArtifactDigest, artifact_kind, canonical_json
from alphasmith.storage.output._named_files import NamedFiles
from alphasmith.storage.output.entries import ArtifactEntry, Sha256
from alphasmith.storage.runs.entries import Part

#: File name inside an exported folder.
EXPORT_FILE = "export.json"
#: Raised when a reader of the previous version would misread a record.
EXPORT_VERSION: Literal[1] = 1


class ExportedOperator(Part):
    """One integer operator of an export."""

    name: str
    """Of its module in the model."""
    scheme: str
    """Short name of its number formats."""
    digest: Sha256
    """Over name, scheme, codes and scales: that of the operator in the run, unless ``unsmoothed``."""
    unsmoothed: bool = False
    """Whether it was written as if no alpha had been found."""


class UnsmoothedSite(Part):
    """A site that was written as if no alpha had been found, because the format has no place for its division or shift."""

    name: str
    loss: float | None = Field(default=None, ge=0)
    """Loss on held-out rows with what the run found (formula fA5); null: not recorded."""
    loss_unsmoothed: float | None = Field(default=None, ge=0)
    """The same without an alpha."""


class LeftOperator(Part):
    """An operator that the run quantized and that is float in the export."""

    name: str
    reason: str


class ExportRecord(Part):
    """Everything that explains an exported folder."""

    export_version: Literal[1] = EXPORT_VERSION
    format: ExportFormat
    layout: OnnxLayout | None = None
    """Of an ONNX model: how integers stand in it."""
    run: str
    """Id of the run."""
    training: str | None = None
    """Id of the training, where the model was trained further."""
    manifest: Sha256
    """Of the manifest of the result it was made from."""
    scheme: str
    """Short name of the scheme of the run."""
    versions: dict[str, str]
    """Of the run: alphasmith, torch and others."""
    operators: tuple[ExportedOperator, ...]
    unsmoothed: tuple[UnsmoothedSite, ...] = ()
    left: tuple[LeftOperator, ...] = ()
    notes: tuple[str, ...] = ()
    """What a consumer computes otherwise than the run did."""
    artifacts: tuple[ArtifactEntry, ...] = ()
    """Every other file of the folder."""

    def with_artifacts(self, written: Iterable[ArtifactDigest]) -> Self:
        """The same record listing these files."""
        entries = (
            ArtifactEntry(kind=artifact_kind(one.path), path=one.path, sha256=one.sha256, bytes=one.bytes)
            for one in written
        )
        return self.model_copy(update={"artifacts": tuple(entries)})

    def to_json(self) -> str:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


class ExportFolder(NamedFiles):
    """The files of one export.

    Attributes:
        record: That of the folder.

    Args:
        path: An exported folder.

    Raises:
        InputError: It holds no readable ``export.json``.
        IntegrityError: A file is named twice.
    """

    def __init__(self, path: Path | str) -> None:
        self.record = read_export_record(Path(path))
        super().__init__(Path(path), self.record.artifacts)


def is_export(folder: Path) -> bool:
    """Whether a folder holds an ``export.json``, readable or not."""
    return (folder / EXPORT_FILE).is_file()


def read_export_record(folder: Path) -> ExportRecord:
    """The record of an exported folder.

    Raises:
        InputError: Field ``DIR``: it is missing or none that this version reads.
    """
    file = folder / EXPORT_FILE
    remedy = "export the run again"
    if file.is_symlink() or not file.is_file():
        raise InputError("DIR", f"{folder} is no export: it has no {EXPORT_FILE}", "give a folder that was exported")
    content = parse_json(read_text(file, field="DIR", remedy=remedy), field="DIR", what=str(file), remedy=remedy)
    try:
        return ExportRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise InputError("DIR", f"{file}: {where}: {first['msg']}", remedy) from error


def export_schema() -> dict[str, Any]:
    """The record as JSON Schema (draft 2020-12), as it is written."""
    made = ExportRecord.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
