"""What the tests of the board share: runs, plans, results, waiting with a deadline, and a database that forgets to answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from alphasmith.storage.database.connection import Database, StorageError
from alphasmith.storage.database.tables import AttemptRow, TicketRow
from alphasmith.storage.queue.board import Board, Identity
from alphasmith.storage.queue.records import Claim, SiteWinner, StoredArtifact, TicketSpec
from alphasmith.storage.runs.entries import SiteRecord
from alphasmith.storage.runs.records import RunSpec
from alphasmith.storage.runs.run_store import RunStore

T = TypeVar("T")

SPEC = RunSpec(
    name="shared",
    model_digest="a" * 64,
    data_digest="b" * 64,
    config={},
    scheme="w8a8-channel-static",
    hardware={},
    scope="site",
    versions={},
    space_hash="",
    config_digest="c" * 64,
)
#: Long enough that no test sees it run out.
LONG = 3600.0


@dataclass(frozen=True)
class Forgetful(Database):
    """Commits, then loses its answer, once for every entry of ``losses``; ``"for good"`` is not repeated.

    Before a transaction begins, what is in ``before`` happens, once.
    """

    losses: list[str] = field(default_factory=list)
    before: list[Callable[[], object]] = field(default_factory=list)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """As ``Database.session``; the error comes after the commit."""
        if self.before:
            self.before.pop()()
        with super().session() as session:
            yield session
        if self.losses:
            how = self.losses.pop()
            lost = OperationalError("COMMIT", {}, Exception(how), connection_invalidated=how != "for good")
            raise StorageError("the answer was lost") from lost


def forgetful(database: Database) -> Forgetful:
    """The same database, forgetful on demand."""
    return Forgetful(engine=database.engine, url=database.url, masked=database.masked)


def new_run(database: Database) -> str:
    """Id of a new run."""
    return RunStore(database).create(SPEC).id


def board(database: Database, run_id: str, *, lease: float = LONG, **more: Any) -> Board:
    """A driver's board."""
    return Board(database, run_id, role="driver", lease=lease, **more)


def elsewhere(token: str) -> Identity:
    """A process of another machine, which nobody here can look at."""
    return Identity(host="elsewhere", pid=1, token=token, started=1, boot="other", namespace="1")


def chain(*sites: str) -> list[TicketSpec]:
    """Sites that wait for nothing, in order."""
    return [TicketSpec(site=site, position=number, digest=f"{site}-digest") for number, site in enumerate(sites)]


def finish(owner: Board, claim: Claim, *, run_id: str, loss: float = 0.25) -> bool:
    """Complete a claim with a record and an artifact."""
    study = f"{run_id}/{claim.site}"
    record = SiteRecord(name=claim.site, position=claim.ticket.position, mode="fold", channels=4, study=study, trials=2)
    winner = SiteWinner(
        site=claim.site, attempt=0, worker="", digest=claim.ticket.digest, scheme=SPEC.scheme,
        winner={"kind": "sampler", "params": {"alpha_0": 0.5}}, loss=loss, artifact_id=f"{claim.site}.safetensors",
        sha256="d" * 64,
    )  # fmt: skip
    kept = StoredArtifact(
        kind="result", name=claim.site, artifact_id=winner.artifact_id, sha256=winner.sha256, bytes=2**40
    )
    return owner.complete(claim, record, winner, kept)


def need(claim: Claim | None) -> Claim:
    """A claim that must be there."""
    if claim is None:
        raise AssertionError("nothing to claim")
    return claim


def until(look: Callable[[], T | None], *, seconds: float = 60.0) -> T:
    """What ``look`` returns as soon as it is something."""
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"nothing happened for {seconds} s")


def states(database: Database, run_id: str) -> list[tuple[str, int, str]]:
    """(site, number, state) of all attempts at the sites of a run, oldest first."""
    query = select(TicketRow.site, AttemptRow.number, AttemptRow.state).join(
        TicketRow, TicketRow.id == AttemptRow.ticket_id
    )
    oldest = query.where(AttemptRow.run_id == run_id).order_by(AttemptRow.started, AttemptRow.id)
    return database.transact(lambda session: [(site, number, state) for site, number, state in session.execute(oldest)])
