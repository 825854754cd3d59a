"""One run in the storage: its record, its studies, its output folder. A run that fails leaves a record with the reason."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
from alphasmith.search.manifests import build_manifest, refinement_entry, scale_tensors, search_facts, space_hash
from alphasmith.search.model_search import ModelResult
from alphasmith.search.outcome import Found, Products
from alphasmith.search.prepare import Prepared
from alphasmith.search.refinement import RefinementKind, RefinementResult
from alphasmith.search.site_result import SiteResult
from alphasmith.search.spaces import SearchSpace
from alphasmith.search.studies import Losses, TrialResult
from alphasmith.search.task import Task
from alphasmith.storage import record_types as stored
from alphasmith.storage.database import initialise, open_database, optuna_storage
from alphasmith.storage.files import artifact_kind
from alphasmith.storage.frames import REFINEMENT, groups_frame, sites_frame, trials_frame
from alphasmith.storage.manifest import FILE_NAME, Manifest
from alphasmith.storage.output import OutputFolder
from alphasmith.storage.records import RunStore
from alphasmith.storage.urls import mask

DEFAULT_STORAGE = "sqlite:///alphasmith.db"
DEFAULT_OUT = Path("alphasmith-runs")
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
    """Opens the storage, creates the run, and keeps what it finds as soon as it is found.

    Used as a context: an error inside marks the run as failed with its message.

    Args:
        config: The run's configuration.
        task: Model and data.
        prepared: Sites and calibration.
        clock: Zone-aware now.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        prepared: Prepared,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config = config
        self._task = task
        self._prepared = prepared
        self._url = config.storage or DEFAULT_STORAGE
        self._database = open_database(self._url)
        initialise(self._database)
        self._store = RunStore(self._database, clock=clock)
        self.optuna_storage = optuna_storage(self._database)
        self._position = {s.name: i for i, s in enumerate(prepared.sites)}
        self._studies: dict[str, str] = {}
        self._spaces: dict[str, SearchSpace] = {}

    def __enter__(self) -> Self:
        record = self._store.create(
            stored.RunSpec(
                name=self._config.name or self._task.name,
                model_digest=self._task.loaded.digest,
                data_digest=self._task.data_digest,
                config=_masked(self._config),
                scheme=self._config.scheme.build().name,
                hardware={
                    "rho": self._prepared.survey.scarcity.rho,
                    "explanation": self._prepared.survey.scarcity.explanation,
                },
                scope=self._config.search.scope,
                versions=versions(),
                space_hash="",
            )
        )
        self.id = record.id
        self._store.start(self.id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._store.fail(self.id, str(error) or type(error).__name__)
        self._database.close()

    @property
    def rho(self) -> float:
        """Scarcity of the target hardware."""
        return self._prepared.survey.scarcity.rho

    def study_name(self, of: str) -> str:
        """Name of the study of a site, or of the whole model (``model``)."""
        self._studies[of] = f"{self.id}/{of}"
        return self._studies[of]

    def site(self, site: Site, result: SiteResult) -> None:
        """Keep one site's result with its groups and trials, in one transaction."""
        self._spaces[site.name] = result.space
        self._store.add_site(
            self.id,
            self._site_record(
                site,
                study_name=result.study_name,
                search=_losses(result.search, result.best_single_alpha),
                held_out=_losses(result.held_out, result.best_single_alpha),
                winner=result.winner,
                trials=len(result.results),
                exact_evaluations=result.exact_evaluations,
                seconds=result.seconds,
                groups=_groups(
                    result,
                    [int(n) for n in result.labels.bincount(minlength=len(result.ranges))],
                    betas=result.candidate.betas,
                    offsets=result.candidate.offsets,
                ),
                shift=result.smoothing.shift is not None,
                range_statistic=result.range_statistic,
                range_factor=result.smoothing.range_factor,
                grouping=result.grouping,
                statistic=result.statistic,
                facts=search_facts(result).model_dump(mode="json"),
            ),
            _digests(result.study_name, result.results),
        )

    def whole(self, result: ModelResult) -> None:
        """Keep the result over the whole model."""
        self._spaces["model"] = SearchSpace.of(result.ranges)
        self._store.set_groups(self.id, self._model_groups(result))
        self._store.add_trials(self.id, _digests(result.study_name, result.results))

    @staticmethod
    def _model_groups(result: ModelResult) -> tuple[stored.GroupRecord, ...]:
        counts = [labels.bincount(minlength=len(result.ranges)).tolist() for labels in result.labels.values()]
        return _groups(result, [sum(column) for column in zip(*counts, strict=True)])

    def outcome(self, found: Found) -> None:
        """Keep what the model's output decided.

        The refinement may have changed sites, and the guard may have put a baseline in the place of every winner.
        """
        changed: set[str] = set() if found.refinement is None else set(found.refinement.changed)
        if found.refinement is not None:
            self._store.add_trials(self.id, _refinement_digests(found.refinement))
        for site in self._prepared.sites:
            if site.name in found.sites and (found.fallback is not None or site.name in changed):
                self.site(site, found.kept(found.sites[site.name]))
        if found.whole is not None and found.fallback is not None:
            self._store.set_groups(self.id, self._model_groups(found.kept(found.whole)))

    def write(self, found: Found, products: Products) -> RunResult:
        """Write the output folder whole or not at all, then finish the run.

        Raises:
            InputError: The folder is taken or not writable, or the device is full.
        """
        for site in self._prepared.sites:
            if site.name not in found.sites:
                self._store.add_site(self.id, self._site_record(site))
        out = self._config.out or DEFAULT_OUT / self.id
        refinement = None if found.refinement is None else refinement_entry(found.refinement).model_dump(mode="json")
        record = self._store.conclude(
            self.id, space_hash=space_hash(self._spaces), folder=str(out.resolve()), refinement=refinement
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
                studies=self._studies,
            )
            sites, groups, trials = run_frames(self._store, self.id)
            folder.write_text("report.html", render_report(json.loads(manifest.to_json()), sites, groups, trials))
            manifest = manifest.with_artifacts(folder.written)
            folder.write_text(FILE_NAME, manifest.to_json())
        self._store.set_artifacts(
            self.id,
            [
                stored.ArtifactRecord(kind=artifact_kind(a.path), path=a.path, sha256=a.sha256, bytes=a.bytes)
                for a in folder.written
            ],
        )
        self._annotate(sites, trials)
        self._store.finish(self.id)
        return RunResult(id=self.id, storage=mask(self._url), folder=out, manifest=manifest, sites=sites, trials=trials)

    def _site_record(self, site: Site, **values: Any) -> stored.SiteRecord:
        return stored.SiteRecord(
            name=site.name,
            position=self._position[site.name],
            mode=site.mode,
            reason=site.reason,
            channels=site.channels,
            operators=tuple(o.name for o in site.operators),
            **values,
        )

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

    def _annotate(self, sites: pd.DataFrame, trials: pd.DataFrame) -> None:
        """Two figures and a note in every study, for the Optuna dashboard."""
        refinement = self._store.get(self.id).refinement
        for of, name in self._studies.items():
            study = optuna.load_study(study_name=name, storage=self.optuna_storage)
            mine = trials[trials["study_name"] == name]
            shown = sites if of in ("model", REFINEMENT) else sites[sites["site"] == of]
            facts = {"run": self.id, "scheme": self._config.scheme.build().name, "model": self._task.name}
            if of == REFINEMENT and refinement is not None:
                facts["outcome"] = verdict_of_refinement(refinement)
            annotate_study(study, sites=shown, trials=mine, note=study_note(of, shown, facts))


def run_frames(store: RunStore, run_id: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Sites, groups and trials of a run as stored; trials name their site (``model`` for the whole model)."""
    sites = store.sites(run_id)
    trials = trials_frame(store.trials(run_id))
    trials["site"] = [str(name).removeprefix(f"{run_id}/") for name in trials["study_name"]]
    return sites_frame(sites), groups_frame(sites, store.groups(run_id)), trials


def frame_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame as plain JSON values; NaN becomes None."""
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=15))
    return rows


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("alphasmith", "numpy", "optuna", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _masked(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    values["storage"] = mask(config.storage) if config.storage else None
    return values


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


def _losses(losses: Losses, best_single_alpha: float) -> stored.Losses:
    return stored.Losses(
        identity=losses.identity,
        alpha_half=losses.alpha_half,
        best_single=losses.best_single,
        best_single_alpha=best_single_alpha,
        ours=losses.ours,
        limit=losses.limit,
    )


def _groups(
    result: SiteResult | ModelResult, sizes: list[int], betas: Sequence[float] = (), offsets: Sequence[float] = ()
) -> tuple[stored.GroupRecord, ...]:
    return tuple(
        stored.GroupRecord(
            index=k,
            size=size,
            low=bounds.low,
            high=bounds.high,
            alpha=None if result.alphas is None else result.alphas[k],
            magnitude=result.magnitudes[k],
            explanation=bounds.explanation,
            beta=betas[k] if betas else None,
            offset=offsets[k] if offsets else None,
        )
        for k, (size, bounds) in enumerate(zip(sizes, result.ranges, strict=True))
    )


_STATES: Mapping[str, stored.TrialState] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def _digests(study_name: str, results: tuple[TrialResult, ...]) -> list[stored.TrialDigest]:
    return [
        stored.TrialDigest.of(
            study_name=study_name,
            trial_number=r.number,
            kind=r.candidate.kind,
            params=r.candidate.params(),
            state=_STATES[r.state],
            loss=r.loss,
            seconds=r.seconds,
            reason=r.reason,
        )
        for r in results
    ]


_REFINEMENT_KINDS: Mapping[RefinementKind, stored.TrialKind] = {
    "ours": "refined",
    "proposal": "refined",
    "best_single": "best_single",
    "alpha_0.5": "alpha_0.5",
    "sampler": "sampler",
}


def _refinement_digests(refinement: RefinementResult) -> list[stored.TrialDigest]:
    """Trials of the refinement; parameters are named as in its Optuna study."""
    return [
        stored.TrialDigest.of(
            study_name=refinement.study_name,
            trial_number=r.number,
            kind=_REFINEMENT_KINDS[r.candidate],
            params={f"delta {kind}": delta for kind, delta in r.change.deltas.items()}
            | {f"choice {site}": choice for site, choice in r.change.choices.items()}
            | {"rest": r.change.rest},
            state=_STATES[r.state],
            loss=r.loss,
            seconds=r.seconds,
            reason=r.reason,
        )
        for r in refinement.results
    ]
