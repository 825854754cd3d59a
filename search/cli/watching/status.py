"""Progress of a run as text and as JSON, read from its database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alphasmith.objectives.text import counted, duration, one_line, told_apart
from alphasmith.search.config import resume_command
from alphasmith.storage.queue.leases import named
from alphasmith.storage.queue.records import Ticket, WorkerRecord
from alphasmith.storage.queue.status import RunSnapshot

#: Sites and workers that are listed before the rest is counted.
_LISTED = 12
#: Longest reason and longest name of a site in a line.
_REASON, _NAME = 160, 34


def planned_sites(look: RunSnapshot) -> int:
    """Sites that are to be searched; 0 before they are planned, and where the model is searched as a whole."""
    progress = look.progress
    return progress.waiting + len(progress.running) + progress.done + len(progress.failed)


def is_over(look: RunSnapshot) -> bool:
    """Whether nobody works on a run any more: it is finished, or was ended and no autonomous worker goes on with it."""
    if look.record.status in ("failed", "interrupted"):
        return look.driver is None and not any(worker.alive for worker in look.progress.workers)
    return look.record.status == "finished"


def progress_facts(look: RunSnapshot) -> dict[str, Any]:
    """How far a run is, JSON-able: counts, running and failed sites, workers, rate [sites/min], time left [s]."""
    progress = look.progress
    return {
        "sites": planned_sites(look),
        "waiting": progress.waiting,
        "running": [
            {
                "site": ticket.site,
                "attempt": ticket.attempts,
                "seconds": _seconds(look, ticket),
                "worker": ticket.worker,
            }
            for ticket in progress.running
        ],
        "done": progress.done,
        "failed": [{"site": site, "reason": reason} for site, reason in progress.failed],
        "trials": progress.trials,
        "workers": [
            {
                "id": worker.id,
                "role": worker.role,
                "host": worker.host,
                "pid": worker.pid,
                "engine": worker.engine,
                "state": _state(worker),
                "heard": round(worker.age, 1),
            }
            for worker in progress.workers
        ],
        "driver": look.driver,
        "rate": progress.rate,
        "seconds_left": progress.seconds_left,
    }


def watch_lines(look: RunSnapshot, storage: str) -> list[str]:
    """What ``show --watch`` shows: the run, its counts, running and failed sites, workers, what to do.

    Args:
        look: The run.
        storage: Address of its database, passwords masked.
    """
    progress = look.progress
    workers = [worker for worker in progress.workers if not worker.left]
    at_work = told_apart([ticket.site for ticket in progress.running], _NAME)
    running = [
        f"{site}, attempt {t.attempts}, {duration(_seconds(look, t))}, {named(t.worker)}"
        for site, t in zip(at_work, progress.running, strict=True)
    ]
    given_up = told_apart([site for site, _ in progress.failed], _NAME)
    reasons = [one_line(reason, _REASON) for _, reason in progress.failed]
    failed = [f"{site}: {reason}" for site, reason in zip(given_up, reasons, strict=True)]
    return [
        _head(look),
        ", ".join([_sites(look), *_pace(look)]),
        _trials(look),
        *_listed("running", running),
        *_listed("failed", failed),
        *_listed("worker", [worker_line(worker) for worker in workers]),
        *advice(look, storage),
    ]


def watch_line(look: RunSnapshot) -> str:
    """The same in one line, for logs."""
    alive = sum(worker.alive for worker in look.progress.workers)
    parts = [_head(look), _sites(look), _trials(look), counted(alive, "worker"), *_pace(look)]
    return ", ".join(parts)


def advice(look: RunSnapshot, storage: str) -> list[str]:
    """Where the result is, or what to do where nobody is about to make it; nothing while a driver is.

    Args:
        look: The run.
        storage: Address of its database, passwords masked.
    """
    if look.record.status == "finished":
        return [f"results in {look.record.folder}"]
    if look.driver is not None or look.record.status == "created":
        return []
    command = resume_command(look.record.id, storage)
    if any(worker.alive for worker in look.progress.workers):
        return [f"its workers go on; if the last one cannot write the result: {command}"]
    return [f"nobody works on it; resume with: {command}"]


def progress_lines(facts: Mapping[str, Any]) -> list[str]:
    """Counts and workers from ``progress_facts``, for ``show`` of a run that is not finished."""
    failed = [(entry["site"], entry["reason"]) for entry in facts["failed"]]
    lines = (
        [f"sites: {_counts(facts['done'], facts['sites'], len(facts['running']), failed)}"] if facts["sites"] else []
    )
    workers = [entry for entry in facts["workers"] if entry["state"] != "left"]
    shown = [
        _worker(entry["pid"], entry["host"], entry["role"], entry["engine"], entry["state"], entry["heard"])
        for entry in workers
    ]
    return [*lines, *_listed("worker", shown, indent="")]


def worker_line(worker: WorkerRecord) -> str:
    """A worker: where it is, what it is to the run, whether it is alive."""
    return _worker(worker.pid, worker.host, worker.role, worker.engine, _state(worker), worker.age)


def _head(look: RunSnapshot) -> str:
    record = look.record
    state: str = record.status
    if record.reason and record.status in ("failed", "interrupted"):
        state += f" ({one_line(record.reason, _REASON)})"
    elif record.status == "running" and look.driver is None:
        state += " (no live driver)"
    return f"{record.id}{f' {record.name}' if record.name else ''}: {state}"


def _sites(look: RunSnapshot) -> str:
    total = planned_sites(look)
    if total:
        progress = look.progress
        return _counts(progress.done, total, len(progress.running), progress.failed) + _stage(look)
    if look.record.scope == "model":
        return "one study over the whole model"
    return "no sites planned" if is_over(look) else "sites not planned yet"


def _stage(look: RunSnapshot) -> str:
    """What is done once all sites are."""
    if look.record.status == "running" and look.progress.done == planned_sites(look):
        return "; the whole model is judged, folded and written" if look.driver else "; the result is to be written"
    return ""


def _counts(done: int, total: int, running: int, failed: Sequence[tuple[str, str]]) -> str:
    parts = [f"{done} of {total} done"]
    if running:
        parts.append(f"{running} running")
    if failed:
        parts.append(f"{len(failed)} failed ({one_line(failed[0][1], _REASON)})")
    return ", ".join(parts)


def _trials(look: RunSnapshot) -> str:
    count = look.progress.trials
    asked = look.record.config.get("search", {}).get("trials")
    if look.record.scope == "model" and asked:
        return f"{count} of {asked} trials"
    return counted(count, "trial")


def _pace(look: RunSnapshot) -> list[str]:
    progress = look.progress
    if progress.rate is None or not (progress.waiting or progress.running):
        return []
    number, per = (progress.rate, "min") if progress.rate >= 1 else (60 * progress.rate, "h")
    pace = f"{number:.{0 if number >= 10 else 1}f} sites/{per}"
    left = progress.seconds_left
    return [pace] if left is None else [pace, f"about {duration(left)} left"]


def _seconds(look: RunSnapshot, ticket: Ticket) -> float:
    """How long an attempt runs [s]."""
    if ticket.started is None:
        return 0.0
    return max(0.0, round((look.present - ticket.started).total_seconds(), 1))


def _state(worker: WorkerRecord) -> str:
    return "alive" if worker.alive else "left" if worker.left else "silent"


def _worker(pid: int, host: str, role: str, engine: str, state: str, age: float) -> str:
    told = f"silent for {duration(age)}" if state == "silent" else state
    return ", ".join(filter(None, (f"process {pid} on {host}", role, engine, told)))


def _listed(what: str, items: Sequence[str], *, indent: str = "  ") -> list[str]:
    lines = [f"{indent}{what}: {item}" for item in items[:_LISTED]]
    if len(items) > _LISTED:
        lines.append(f"{indent}{what}: ... and {len(items) - _LISTED} more")
    return lines
