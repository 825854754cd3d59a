"""The folder of a compressed model: what is stored, its manifest, its report; it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial
from torch import nn

from alphasmith.dashboards.compression_report import render_compression
from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.joint.packed.forms import choose_forms
from alphasmith.objectives.joint.ports import Measured
from alphasmith.search.compression._stages import Compressed, ModelStages
from alphasmith.search.compression._study import (
    BYTES,
    CONSTRAINT,
    DROP,
    LATENCY,
    ORIGINAL,
    VALUE,
    feasible,
    front,
)
from alphasmith.search.compression._task import CompressedTask
from alphasmith.search.compression.artifact import load_compressed
from alphasmith.search.inputs.versions import versions
from alphasmith.storage.output.compressed_folder import write_compressed
from alphasmith.storage.output.compression_manifest import (
    BytesEntry,
    CompressionManifest,
    FormEntry,
    FrontEntry,
    MetricEntry,
    RoundsEntry,
    TrialEntry,
    layer_entries,
)
from alphasmith.storage.output.entries import ModelEntry, RunEntry
from alphasmith.storage.output.output_folder import OutputFolder, attempt_name
from alphasmith.storage.output.reservation import Reservation
from alphasmith.storage.queue.leases import Identity
from alphasmith.storage.runs.compressions import CompressionRecord


def write_result(
    out: Path,
    record: CompressionRecord,
    opened: CompressedTask,
    stages: ModelStages,
    made: Compressed,
    *,
    trials: Sequence[FrozenTrial],
    number: int,
    tested: Mapping[str, Mapping[str, float | None]],
    finished: datetime,
    place: Reservation,
) -> CompressionManifest:
    """Write everything, then load the model again: it must have the bits of the one that was measured.

    Args:
        out: Output folder.
        record: The compression.
        opened: Model and task.
        stages: With the original and its metrics.
        made: What is written.
        trials: All that count.
        number: Of the trial that is written.
        tested: Metrics on the test split, of the original and of the front.
        finished: Now.
        place: The reservation of ``out``.

    Raises:
        InputError: The folder is not writable, or the device is full.
        AlphasmithError: The model that was written is another one than was measured.
    """
    manifest = _manifest(record, opened, stages, made, trials, number, tested, finished)

    def publish(rename: Callable[[], None]) -> None:
        place.hold(record.id)
        rename()

    with OutputFolder(out, attempt=attempt_name(record.id, Identity.here().token), publish=publish) as folder:
        shown = shown_trials(trials, number)
        folder.write_text("report.html", render_compression(manifest, shown))
        manifest = write_compressed(folder, made.packed, manifest)
        _check_same(made.model, load_compressed(folder.path, stages.original))
    return manifest


def shown_trials(trials: Sequence[FrozenTrial], written: int) -> list[dict[str, Any]]:
    """What figures show of the trials that were measured.

    Args:
        trials: All of them.
        written: Number of the one in the folder.
    """
    best = {one.number for one in front(trials)}
    return [
        {
            "number": trial.number,
            "stored_bytes": trial.user_attrs[BYTES],
            "drops": _named(trial.user_attrs, DROP),
            "within": feasible(trial),
            "on_front": trial.number in best,
            "written": trial.number == written,
            "told": ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items()),
        }
        for trial in trials
        if BYTES in trial.user_attrs
    ]


def _manifest(
    record: CompressionRecord,
    opened: CompressedTask,
    stages: ModelStages,
    made: Compressed,
    trials: Sequence[FrozenTrial],
    number: int,
    tested: Mapping[str, Mapping[str, float | None]],
    finished: datetime,
) -> CompressionManifest:
    trial = next(one for one in trials if one.number == number)
    within = front(trials)
    study = Measured(values=_named(trial.user_attrs, VALUE))
    verdict = stages.verdict(study)
    limits = {limit.metric: str(limit) for limit in stages.condition.tolerances}
    metrics = tuple(
        MetricEntry(
            name=drop.metric.name,
            goal=drop.metric.goal,
            unit=drop.metric.unit,
            tolerance=limits.get(drop.metric.name, ""),
            study_float=drop.baseline,
            study_compressed=drop.current,
            test_float=tested.get(ORIGINAL, {}).get(drop.metric.name),
            test_compressed=tested.get(str(number), {}).get(drop.metric.name),
        )
        for drop in verdict.drops
    )
    rounds = made.facts.get("rounds")
    layout = made.packed.structure.layout
    names = (LATENCY,) if LATENCY in trial.user_attrs else ()
    return CompressionManifest(
        run=RunEntry(
            id=record.id,
            name=opened.name,
            created=record.created,
            started=record.created,
            finished=finished,
        ),
        versions=versions(),
        config=dict(record.config),
        seeds={"study": int(record.config["study"]["seed"])},
        notes=tuple(dict.fromkeys((*made.facts.get("notes", ()), *stages.baseline.notes))),
        model=ModelEntry(
            kind=opened.kind,
            name=opened.name,
            digest=record.model_digest,
            parameter_count=sum(parameter.numel() for parameter in stages.original.parameters()),
        ),
        rounds=None if not rounds else RoundsEntry.model_validate(rounds),
        trial=TrialEntry(
            number=number,
            parameters=dict(trial.params),
            objectives={name: float(trial.user_attrs[name]) for name in (BYTES, *names)},
            constraints=_named(trial.user_attrs, CONSTRAINT),
            trials=len(trials),
        ),
        front=tuple(_front_entry(one, tested) for one in within),
        metrics=metrics,
        bytes=BytesEntry.of(made.packed, stages.float_bytes),
        folded=tuple(layout.folded),
        taken_apart=(*layout.recurrent, *layout.attention),
        layers=layer_entries(made.packed, reasons=made.facts.get("reasons")),
        forms=tuple(
            FormEntry(layer=form.layer, runs=form.runs, seconds=dict(form.seconds), reason=form.reason)
            for form in choose_forms(made.model, stages.example())
        ),
    )


def _front_entry(trial: FrozenTrial, tested: Mapping[str, Mapping[str, float | None]]) -> FrontEntry:
    latency = trial.user_attrs.get(LATENCY)
    return FrontEntry(
        number=trial.number,
        stored_bytes=trial.user_attrs[BYTES],
        milliseconds=latency,
        study=_named(trial.user_attrs, VALUE),
        drops=_named(trial.user_attrs, DROP),
        test=dict(tested.get(str(trial.number), {})),
    )


def _named(attributes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in attributes.items() if name.startswith(prefix)}


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _check_same(measured: nn.Module, written: nn.Module) -> None:
    ours, theirs = measured.state_dict(), written.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise AlphasmithError("the model that was written is another one than was measured; nothing is kept")
