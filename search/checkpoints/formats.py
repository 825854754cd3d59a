"""``formats``: the front of a run's formats, and the quantized model of another of its points, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from alphasmith.dashboards.report import render_report
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import SiteFormat
from alphasmith.objectives.quantization.formats import scheme_of
from alphasmith.objectives.quantization.stored_forms import exchanged
from alphasmith.objectives.text import listed
from alphasmith.search.checkpoints.load import STRUCTURE
from alphasmith.storage.output.entries import PayloadEntry, SchemeEntry
from alphasmith.storage.output.format_entries import FormatPoint, FormatsEntry
from alphasmith.storage.output.manifest import FILE_NAME, Manifest
from alphasmith.storage.output.output_folder import OutputFolder
from alphasmith.storage.output.result_folder import ResultFolder
from alphasmith.storage.runs.records import TrialRecord

#: Files of an output folder that hold the operators of other points.
TENSORS, FORMS = "formats/operators.safetensors", "formats/operators.json"
_WEIGHTS = "quantized/model.safetensors"
_FLOAT32 = 4


def pick(folder: Path, number: int, out: Path, trials: Iterable[TrialRecord] = ()) -> dict[str, Any]:
    """Write a run's result anew with the formats of another point of its front; neither model nor data are needed.

    Args:
        folder: Output folder of the run.
        number: The point.
        out: Target; must not exist.
        trials: Of the run, for the report.

    Returns:
        ``out``, ``point``, its ``formats``, ``cost`` and ``loss``.

    Raises:
        InputError: Not an output folder, one without a front, no such point, or ``out`` is taken.
        IntegrityError: A file has changed.
    """
    result = ResultFolder(folder)
    manifest = result.manifest
    entry = manifest.formats
    if entry is None:
        remedy = "run with sites.formats or a budget, see docs/formats.md"
        raise InputError("RUN", f"{manifest.run.id} made no choice of formats", remedy)
    point = _point(entry, number)
    if manifest.training is not None or not result.has(FORMS):
        remedy = f"give the folder that run {manifest.run.id} wrote itself"
        raise InputError("RUN", f"{folder} holds one point of the front and no other", remedy)
    result.check()
    kept = entry.chosen
    changed: dict[str, SiteFormat] = {
        site: point.formats.get(site, entry.own)
        for site in sorted({*kept.formats, *point.formats})
        if point.formats.get(site, entry.own) != kept.formats.get(site, entry.own)
    }
    before, structure = result.read_tensors(_WEIGHTS), result.read_json(STRUCTURE)
    tensors, structure = exchanged(before, structure, result.read_tensors(TENSORS), result.read_json(FORMS), changed)
    with OutputFolder(out) as target:
        target.write_tensors(_WEIGHTS, tensors, {"format": "pt"})
        target.write_json(STRUCTURE, structure)
        for name in result.names():
            if name not in (_WEIGHTS, STRUCTURE, "report.html") and not name.startswith("formats/"):
                target.copy_file(result.file(name), name)
        made = _manifest(manifest, entry, point, changed, before, tensors).with_artifacts(target.written)
        target.write_text("report.html", render_report(made, trials))
        target.write_text(FILE_NAME, made.with_artifacts(target.written).to_json())
    return {
        "out": str(out),
        "point": number,
        "formats": dict(point.formats),
        "cost": point.cost,
        "loss": point.loss,
    }


def _point(entry: FormatsEntry, number: int) -> FormatPoint:
    usable = {point.number: point for point in entry.pickable}
    if number not in usable:
        remedy = f"choose one of {listed([str(name) for name in sorted(usable)], len(usable))}"
        raise InputError("--pick", f"{number} is no point of the front", remedy)
    return usable[number]


def _manifest(
    manifest: Manifest,
    entry: FormatsEntry,
    point: FormatPoint,
    changed: Mapping[str, SiteFormat],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> Manifest:
    """The manifest of the run with another point picked; the trial numbers and losses stay what they were."""
    if point.number == entry.picked:
        return manifest
    picked = entry.model_copy(update={"picked": point.number, "reason": "picked by hand", "metric": None})
    sizes = manifest.payload
    codes = _codes(after) - _codes(before)
    whole = _bytes(after.values()) - _bytes(before.values())
    payload = PayloadEntry(
        **{
            **sizes.model_dump(),
            "weights_quantized": sizes.weights_quantized + codes,
            "weights_float": sizes.weights_float + _FLOAT32 * (_numbers(after) - _numbers(before)),
            "other": sizes.other + whole - codes,
        }
    )
    schemes = manifest.scheme.site_schemes()
    others = {site: scheme_of(name, schemes.default) for site, name in changed.items()}
    scheme = SchemeEntry.of(schemes.changed(others))
    return manifest.model_copy(update={"formats": picked, "payload": payload, "scheme": scheme})


def _codes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of quantized weights."""
    return _bytes(tensor for name, tensor in tensors.items() if name.endswith(".weight_values"))


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    """How many weights are quantized: codes are stored one by one."""
    return sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".weight_values"))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
