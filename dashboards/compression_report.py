"""One self-contained HTML page that explains a joint compression: what was lost, the front, the rounds, every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alphasmith.dashboards._page import Figure, Section, render, shown
from alphasmith.dashboards.figures.compression import size_against
from alphasmith.dashboards.text import facts_of
from alphasmith.objectives.text import number

if TYPE_CHECKING:  # it knows packed models, and so torch
    from alphasmith.storage.output.compression_manifest import CompressionManifest, MetricEntry

_CAPTION = "Every mark is a trial; lower and further left is better. Crosses lost more than is tolerated; the diamond is the model in this folder."
#: Columns with rows.
_Grid = tuple[tuple[str, ...], list[list[str]]]


def compression_sentence(manifest: CompressionManifest) -> str:
    """What a compression came to, in one sentence.

    Args:
        manifest: Of its result.
    """
    size = manifest.bytes
    metrics = "; ".join(_lost(metric) for metric in manifest.metrics if metric.study_float is not None)
    ratio = size.original / size.stored
    return f"{size.stored:,} bytes in place of {size.original:,}, {ratio:.1f} times smaller; {metrics}."


def front_grid(manifest: CompressionManifest) -> _Grid:
    """The front as a table: size, times smaller, every metric on the study and the test split.

    Args:
        manifest: Of a compression.
    """
    names = [metric.name for metric in manifest.metrics]
    timed = any(entry.milliseconds is not None for entry in manifest.front)
    columns = ("trial", "bytes", "smaller", *(("latency [ms]",) if timed else ()))
    columns += tuple(f"{name}, {split}" for name in names for split in ("study", "test"))
    written = None if manifest.trial is None else manifest.trial.number
    rows = []
    for entry in manifest.front:
        row = [f"{entry.number}{' (this one)' if entry.number == written else ''}", f"{entry.stored_bytes:,}"]
        row.append(f"{manifest.bytes.original / entry.stored_bytes:.1f}x")
        row += [_value(entry.milliseconds)] if timed else []
        row += [_value(values.get(name)) for name in names for values in (entry.study, entry.test)]
        rows.append(row)
    return columns, rows


def metric_grid(manifest: CompressionManifest) -> _Grid:
    """Every metric of the original and of the compressed model on both splits.

    Args:
        manifest: Of a compression.
    """
    columns = ("metric", "original, study", "compressed, study", "original, test", "compressed, test", "may lose")
    rows = [
        [
            metric.name + (f" [{metric.unit}]" if metric.unit else ""),
            *map(_value, (metric.study_float, metric.study_compressed, metric.test_float, metric.test_compressed)),
            metric.tolerance or "anything",
        ]
        for metric in manifest.metrics
    ]
    return columns, rows


def fallen_back(manifest: CompressionManifest) -> list[str]:
    """Layers that became branches in place of truncation, a line each with the reason.

    Args:
        manifest: Of a compression.
    """
    branches = (layer for layer in manifest.layers if layer.form == "branch" and layer.reason)
    return [f"{layer.name}: {layer.reason}" for layer in branches]


def render_compression(manifest: CompressionManifest, trials: Sequence[Mapping[str, Any]]) -> str:
    """The report as one HTML document, UTF-8 when encoded.

    Args:
        manifest: Of the compression; its files are not shown.
        trials: Trials that were measured, see :func:`~alphasmith.dashboards.figures.compression.size_against`.
    """
    values = manifest.model_dump(mode="json")
    size, trial = manifest.bytes, manifest.trial
    tiles = [
        (f"{size.original / size.stored:.1f}x", "smaller"),
        (f"{size.stored:,}", f"bytes stored, of {size.original:,}"),
        *((_value(metric.study_compressed), _lost(metric)) for metric in manifest.metrics),
        *([] if trial is None else [(str(trial.trials), f"trials, {len(manifest.front)} on the front")]),
    ]
    return render(
        "compression.html",
        title=f"Alphasmith compression {manifest.run.id}",
        id=manifest.run.id,
        sentence=compression_sentence(manifest),
        tiles=tiles,
        notes=manifest.notes,
        metrics=metric_grid(manifest),
        front=front_grid(manifest),
        figures=[_figure(manifest, metric, trials) for metric in manifest.metrics],
        rounds=_rounds(manifest),
        layers=_layers(manifest),
        sections=_sections(values),
    )


def _figure(manifest: CompressionManifest, metric: MetricEntry, trials: Sequence[Mapping[str, Any]]) -> Figure:
    # Where a metric has a limit, its constraint is the drop less this limit.
    limit = None
    trial = manifest.trial
    if trial is not None and metric.name in trial.constraints:
        own = next(entry for entry in manifest.front if entry.number == trial.number)
        lost = own.drops.get(metric.name)
        limit = None if lost is None else lost - trial.constraints[metric.name]
    key = f"size-{[other.name for other in manifest.metrics].index(metric.name)}"
    return shown(key, _CAPTION, size_against(metric.name, metric.unit, trials, limit=limit))


def _rounds(manifest: CompressionManifest) -> _Grid:
    found = manifest.rounds
    columns = ("round", "energy kept", "layers factored", "numbers", "updates", "verdict", "metrics")
    if found is None:
        return columns, []
    rows = []
    for entry in found.rounds:
        energy = ", ".join(f"{name} {value:.4g}" for name, value in entry.energy.items())
        kept = " (kept)" if entry.number == found.kept else ""
        cells = [f"{entry.number}{kept}", energy, str(len(entry.ranks)), f"{entry.numbers:,}", str(entry.steps)]
        rows.append([*cells, entry.verdict, ", ".join(f"{name} {_value(v)}" for name, v in entry.metrics.items())])
    return columns, rows


def _layers(manifest: CompressionManifest) -> _Grid:
    columns = ("layer", "class", "form", "rank", "K", "SQNR [dB]", "bytes", "of", "smaller", "why this form")
    rows = []
    for layer in manifest.layers:
        coded = [tensor for tensor in layer.tensors if tensor.stored == "codebook"]
        before, after = (sum(getattr(t, name) for t in layer.tensors) for name in ("float_bytes", "stored_bytes"))
        worst = min((tensor.sqnr for tensor in coded if tensor.sqnr is not None), default=None)
        rows.append(
            [
                layer.name or "(the model itself)",
                layer.kind,
                layer.form,
                str(layer.rank or ""),
                "/".join(dict.fromkeys(str(tensor.entries) for tensor in coded)),
                "" if worst is None else f"{worst:.1f}",
                f"{after:,}",
                f"{before:,}",
                f"{before / after:.1f}x" if after else "",
                layer.reason,
            ]
        )
    return columns, rows


def _sections(values: Mapping[str, Any]) -> list[Section]:
    known = (
        ("bytes", "Bytes", "Where the bytes are; the header of the file, of names and places, comes on top."),
        ("trial", "The trial", "What the study chose for the model in this folder."),
        ("config", "Configuration", "Everything that was asked for, defaults included."),
        ("versions", "Versions", "What made it."),
        ("model", "Model", "What came in."),
    )
    return [
        Section(key=key, heading=heading, intro=intro, facts=facts_of(values[key]))
        for key, heading, intro in known
        if values.get(key)
    ]


def _lost(metric: MetricEntry) -> str:
    before, after = metric.study_float, metric.study_compressed
    unit = f" {metric.unit}" if metric.unit else ""
    if before is None or after is None:
        return f"{metric.name} not measured"
    return f"{metric.name} {number(after)}{unit} ({number(before)}{unit} before)"


def _value(value: float | None) -> str:
    return "not measured" if value is None else number(value)
