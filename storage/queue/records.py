"""Records shared between the processes that work on one run: tickets, claims, workers, objects in the artifact store.

A *ticket* is a site that is to be searched. A process *claims* it under a lease, which it renews while it works; a lease that
ran out may be claimed by another process. The number of the attempt fences writes: an earlier attempt's are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

TicketState = Literal["waiting", "running", "done", "failed"]
AttemptState = Literal["running", "done", "failed", "lost", "returned"]
WorkerRole = Literal["driver", "worker"]
ArtifactKind = Literal["calibration", "weights", "result"]


@dataclass(frozen=True, kw_only=True)
class TicketSpec:
    """A site that is to be searched, as planned.

    Attributes:
        site: Site name, unique in the run.
        position: Its place in the order of the search, from 0.
        depends_on: Sites whose winners change this site's weights; they are searched before.
        digest: Digest of the site (its pristine weights and how they are read), by which later runs find its winner.
        reused: Winner recorded by an earlier run that the search starts from, JSON-able: ``{"run": id, "candidate": {"kind":
            ..., "params": {...}}}``; None where there is none.
    """

    site: str
    position: int
    depends_on: tuple[str, ...] = ()
    digest: str = ""
    reused: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Ticket(TicketSpec):
    """A ticket as stored.

    Attributes:
        state: See ``storage.tables``.
        attempts: Claims so far.
        worker: Who holds the lease, or held the last one.
        lease_until: When the lease runs out, by the database's clock; None unless running.
        started: When the last attempt began.
        ended: When it was done or failed.
        reason: Why it failed, or why the last attempt ended without a result; empty otherwise.
    """

    state: TicketState
    attempts: int
    worker: str | None
    lease_until: datetime | None
    started: datetime | None
    ended: datetime | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A live lease on one ticket.

    Attributes:
        ticket: What is to be searched.
        attempt: Number of this attempt, from 1: the fencing token.
    """

    ticket: Ticket
    attempt: int

    @property
    def site(self) -> str:
        """Name of the site."""
        return self.ticket.site


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """A process that works, or worked, on a run.

    Attributes:
        id: Unique name.
        role: Its driver, or an autonomous worker.
        host: Host name.
        pid: Process id there.
        engine: What it searches with, e.g. ``local, 2 processes``.
        alive: Whether it has neither left nor missed its heartbeats for longer than a lease.
        left: Whether it took its leave, or another process found it dead; neither alive nor left: it fell silent.
        joined: When it joined.
        heartbeat: When it last reported.
        age: Seconds since then, by the database's clock.
    """

    id: str
    role: WorkerRole
    host: str
    pid: int
    engine: str
    alive: bool
    left: bool
    joined: datetime
    heartbeat: datetime
    age: float


@dataclass(frozen=True, kw_only=True)
class SiteWinner:
    """The accepted result of one site.

    Attributes:
        site: Site name.
        attempt: The attempt that made it.
        worker: Who did.
        digest: See ``TicketSpec.digest``.
        scheme: Name of the scheme.
        winner: The candidate, JSON-able: ``{"kind": ..., "params": {...}}``.
        loss: Its held-out loss.
        artifact_id: Where its tensors are in the artifact store.
        sha256: Their digest.
        run: The run it belongs to.
    """

    site: str
    attempt: int
    worker: str
    digest: str
    scheme: str
    winner: Mapping[str, Any]
    loss: float
    artifact_id: str
    sha256: str
    run: str = ""


@dataclass(frozen=True, kw_only=True)
class StoredArtifact:
    """An object in the artifact store.

    Attributes:
        kind: What it is for.
        name: Name within its kind, e.g. the site.
        key: What it was made from (a digest), by which other runs find it; empty: found by name only.
        artifact_id: Its id in the store.
        sha256: Digest of its bytes.
        bytes: Size [bytes].
    """

    kind: ArtifactKind
    name: str
    key: str = ""
    artifact_id: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """How far a run is, as the database knows it.

    Attributes:
        waiting: Sites nobody works on yet.
        running: Sites under a live lease.
        done: Sites with an accepted result.
        failed: (site, reason) of sites that failed for good.
        trials: Trials recorded by Optuna's studies of the run.
        workers: Processes that joined, newest heartbeat first.
        rate: Sites per minute over the last minutes; None before two were done.
        seconds_left: Estimate at that rate [s]; None where there is no rate.
    """

    waiting: int
    running: tuple[Ticket, ...]
    done: int
    failed: tuple[tuple[str, str], ...]
    trials: int
    workers: tuple[WorkerRecord, ...]
    rate: float | None
    seconds_left: float | None
