"""Runs found, created and opened from a configuration or a recorded run."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import usable_path
from alphasmith.objectives.text import listed
from alphasmith.search.config import DEFAULT_OUT, DEFAULT_STORAGE, RunConfig, resume_command
from alphasmith.search.inputs.preparation import Survey, site_schemes
from alphasmith.search.inputs.task import Task
from alphasmith.search.inputs.versions import versions
from alphasmith.search.interruption import Interrupted
from alphasmith.search.progress import Progress
from alphasmith.search.work.session import RunHandle
from alphasmith.storage.artifacts.folder import FolderBackend
from alphasmith.storage.artifacts.store import ArtifactStore, default_address
from alphasmith.storage.database.connection import Database
from alphasmith.storage.database.urls import mask
from alphasmith.storage.output.output_folder import BLOCKS, attempt_name, check_target, partial_folder, result_in
from alphasmith.storage.output.reservation import Reservation
from alphasmith.storage.runs import records as stored
from alphasmith.storage.runs.records import RunRecord
from alphasmith.storage.runs.run_store import RunStore

#: Written to a bucket and removed again, to see that it can be.
_PROBE = "probe"


def find_run(database: Database, config: RunConfig, task: Task, progress: Progress) -> stored.RunRecord | None:
    """An unfinished run of the same configuration, model and data, the newest one; None where there is none."""
    same = RunStore(database).find_unfinished(config_digest(config), task.loaded.digest, task.data_digest)
    if not same:
        return None
    progress.note(f"run {same[0].id} of the same configuration, model and data is {same[0].status}: going on with it")
    return same[0]


def check_out(config: RunConfig, record: stored.RunRecord | None, *, new: bool) -> None:
    """Refuse an output folder that is in use, as soon as that is certain.

    Args:
        config: This launch's configuration.
        record: The run that is continued; None: a new one, or not known yet.
        new: Whether there will be a new one if there is no record. A folder that holds a result is let through before that
            is known: a run that was killed at its very end finds its own there.

    Raises:
        InputError: Field ``out``.
    """
    if record is not None:
        check_target(output_of(config, record), record.id)
    elif config.out is not None:
        out = usable_path("out", config.out)
        if new or result_in(out) is None:
            check_target(out, None)


def output_of(config: RunConfig, record: stored.RunRecord) -> Path:
    """Where the result of a run goes: where this launch wants it, else where it was to go before. Absolute."""
    recorded = Path(record.folder) if record.folder else DEFAULT_OUT / record.id
    return usable_path("out", config.out or recorded)


def places_of(config: RunConfig, record: stored.RunRecord | None) -> tuple[Path, Path | None]:
    """Where the result of a launch goes, or beside which folder, and what it kept beside that block by block; None: nothing yet.

    Args:
        config: This launch's configuration.
        record: The run; None: it is not on record yet.
    """
    if record is None:
        return usable_path("out", config.out or DEFAULT_OUT), None
    out = output_of(config, record)
    return out, partial_folder(out, attempt_name(record.id, BLOCKS))


class Place:
    """Where the result of a launch will be, reserved from its first second on, or as soon as it is known.

    Args:
        config: This launch's configuration.
        stack: Gives the reservation back when it is closed.
    """

    def __init__(self, config: RunConfig, stack: ExitStack) -> None:
        self._config = config
        self._stack = stack
        self._reserved: Reservation | None = None

    def reserve(self, record: stored.RunRecord | None, *, driving: bool = False) -> None:
        """Reserve it, or say for which run it is reserved; does nothing while it is not known where that is.

        Args:
            record: The run; None: not known yet.
            driving: Whether this process has the right to drive it.

        Raises:
            InputError: Field ``out``: a process that lives has reserved it for another run, or the place is not writable.
        """
        if record is not None:
            out = output_of(self._config, record)
        elif self._config.out is not None:
            out = usable_path("out", self._config.out)
        else:
            return
        if self._reserved is None or self._reserved.out != out:
            storage = mask(self._config.storage or DEFAULT_STORAGE)
            made = Reservation(out, storage=storage, lease=self._config.workers.lease)
            self._reserved = self._stack.enter_context(made)
        self._reserved.take("" if record is None else record.id, driving=driving)

    def check(self) -> None:
        """Require that it is still reserved for this process.

        Raises:
            InputError: Field ``out``: it is not.
        """
        if self._reserved is not None:
            self._reserved.check()


def writable_store(config: RunConfig, record: stored.RunRecord | None = None) -> ArtifactStore:
    """The artifact store of a launch, seen to be writable before anything is computed. Nothing stays in it.

    Args:
        config: This launch's configuration.
        record: The run that is continued, whose store is used unless another one is given; None: a new one.

    Raises:
        InputError: Field ``artifacts``: it cannot be reached or written.
    """
    recorded = "" if record is None else record.artifacts
    store = ArtifactStore.open(config.artifacts or recorded or default_address(config.storage or DEFAULT_STORAGE))
    backend = store.backend
    if not isinstance(backend, FolderBackend):
        backend.write(_PROBE, io.BytesIO())
        backend.remove(_PROBE)
    elif backend.folder.is_dir():
        with backend.drafted() as draft:
            draft.write_bytes(b"?")
    else:
        parent = next(folder for folder in backend.folder.parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(
                "artifacts",
                f"{backend.folder} cannot be made in {parent}",
                "choose another folder or correct its permissions",
            )
    return store


def open_run(
    database: Database, config: RunConfig, record: stored.RunRecord, store: ArtifactStore, *, engine: str, place: Place
) -> RunHandle:
    """A recorded run, to be driven by this process.

    Args:
        database: Where it is on record.
        config: Its configuration; the places it names are recorded once the run is entered.
        record: The run.
        store: Where its objects are, or go from now on.
        engine: Display name of the engine.
        place: Of its result.
    """
    if config.artifacts in (None, record.artifacts):
        # The same place, however it is written; a worker that finishes a run may see it under another name.
        record = replace(record, artifacts=store.address)
    return RunHandle(
        database,
        record,
        role="driver",
        engine=engine,
        workers=config.workers,
        folder=output_of(config, record),
        artifacts=store,
        on_driving=lambda: place.reserve(record, driving=True),
        on_publishing=place.check,
    )


def new_run(
    database: Database, config: RunConfig, task: Task, found: Survey, artifacts: ArtifactStore
) -> stored.RunRecord:
    """A run on record.

    Args:
        database: Where it goes on record.
        config: Its configuration.
        task: Model and data.
        found: Its sites.
        artifacts: Where its objects will be.
    """
    store = RunStore(database)
    record = store.create(
        stored.RunSpec(
            name=config.name or task.name,
            model_digest=task.loaded.digest,
            data_digest=task.data_digest,
            config=stored_values(config),
            scheme=site_schemes(config, found.sites).name,
            hardware={"rho": found.scarcity.rho, "explanation": found.scarcity.explanation},
            scope=config.search.scope,
            versions=versions(),
            space_hash="",
            config_digest=config_digest(config),
            artifacts=artifacts.address,
        )
    )
    return store.place(record.id, str(output_of(config, record)))


@contextmanager
def named(run_id: str, storage: str) -> Iterator[None]:
    """Add the resume command to the message of an interrupt.

    Args:
        run_id: The run.
        storage: Address of its database, passwords masked.

    Raises:
        Interrupted: The block was asked to stop.
        KeyboardInterrupt: It was left by a second Ctrl-C.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        told = f"interrupted; what was found is on record, resume with: {resume_command(run_id, storage)}"
        raise type(error)(told) from error


def open_existing_run(database: Database, run: str) -> stored.RunRecord:
    """A run that is on record, by id or the beginning of it.

    Raises:
        InputError: There is none, or it is finished.
    """
    record = RunStore(database).get(run)
    if record.status == "finished":
        raise InputError("RUN", f"{record.id} is finished", f"its result is in {Path(record.folder)}")
    return record


#: Fields that change where or how fast a run is made, or where its inputs lie (their content has its own digests).
_PLACES = frozenset(
    {
        "name",
        "storage",
        "out",
        "dtype",
        "engine",
        "artifacts",
        "workers",
        "model.path",
        "model.factory_path",
        "data.path",
        "data.batch_size",
        "search.device",
        "search.threads",
    }
)
#: Fields that earlier versions did not know, by the value that says what those did: they count where they say something else.
_ALWAYS_WAS: Mapping[str, Any] = {"scheme.kernel": "exact", "round_scales": "none"}
#: Differences that are named in an error; the rest is counted.
_NAMED = 4


def config_digest(config: RunConfig) -> str:
    """sha256 over the part of a configuration that decides the result."""
    return hashlib.sha256(json.dumps(_deciding(config.model_dump(mode="json")), sort_keys=True).encode()).hexdigest()


def stored_values(config: RunConfig) -> dict[str, Any]:
    """A configuration as it is recorded: passwords masked, paths absolute, so that it can be resumed from anywhere."""
    values = config.model_dump(mode="json")
    values["storage"] = mask(config.storage) if config.storage else None
    for section, key in (("model", "path"), ("model", "factory_path"), ("data", "path"), (None, "out")):
        table = values if section is None else values[section]
        if table[key] is not None:
            table[key] = str(usable_path(key if section is None else f"{section}.{key}", table[key]))
    return values


def stored_config(record: RunRecord, storage: str) -> RunConfig:
    """The configuration of a recorded run, with the places given now.

    Args:
        record: The run.
        storage: Address of the database it was read from; the recorded one has no password.

    Raises:
        InputError: It was recorded by a version with other fields.
    """
    # Both may have been changed since the configuration was recorded.
    places = {"out": record.folder, "artifacts": record.artifacts}
    told = {name: place for name, place in places.items() if place}
    return RunConfig.build({**dict(record.config), **told, "storage": storage})


def check_same(record: RunRecord, config: RunConfig, task: Task) -> None:
    """Refuse to resume a run whose model, data or configuration is not what it was.

    Raises:
        InputError: Names what changed.
    """
    new_run = "start a new run"
    if record.model_digest != task.loaded.digest:
        told = "" if task.kind != "demo" else "; a model given from Python is resumed by resume(..., model=...)"
        raise InputError(
            "model", _changed(record, record.model_digest, task.loaded.digest), f"restore it, or {new_run}{told}"
        )
    if record.data_digest != task.data_digest:
        raise InputError("data", _changed(record, record.data_digest, task.data_digest), f"restore it, or {new_run}")
    then, now = (dict(_flat(_deciding(c))) for c in (record.config, config.model_dump(mode="json")))
    fields = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if fields:
        told = listed([f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in fields], _NAMED)
        raise InputError("config", f"not that of run {record.id}: {told}", f"restore it, or {new_run}")


def _changed(record: RunRecord, then: str, now: str) -> str:
    return f"changed since run {record.id} began (sha256 {then[:12]} then, {now[:12]} now)"


def _deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: value for name, value in values.items() if name not in _PLACES}
    if dict(sections.get("memory") or {}).get("mode") != "blockwise":
        sections.pop("memory", None)  # how much of it is in memory decides nothing else

    def counts(field: str, value: Any) -> bool:
        # Nothing named is what an earlier version, which could name nothing, recorded.
        return field not in _PLACES and value != {} and value != _ALWAYS_WAS.get(field, {})

    return {
        name: {key: v for key, v in value.items() if counts(f"{name}.{key}", v)}
        if isinstance(value, Mapping)
        else value
        for name, value in sections.items()
        if isinstance(value, Mapping) or counts(name, value)
    }


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value
