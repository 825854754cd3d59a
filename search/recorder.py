"""What the driver of a run records: the outcome, the output folder, the end. Results of sites: see ``site_keeper``."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from torch import Tensor, nn

from alphasmith.dashboards.report import render_report
from alphasmith.dashboards.study_views import annotate_study, study_note
from alphasmith.dashboards.words import verdict_of_refinement
from alphasmith.objectives.hf_folder import save_folder
from alphasmith.objectives.recurrent import original_names
from alphasmith.objectives.sites.types import Site
from alphasmith.search.config import RunConfig
from alphasmith.search.manifests import build_manifest, refinement_entry, scale_tensors, space_hash
from alphasmith.search.model_search import ModelResult
from alphasmith.search.outcome import Found, Products
from alphasmith.search.prepare import Prepared
from alphasmith.search.run_handle import RunHandle
from alphasmith.search.site_records import model_groups, refinement_digests, site_record, trial_digests
from alphasmith.search.site_result import SiteResult
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.task import Task
from alphasmith.storage import record_types as stored
from alphasmith.storage.files import artifact_kind, digest_file, verify_file
from alphasmith.storage.frames import REFINEMENT, run_frames
from alphasmith.storage.manifest import FILE_NAME, Manifest, read_manifest
from alphasmith.storage.output import OutputFolder

#: Files of a Hugging Face folder, beside configuration and weights, that a smoothed copy needs to be used like the original.
_COMPANIONS = (
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer*",
    "video_preprocessor_config.json",
    "vocab.*",
)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What ``run`` returns.

    Attributes:
        id: Run id in the storage.
        storage: Its address, passwords masked.
        folder: Output folder.
        manifest: Everything that explains the result.
        sites: One row per site, columns as ``storage.frames.sites_frame``.
        trials: One row per trial of every study.
    """

    id: str
    storage: str
    folder: Path
    manifest: Manifest
    sites: pd.DataFrame
    trials: pd.DataFrame


class RunRecorder:
    """What the driver of a run records beside the results of its sites: the whole model, the outcome, the output folder.

    Args:
        handle: The run, open for work.
        config: Its configuration.
        task: Model and data.
        prepared: Sites and calibration.
    """

    def __init__(self, handle: RunHandle, config: RunConfig, task: Task, prepared: Prepared) -> None:
        self._handle = handle
        self._store = handle.store
        self._config = config
        self._task = task
        self._prepared = prepared
        self._position = {s.name: i for i, s in enumerate(prepared.sites)}
        self.id = handle.id

    def site(self, site: Site, result: SiteResult) -> None:
        """Keep one site's result once more, after it has changed."""
        self._store.add_site(
            self.id,
            site_record(site, self._position[site.name], result),
            trial_digests(result.study_name, result.results),
        )

    def whole(self, result: ModelResult) -> None:
        """Keep the result over the whole model."""
        self._handle.check_driving()
        self._store.set_groups(self.id, model_groups(result))
        self._store.add_trials(self.id, trial_digests(result.study_name, result.results))

    def outcome(self, found: Found) -> None:
        """Keep what the model's output decided; done twice, it leaves the same records.

        The refinement may have changed sites, and the guard may have put a baseline in the place of every winner.
        """
        self._handle.check_driving()
        changed: set[str] = set() if found.refinement is None else set(found.refinement.changed)
        if found.refinement is not None:
            self._store.add_trials(self.id, refinement_digests(found.refinement))
        for site in self._prepared.sites:
            if site.name in found.sites and (found.fallback is not None or site.name in changed):
                self.site(site, found.kept(found.sites[site.name]))
        if found.whole is not None and found.fallback is not None:
            self._store.set_groups(self.id, model_groups(found.kept(found.whole)))

    def write(self, found: Found, products: Products) -> RunResult:
        """Write the output folder whole or not at all, then finish the run.

        Raises:
            InputError: The folder is taken or not writable, or the device is full.
        """
        self._handle.check_driving()
        for site in self._prepared.sites:
            if site.name not in found.sites:
                self._store.add_site(self.id, site_record(site, self._position[site.name]))
        out = self._handle.folder
        refinement = None if found.refinement is None else refinement_entry(found.refinement).model_dump(mode="json")
        spaces = {name: result.space for name, result in found.sites.items()}
        studies = {name: result.study_name for name, result in found.sites.items()}
        if found.whole is not None:
            spaces["model"], studies["model"] = SearchSpace.of(found.whole.ranges), found.whole.study_name
        record = self._store.conclude(
            self.id, space_hash=space_hash(spaces), folder=str(out.resolve()), refinement=refinement
        )
        with OutputFolder(out) as folder:
            self._write_smoothed(folder, products.folded)
            self._write_quantized(folder, products)
            folder.write_tensors("scales.safetensors", scale_tensors(self._prepared.sites, found.final))
            manifest = build_manifest(
                record,
                config=self._config,
                task=self._task,
                prepared=self._prepared,
                found=found,
                products=products,
                artifacts=folder.written,
                studies=studies,
            )
            sites, groups, trials = run_frames(self._store, self.id)
            folder.write_text("report.html", render_report(json.loads(manifest.to_json()), sites, groups, trials))
            manifest = manifest.with_artifacts(folder.written)
            folder.write_text(FILE_NAME, manifest.to_json())
        return conclude(self._handle, manifest)

    def _write_smoothed(self, folder: OutputFolder, folded: nn.Module) -> None:
        """The folded float model under the user's own names; a Hugging Face folder where the model came as one."""
        names = self._prepared.survey.names
        tensors = original_names(folded.state_dict(), names)
        if hasattr(folded, "save_pretrained"):
            shipped = folded
            if names:  # recurrent layers are saved in the architecture the model came in
                shipped = self._task.loaded.model
                shipped.load_state_dict(tensors)
            save_folder(shipped, folder.subfolder("smoothed"))
            folder.adopt("smoothed")
        else:
            folder.write_tensors("smoothed/model.safetensors", _unshared(tensors))
        self._copy_companions(folder, "smoothed")

    def _write_quantized(self, folder: OutputFolder, products: Products) -> None:
        structure = {**products.structure, "unrolled": bool(self._prepared.survey.names)}
        folder.write_tensors("quantized/model.safetensors", products.tensors, {"format": "pt"})
        folder.write_json("quantized/quantization.json", structure)
        config: Any = getattr(self._task.loaded.model, "config", None)
        if hasattr(config, "to_json_string"):
            folder.write_json("quantized/config.json", json.loads(config.to_json_string(use_diff=False)))
        self._copy_companions(folder, "quantized")

    def _copy_companions(self, folder: OutputFolder, into: str) -> None:
        for name, text in self._task.companions.items():
            folder.write_text(f"{into}/{name}", text)
        source = self._task.loaded.folder
        if source is None or self._task.loaded.kind != "hf":
            return
        files = {file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()}
        for file in sorted(files):
            folder.copy_file(file, f"{into}/{file.name}")


def conclude(handle: RunHandle, manifest: Manifest) -> RunResult:
    """Finish a run whose output folder is whole: its files on record, notes in its studies, the run marked as finished.

    Args:
        handle: The run, open for work.
        manifest: That of the folder.
    """
    own = digest_file(handle.folder / FILE_NAME, name=FILE_NAME)
    files = [(a.path, a.sha256, a.bytes) for a in manifest.artifacts] + [(own.path, own.sha256, own.bytes)]
    handle.store.set_artifacts(
        handle.id,
        [
            stored.ArtifactRecord(kind=artifact_kind(path), path=path, sha256=sha256, bytes=size)
            for path, sha256, size in files
        ],
    )
    sites, _, trials = run_frames(handle.store, handle.id)
    _annotate(handle, manifest, sites, trials)
    handle.check_driving()
    handle.discard_working_objects()  # killed after this, the run needs them no more: its folder is whole
    handle.store.finish(handle.id)
    return RunResult(
        id=handle.id, storage=handle.storage, folder=handle.folder, manifest=manifest, sites=sites, trials=trials
    )


def written_before(handle: RunHandle) -> Manifest | None:
    """The manifest of a run that was ended between the writing of its folder and the end of its record; None otherwise.

    Raises:
        IntegrityError: The folder is this run's but not as it was written.
    """
    if not (handle.folder / FILE_NAME).is_file():
        return None
    manifest = read_manifest(handle.folder)
    if manifest.run.id != handle.id:
        return None
    for artifact in manifest.artifacts:
        verify_file(handle.folder / artifact.path, artifact.sha256)
    return manifest


def _annotate(handle: RunHandle, manifest: Manifest, sites: pd.DataFrame, trials: pd.DataFrame) -> None:
    """Two figures and a note in every study, for the Optuna dashboard."""
    record = handle.store.get(handle.id)
    for name in dict.fromkeys(trials["study_name"]):
        of = str(name).removeprefix(f"{handle.id}/")
        study = optuna.load_study(study_name=name, storage=handle.optuna_storage)
        mine = trials[trials["study_name"] == name]
        shown = sites if of in ("model", REFINEMENT) else sites[sites["site"] == of]
        facts = {"run": handle.id, "scheme": record.scheme, "model": manifest.model.name}
        if of == REFINEMENT and record.refinement is not None:
            facts["outcome"] = verdict_of_refinement(record.refinement)
        annotate_study(study, sites=shown, trials=mine, note=study_note(of, shown, facts))


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("alphasmith", "numpy", "optuna", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once, under the first of their names, as safetensors demands."""
    seen: dict[tuple[Any, ...], str] = {}
    kept: dict[str, Tensor] = {}
    for name, value in tensors.items():
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape))
        if value.numel() and key in seen:
            continue
        seen[key] = name
        kept[name] = value
    return kept
