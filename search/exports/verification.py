"""An exported folder against its record: every file, and the codes and scales of every integer operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import IntegrityError
from alphasmith.objectives.extras import require_extra
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.checkpoints.find import find_result
from alphasmith.search.exports._compressed_tensors import read_operator
from alphasmith.search.exports.source import DeployedOperator, ExportSource
from alphasmith.storage.files.durable import digest_file
from alphasmith.storage.output.checkpoint import SINGLE
from alphasmith.storage.output.export_record import ExportFolder
from alphasmith.storage.output.manifest import FILE_NAME


def verify_export(folder: Path, *, run: str | Path | None = None, storage: str | None = None) -> dict[str, Any]:
    """Check every digest of an export; then unpack every operator and compare it with the one that the run stored.

    Args:
        folder: An exported folder.
        run: Id or output folder of the run, to be compared with as well; None: the digests of its operators that are on record.
        storage: Where ids are looked up.

    Returns:
        ``folder``, ``format``, ``artifacts`` and ``operators`` checked, ``run``, and ``compared`` with the record or with the run.

    Raises:
        InputError: Not an export, or no such run.
        IntegrityError: A file has changed, or codes and scales are not the run's.
    """
    export = ExportFolder(folder)
    record = export.record
    export.check()
    stored = _onnx(export) if record.format == "onnx" else _checkpoint(export)
    for entry in record.operators:
        try:
            found = stored(entry.name, Scheme.parse(entry.scheme))
        except KeyError as error:
            raise IntegrityError(f"{folder}: operator {entry.name} has no tensor {error}") from error
        if any(operator.digest != entry.digest for operator in found):
            raise IntegrityError(f"{folder}: codes or scales of operator {entry.name} are not those on record")
    answer: dict[str, Any] = {
        "folder": str(folder),
        "format": record.format,
        "artifacts": len(record.artifacts),
        "operators": len(record.operators),
        "run": record.training or record.run,
        "compared": "record",
    }
    if run is not None:
        source = ExportSource(find_result(run, storage))
        if digest_file(source.result.path / FILE_NAME).sha256 != record.manifest:
            raise IntegrityError(f"{folder} was not exported from {source.result.path}: its manifest is another one")
        own = {operator.name: operator.digest for operator in source.operators}
        for entry in record.operators:
            if not entry.unsmoothed and own.get(entry.name) != entry.digest:
                raise IntegrityError(f"{folder}: operator {entry.name} is not the run's")
        answer["compared"] = "run"
    return answer


def _checkpoint(export: ExportFolder) -> Callable[[str, Scheme], list[DeployedOperator]]:
    """Reads an operator of a safetensors checkpoint by its name."""
    files = [name for name in export.names() if name.endswith(".safetensors")]
    if not files:
        raise IntegrityError(f"{export.path}: no {SINGLE} is on record")
    tensors = {name: value for file in files for name, value in export.read_tensors(file).items()}
    return lambda name, scheme: [read_operator(name, tensors, scheme)]


def _onnx(export: ExportFolder) -> Callable[[str, Scheme], list[DeployedOperator]]:
    """Reads an operator of ONNX models by its name."""
    files = [name for name in export.names() if name.endswith(".onnx")]
    if not files:
        raise IntegrityError(f"{export.path}: no ONNX model is on record")
    require_extra("verify", "onnx")
    from alphasmith.search.exports.onnx.reading import OnnxOperators

    return OnnxOperators([export.path / file for file in files]).read
