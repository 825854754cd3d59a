"""What each command does, apart from reading its arguments and printing its answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphasmith.objectives.errors import InputError
from alphasmith.search.defaults import DEFAULT_STORAGE
from alphasmith.search.progress_texts import lease_of, progress_facts
from alphasmith.storage.counts import trial_counts
from alphasmith.storage.database import check_exists, open_existing
from alphasmith.storage.looks import live_drivers, look_at
from alphasmith.storage.record_types import RunRecord
from alphasmith.storage.records import RunStore
from alphasmith.storage.rows import group_rows, site_rows

if TYPE_CHECKING:
    from alphasmith.search.config import RunConfig
    from alphasmith.search.hardware import HardwareBudget

# What only one command needs is imported there: `list` and `show` must not wait for torch and plotly.

#: Groups whose ranges ``hardware`` shows where every site chooses its own number.
_SHOWN_GROUPS = 4


def list_runs(storage: str | None) -> list[dict[str, Any]]:
    """One mapping per run, newest first."""
    database = open_existing(storage or DEFAULT_STORAGE)
    drivers = live_drivers(database)
    return [_run_facts(record) | {"driver": drivers.get(record.id)} for record in RunStore(database).runs()]


def show_run(prefix: str, storage: str | None) -> dict[str, Any]:
    """Everything stored about a run: facts, configuration, sites with their groups."""
    database = open_existing(storage or DEFAULT_STORAGE)
    store = RunStore(database)
    record = store.get(prefix)
    sites = store.sites(record.id)
    # Trials are many: they are counted where they are.
    counts = trial_counts(database, record.id)
    look = look_at(database, record, lease=lease_of(record))
    return _run_facts(look.record) | {
        "config": dict(record.config),
        "hardware": dict(record.hardware),
        "refinement": None if record.refinement is None else dict(record.refinement),
        "progress": progress_facts(look),
        "trials": sum(counts.values()),
        "failed_trials": counts.get("failed", 0),
        "sites": site_rows(sites),
        "groups": group_rows(sites, store.groups(record.id)),
    }


def hardware(config: RunConfig) -> dict[str, Any]:
    """The detected and the given budget, what the model requires, rho, and the ranges that follow.

    Without a model in ``config`` nothing is known of what is required, and the ranges are those of fA6 for rho = 0.
    """
    from alphasmith.search.hardware import detect, scarcity, target_budget
    from alphasmith.search.prepare import survey
    from alphasmith.search.ranges import group_ranges
    from alphasmith.search.task import load_task

    answer: dict[str, Any] = {"detected": _budget(detect()), "given": _budget(target_budget(config.hardware))}
    rho, explanation = 0.0, "no model given, rho = 0"
    if config.model.path or config.model.factory or config.model.demo:
        found = survey(config, load_task(config))
        rho, explanation = found.scarcity.rho, found.scarcity.explanation
        answer["required"] = _budget(found.scarcity.required)
        answer["this_machine"] = {"rho": scarcity(detect(), found.scarcity.required).rho}
    shown = _SHOWN_GROUPS if config.groups.k == "auto" else config.groups.k
    positions = [k / max(shown - 1, 1) for k in range(shown)]
    ranges = group_ranges(positions, rho=rho, kind="wide" if config.groups.ranges == "wide" else "magnitude")
    answer["rho"] = rho
    answer["explanation"] = explanation
    answer["ranges"] = [
        # Positions stand in for magnitudes here, so the magnitude at the head of the explanation is left out.
        {"position": r.position, "low": r.low, "high": r.high, "explanation": r.explanation.partition(": ")[2]}
        for r in ranges
    ]
    return answer


def report(prefix: str, out: Path, storage: str | None) -> None:
    """Render a run's report from its manifest and the storage.

    Raises:
        InputError: No such run, it is not finished, or ``out`` cannot be written.
    """
    from alphasmith.dashboards.report import render_report
    from alphasmith.storage.frames import run_frames
    from alphasmith.storage.manifest import read_manifest

    store = _store(storage)
    record = store.get(prefix)
    if record.status != "finished":
        raise InputError("RUN", f"{record.id} is {record.status}", "give a finished run")
    manifest = read_manifest(Path(record.folder))
    sites, groups, trials = run_frames(store, record.id)
    text = render_report(json.loads(manifest.to_json()), sites, groups, trials)
    try:
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise InputError("--out", f"{out} cannot be written ({error.strerror})", "choose another file") from error


def dashboard(
    storage: str | None,
    *,
    host: str,
    port: int,
    hosts: Sequence[str],
    allow_write: bool,
    ready: Callable[[str], None],
) -> None:
    """Serve the Optuna dashboard until interrupted; ``ready`` is called once with the address it listens on."""
    from alphasmith.dashboards.server import serve

    url = storage or DEFAULT_STORAGE
    check_exists(url)
    serve(url, host=host, port=port, hosts=hosts, allow_write=allow_write, ready=ready)


def _store(storage: str | None) -> RunStore:
    return RunStore(open_existing(storage or DEFAULT_STORAGE))


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


def _budget(budget: HardwareBudget) -> dict[str, int | None]:
    return {"memory": budget.memory, "gpu_threads": budget.gpu_threads, "bandwidth": budget.bandwidth}
