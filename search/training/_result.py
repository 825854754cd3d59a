"""The folder of a trained model: an integer model again, its manifest, its report; it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.dashboards.report import render_report
from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.media import data_digest
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.payload import payload
from alphasmith.objectives.training.outcome import TrainingOutcome
from alphasmith.search.checkpoints.load import STRUCTURE, load_quantized
from alphasmith.search.inputs.labelled_samples import LabelledSamples
from alphasmith.search.training._parent import Parent
from alphasmith.search.training._samples import LabelledData, batches_of
from alphasmith.search.training.config import FinetuneConfig, as_recorded
from alphasmith.storage.output.manifest import FILE_NAME, Manifest
from alphasmith.storage.output.output_folder import OutputFolder
from alphasmith.storage.output.training_entry import CurvePointEntry, SettingsStudyEntry, TrainingEntry
from alphasmith.storage.runs.records import TrialRecord
from alphasmith.storage.runs.trainings import TrainingRecord

_WEIGHTS = "quantized/model.safetensors"
#: What the structure of a quantized model says of the architecture that it stands on.
_REWRITTEN = ("unrolled", "split_attention")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What a training came to.

    Attributes:
        integer: The integer model that is kept.
        outcome: The curve and the verdict.
        config: What was asked for, with the settings that were used.
        study: Where the settings come from; None: as they were given.
        held_out: Samples that decided.
    """

    integer: nn.Module
    outcome: TrainingOutcome
    config: FinetuneConfig
    study: SettingsStudyEntry | None
    held_out: LabelledSamples


def write_result(
    folder: OutputFolder,
    record: TrainingRecord,
    parent: Parent,
    data: LabelledData,
    trained: Trained,
    *,
    trials: Sequence[TrialRecord],
    finished: datetime,
) -> Manifest:
    """Write everything, then load the integer model again: it must answer the held-out samples with the same bits.

    Args:
        folder: The output folder, entered.
        record: The training.
        parent: What it started from.
        data: What was read.
        trained: What it came to.
        trials: Trials of the run, for the report.
        finished: Now.

    Raises:
        InputError: The folder is not writable, or the device is full.
        AlphasmithError: The model that was written answers otherwise than the one that was trained.
    """
    result, outcome = parent.opened.result, trained.outcome
    if outcome.kept:
        tensors, structure = payload(trained.integer)
        structure |= {name: value for name, value in result.read_json(STRUCTURE).items() if name in _REWRITTEN}
        folder.write_tensors(_WEIGHTS, tensors, {"format": "pt"})
        folder.write_json(STRUCTURE, structure)
    for name in result.names("quantized"):
        if not outcome.kept or name not in (_WEIGHTS, STRUCTURE):
            folder.copy_file(result.file(name), name)
    device = parent.opened.device
    batches = list(batches_of(trained.held_out, trained.config.training.batch_size))
    digest = _outputs(trained.integer, batches, device)
    entry = _entry(record, parent, data, trained, digest, finished)
    note = f"trained further: {outcome.reason}; the run's proof of equivalence does not apply"
    manifest = result.manifest.model_copy(
        update={"training": entry, "proof": None, "notes": (*result.manifest.notes, note)}
    ).with_artifacts(folder.written)
    folder.write_text("report.html", render_report(manifest, trials))
    manifest = manifest.with_artifacts(folder.written)
    folder.write_text(FILE_NAME, manifest.to_json())
    again = load_quantized(folder.path, parent.opened.architecture).to(device)
    if _outputs(again, batches, device) != digest:
        raise AlphasmithError(
            "the integer model that was written answers otherwise than the trained one; nothing is kept"
        )
    return manifest


def _outputs(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> str:
    """sha256 over a model's answers."""

    def answer(batch: Batch) -> Tensor:
        return main_output(call(model.eval(), batch.to(device)))

    with torch.no_grad():
        return data_digest(Batch(args=(answer(batch),)) for batch in batches)


def _entry(
    record: TrainingRecord, parent: Parent, data: LabelledData, trained: Trained, digest: str, finished: datetime
) -> TrainingEntry:
    outcome, config = trained.outcome, trained.config
    settings: dict[str, Any] = asdict(config.training) | {"steps": config.training.updates(len(data.draw.trained))}
    return TrainingEntry(
        id=record.id,
        parent=parent.run,
        parent_digest=parent.digest,
        created=record.created,
        finished=finished,
        kept=outcome.kept,
        reason=outcome.reason,
        ending=outcome.ending,
        settings=settings,
        study=trained.study,
        data=as_recorded(config)["data"],
        data_digest=data.digest,
        samples=data.media.samples,
        classes=data.names,
        trained=data.draw.trained,
        held_out=trained.held_out.numbers,
        steps=outcome.steps,
        best_step=outcome.best_step,
        gain=outcome.gain,
        standard_error=outcome.standard_error,
        metric_name=outcome.metric_name,
        curve=tuple(CurvePointEntry(**asdict(point)) for point in outcome.points),
        outputs_digest=digest,
        seconds=outcome.seconds,
    )
