"""What the integer model of a run is, for people and for clients of a service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from alphasmith.objectives.literals import MediaKind
from alphasmith.search.processing.opening import IntegerModel


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a model is.

    Attributes:
        run: Id of the run that made it.
        run_name: Name the user gave the run.
        name: Name of the float model.
        folder: Output folder.
        kind: What it takes.
        classes: Names of its classes by number; None: not known before its first answer.
        scheme: Quantization scheme, e.g. ``w8a8-channel-static``.
        parameters: Number of parameters, tied ones once.
        finished: When it was written, ISO 8601, UTC.
        metrics: Name of a task metric -> ``float`` and ``quantized``, as the run measured them; null where it did not.
        digests: File that decides what is computed -> sha256; ``float model`` -> that of the model it was made from.
        notes: What was assumed because the model does not say.
    """

    run: str
    run_name: str
    name: str
    folder: str
    kind: MediaKind
    classes: tuple[str, ...] | None
    scheme: str
    parameters: int
    finished: str
    metrics: Mapping[str, Mapping[str, float | None]]
    digests: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self)


def described(
    opened: IntegerModel, *, kind: MediaKind, classes: tuple[str, ...] | None, notes: tuple[str, ...]
) -> ModelDescription:
    """What an opened model is.

    Args:
        opened: The model.
        kind: What it takes.
        classes: Names of its classes.
        notes: What was assumed.
    """
    manifest = opened.result.manifest
    kept = {"identity": "naive", "alpha_0.5": "alpha_half"}.get(manifest.output.kept, manifest.output.kept)
    metrics = {
        metric.name: {"float": metric.float_model, "quantized": getattr(metric, kept)}
        for metric in manifest.output.metrics
    }
    digests = {entry.path: entry.sha256 for entry in manifest.artifacts if entry.path.startswith("quantized/")}
    return ModelDescription(
        run=manifest.run.id,
        run_name=manifest.run.name,
        name=manifest.model.name,
        folder=str(opened.result.path),
        kind=kind,
        classes=classes,
        scheme=manifest.scheme.name,
        parameters=manifest.model.parameter_count,
        finished=manifest.run.finished.isoformat(),
        metrics=metrics,
        digests={"float model": manifest.model.digest, **digests},
        notes=notes,
    )
