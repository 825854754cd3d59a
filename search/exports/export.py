"""``alphasmith export``: a result in the format of another tool, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.extras import require_extra
from alphasmith.objectives.literals import ExportFormat, OnnxLayout
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.reading import usable_path
from alphasmith.search.checkpoints.find import as_written, find_result
from alphasmith.search.exports._card import CARD, ORIGINAL_CARD, model_card
from alphasmith.search.exports._compressed_tensors import Checkpoint, compressed_tensors, explicit_operators
from alphasmith.search.exports._plain_sites import plain_operators
from alphasmith.search.exports.source import DeployedOperator, ExportSource, to_json
from alphasmith.storage.files.durable import digest_file
from alphasmith.storage.output.checkpoint import shard_bytes, write_checkpoint
from alphasmith.storage.output.export_record import (
    EXPORT_FILE,
    ExportedOperator,
    ExportRecord,
    LeftOperator,
    UnsmoothedSite,
    is_export,
)
from alphasmith.storage.output.manifest import FILE_NAME
from alphasmith.storage.output.output_folder import OutputFolder

if TYPE_CHECKING:
    from alphasmith.search.exports.onnx.models import OnnxModels

FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
LAYOUTS: tuple[OnnxLayout, ...] = get_args(OnnxLayout)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written.

    Attributes:
        folder: Where.
        record: Its ``export.json``.
        bytes: Of all files.
    """

    folder: Path
    record: ExportRecord
    bytes: int


def export(
    source: Path | str,
    format: str,
    out: Path | str,
    *,
    storage: str | None = None,
    unsmoothed_sites: bool = False,
    overwrite: bool = False,
    data: Path | None = None,
    allow_code: Collection[str | Path] = (),
    layout: str | None = None,
    model: nn.Module | None = None,
    batch: Any = None,
) -> ExportResult:
    """Write the integer model of a run or training in the format of another tool.

    Args:
        source: Its id, or the beginning of one, or its output folder.
        format: ``compressed-tensors``: a folder that transformers and vLLM load. ``onnx``: graphs for ONNX Runtime and others.
        out: Target folder: absent or empty.
        storage: Address of the database that ids are looked up in; None: the usual one.
        unsmoothed_sites: Write sites with a division or shift at run time as if no alpha had been found, instead of refusing them.
        overwrite: Replace an earlier export in ``out``.
        data: Where the run's media are now; only read for ``unsmoothed_sites`` with static activations, and for ``onnx`` where
            the run's model was none of transformers.
        allow_code: Functions and folders that the manifest may lead to, likewise.
        layout: Of ``onnx``: ``ort-u8`` (also None), unsigned integers in the nodes of ONNX Runtime, exact on every processor;
            ``ort-s8``, the same with signed weights, faster and exact where a processor has VNNI; or
            ``qdq``, standard nodes around float ones.
        model: For ``onnx``: the float architecture, where a script handed the model to the run.
        batch: For ``onnx``: what the model is traced with, two samples or more: tensors, in a tuple or a mapping, or a ``Batch``.

    Raises:
        InputError: No such result, an unknown format, a scheme or site that the format cannot hold (named), a missing extra, an
            operation that cannot be traced (named), or a target that is taken. Nothing is left in the target.
    """
    if format not in FORMATS:
        raise InputError("--format", f"{format!r} is unknown", f"give one of {', '.join(FORMATS)}")
    _check_choices(format, layout, unsmoothed_sites, model is not None or batch is not None)
    target = usable_path("--out", out)
    replaced = _checked_target(target, overwrite)
    with as_written():
        opened = ExportSource(find_result(source, storage))
        made: Checkpoint | OnnxModels
        plain: Mapping[str, DeployedOperator] = {}
        chosen: OnnxLayout | None = None
        if format == "onnx":
            chosen = next((known for known in LAYOUTS if known == layout), "ort-u8")
        if chosen is not None:
            from alphasmith.search.exports.onnx.models import onnx_models

            given = None if batch is None else _as_batch(batch)
            made = onnx_models(opened, chosen, model=model, batch=given, data=data, allow_code=allow_code)
        else:
            _ = opened.config
            explicit = explicit_operators(opened) if unsmoothed_sites else ()
            plain = plain_operators(opened, explicit, data=data, allow_code=allow_code)
            made = compressed_tensors(opened, plain)
        record = _record(opened, format, made, plain, chosen)
        written = target if not replaced else target.with_name(f"{target.name}.new-{secrets.token_hex(4)}")
        with OutputFolder(written) as folder:
            record = _write(folder, opened, made, record)
    if replaced:
        _replace(target, written)
    size = sum(entry.bytes for entry in record.artifacts)
    return ExportResult(folder=target, record=record, bytes=size)


def _check_choices(format: str, layout: str | None, unsmoothed_sites: bool, in_memory: bool) -> None:
    """Refuse what does not belong to a format.

    Raises:
        InputError: Names the field.
    """
    if format == "onnx":
        if layout is not None and layout not in LAYOUTS:
            raise InputError("--layout", f"{layout!r} is unknown", f"give one of {', '.join(LAYOUTS)}")
        if unsmoothed_sites:
            told = "onnx has a place for a division at run time"
            raise InputError("--unsmoothed-sites", told, "leave it out; every site is written as it was found")
        require_extra("--format", "onnx")
        return
    remedy = "leave it out, or give --format onnx"
    if layout is not None:
        raise InputError("--layout", f"{format} has one layout", remedy)
    if in_memory:
        raise InputError("model, batch", f"{format} is written from the result alone", remedy)


def _as_batch(given: Any) -> Batch:
    """Arguments of a call as a batch.

    Raises:
        InputError: Field ``batch``.
    """
    if isinstance(given, Batch):
        return given
    if isinstance(given, Mapping):
        return Batch(kwargs=dict(given))
    args = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(value, Tensor) for value in args):
        raise InputError(
            "batch", f"is a {type(given).__name__}", "give tensors, a tuple or a mapping of them, or a Batch"
        )
    return Batch(args=args)


def _checked_target(target: Path, overwrite: bool) -> bool:
    """Whether an earlier export is to be replaced.

    Raises:
        InputError: The target is taken by something else, or by an export that must not be replaced.
    """
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if not taken:
        return False
    if not overwrite:
        raise InputError(
            "--out", f"{target} is not empty", "choose another folder, or give --overwrite to replace an export"
        )
    if target.is_symlink() or not is_export(target):
        raise InputError(
            "--out", f"{target} holds no export, so it is not replaced", "choose another folder or remove it"
        )
    return True


def _replace(target: Path, written: Path) -> None:
    """Put a folder that is whole in the place of an earlier export; what is there stays until the new one is beside it."""
    away = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
    os.rename(target, away)
    try:
        os.rename(written, target)
    except OSError:
        os.rename(away, target)
        raise
    with suppress(OSError):
        shutil.rmtree(away)


def _record(
    source: ExportSource,
    format: ExportFormat,
    made: Checkpoint | OnnxModels,
    plain: Mapping[str, DeployedOperator],
    layout: OnnxLayout | None,
) -> ExportRecord:
    manifest = source.result.manifest
    operators = {operator.name: plain.get(operator.name, operator) for operator in source.operators}
    unsmoothed = set(source.sites_of(plain))
    sites = [site for site in manifest.sites if site.name in unsmoothed]
    return ExportRecord(
        format=format,
        layout=layout,
        run=manifest.run.id,
        training=None if manifest.training is None else manifest.training.id,
        manifest=digest_file(source.result.path / FILE_NAME).sha256,
        scheme=manifest.scheme.name,
        versions=manifest.versions,
        operators=tuple(
            ExportedOperator(
                name=name, scheme=operators[name].scheme.name, digest=operators[name].digest, unsmoothed=name in plain
            )
            for name in made.quantized
        ),
        unsmoothed=tuple(
            UnsmoothedSite(
                name=site.name,
                loss=None if site.losses is None else site.losses.held_out.ours,
                loss_unsmoothed=None if site.losses is None else site.losses.held_out.identity,
            )
            for site in sites
        ),
        left=tuple(LeftOperator(name=name, reason=reason) for name, reason in made.left.items()),
        notes=made.notes,
    )


def _write(
    folder: OutputFolder, source: ExportSource, made: Checkpoint | OnnxModels, record: ExportRecord
) -> ExportRecord:
    config: Mapping[str, Any] = {}
    if isinstance(made, Checkpoint):
        most = shard_bytes(source.result.path / source.folder)
        write_checkpoint(folder, "", made.tensors, types={}, most=most)
        config = made.config
    else:
        made.write(folder)
        config = source.config if source.of_transformers else {}
    if config:
        folder.write_text("config.json", to_json(config))
    original = None
    for name in source.companions():
        content = source.result.read_bytes(f"{source.folder}/{name}")
        if name == CARD:
            original = content.decode("utf-8", errors="replace")
        folder.write_bytes(ORIGINAL_CARD if name == CARD else name, content)
    licences = [name for name in source.companions() if name.startswith(("LICEN", "NOTICE"))]
    architecture = next(iter(config.get("architectures") or ["AutoModel"]))
    manifest = source.result.manifest
    card = model_card(
        manifest,
        record,
        architecture=architecture,
        original=original,
        licences=licences,
        obstacles=made.obstacles if isinstance(made, Checkpoint) else (),
    )
    folder.write_text(CARD, card)
    whole = record.with_artifacts(folder.written)
    folder.write_text(EXPORT_FILE, whole.to_json())
    return whole
