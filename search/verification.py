"""``verify`` and ``undo``: what the manifest promises, checked and taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from alphasmith.objectives.equivalence import prove
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.hf_folder import save_folder
from alphasmith.objectives.models import load_model
from alphasmith.objectives.sites.folding import edit_parameter, shift_bias
from alphasmith.objectives.sites.types import ParameterEdit, ShiftEdit
from alphasmith.search.config import RunConfig
from alphasmith.search.reload import load_quantized, load_smoothed
from alphasmith.search.task import load_task
from alphasmith.storage.artifacts import read_tensors
from alphasmith.storage.files import verify_file
from alphasmith.storage.manifest import Manifest, read_manifest
from alphasmith.storage.manifest_parts import SiteEntry
from alphasmith.storage.output import OutputFolder


def verify(
    folder: Path,
    *,
    model: Path | None = None,
    data: Path | None = None,
    factory: str | None = None,
    factory_path: Path | None = None,
) -> dict[str, Any]:
    """Check every digest, then prove that the smoothed model computes what the original does and the quantized one loads.

    The original is loaded as the run loaded it, with the run's proof data. A model or data that a script handed over are
    nowhere to be found again: then only digests are checked, and the answer says so. No function that the manifest names
    is run unless ``factory`` allows it.

    Args:
        folder: Output folder of a run.
        model: Where the original model folder is now.
        data: Where the run's media are now.
        factory: ``module:function`` of the original, when it was built by one; naming it runs it.
        factory_path: Folder of that module.

    Returns:
        ``artifacts`` checked, ``error``, ``tolerance`` and ``samples`` of the proof, or ``skipped`` with the reason.

    Raises:
        InputError: Not an output folder, or the original cannot be loaded or is another model.
        IntegrityError: A file has changed.
        EquivalenceError: The models differ.
    """
    manifest = read_manifest(folder)
    for artifact in manifest.artifacts:
        verify_file(folder / artifact.path, artifact.sha256)
    answer: dict[str, Any] = {"folder": str(folder), "artifacts": len(manifest.artifacts)}
    reason = _not_provable(manifest)
    if reason:
        return answer | {"skipped": reason}
    config = _original(manifest, model, data, factory, factory_path)
    task = load_task(config)
    if task.loaded.digest != manifest.model.digest:
        raise InputError("model", "is not the model of this run (its weights have another digest)", "give the original")
    tolerance = config.proof.tolerance
    error = prove(task.loaded.model, load_smoothed(folder, task.loaded.model), task.proof, tolerance=tolerance)
    load_quantized(folder, task.loaded.model)
    return answer | {"error": error, "tolerance": tolerance, "samples": sum(b.size for b in task.proof)}


def undo(folder: Path, out: Path) -> dict[str, Any]:
    """Take scales and folded shifts out of the smoothed checkpoint again.

    Float32 division does not take back float32 multiplication bit for bit: every weight is within two roundings of the
    original's, every bias within the roundings of what a shift added to it.

    Args:
        folder: Output folder of a run.
        out: Target; must not exist.

    Returns:
        ``out`` and the number of ``parameters`` restored.

    Raises:
        InputError: Not an output folder, or ``out`` is taken.
        IntegrityError: A file has changed.
    """
    manifest = read_manifest(folder)
    digests = {a.path: a.sha256 for a in manifest.artifacts}
    scales = read_tensors(folder / "scales.safetensors", sha256=digests.get("scales.safetensors"))
    source = folder / "smoothed"
    for path in sorted(p for p in digests if p.startswith("smoothed/")):
        verify_file(folder / path, digests[path])
    with OutputFolder(out) as target:
        if (source / "config.json").is_file():
            # A checkpoint may name tensors otherwise than the model does: only the model knows both.
            model = load_model(path=source).model
            tensors = dict(model.state_dict())
            touched = unfold(tensors, manifest.sites, scales)
            model.load_state_dict(tensors)
            save_folder(model, target.path)
            target.adopt()
            kept = [f for f in source.iterdir() if not (target.path / f.name).exists() and ".safetensors" not in f.name]
        else:
            tensors = read_tensors(source / "model.safetensors")
            touched = unfold(tensors, manifest.sites, scales)
            target.write_tensors("model.safetensors", tensors)
            kept = []
        for file in sorted(kept):
            target.copy_file(file, file.name)
    return {"out": str(out), "parameters": len(touched)}


def unfold(tensors: dict[str, Tensor], sites: Sequence[SiteEntry], stored: Mapping[str, Tensor]) -> set[str]:
    """Undo every edit of the tensors in place, last site first, scales before shifts.

    Args:
        tensors: Name -> tensor of the smoothed checkpoint; changed.
        sites: The sites of the run's manifest, in its order.
        stored: The tensors of ``scales.safetensors``.

    Returns:
        The names that were touched.

    Raises:
        InputError: An edit does not fit its tensor.
    """
    touched = set()
    for site in reversed(sites):
        if site.mode != "fold":
            continue
        for edit in reversed(site.edits):
            if edit.parameter not in tensors:
                continue
            scaled = ParameterEdit(
                parameter=edit.parameter, channel=stored[edit.channel], power=-edit.power, offset=edit.offset
            )
            tensors[edit.parameter] = edit_parameter(tensors[edit.parameter], scaled, stored[f"scale/{site.name}"])
            touched.add(edit.parameter)
        for entry in reversed(site.shift_edits):
            if entry.parameter not in tensors:
                continue
            shifted = ShiftEdit(
                parameter=entry.parameter,
                channel=stored[entry.channel],
                weight=entry.weight,
                transposed=entry.transposed,
            )
            bias, weight = tensors[entry.parameter], tensors.get(entry.weight)
            tensors[entry.parameter] = shift_bias(bias, shifted, stored[f"shift/{site.name}"], weight, undo=True)
            touched.add(entry.parameter)
    return touched


def _not_provable(manifest: Manifest) -> str:
    """Why the original and its data cannot be found again; empty when they can."""
    if manifest.model.kind == "module":
        return "the model was handed over by a script, so there is no original to compare with"
    data: dict[str, Any] = dict(manifest.config["data"])  # type: ignore[arg-type]
    if manifest.model.kind != "demo" and data["path"] is None and data["factory"] is None:
        return "the data were handed over by a script, so there is nothing to compare on"
    if manifest.model.kind == "hf" and data["factory"] is not None:
        return f"the data come from the function {data['factory']}, which is not run unasked"
    return ""


def _original(
    manifest: Manifest, model: Path | None, data: Path | None, factory: str | None, factory_path: Path | None
) -> RunConfig:
    """The run's configuration with the original where it is now, without the metric, which nothing here needs."""
    values: dict[str, Any] = dict(manifest.config)
    source, media = dict(values["model"]), dict(values["data"])
    if source["factory"] is not None and factory is None:
        named = [source["factory"], *([media["factory"]] if media["factory"] else [])]
        raise InputError(
            "--factory", f"model and data were made by {' and '.join(named)}", f"allow it with --factory {named[0]}"
        )
    given = {"path": model, "factory": factory, "factory_path": factory_path}
    # Running code of a folder is for the caller to allow, not for a manifest.
    source |= {"trust_remote_code": False, "factory_path": None}
    source |= {key: str(value) for key, value in given.items() if value is not None}
    media |= {"metric": None} if data is None else {"metric": None, "path": str(data)}
    return RunConfig.build(values | {"model": source, "data": media})
