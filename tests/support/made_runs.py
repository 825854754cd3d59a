"""Runs as their records, studies and objects stand when a search has ended, for the tests of upkeep."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import torch
from optuna.storages import BaseStorage

from alphasmith.storage.artifacts.run_artifacts import RunArtifacts
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import Database, optuna_storage
from alphasmith.storage.database.tables import ResultRow, TicketRow
from alphasmith.storage.runs.entries import SiteRecord
from alphasmith.storage.runs.records import RunSpec
from alphasmith.storage.runs.run_store import RunStore
from alphasmith.storage.upkeep.garbage import Removal

OLD = timedelta(days=2)
SITE = "fc1"


@dataclass(frozen=True)
class FinishedRun:
    """A run with one finished site: ticket, result, record, two trials, an object of each kind."""

    id: str
    study: str
    kept: RunArtifacts
    store: RunStore
    folder: Path

    def has(self, kind: str) -> bool:
        """Whether an object is found and whole."""
        return self.kept.get(kind, SITE) is not None  # type: ignore[arg-type]


@functools.cache
def optuna_of(database: Database) -> BaseStorage:
    """Optuna's storage, opened once."""
    return optuna_storage(database)


def make(database: Database, artifacts: Path, *, status: str = "finished") -> FinishedRun:
    """Make such a run; ``artifacts`` is its store."""
    store = RunStore(database)
    spec = RunSpec(
        name="made",
        model_digest="",
        data_digest="",
        config={"out": str(artifacts.parent / "out")},
        scheme="w8a8",
        hardware={},
        scope="site",
        versions={},
        space_hash="",
        artifacts=str(artifacts),
    )
    run = store.create(spec).id
    store.start(run)
    study = f"{run}/{SITE}"
    made = optuna.create_study(study_name=study, storage=optuna_of(database))
    for number in range(2):
        made.add_trial(optuna.trial.create_trial(value=float(number), user_attrs={"candidate": "sampler"}))
    site = SiteRecord(
        name=SITE, position=0, mode="fold", reason="", channels=4, operators=("fc1",), study=study, winner=None, trials=2,
        exact_evaluations=2, seconds=0.1,
    )  # fmt: skip
    store.add_site(run, site)
    kept = RunArtifacts(database, ArtifactStore.open(str(artifacts)), run)
    result = None
    for kind in ("calibration", "weights", "result"):
        result = kept.put(kind, SITE, {run: torch.ones(3), kind: torch.ones(3)})
    assert result is not None
    now = datetime.now(UTC)
    with database.session() as session:
        session.add(
            TicketRow(
                run_id=run, site=SITE, position=0, depends_on=[], blocked=0, digest="", state="done", attempts=1, tries=1, worker="w",
                reason="",
            )
        )  # fmt: skip
        session.add(
            ResultRow(
                run_id=run, site=SITE, attempt=1, worker="w", digest="", scheme="w8a8", winner={}, loss=1.0,
                artifact_id=result.artifact_id, sha256=result.sha256, accepted=now,
            )
        )  # fmt: skip
    if status == "finished":
        store.finish(run)
    elif status == "failed":
        store.fail(run, "stopped")
    return FinishedRun(run, study, kept, store, artifacts)


def age(folder: Path) -> None:
    """Make everything in a folder two days old."""
    then = (datetime.now(UTC) - OLD).timestamp()
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then))


def what(found: list[Removal]) -> dict[str, int]:
    """How many of each."""
    kinds = [item.what for item in found]
    return {kind: kinds.count(kind) for kind in kinds}
