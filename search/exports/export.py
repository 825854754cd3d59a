"""``alphasmith export``: a result in the format of another tool, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import ExportFormat
from alphasmith.objectives.reading import usable_path
from alphasmith.search.checkpoints.find import as_written, find_result
from alphasmith.search.exports._card import CARD, ORIGINAL_CARD, model_card
from alphasmith.search.exports._compressed_tensors import Checkpoint, compressed_tensors, explicit_operators
from alphasmith.search.exports._plain_sites import plain_operators
from alphasmith.search.exports._source import DeployedOperator, ExportSource, to_json
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

FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)


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
) -> ExportResult:
    """Write the integer model of a run or training in the format of another tool.

    Args:
        source: Its id, or the beginning of one, or its output folder.
        format: ``compressed-tensors``: a folder that transformers and vLLM load.
        out: Target folder: absent or empty.
        storage: Address of the database that ids are looked up in; None: the usual one.
        unsmoothed_sites: Write sites with a division or shift at run time as if no alpha had been found, instead of refusing them.
        overwrite: Replace an earlier export in ``out``.
        data: Where the run's media are now; only read for ``unsmoothed_sites`` with static activations.
        allow_code: Functions and folders that the manifest may lead to, likewise.

    Raises:
        InputError: No such result, an unknown format, a scheme or site that the format cannot hold (named), or a target that is taken.
            Nothing is left in the target.
    """
    if format not in FORMATS:
        raise InputError("--format", f"{format!r} is unknown", f"give one of {', '.join(FORMATS)}")
    target = usable_path("--out", out)
    replaced = _checked_target(target, overwrite)
    with as_written():
        opened = ExportSource(find_result(source, storage))
        _ = opened.config
        explicit = explicit_operators(opened) if unsmoothed_sites else ()
        plain = plain_operators(opened, explicit, data=data, allow_code=allow_code)
        made = compressed_tensors(opened, plain)
        record = _record(opened, format, made, plain)
        written = target if not replaced else target.with_name(f"{target.name}.new-{secrets.token_hex(4)}")
        with OutputFolder(written) as folder:
            record = _write(folder, opened, made, record)
    if replaced:
        _replace(target, written)
    size = sum(entry.bytes for entry in record.artifacts)
    return ExportResult(folder=target, record=record, bytes=size)


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
    source: ExportSource, format: ExportFormat, made: Checkpoint, plain: Mapping[str, DeployedOperator]
) -> ExportRecord:
    manifest = source.result.manifest
    operators = {operator.name: plain.get(operator.name, operator) for operator in source.operators}
    unsmoothed = set(source.sites_of(plain))
    sites = [site for site in manifest.sites if site.name in unsmoothed]
    return ExportRecord(
        format=format,
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


def _write(folder: OutputFolder, source: ExportSource, made: Checkpoint, record: ExportRecord) -> ExportRecord:
    most = shard_bytes(source.result.path / source.folder)
    write_checkpoint(folder, "", made.tensors, types={}, most=most)
    folder.write_text("config.json", to_json(made.config))
    original = None
    for name in source.companions():
        content = source.result.read_bytes(f"{source.folder}/{name}")
        if name == CARD:
            original = content.decode("utf-8", errors="replace")
        folder.write_bytes(ORIGINAL_CARD if name == CARD else name, content)
    licences = [name for name in source.companions() if name.startswith(("LICEN", "NOTICE"))]
    architecture = next(iter(made.config.get("architectures") or ["AutoModel"]))
    manifest = source.result.manifest
    folder.write_text(
        CARD, model_card(manifest, record, architecture=architecture, original=original, licences=licences)
    )
    whole = record.with_artifacts(folder.written)
    folder.write_text(EXPORT_FILE, whole.to_json())
    return whole
