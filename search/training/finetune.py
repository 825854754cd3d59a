"""A compressed model trained further on labelled data, from its run's folder to a folder beside it. Source: claim A-13."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from torch import nn

from alphasmith.dashboards.study_views import annotate_training
from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.reading import usable_path
from alphasmith.objectives.text import error_line, number
from alphasmith.objectives.training.fake_quantized import FakeQuantized
from alphasmith.objectives.training.loop import TrainingData, train
from alphasmith.objectives.training.outcome import TrainingOutcome, TrainingPoint
from alphasmith.search.config import DEFAULT_STORAGE, resume_command
from alphasmith.search.interruption import Interrupted, never
from alphasmith.search.processing.opening import ModelPlace
from alphasmith.search.progress import Progress, Silent
from alphasmith.search.toml_values import merged
from alphasmith.search.training._checkpoints import CheckpointFolder
from alphasmith.search.training._parent import Parent, ends_in_probabilities, open_parent
from alphasmith.search.training._result import Trained, write_result
from alphasmith.search.training._samples import LabelledData, read_samples
from alphasmith.search.training._study import StudyPlan, TrainingDivergedError, choose_settings
from alphasmith.search.training.config import FinetuneConfig, as_recorded
from alphasmith.storage.database.connection import Database, check_writable, opened, optuna_storage
from alphasmith.storage.output.manifest import Manifest
from alphasmith.storage.output.output_folder import (
    OutputFolder,
    attempt_name,
    check_target,
    discard_partial,
    partial_folder,
    training_in,
    unfinished_folders,
)
from alphasmith.storage.output.reservation import Reservation
from alphasmith.storage.output.result_folder import ResultFolder
from alphasmith.storage.queue.leases import Identity
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.runs.trainings import TrainingRecord, TrainingSpec, TrainingStore
from alphasmith.storage.upkeep.delete import remove_training

#: Seconds after which a training without a heartbeat counts as dead where its process cannot be seen.
_LEASE = 60.0


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What ``finetune`` returns.

    Attributes:
        id: Training id in the storage.
        storage: Its address, passwords masked.
        folder: Output folder.
        manifest: Everything that explains the result; its section ``training`` is about the training.
    """

    id: str
    storage: str
    folder: Path
    manifest: Manifest

    @property
    def kept(self) -> bool:
        """Whether the folder holds the trained model; else it holds the untrained one."""
        return self.manifest.training is not None and self.manifest.training.kept

    @property
    def reason(self) -> str:
        """Why."""
        return "" if self.manifest.training is None else self.manifest.training.reason


@dataclass(frozen=True, kw_only=True, eq=False)
class _Launch:
    """One launch of a training.

    Attributes:
        config: What is asked for.
        parent: What it starts from.
        data: What is read.
        progress: Receives stages and notes.
        stop: Polled.
    """

    config: FinetuneConfig
    parent: Parent
    data: LabelledData
    progress: Progress
    stop: Callable[[], bool]


def finetune(
    run: Path | str,
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    *,
    batches: Iterable[Any] | None = None,
    model: nn.Module | None = None,
    path: Path | None = None,
    factory: str | None = None,
    factory_path: Path | None = None,
    allow_code: Collection[str | Path] = (),
    progress: Progress | None = None,
    fresh: bool = False,
    stop: Callable[[], bool] = never,
) -> TrainingResult:
    """Train the compressed model of a run through its quantizers; an unfinished training of the same kind is continued.

    Args:
        run: A finished run, or its output folder. Nothing of it is changed.
        config: Data, settings and places, or the fields of them.
        batches: (inputs, labels) in place of ``config.data.path``: an iterable that ends, see
            :func:`alphasmith.objectives.media.in_memory.labelled`.
        model: The float architecture, where the run was given a module.
        path: Where the original model folder is now, for a factory that is called with it.
        factory: ``module:function`` that builds the architecture; naming it runs it.
        factory_path: Folder of that module.
        allow_code: Functions and folders that the run's manifest may lead to, as of ``resume``.
        progress: Receives stages and notes; None: silent.
        fresh: Begin a new training in any case.
        stop: Polled; returns True to stop in good order.

    Returns:
        The training's id, folder and manifest: an integer model again, the untrained one where training made nothing better.

    Raises:
        InputError: Anything the user can mend, a loss that diverges included; nothing is left behind.
        Interrupted: ``stop`` said so; the last checkpoint stays, the same call goes on from it.
    """
    chosen = FinetuneConfig.build(config or {})
    place = ModelPlace(
        source=run,
        storage=chosen.storage,
        model=model,
        path=path,
        factory=factory,
        factory_path=factory_path,
        allow_code=allow_code,
        device=chosen.device,
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line per trial would break into the progress display
    launch = _begun(chosen, place, batches, progress or Silent(), stop)
    if chosen.out is not None and training_in(usable_path("out", chosen.out)) is None:
        check_target(usable_path("out", chosen.out), None)
    url = chosen.storage or DEFAULT_STORAGE
    check_writable(url)
    spec = _spec(launch)
    with opened(url, create=True) as database:
        record = None if fresh else _unfinished(database, launch, spec)
        made = record is None
        if record is None:
            record = TrainingStore(database).create(spec)
        return _driven(launch, database, record, made)


def resume_training(
    training: str,
    *,
    storage: str | None = None,
    batches: Iterable[Any] | None = None,
    model: nn.Module | None = None,
    factory: str | None = None,
    factory_path: Path | None = None,
    allow_code: Collection[str | Path] = (),
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> TrainingResult:
    """Go on with a training that was interrupted or killed, from its last checkpoint.

    Args:
        training: Its id, or the beginning of it.
        storage: The database it is in; None: the default one.
        batches: Where the training was given samples by a script: the same ones.
        model: Likewise the architecture.
        factory: As of :func:`finetune`.
        factory_path: As of :func:`finetune`.
        allow_code: As of :func:`finetune`.
        progress: Receives stages and notes; None: silent.
        stop: Polled; returns True to stop in good order.

    Raises:
        InputError: No such training, it is finished, or its data or the run's folder are not what they were.
        Interrupted: As :func:`finetune`.
    """
    url = storage or DEFAULT_STORAGE
    with opened(url) as database:
        record = TrainingStore(database).get(training)
        if record.status == "finished":
            raise InputError("RUN", f"{record.id} is finished", f"its result is in {record.folder}")
        values = dict(record.config)
        source = Path(str(values.pop("source", "")))
        config = FinetuneConfig.build(merged(values, {"storage": url, "out": record.folder}))
        place = ModelPlace(
            source=source,
            storage=url,
            model=model,
            factory=factory,
            factory_path=factory_path,
            allow_code=allow_code,
            device=config.device,
        )
        launch = _begun(config, place, batches, progress or Silent(), stop)
        for name, then, now in (
            ("RUN", record.parent_digest, launch.parent.digest),
            ("data", record.data_digest, launch.data.digest),
        ):
            if then != now:
                told = f"changed since {record.id} began (sha256 {then[:12]} then, {now[:12]} now)"
                raise InputError(name, told, "restore it, or begin a new training")
        return _driven(launch, database, record, made=False)


def _begun(
    config: FinetuneConfig,
    place: ModelPlace,
    batches: Iterable[Any] | None,
    progress: Progress,
    stop: Callable[[], bool],
) -> _Launch:
    """Model and data, read and checked."""
    progress.stage("loading model and data")
    parent = open_parent(place)
    data = read_samples(config, parent.opened, batches)
    for note in data.notes:
        progress.note(note)
    drawn = data.draw
    progress.note(
        f"{len(drawn.trained)} of {data.media.samples} samples to train on, {len(drawn.held_out)} others held out"
    )
    return _Launch(config=config, parent=parent, data=data, progress=progress, stop=stop)


def _spec(launch: _Launch) -> TrainingSpec:
    config, parent = launch.config, launch.parent
    deciding = json.dumps(config.deciding(), sort_keys=True, default=str)
    out = parent.opened.result.path.resolve().parent / "{id}" if config.out is None else usable_path("out", config.out)
    return TrainingSpec(
        parent=parent.run,
        parent_digest=parent.digest,
        config=as_recorded(config) | {"source": str(parent.opened.result.path.resolve())},
        config_digest=hashlib.sha256(deciding.encode()).hexdigest(),
        data_digest=launch.data.digest,
        folder=str(out),
    )


def _unfinished(database: Database, launch: _Launch, spec: TrainingSpec) -> TrainingRecord | None:
    """An unfinished training of the same settings, model and data that goes to the same place; None where there is none."""
    found = TrainingStore(database).find_unfinished(spec.config_digest, spec.parent_digest, spec.data_digest)
    same = [record for record in found if launch.config.out is None or record.folder == spec.folder]
    if not same:
        return None
    launch.progress.note(f"training {same[0].id} of the same settings, model and data is going on")
    return same[0]


def _driven(launch: _Launch, database: Database, record: TrainingRecord, made: bool) -> TrainingResult:
    """Train to the end, or leave a record that says why not."""
    store, out = TrainingStore(database), Path(record.folder)
    with ExitStack() as stack:
        place = stack.enter_context(Reservation(out, storage=database.masked, lease=_LEASE))
        try:
            place.hold(record.id)
            if training_in(out) == record.id:  # killed between the writing of the folder and the end of the record
                written = ResultFolder(out)
                written.check()
                return _concluded(database, record, written.manifest, out)
            check_target(out, None)
        except InputError:
            if made:  # of another process that works there nothing is touched
                store.delete(record.id)
            raise
        store.start(record.id)
        for left in unfinished_folders(out, record.id):
            if left != partial_folder(out, record.id):
                discard_partial(left)
        try:
            return _trained(launch, database, record, place)
        except (Interrupted, KeyboardInterrupt) as error:
            store.interrupt(record.id, "interrupted")
            command = resume_command(record.id, database.masked)
            raise type(error)(f"interrupted; the last checkpoint is kept, resume with: {command}") from error
        except InputError as error:
            if made or isinstance(error, TrainingDivergedError):  # nothing is left behind of what cannot be
                remove_training(database, record)
            else:
                store.fail(record.id, error_line(error))
            raise
        except BaseException as error:
            store.fail(record.id, error_line(error))
            raise


def _trained(launch: _Launch, database: Database, record: TrainingRecord, place: Reservation) -> TrainingResult:
    config, parent, data, progress = launch.config, launch.parent, launch.data, launch.progress
    out = Path(record.folder)
    work = partial_folder(out, record.id)
    held_out = data.draw.held_out
    study = None
    sets = TrainingData(
        samples=data.samples(data.draw.trained),
        held_out=data.samples(held_out),
        teacher=parent.float_model() if config.training.distill > 0 or config.study else None,
        probabilities=ends_in_probabilities(parent.opened, data.samples(data.draw.trained).batch([0])),
        cache=None,
    )
    if config.study:
        judged, decided = data.draw.halved(data.classes, config.training.seed)
        plan = StudyPlan(
            settings=config.training,
            data=replace(sets, held_out=data.samples(judged)),
            trials=config.study,
            work=work,
            model=parent.opened.model,
        )
        settings, study = choose_settings(plan, database, record.id, progress=progress, stop=launch.stop)
        config = config.model_copy(update={"training": settings})
        held_out = decided
        sets = replace(sets, held_out=data.samples(decided))
    model = _twin(parent, config)
    outcome = _run(model, sets, config, CheckpointFolder(work), progress, launch.stop)
    progress.note(outcome.reason)
    integer = model.integers() if outcome.kept else parent.opened.model
    progress.stage("writing")
    kept = Trained(
        integer=integer,
        outcome=outcome,
        config=config,
        study=study,
        held_out=data.samples(held_out),
    )
    runs = RunStore(database)
    trials = runs.trials(record.run_id) if record.run_id is not None else []

    def publish(rename: Callable[[], None]) -> None:
        place.hold(record.id)
        rename()

    with OutputFolder(out, attempt=attempt_name(record.id, Identity.here().token), publish=publish) as folder:
        manifest = write_result(folder, record, parent, data, kept, trials=trials, finished=datetime.now(UTC))
    return _concluded(database, record, manifest, out)


def _twin(parent: Parent, config: FinetuneConfig) -> FakeQuantized:
    settings = config.training
    return FakeQuantized(
        parent.opened.model,
        learn_steps=settings.learn_steps,
        learn_ranges=settings.learn_ranges,
        freeze_norm_statistics=settings.freeze_norm_statistics,
    )


def _run(
    model: FakeQuantized,
    sets: TrainingData,
    config: FinetuneConfig,
    checkpoints: CheckpointFolder,
    progress: Progress,
    stop: Callable[[], bool],
) -> TrainingOutcome:
    """Train; where that diverges and nothing was better before, there is nothing to keep.

    Raises:
        Interrupted: ``stop`` said so.
        TrainingDivergedError: It diverged.
    """
    settings = config.training
    progress.stage("training", settings.updates(len(sets.samples)))
    best: list[TrainingPoint] = []

    def told(point: TrainingPoint) -> None:
        best.append(point)

    def polled() -> bool:
        if best:
            progress.advance(f"held-out loss {number(best[-1].held_out_loss)}")
        return stop()

    outcome = train(model, sets, settings, checkpoints=checkpoints, progress=told, stop=polled)
    if outcome.ending == "interrupted":
        raise Interrupted(outcome.reason)
    if outcome.ending == "diverged" and not outcome.kept:
        remedy = f"lower --learning-rate (it is {settings.learning_rate:g})"
        raise TrainingDivergedError("training", outcome.reason, remedy)
    return outcome


def _concluded(database: Database, record: TrainingRecord, manifest: Manifest, out: Path) -> TrainingResult:
    """Finish the record of a training whose folder is whole, and remove its checkpoints."""
    if manifest.training is None:
        raise AlphasmithError(f"{out} says nothing of a training")
    for left in unfinished_folders(out, record.id):
        shutil.rmtree(left, ignore_errors=True)
    entry = manifest.training.model_dump(mode="json")
    if manifest.training.study is not None:
        study = optuna.load_study(study_name=manifest.training.study.study, storage=optuna_storage(database))
        annotate_training(study, entry)
    TrainingStore(database).finish(record.id, entry)
    return TrainingResult(id=record.id, storage=database.masked, folder=out, manifest=manifest)
