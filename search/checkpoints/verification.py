"""``verify`` and ``undo``: what the manifest promises, checked and taken back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from alphasmith.objectives.demo import load_demo
from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.judge.equivalence import prove
from alphasmith.objectives.model.hf_folder import save_folder
from alphasmith.objectives.model.loading import load_model
from alphasmith.objectives.model.plain_operators import BakedWeight, Piece, Rewriting
from alphasmith.objectives.quantization.payload import payload
from alphasmith.objectives.sites.folding import edit_parameter, shift_bias
from alphasmith.objectives.sites.types import ParameterEdit, ShiftEdit
from alphasmith.objectives.stored_types import same_bits
from alphasmith.objectives.text import error_line
from alphasmith.search.checkpoints.load import STRUCTURE, load_quantized, load_smoothed
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.permission import check_code
from alphasmith.search.inputs.task import load_task
from alphasmith.storage.output.checkpoint import shard_bytes, write_checkpoint
from alphasmith.storage.output.entries import ModelEntry, SiteEntry
from alphasmith.storage.output.manifest import FILE_NAME, Manifest
from alphasmith.storage.output.output_folder import OutputFolder
from alphasmith.storage.output.result_folder import ResultFolder

#: Files without which a result says nothing.
_TRAINED = (STRUCTURE,)
_DECIDING = (*_TRAINED, "scales.safetensors")


def verify(
    folder: Path,
    *,
    model: Path | None = None,
    data: Path | None = None,
    factory: str | None = None,
    factory_path: Path | None = None,
    allow_code: Collection[str | Path] = (),
) -> dict[str, Any]:
    """Check every digest, then prove that the smoothed model computes what the original does and the quantized one loads.

    The original is loaded as the run loaded it, with the run's proof data. A model or data that a script handed over are
    nowhere to be found again: then only digests are checked, and the answer says so. No function that the manifest names
    is run unless ``factory`` or ``allow_code`` names it.

    Args:
        folder: Output folder of a run.
        model: Where the original model folder is now.
        data: Where the run's media are now.
        factory: ``module:function`` of the original, when it was built by one; naming it runs it.
        factory_path: Folder of that module.
        allow_code: Further functions and folders that the manifest may lead to, as of ``resume``.

    Of a trained model there is no equivalence to prove: its integer model is loaded and must hold the bits that were written.

    Returns:
        ``artifacts`` checked, ``error``, ``tolerance`` and ``samples`` of the proof, or ``skipped`` with the reason; ``training``
        where the model was trained.

    Raises:
        InputError: Not an output folder, or the original cannot be loaded or is another model.
        IntegrityError: A file has changed.
        EquivalenceError: The models differ.
    """
    result = ResultFolder(folder)
    manifest = result.manifest
    result.check()
    weights = result.weight_files("quantized")
    deciding = (
        (*_TRAINED, *weights)
        if manifest.training is not None
        else (*_DECIDING, *weights, *result.weight_files("smoothed"))
    )
    for name in deciding:
        if not result.has(name):
            raise IntegrityError(f"{folder / FILE_NAME} does not name {name}, which decides what is computed")
    answer: dict[str, Any] = {"folder": str(folder), "artifacts": len(manifest.artifacts)}
    if manifest.training is not None:
        return (
            answer | {"training": manifest.training.id} | _same_bits(result, model, factory, factory_path, allow_code)
        )
    reason = _not_provable(manifest)
    if reason:
        return answer | {"skipped": reason}
    config = original_config(manifest, model, data, factory, factory_path)
    given = [name for name in (factory, factory_path, model) if name is not None]
    check_code(config, [*allow_code, *given], str(folder / FILE_NAME))
    task = load_task(config)
    if task.loaded.digest != manifest.model.digest:
        raise InputError("model", "is not the model of this run (its weights have another digest)", "give the original")
    tolerance = config.proof.tolerance if manifest.proof is None else manifest.proof.tolerance
    error = prove(task.loaded.model, load_smoothed(folder, task.loaded.model), task.proof, tolerance=tolerance)
    load_quantized(folder, task.loaded.model)
    return answer | {"error": error, "tolerance": tolerance, "samples": sum(b.size for b in task.proof)}


def _same_bits(
    result: ResultFolder,
    model: Path | None,
    factory: str | None,
    factory_path: Path | None,
    allow_code: Collection[str | Path],
) -> dict[str, Any]:
    """Load an integer model and compare all that it holds with what was written.

    Raises:
        IntegrityError: Something differs.
    """
    architecture = None
    if not result.has("quantized/config.json"):
        manifest = result.manifest
        if manifest.model.kind == "demo":
            demo = dict(manifest.config["model"])["demo"] or "image"  # type: ignore[arg-type]
            architecture = load_demo(demo).model  # type: ignore[arg-type]
        elif factory is None and manifest.model.kind == "module":
            return {"skipped": "the model was handed over by a script: name a function that builds it with --factory"}
        else:
            config = original_config(manifest, model, None, factory, factory_path)
            given = [name for name in (factory, factory_path, model) if name is not None]
            check_code(config, [*allow_code, *given], str(result.path / FILE_NAME), ("batches", "metric"))
            source = config.model
            architecture = load_model(path=source.path, factory=source.factory, factory_path=source.factory_path).model
    tensors, structure = payload(load_quantized(result.path, architecture))
    stored, told = result.read_checkpoint("quantized"), result.read_json(STRUCTURE)
    differing = [
        name
        for name in sorted(tensors.keys() | stored.keys())
        if name not in tensors or name not in stored or not same_bits(tensors[name], stored[name])
    ]
    same = all(structure[name] == told.get(name, structure[name]) for name in structure)
    if differing or not same:
        raise IntegrityError(f"{result.path}: {(differing or [STRUCTURE])[0]} is another one when the model is loaded")
    return {}


def undo(folder: Path, out: Path) -> dict[str, Any]:
    """Take scales and folded shifts out of the smoothed checkpoint again.

    Float32 division does not take back float32 multiplication bit for bit: every weight is within two roundings of the
    original's, every bias within the roundings of what a shift added to it. Scales that are powers of two (``round_scales``) are taken
    back to the bit.

    Args:
        folder: Output folder of a run.
        out: Target; must not exist.

    Returns:
        ``out`` and the number of ``parameters`` restored.

    Raises:
        InputError: Not an output folder, or ``out`` is taken.
        IntegrityError: A file has changed.
    """
    result = ResultFolder(folder)
    if result.manifest.training is not None:
        raise InputError("DIR", f"{folder} holds a trained model", f"undo the folder of run {result.manifest.run.id}")
    scales = result.read_tensors("scales.safetensors")
    sites = result.manifest.sites
    rewriting = _rewriting(result.manifest.model)
    result.weight_files("smoothed")
    result.check("smoothed")
    with OutputFolder(out) as target:
        kept: list[str] = []
        if result.has("smoothed/config.json"):
            # A checkpoint may name tensors otherwise than the model does: only the model knows both.
            with result.only_named("smoothed") as checked:
                loaded, most = load_model(path=checked), shard_bytes(checked)
            model = loaded.model
            stored = model.state_dict()
            tensors = rewriting.rewritten(stored)
            touched = unfold(tensors, sites, scales)
            model.load_state_dict(rewriting.original(tensors, stored.keys()))
            save_folder(model, target.path, types=loaded.types, most=most)
            target.adopt()
            kept = [name for name in result.names("smoothed") if ".safetensors" not in name]
        else:
            stored = result.read_checkpoint("smoothed")
            tensors = rewriting.rewritten(stored)
            touched = unfold(tensors, sites, scales)
            original = rewriting.original(tensors, stored.keys())
            write_checkpoint(target, "", original, types={}, most=shard_bytes(result.path / "smoothed"))
        for name in kept:
            beside = name.removeprefix("smoothed/")
            if not (target.path / beside).exists():
                target.write_bytes(beside, result.read_bytes(name))
    return {"out": str(out), "parameters": len(touched)}


def _rewriting(entry: ModelEntry) -> Rewriting:
    """How the names of edits relate to those of the checkpoint."""
    return Rewriting(
        pieces=tuple(Piece(**piece.model_dump()) for piece in entry.pieces),
        baked=tuple(BakedWeight(**baked.model_dump()) for baked in entry.baked),
    )


def unfold(tensors: dict[str, Tensor], sites: Sequence[SiteEntry], stored: Mapping[str, Tensor]) -> set[str]:
    """Undo every edit of the tensors in place, last site first, scales before shifts.

    Args:
        tensors: Name -> tensor of the smoothed checkpoint; changed.
        sites: The sites of the run's manifest, in its order.
        stored: The tensors of ``scales.safetensors``.

    Returns:
        The names that were touched.

    Raises:
        IntegrityError: An edit names a tensor that is nowhere, or does not fit its own.
    """
    touched = set()
    for site in reversed(sites):
        if site.mode != "fold":
            continue
        try:
            for edit in reversed(site.edits):
                scaled = ParameterEdit(
                    parameter=edit.parameter, channel=stored[edit.channel], power=-edit.power, offset=edit.offset
                )
                tensors[edit.parameter] = edit_parameter(tensors[edit.parameter], scaled, stored[f"scale/{site.name}"])
                touched.add(edit.parameter)
            for entry in reversed(site.shift_edits):
                shifted = ShiftEdit(
                    parameter=entry.parameter,
                    channel=stored[entry.channel],
                    weight=entry.weight,
                    transposed=entry.transposed,
                )
                bias, weight = tensors[entry.parameter], tensors.get(entry.weight)
                tensors[entry.parameter] = shift_bias(bias, shifted, stored[f"shift/{site.name}"], weight, undo=True)
                touched.add(entry.parameter)
        except KeyError as error:
            raise IntegrityError(f"site {site.name}: the manifest names {error}, which no file holds") from error
        except (InputError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"site {site.name}: its edits do not fit their tensors ({error_line(error)})"
            ) from error
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


def original_config(
    manifest: Manifest, model: Path | None, data: Path | None, factory: str | None, factory_path: Path | None
) -> RunConfig:
    """The run's configuration with the original where it is now, without the metric and without permission for code of a folder.

    Args:
        manifest: Of the run.
        model: The original model folder; None: where it was.
        data: The run's media; None: where they were.
        factory: Function that builds the original; None: that of the run.
        factory_path: Folder of its module; None: that of the run.
    """
    values: dict[str, Any] = dict(manifest.config)
    source, media = dict(values["model"]), dict(values["data"])
    given = {"path": model, "factory": factory, "factory_path": factory_path}
    # Running code of a folder is for the caller to allow, not for a manifest.
    source |= {"trust_remote_code": False}
    if factory is not None:
        source |= {"factory_path": None}
    source |= {key: str(value) for key, value in given.items() if value is not None}
    media |= {"metric": None} if data is None else {"metric": None, "path": str(data)}
    return RunConfig.build(values | {"model": source, "data": media})
