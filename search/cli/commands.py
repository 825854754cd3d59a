"""What each command does, apart from reading its arguments and printing its answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphasmith.objectives.errors import AlphasmithError, InputError
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.cli.watching.status import progress_facts
from alphasmith.search.config import DEFAULT_STORAGE
from alphasmith.storage.database.connection import check_exists, opened
from alphasmith.storage.output.format_entries import FormatsEntry
from alphasmith.storage.output.manifest import FILE_NAME, Manifest, read_manifest
from alphasmith.storage.output.reserved_work import driver_of
from alphasmith.storage.queue.status import RunSnapshot, lease_of, live_drivers, look_at
from alphasmith.storage.runs.compressions import CompressionRecord, CompressionStore, is_compression_id
from alphasmith.storage.runs.entries import Group, SiteRecord
from alphasmith.storage.runs.records import RunRecord, TrialRecord, TrialState, UnreadableRun
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.runs.trainings import TrainingRecord, TrainingStore, is_training_id

if TYPE_CHECKING:
    from alphasmith.search.config import RunConfig
    from alphasmith.search.inputs.format_cost import SiteShape
    from alphasmith.search.inputs.hardware import HardwareBudget
    from alphasmith.storage.upkeep.garbage import Removal

# What only one command needs is imported there: `list` and `show` must not wait for torch and plotly.

#: Rows of a forward that ``hardware`` compares formats for, and the site where there is no model.
_ROWS = (1, 512)
_SQUARE = {"inputs": 4096, "outputs": 4096, "weights": 4096**2}
#: Formats that it compares; the first is what the others are relative to.
_FORMATS = (
    "w8a8-channel-static",
    "w8au8-channel-static",
    "w8a8-channel-token",
    "w8au8-channel-token",
    "w8ai16-channel-static",
    "w4a8-g128-static",
    "w8a16-channel",
    "w4a16-g128",
    "float",
)
#: Groups whose ranges ``hardware`` shows where every site chooses its own number.
_SHOWN_GROUPS = 4


def list_runs(storage: str | None) -> list[dict[str, Any]]:
    """One mapping per run, newest first; a row that cannot be read has status ``unreadable`` and a reason."""
    with opened(storage or DEFAULT_STORAGE) as database:
        drivers = live_drivers(database)
        trainings = TrainingStore(database).listing()
        known = [_training_facts(training, driver_of(database, training)) for training in trainings]
        return [
            (_run_facts(run) if isinstance(run, RunRecord) else _unreadable_facts(run))
            | {"driver": drivers.get(run.id)}
            | {"trainings": [training for training in known if training["run"] == run.id]}
            for run in RunStore(database).listing()
        ]


def list_compressions(storage: str | None) -> list[dict[str, Any]]:
    """One mapping per joint compression, newest first."""
    with opened(storage or DEFAULT_STORAGE) as database:
        records = CompressionStore(database).listing()
        return [_compression_facts(record, driver_of(database, record)) for record in records]


def show_compression(prefix: str, storage: str | None) -> dict[str, Any]:
    """What is on record of a compression and, once it has finished and where its folder is seen, its manifest.

    Raises:
        InputError: No such compression or database.
    """
    from alphasmith.storage.output.compressed_folder import compression_in
    from alphasmith.storage.output.compression_manifest import read_compression_manifest

    with opened(storage or DEFAULT_STORAGE) as database:
        record = CompressionStore(database).get(prefix)
        facts = _compression_facts(record, driver_of(database, record))
    manifest = None
    if record.status == "finished" and compression_in(Path(record.folder)) == record.id:
        manifest = read_compression_manifest(Path(record.folder)).model_dump(mode="json")
    return facts | {"config": dict(record.config), "manifest": manifest}


def show_training(prefix: str, storage: str | None) -> dict[str, Any]:
    """What is on record of a training, its configuration and, once it has finished, the section of its manifest.

    Raises:
        InputError: No such training or database.
    """
    with opened(storage or DEFAULT_STORAGE) as database:
        record = TrainingStore(database).get(prefix)
        driver = driver_of(database, record)
    entry = None if record.entry is None else dict(record.entry)
    return _training_facts(record, driver) | {"config": dict(record.config), "training": entry}


@dataclass(frozen=True, kw_only=True)
class ShownRun:
    """All that is known of a run.

    Attributes:
        look: Its record and how far it is.
        sites: Its sites so far, in forward order.
        groups: Groups over the whole model (scope ``model``).
        counts: State -> trials that ended so.
        storage: Address of its database, passwords masked.
        trainings: Trainings of its model, newest first.
        manifest: That of its output folder; None where it is not finished, or its folder is not seen from here.
    """

    look: RunSnapshot
    sites: Sequence[SiteRecord]
    groups: Sequence[Group]
    counts: Mapping[TrialState, int]
    storage: str
    manifest: Manifest | None
    trainings: Sequence[Mapping[str, Any]] = ()

    @property
    def trials(self) -> int:
        """Trials that ended."""
        return sum(self.counts.values())


def show_run(prefix: str, storage: str | None) -> ShownRun:
    """Everything stored about a run.

    Raises:
        InputError: No such run or database.
    """
    with opened(storage or DEFAULT_STORAGE) as database:
        store = RunStore(database)
        record = store.get(prefix)
        sites, groups = store.sites(record.id), store.groups(record.id)
        # Trials are many: they are counted where they are.
        counts = store.trial_counts(record.id)
        look = look_at(database, record, lease=lease_of(record.config))
        masked = database.masked
        trainings = [
            _training_facts(training, driver_of(database, training))
            for training in TrainingStore(database).listing(record.id)
        ]
    manifest = _manifest(look.record)
    return ShownRun(
        look=look, sites=sites, groups=groups, counts=counts, storage=masked, manifest=manifest, trainings=trainings
    )


def shown_facts(shown: ShownRun) -> dict[str, Any]:
    """A run as JSON: facts, configuration, progress, sites with their groups."""
    from alphasmith.storage.runs.data_frames import group_rows, site_rows  # pandas takes half a second to import

    record = shown.look.record
    return _run_facts(record) | {
        "config": dict(record.config),
        "hardware": dict(record.hardware),
        "refinement": None if record.refinement is None else dict(record.refinement),
        "progress": progress_facts(shown.look),
        "trials": shown.trials,
        "failed_trials": shown.counts.get("failed", 0),
        "trainings": [dict(training) for training in shown.trainings],
        "weights": [] if shown.manifest is None else [weight.model_dump() for weight in shown.manifest.weights],
        "sites": site_rows(shown.sites),
        "groups": group_rows(shown.sites, shown.groups),
    }


def delete(
    prefix: str,
    storage: str | None,
    *,
    sure: Callable[[RunRecord | TrainingRecord | CompressionRecord, Sequence[Removal]], bool],
) -> tuple[RunRecord | TrainingRecord | CompressionRecord, list[Removal]] | None:
    """Delete a run, a training alone or a compression, after ``sure`` was asked, with its record and what would go.

    Returns:
        The record as it was, and what was removed; None: it was not to be deleted.

    Raises:
        InputError: There is none, or a process works on it.
    """
    from alphasmith.storage.upkeep.delete import delete_compression, delete_run, delete_training

    with opened(storage or DEFAULT_STORAGE) as database:
        record: RunRecord | TrainingRecord | CompressionRecord
        if is_compression_id(prefix):
            record = compression = CompressionStore(database).get(prefix)
            remove = partial(delete_compression, database, compression)
        elif is_training_id(prefix):
            record = training = TrainingStore(database).get(prefix)
            remove = partial(delete_training, database, training)
        else:
            record = RunStore(database).get(prefix)
            remove = partial(delete_run, database, record.id)
        if not sure(record, remove(dry_run=True)):
            return None
        return record, remove(dry_run=False)


def hardware(config: RunConfig, *, probe: bool = False) -> dict[str, Any]:
    """The detected and the given budget, what the model requires, rho, the ranges that follow, what formats cost, and, asked to ``probe``,
    what libraries make of 8-bit products here.

    Without a model in ``config`` nothing is known of what is required, the ranges are those of fA6 for rho = 0, and the costs are
    those of one square site.
    """
    from alphasmith.search.inputs.format_cost import SiteShape
    from alphasmith.search.inputs.hardware import detect, scarcity, target_budget
    from alphasmith.search.inputs.preparation import survey
    from alphasmith.search.inputs.task import load_task
    from alphasmith.search.study.alpha_ranges import group_ranges

    answer: dict[str, Any] = {"detected": _budget(detect()), "given": _budget(target_budget(config.hardware))}
    rho, explanation = 0.0, "no model given, rho = 0"
    shapes = {rows: [SiteShape(rows=rows, **_SQUARE)] for rows in _ROWS}
    if config.model.path or config.model.factory or config.model.demo:
        found = survey(config, load_task(config))
        rho, explanation = found.scarcity.rho, found.scarcity.explanation
        multiplied = [site for site in found.sites if any(not o.raw or o.stacked for o in site.operators)]
        shapes = {rows: [SiteShape.of(site, rows) for site in multiplied] for rows in _ROWS if multiplied}
        answer["required"] = _budget(found.scarcity.required)
        answer["this_machine"] = {"rho": scarcity(detect(), found.scarcity.required).rho}
    shown = _SHOWN_GROUPS if config.groups.k == "auto" else config.groups.k
    positions = [k / max(shown - 1, 1) for k in range(shown)]
    ranges = group_ranges(positions, rho=rho, kind="wide" if config.groups.ranges == "wide" else "magnitude")
    answer["formats"] = _format_costs(config, shapes)
    if probe:
        answer["kernels"] = _kernels()
    answer["rho"] = rho
    answer["explanation"] = explanation
    answer["ranges"] = [
        # Positions stand in for magnitudes here, so the magnitude at the head of the explanation is left out.
        {"position": r.position, "low": r.low, "high": r.high, "explanation": r.explanation.partition(": ")[2]}
        for r in ranges
    ]
    return answer


def _kernels() -> list[dict[str, Any]]:
    """What every library computes on this machine. Source: formula fA20."""
    from alphasmith.search.inputs.kernel_probe import LIBRARIES
    from alphasmith.search.inputs.kernel_probe import probe as asked

    return [asdict(asked(library)) for library in LIBRARIES]


def _format_costs(config: RunConfig, shapes: Mapping[int, Sequence[SiteShape]]) -> list[dict[str, Any]]:
    """Cost of every format of activations over that of static int8, with one row at a time and with many. Source: formula fA19."""
    from alphasmith.search.inputs.format_cost import relative_costs
    from alphasmith.search.inputs.hardware import HardwareBudget, detect, target_budget

    given = target_budget(config.hardware)
    target = detect() if given == HardwareBudget() else given
    schemes = [Scheme.parse(name) for name in _FORMATS]
    costs = {rows: relative_costs(sites, schemes, target) for rows, sites in shapes.items()}
    return [{"name": s.name, "cost": {str(rows): found[s.name] for rows, found in costs.items()}} for s in schemes]


def report(prefix: str, out: Path, storage: str | None) -> None:
    """Render the report of a run, or of a training, from its manifest and the storage.

    Raises:
        InputError: No such run, it is not finished, or ``out`` cannot be written.
    """
    from alphasmith.dashboards.report import render_report

    out = out.absolute()
    if not out.name or out.is_dir():
        raise InputError("--out", f"{out} is a folder", "name the file")
    if is_compression_id(prefix):
        _write_page(out, _compression_page(prefix, storage))
        return
    with opened(storage or DEFAULT_STORAGE) as database:
        store = RunStore(database)
        training = TrainingStore(database).get(prefix) if is_training_id(prefix) else None
        record = training or store.get(prefix)
        if record.status != "finished":
            raise InputError("RUN", f"{record.id} is {record.status}", "give a finished run or training")
        manifest = read_manifest(Path(record.folder))
        run_id = record.id if training is None else training.run_id
        text = render_report(manifest, [] if run_id is None else store.trials(run_id))
    _write_page(out, text)


def formats(run: str, storage: str | None) -> FormatsEntry:
    """The front of formats of a finished run.

    Args:
        run: Its id, or its output folder.
        storage: The database it is in; None: the default one.

    Raises:
        InputError: No such run, it is not finished, or it made no choice of formats.
    """
    found = read_manifest(_result_of(run, storage)[0])
    if found.formats is None:
        remedy = "run with sites.formats or a budget, see docs/formats.md"
        raise InputError("RUN", f"{found.run.id} made no choice of formats", remedy)
    return found.formats


def pick_formats(run: str, point: int, out: Path, storage: str | None) -> dict[str, Any]:
    """Write the model of another point of the front, see ``checkpoints.formats.pick``.

    Args:
        run: Id or output folder of the run.
        point: Number of the point.
        out: Target; must not exist.
        storage: The database it is in; None: the default one.

    Raises:
        InputError: As :func:`formats`; no such point; or ``out`` is taken.
        IntegrityError: A file has changed.
    """
    from alphasmith.search.checkpoints.formats import pick

    folder, trials = _result_of(run, storage)
    return pick(folder, point, out, trials)


def _result_of(run: str, storage: str | None) -> tuple[Path, Sequence[TrialRecord]]:
    """Folder of a run that is named by it or by its id, and what is on record of its trials."""
    if (Path(run) / FILE_NAME).is_file():
        return Path(run), ()
    with opened(storage or DEFAULT_STORAGE) as database:
        store = RunStore(database)
        record = store.get(run)
        if record.status != "finished":
            raise InputError("RUN", f"{record.id} is {record.status}", "give a finished run")
        return Path(record.folder), store.trials(record.id)


def _compression_page(prefix: str, storage: str | None) -> str:
    """The page that a compression wrote, compared with its digest."""
    from alphasmith.storage.output.compressed_folder import CompressedFolder

    with opened(storage or DEFAULT_STORAGE) as database:
        record = CompressionStore(database).get(prefix)
    if record.status != "finished":
        raise InputError("RUN", f"{record.id} is {record.status}", f"finish it: alphasmith resume {record.id}")
    return CompressedFolder(record.folder).read_bytes("report.html").decode("utf-8")


def _write_page(out: Path, text: str) -> None:
    try:
        beside = out.with_name(f".{out.name}.partial")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, out)
    except OSError as error:
        raise InputError("--out", f"{out} cannot be written ({error.strerror})", "choose another file") from error


def dashboard(
    storage: str | None,
    *,
    host: str,
    port: int,
    hosts: Sequence[str],
    allow_write: bool,
    token: str | None,
    ready: Callable[[str], None],
) -> None:
    """Serve the Optuna dashboard until interrupted; ``ready`` is called once with the address it listens on."""
    from alphasmith.dashboards.server import serve

    url = storage or DEFAULT_STORAGE
    check_exists(url)
    serve(url, host=host, port=port, hosts=hosts, allow_write=allow_write, token=token or None, ready=ready)


def _run_facts(record: RunRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "reason": record.reason,
        "scheme": record.scheme,
        "scope": record.scope,
        "created": record.created.isoformat(timespec="seconds"),
        "finished": None if record.finished is None else record.finished.isoformat(timespec="seconds"),
        "folder": record.folder,
    }


def _compression_facts(record: CompressionRecord, driver: str | None) -> dict[str, Any]:
    return {
        "id": record.id,
        "status": record.status,
        "driver": driver,
        "reason": record.reason,
        "created": record.created.isoformat(timespec="seconds"),
        "finished": None if record.finished is None else record.finished.isoformat(timespec="seconds"),
        "folder": record.folder,
        "study": record.study,
    }


def _training_facts(record: TrainingRecord, driver: str | None) -> dict[str, Any]:
    entry = record.entry or {}
    return {
        "id": record.id,
        "run": record.parent,
        "status": record.status,
        "driver": driver,
        "kept": entry.get("kept"),
        "reason": str(entry.get("reason", "")) or record.reason,
        "created": record.created.isoformat(timespec="seconds"),
        "finished": None if record.finished is None else record.finished.isoformat(timespec="seconds"),
        "folder": record.folder,
    }


def _unreadable_facts(run: UnreadableRun) -> dict[str, Any]:
    """The same keys for a row that holds no record."""
    unknown = dict.fromkeys(("name", "scheme", "scope", "created", "finished", "folder"))
    return {**unknown, "id": run.id, "status": "unreadable", "reason": run.reason}


def _manifest(record: RunRecord) -> Manifest | None:
    """The manifest of a finished run, where its folder is seen from here and is still that of the run."""
    if record.status != "finished":
        return None
    try:
        manifest = read_manifest(Path(record.folder))
    except AlphasmithError:
        return None
    return manifest if manifest.run.id == record.id else None


def _budget(budget: HardwareBudget) -> dict[str, int | None]:
    return {"memory": budget.memory, "gpu_threads": budget.gpu_threads, "bandwidth": budget.bandwidth}
