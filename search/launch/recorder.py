"""The driver's records of a run: the outcome, the output folder, the end. Results of sites: see ``site_results``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from torch import Tensor

from alphasmith.dashboards.report import render_report
from alphasmith.dashboards.study_views import annotate_formats, annotate_study, study_note
from alphasmith.dashboards.text import verdict_of_refinement
from alphasmith.objectives.model.hf_folder import architecture_names, save_folder
from alphasmith.objectives.model.plain_operators import bake_plain
from alphasmith.objectives.sensitivity.output_shares import OutputShares
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.text import number
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.inputs.task import Task
from alphasmith.search.launch._manifest_builder import (
    build_manifest,
    model_groups,
    refinement_entry,
    scale_tensors,
    space_hash,
)
from alphasmith.search.launch._outcome import Products, SearchOutcome
from alphasmith.search.model.search import ModelResult
from alphasmith.search.site.result import SiteResult
from alphasmith.search.study.space import SearchSpace
from alphasmith.search.work.session import RunHandle
from alphasmith.search.work.site_records import site_record
from alphasmith.storage.output.checkpoint import shard_bytes, write_checkpoint
from alphasmith.storage.output.entries import MetricEntry, OutputEntry
from alphasmith.storage.output.manifest import FILE_NAME, Manifest
from alphasmith.storage.output.output_folder import OutputFolder
from alphasmith.storage.output.result_folder import ResultFolder
from alphasmith.storage.runs.data_frames import AT_OUTPUT, sites_frame, trials_frame
from alphasmith.storage.runs.records import TrialRecord

#: Files of a Hugging Face folder, beside configuration and weights, that a smoothed copy needs to be used like the original.
_COMPANIONS = (
    "LICEN[CS]E*",
    "NOTICE*",
    "README.md",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
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
        sites: One row per site, columns as ``data_frames.sites_frame``.
        trials: One row per trial of every study.
    """

    id: str
    storage: str
    folder: Path
    manifest: Manifest
    sites: pd.DataFrame
    trials: pd.DataFrame

    def __repr__(self) -> str:
        return "\n".join(["RunResult", *(f"  {name}: {value}" for name, value in self._facts().items())])

    def _repr_html_(self) -> str:
        """For notebooks."""
        row = '<tr><th style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>'
        return f"<table>{''.join(row.format(escape(k), escape(v)) for k, v in self._facts().items())}</table>"

    def _facts(self) -> dict[str, str]:
        """What one wants to see of a run at once."""
        run, output = self.manifest.run, self.manifest.output
        kept = {"identity": "naive", "alpha_0.5": "alpha_half"}.get(output.kept, output.kept)

        def change(of: OutputEntry | MetricEntry) -> str:
            return f"{number(of.naive, 4)} quantized without smoothing, {number(getattr(of, kept), 4)} with"

        return {
            "run": f"{self.id}{run.name and f' ({run.name})'} in {self.storage}",
            "status": f"finished {run.finished:%Y-%m-%d %H:%M} UTC",
            "scheme": self.manifest.scheme.name,
            f"output loss ({output.loss})": change(output),
            **{m.name: f"{number(m.float_model, 4)} in float, {change(m)}" for m in output.metrics},
            "folder": str(self.folder),
        }


class RunRecorder:
    """What the driver of a run records beside the results of its sites: the whole model, the outcome, the output folder.

    Args:
        handle: The run, open for work.
        config: Its configuration.
        task: Model and data.
        prepared: Sites and calibration.
    """

    def __init__(self, handle: RunHandle, config: RunConfig, task: Task, prepared: PreparedModel) -> None:
        self._handle = handle
        self._store = handle.store
        self._config = config
        self._task = task
        self._prepared = prepared
        self._position = {s.name: i for i, s in enumerate(prepared.sites)}
        self.id = handle.id

    def site(self, site: Site, result: SiteResult, shares: OutputShares | None = None) -> None:
        """Keep one site's result once more, after it has changed or its share of the output's error is known."""
        self._store.add_site(self.id, site_record(site, self._position[site.name], result, shares))

    def whole(self, result: ModelResult) -> None:
        """Keep the result over the whole model."""
        self._handle.check_driving()
        self._store.set_groups(self.id, model_groups(result))

    def outcome(self, found: SearchOutcome) -> None:
        """Keep what the model's output decided; done twice, it leaves the same records.

        The refinement may have changed sites, the guard may have put a baseline in the place of every winner, and every site
        now has its share of the output's error.
        """
        self._handle.check_driving()
        changed: set[str] = set() if found.refinement is None else set(found.refinement.changed)
        for site in self._prepared.sites:
            known = found.shares is not None or found.fallback is not None or site.name in changed
            if site.name in found.sites and known:
                self.site(site, found.kept(found.sites[site.name]), found.shares)
        if found.whole is not None and found.fallback is not None:
            self._store.set_groups(self.id, model_groups(found.kept(found.whole)))

    def write(self, found: SearchOutcome, products: Products) -> RunResult:
        """Write the output folder whole or not at all, then finish the run.

        Raises:
            InputError: As :meth:`write_with`.
        """

        def both(folder: OutputFolder) -> Products:
            self._write_quantized(folder, products)
            if products.forms is not None:
                tensors, structure = products.forms
                folder.write_tensors("formats/operators.safetensors", tensors)
                folder.write_json("formats/operators.json", structure)
            self._write_smoothed(folder, products)
            return products

        return self.write_with(found, both)

    def write_with(self, found: SearchOutcome, models: Callable[[OutputFolder], Products]) -> RunResult:
        """The same, with models that are made while they are written.

        Args:
            found: What the search decided.
            models: Writes ``quantized/`` and ``smoothed/`` and tells what they are.

        Raises:
            InputError: The folder is taken or not writable, or the device is full.
        """
        self._handle.check_driving()
        for site in self._prepared.sites:
            if site.name not in found.sites:
                left = site_record(site, self._position[site.name], shares=found.shares)
                self._store.add_site(self.id, left)
        out = self._handle.folder
        refinement = None if found.refinement is None else refinement_entry(found.refinement).model_dump(mode="json")
        spaces = {name: result.space for name, result in found.sites.items()}
        if found.whole is not None:
            spaces["model"] = SearchSpace.of(found.whole.ranges)
        record = self._store.conclude(
            self.id, space_hash=space_hash(spaces), folder=str(out.resolve()), refinement=refinement
        )
        with self._handle.output() as folder:
            products = models(folder)
            folder.write_tensors("scales.safetensors", scale_tensors(self._prepared.sites, found.final))
            manifest = build_manifest(
                record,
                config=self._config,
                task=self._task,
                prepared=self._prepared,
                found=found,
                products=products,
                artifacts=folder.written,
                finished=self._handle.now(),
            )
            trials = self._store.trials(self.id)
            folder.write_text("report.html", render_report(manifest, trials))
            manifest = manifest.with_artifacts(folder.written)
            folder.write_text(FILE_NAME, manifest.to_json())
        return conclude(self._handle, manifest, trials)

    def _write_smoothed(self, folder: OutputFolder, products: Products) -> None:
        """The folded float model under the user's own names, in types and shards as it came; a Hugging Face folder where it was one."""
        folded, most = products.folded, shard_bytes(self._task.loaded.folder)
        rewriting = self._prepared.survey.rewriting
        # A checkpoint of transformers has the names that its configuration builds.
        plain = rewriting.baked and hasattr(folded, "save_pretrained")
        known = architecture_names(self._task.loaded.model) if plain else None
        tensors = rewriting.original(folded.state_dict(), known)
        if hasattr(folded, "save_pretrained"):
            shipped = folded
            if rewriting.names or rewriting.baked:  # saved in the architecture the model came in
                shipped = self._task.loaded.model
                bake_plain(shipped, tensors)
                shipped.load_state_dict(tensors)
            save_folder(shipped, folder.subfolder("smoothed"), types=products.types, most=most)
            folder.adopt("smoothed")
        else:
            write_checkpoint(folder, "smoothed", _unshared(tensors), types=products.types, most=most)
        self.copy_companions(folder, "smoothed")

    def _write_quantized(self, folder: OutputFolder, products: Products) -> None:
        folder.write_tensors("quantized/model.safetensors", products.tensors, {"format": "pt"})
        self.describe_quantized(folder, products.structure)

    def describe_quantized(self, folder: OutputFolder, structure: Mapping[str, Any]) -> None:
        """What belongs beside the tensors of ``quantized/``.

        Args:
            folder: The output folder.
            structure: See ``quantization.payload``.
        """
        rewriting = self._prepared.survey.rewriting
        rewritten = {"unrolled": bool(rewriting.renamed), "split_attention": bool(rewriting.pieces)}
        folder.write_json("quantized/quantization.json", {**structure, **rewritten})
        model = self._task.loaded.model
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_json_string"):
            content = json.loads(config.to_json_string(use_diff=False))
            if not content.get("architectures") and type(model).__module__.startswith("transformers."):
                content["architectures"] = [type(model).__name__]  # a model that was never saved does not say it
            folder.write_json("quantized/config.json", content)
        self.copy_companions(folder, "quantized")

    def copy_companions(self, folder: OutputFolder, into: str) -> None:
        """Tokenizer and processor files of the model, as they came.

        Args:
            folder: The output folder.
            into: A checkpoint's folder in it.
        """
        for name, text in self._task.companions.items():
            folder.write_text(f"{into}/{name}", text)
        source = self._task.loaded.folder
        if source is None or self._task.loaded.kind != "hf":
            return
        files = {file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()}
        for file in sorted(files):
            folder.copy_file(file, f"{into}/{file.name}")


def conclude(handle: RunHandle, manifest: Manifest, trials: Sequence[TrialRecord]) -> RunResult:
    """Finish a run whose output folder is whole: notes in its studies, the run marked as finished.

    Args:
        handle: The run, open for work.
        manifest: That of the folder.
        trials: All trials of the run.
    """
    sites, tried = sites_frame(manifest.sites), trials_frame(trials)
    _annotate(handle, manifest, sites, tried)
    _annotate_formats(handle, manifest)
    handle.check_driving()
    handle.discard_working_objects()  # killed after this, the run needs them no more: its folder is whole
    handle.finish()
    return RunResult(
        id=handle.id, storage=handle.storage, folder=handle.folder, manifest=manifest, sites=sites, trials=tried
    )


def written_before(handle: RunHandle) -> Manifest | None:
    """The manifest of a run that was ended between the writing of its folder and the end of its record; None otherwise.

    Raises:
        IntegrityError: The folder is this run's but not as it was written.
    """
    if not (handle.folder / FILE_NAME).is_file():
        return None
    result = ResultFolder(handle.folder)
    if result.manifest.run.id != handle.id:
        return None
    result.check()
    return result.manifest


def _annotate(handle: RunHandle, manifest: Manifest, sites: pd.DataFrame, trials: pd.DataFrame) -> None:
    """Two figures and a note in every study, for the Optuna dashboard."""
    for name, mine in trials.groupby("study_name"):
        of = str(mine["site"].iloc[0])
        study = optuna.load_study(study_name=str(name), storage=handle.optuna_storage)
        shown = sites if of == "model" or of in AT_OUTPUT else sites[sites["site"] == of]
        facts = {"run": handle.id, "scheme": manifest.scheme.name, "model": manifest.model.name}
        steps = () if manifest.refinement is None else manifest.refinement.steps
        for step in steps:
            if step.study == name:
                facts["outcome"] = verdict_of_refinement(step.model_dump())
        annotate_study(study, sites=shown, trials=mine, note=study_note(of, shown, facts))


def _annotate_formats(handle: RunHandle, manifest: Manifest) -> None:
    """A figure and a note in the study of the formats."""
    if manifest.formats is not None and manifest.formats.study is not None:
        study = optuna.load_study(study_name=manifest.formats.study, storage=handle.optuna_storage)
        annotate_formats(study, manifest.model_dump(mode="json"))


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
