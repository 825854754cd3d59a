"""Output folders of joint compressions, small and whole."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from alphasmith.objectives.joint.packed.packing import PackedModel
from alphasmith.storage.output.compressed_folder import write_compressed
from alphasmith.storage.output.compression_manifest import (
    BytesEntry,
    CompressionManifest,
    FrontEntry,
    MetricEntry,
    RoundEntry,
    RoundsEntry,
    TrialEntry,
    layer_entries,
)
from alphasmith.storage.output.entries import ModelEntry, RunEntry
from alphasmith.storage.output.output_folder import OutputFolder

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
DIGEST = "0123456789abcdef" * 4


def made_manifest(packed: PackedModel, original: int, **changes: Any) -> CompressionManifest:
    """A manifest with every part filled in, but for the files."""
    layout = packed.structure.layout
    round_ = RoundEntry(
        number=1, energy={"conv": 0.99}, ranks={"mix": 2}, fallen=("mix",), numbers=100, steps=10,
        metrics={"si_sdr": 7.5, "pesq": None}, drops={"si_sdr": 0.5, "pesq": None}, verdict="met", reason="tolerated",
    )  # fmt: skip
    given: dict[str, Any] = {
        "run": RunEntry(id="c-1", name="demo", created=NOW, started=NOW, finished=NOW + timedelta(minutes=1)),
        "versions": {"torch": "2.13.0"},
        "config": {"drop": {"tolerances": {"si_sdr": 0.6}}},
        "seeds": {"study": 0},
        "model": ModelEntry(kind="module", name="Mixed", digest=DIGEST, parameter_count=10),
        "data_digest": DIGEST,
        "rounds": RoundsEntry(status="round_cap", kept=1, rounds=(round_,)),
        "trial": TrialEntry(number=3, parameters={"k.conv": 4}, objectives={"bytes": 1.0}, trials=5),
        "front": (FrontEntry(number=3, stored_bytes=1),),
        "metrics": (MetricEntry(name="si_sdr", goal="max", unit="dB", study_float=8.0, study_compressed=7.5),),
        "bytes": BytesEntry.of(packed, original),
        "folded": layout.folded,
        "taken_apart": layout.recurrent,
        "layers": layer_entries(packed, kept={"mix": 0.9}, reasons={"out": "its weight is that of embed"}),
    }
    return CompressionManifest(**(given | changes))


def write_folder(out: Path, packed: PackedModel, original: int) -> CompressionManifest:
    """An output folder with a report beside the model."""
    with OutputFolder(out) as folder:
        folder.write_text("report.html", "<p>report</p>")
        return write_compressed(folder, packed, made_manifest(packed, original))
