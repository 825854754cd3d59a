"""A model made smaller by sparse, low-rank and codebook forms together, as a study; the smallest that keeps within the limits is written.

Source: claims B-1 to B-10.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from torch import nn

from alphasmith.dashboards.study_views import annotate_compression
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.ports import JointTask
from alphasmith.objectives.reading import usable_path
from alphasmith.objectives.text import counted as count_of
from alphasmith.objectives.text import error_line
from alphasmith.search.compression._launch import Launch, begun, recorded, spec_of
from alphasmith.search.compression._result import shown_trials, write_result
from alphasmith.search.compression._study import CONSTRAINT, ORIGINAL, TESTED, fixed, front
from alphasmith.search.compression._study import counted as counted_trials
from alphasmith.search.compression._workers import try_all
from alphasmith.search.compression.config import CompressConfig
from alphasmith.search.config import DEFAULT_STORAGE
from alphasmith.search.interruption import Interrupted, never
from alphasmith.search.progress import Progress, Silent
from alphasmith.search.toml_values import merged
from alphasmith.storage.database.connection import Database, check_writable, opened
from alphasmith.storage.output.compressed_folder import CompressedFolder, compression_in
from alphasmith.storage.output.compression_manifest import CompressionManifest
from alphasmith.storage.output.output_folder import check_target, discard_partial, unfinished_folders
from alphasmith.storage.output.reservation import Reservation
from alphasmith.storage.runs.compressions import CompressionRecord, CompressionStore


@dataclass(frozen=True, kw_only=True)
class CompressionResult:
    """What ``compress`` returns.

    Attributes:
        id: Compression id in the storage.
        storage: Its address, passwords masked.
        folder: Output folder, see :func:`~alphasmith.search.compression.artifact.load_compressed`.
        manifest: Everything that explains the result.
        front: Numbers of the trials that no other one beats within the limits, smallest model first; any can be written.
    """

    id: str
    storage: str
    folder: Path
    manifest: CompressionManifest
    front: tuple[int, ...]


def compress(
    model: nn.Module | None = None,
    task: JointTask | None = None,
    config: CompressConfig | Mapping[str, Any] | None = None,
    *,
    progress: Progress | None = None,
    fresh: bool = False,
    stop: Callable[[], bool] = never,
) -> CompressionResult:
    """Study how small a model becomes while it keeps within the limits, and write the smallest one.

    An unfinished compression of the same model and settings is continued; more trials go on with the same study.

    Args:
        model: Trained; left as it is. None, with ``task``: what ``config.task`` says.
        task: What it is for.
        config: The configuration, or the fields of it.
        progress: Receives stages and notes; None: silent.
        fresh: Begin a new compression in any case.
        stop: Polled; returns True to stop in good order.

    Returns:
        The compression's id, folder, manifest and front.

    Raises:
        InputError: Anything the user can mend; that no trial kept within the limits is one of these.
        Interrupted: ``stop`` said so; what was found is on record, the same call goes on with it.
    """
    chosen = CompressConfig.build(config or {})
    if chosen.out is not None and compression_in(usable_path("out", chosen.out)) is None:
        check_target(usable_path("out", chosen.out), None)
    url = chosen.storage or DEFAULT_STORAGE
    check_writable(url)
    launch = begun(chosen, model, task, progress or Silent(), stop)
    spec = spec_of(launch)
    with opened(url, create=True) as database:
        store = CompressionStore(database)
        same = [] if fresh else store.find_unfinished(spec.config_digest, spec.model_digest)
        same = [record for record in same if chosen.out is None or record.folder == spec.folder]
        if same:
            launch.progress.note(f"compression {same[0].id} of the same model and settings is going on")
        return finish(launch, database, same[0] if same else store.create(spec), made=not same)


def resume_compression(
    compression: str,
    *,
    storage: str | None = None,
    changes: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    task: JointTask | None = None,
    allow_code: Collection[str | Path] = (),
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> CompressionResult:
    """Go on with a compression that was interrupted or killed, or failed.

    Args:
        compression: Its id, or the beginning of it.
        storage: The database it is in; None: the default one.
        changes: Fields that may differ from what was asked for, such as ``{"study": {"trials": 48}}``.
        model: Where it was given by a script: the same one.
        task: Likewise.
        allow_code: Function and folders that the record may lead to.
        progress: Receives stages and notes; None: silent.
        stop: Polled; returns True to stop in good order.

    Raises:
        InputError: No such compression, it is finished, or the model is not what it was.
        Interrupted: As :func:`compress`.
    """
    with opened(storage or DEFAULT_STORAGE) as database:
        record = CompressionStore(database).get(compression)
        if record.status == "finished":
            raise InputError("ID", f"{record.id} is finished", f"its result is in {record.folder}")
        launch = recorded(record, changes or {}, model, task, allow_code, progress or Silent(), stop)
        return finish(launch, database, record, made=False)


def pick(
    compression: str,
    trial: int,
    out: Path,
    *,
    storage: str | None = None,
    model: nn.Module | None = None,
    task: JointTask | None = None,
    allow_code: Collection[str | Path] = (),
    progress: Progress | None = None,
    stop: Callable[[], bool] = never,
) -> CompressionResult:
    """Write the model of another trial of a finished compression; its stages are taken from the cache, or made anew.

    Args:
        compression: Its id, or the beginning of it.
        trial: Number of a trial whose model keeps within the limits.
        out: Output folder; must not exist.
        storage: As of :func:`resume_compression`.
        model: Likewise.
        task: Likewise.
        allow_code: Likewise.
        progress: Likewise.
        stop: Likewise.

    Raises:
        InputError: No such compression or trial, it is not finished, or the trial's model lost too much.
        Interrupted: As :func:`compress`.
    """
    target = usable_path("out", out)
    check_target(target, None)
    with opened(storage or DEFAULT_STORAGE) as database:
        store = CompressionStore(database)
        record = store.get(compression)
        if record.status != "finished":
            raise InputError("ID", f"{record.id} is {record.status}", f"finish it: alphasmith resume {record.id}")
        launch = recorded(record, {}, model, task, allow_code, progress or Silent(), stop)
        trials = counted_trials(store.study(record))
        within = front(trials)
        if trial not in [one.number for one in within]:
            known = ", ".join(str(one.number) for one in within)
            raise InputError("--pick", f"trial {trial} of {record.id} is not on its front", f"use one of {known}")
        with Reservation(target, storage=database.masked, lease=launch.config.workers.lease) as place:
            place.take()
            manifest = _written(launch, database, record, trials, trial, target, place)
        return _result(database, record, target, manifest, within)


def finish(launch: Launch, database: Database, record: CompressionRecord, *, made: bool = False) -> CompressionResult:
    """Drive a compression: search to the end, test, write; or leave a record that says why not.

    Args:
        launch: The compression, open in this process.
        database: Its database.
        record: Its record.
        made: Whether it was put on record just now.

    Raises:
        ReservedError: Another process that lives drives it.
        InputError: Anything the user can mend.
        Interrupted: The launch was asked to stop.
    """
    store, out = CompressionStore(database), Path(record.folder)
    with ExitStack() as stack:
        place = stack.enter_context(Reservation(out, storage=database.masked, lease=launch.config.workers.lease))
        try:
            place.hold(record.id)
            if compression_in(out) == record.id:  # killed between the writing of the folder and the end of the record
                return _concluded(database, record, out)
            check_target(out, None)
        except InputError:
            if made:  # of another process that works there nothing is touched
                store.delete(record)
            raise
        for left in unfinished_folders(out, record.id):  # of a process that was killed while it wrote
            discard_partial(left)
        now = launch.config.model_dump(mode="json", include={"study": {"trials"}, "engine": True, "workers": True})
        record = store.move(record, "running", config=merged(record.config, now))
        try:
            trials = try_all(launch, database, record)
            within = front(trials)
            if not within:
                raise _nothing_found(trials)
            _test(launch, store.study(record), within)
            trials = counted_trials(store.study(record))
            _written(launch, database, record, trials, within[0].number, out, place)
        except (Interrupted, KeyboardInterrupt) as error:
            store.move(record, "interrupted", reason="interrupted")
            told = f"interrupted; what was found is on record, resume with: alphasmith resume {record.id}"
            raise type(error)(told) from error
        except BaseException as error:
            store.move(record, "failed", reason=error_line(error))
            raise
        return _concluded(database, record, out)


def _concluded(database: Database, record: CompressionRecord, out: Path) -> CompressionResult:
    """Finish the record of a compression whose folder is whole."""
    store = CompressionStore(database)
    folder = CompressedFolder(out)
    folder.packed()  # compares every digest
    trials = counted_trials(store.study(record))
    within = front(trials)
    annotate_compression(store.study(record), folder.manifest, shown_trials(trials, within[0].number))
    store.move(record, "finished")
    return _result(database, record, out, folder.manifest, within)


def _nothing_found(trials: Sequence[FrozenTrial]) -> InputError:
    """No trial kept within the limits: says by how much the nearest one missed them."""

    def excess(trial: FrozenTrial) -> float:
        return max((value for name, value in trial.user_attrs.items() if name.startswith(CONSTRAINT)), default=0.0)

    judged = [trial for trial in trials if any(name.startswith(CONSTRAINT) for name in trial.user_attrs)]
    if not judged:
        reasons = {str(trial.user_attrs.get("dropped") or trial.user_attrs.get("reason")) for trial in trials}
        return InputError("drop", f"none of {count_of(len(trials), 'trial')} came to a model ({min(reasons)})", _MORE)
    nearest = min(judged, key=excess)
    return InputError(
        "drop",
        f"none of {count_of(len(trials), 'trial')} keeps within the limits; trial {nearest.number} misses them by "
        f"{excess(nearest):.3g}",
        _MORE,
    )


_MORE = "allow a larger drop, more entries (clusters.k), or more trials (study.trials)"


def _test(launch: Launch, study: optuna.Study, within: Sequence[FrozenTrial]) -> None:
    """Measure the original and the front on the test split, which nothing has looked at; every model once."""
    launch.progress.stage("testing", len(within) + 1)
    task, stages = launch.opened.task, launch.stages
    tested: dict[str, dict[str, float | None]] = dict(study.user_attrs.get(TESTED, {}))
    for name in (ORIGINAL, *(str(trial.number) for trial in within)):
        if name not in tested:
            model = stages.original
            if name != ORIGINAL:
                trial = next(one for one in within if str(one.number) == name)
                model = stages.compressed(launch.space.suggest(fixed(trial))).model
            tested[name] = dict(task.measure(model, "test").values)
            study.set_user_attr(TESTED, tested)
        launch.progress.advance()


def _written(
    launch: Launch,
    database: Database,
    record: CompressionRecord,
    trials: Sequence[FrozenTrial],
    number: int,
    out: Path,
    place: Reservation,
) -> CompressionManifest:
    launch.progress.stage("writing")
    trial = next(one for one in trials if one.number == number)
    made = launch.stages.compressed(launch.space.suggest(fixed(trial)))
    tested = CompressionStore(database).study(record).user_attrs.get(TESTED, {})
    return write_result(
        out,
        record,
        launch.opened,
        launch.stages,
        made,
        trials=trials,
        number=number,
        tested=tested,
        finished=datetime.now(UTC),
        place=place,
    )


def _result(
    database: Database,
    record: CompressionRecord,
    out: Path,
    manifest: CompressionManifest,
    within: Sequence[FrozenTrial],
) -> CompressionResult:
    return CompressionResult(
        id=record.id,
        storage=database.masked,
        folder=out,
        manifest=manifest,
        front=tuple(trial.number for trial in within),
    )
