"""Runs, sites, trials and artifacts in SQL: one contract, any backend."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import CursorResult, delete, insert, select, update
from sqlalchemy.orm import Session, selectinload

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database import Database, DuplicateError, StorageError
from alphasmith.storage.record_types import (
    ArtifactRecord,
    GroupRecord,
    Losses,
    RunRecord,
    RunSpec,
    RunStatus,
    SiteRecord,
    TrialDigest,
    check_json,
    params_hash,
    prose,
    utc,
)
from alphasmith.storage.row_records import (
    group_of,
    insert_digests,
    insert_groups,
    run_of,
    site_of,
    store_site,
    trial_of,
)
from alphasmith.storage.tables import ArtifactRow, GroupRow, RunRow, SiteRow, TrialDigestRow

__all__ = [
    "ArtifactRecord",
    "GroupRecord",
    "Losses",
    "RunRecord",
    "RunSpec",
    "RunStore",
    "SiteRecord",
    "TrialDigest",
    "params_hash",
]

_SPEC = tuple(item.name for item in fields(RunSpec))
_ID_TRIES = 5
_SEE = "see alphasmith list"
_REMEDIES: dict[RunStatus, str] = {
    "running": "launch a new run",
    "finished": "start or resume it first",
    "failed": "a finished run keeps its result",
    "interrupted": "a finished run keeps its result",
}
#: States from which a run can go on.
_OPEN: tuple[RunStatus, ...] = ("created", "running", "failed", "interrupted")


def _now() -> datetime:
    return datetime.now(UTC)


def _token() -> str:
    return secrets.token_hex(3)


class RunStore:
    """Reads and writes the records of runs.

    Every method is one transaction: what it stores is stored whole or not at all, and what it returns is a snapshot that
    never changes. A transaction that the database lost is repeated, see ``Database.transact``; none stores anything twice. One store may be used from many threads; every process opens its own database. Writers in several
    processes are serialised by the database. On SQLite a writer waits up to 60 s for another.

    Methods that take ``run_id`` need the full id; ``get`` resolves a prefix.

    Every method may raise StorageError when the database refuses or loses the operation; nothing was written then.

    Args:
        database: An initialised database.
        clock: Returns the current time with its zone.
        token: Returns the random end of a new id.
    """

    def __init__(
        self, database: Database, *, clock: Callable[[], datetime] = _now, token: Callable[[], str] = _token
    ) -> None:
        self._database = database
        self._clock = clock
        self._token = token

    def create(self, spec: RunSpec) -> RunRecord:
        """Store a new run in state ``created`` under an id of date and random end.

        Raises:
            InputError: The clock gives a time without zone.
            StorageError: No free id was found.
        """
        now = utc(self._clock())
        for _ in range(_ID_TRIES):
            run_id = f"r-{now:%Y%m%d}-{self._token()}"
            values = {
                "id": run_id,
                "status": "created",
                "reason": "",
                "folder": "",
                "created": now,
                **{name: getattr(spec, name) for name in _SPEC},
            }
            try:
                made = self._database.transact(_Insertion(values))
            except DuplicateError:
                continue
            if made:
                return self._record(run_id)
        raise StorageError(f"{self._database.masked}: no free run id after {_ID_TRIES} tries")

    def place(self, run_id: str, folder: str) -> RunRecord:
        """Say where the output of a run will be.

        Args:
            run_id: The run.
            folder: Absolute path; nothing needs to be there.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> RunRecord:
            row = self._require(session, run_id)
            row.folder = folder
            return run_of(row)

        return self._database.transact(operation)

    def keep_in(self, run_id: str, artifacts: str) -> RunRecord:
        """Say where the objects of a run are from now on.

        Args:
            run_id: The run.
            artifacts: Address of the store, absolute. What the run still needs must be there.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> RunRecord:
            row = self._require(session, run_id)
            row.artifacts = artifacts
            return run_of(row)

        return self._database.transact(operation)

    def start(self, run_id: str) -> RunRecord:
        """Mark a run as running, for the first time or again after a failure, an interruption or a kill.

        Raises:
            InputError: No such run, or it is finished.
        """
        return self._move(run_id, "running", _OPEN, reason="", started=utc(self._clock()), finished=None)

    def conclude(
        self, run_id: str, *, space_hash: str, folder: str, refinement: Mapping[str, Any] | None = None
    ) -> RunRecord:
        """Add what only the end of a search knows.

        Args:
            run_id: A running run.
            space_hash: Digest of the search spaces of its studies.
            folder: Output folder, absolute.
            refinement: What the refinement at the model's output did, JSON-able; None: there was none.

        Raises:
            InputError: No such run, or it is not running.
            NonFiniteError: The refinement holds NaN or infinity.
        """
        told = None if refinement is None else dict(refinement)
        check_json("run.refinement", told)
        return self._move(run_id, "running", ("running",), space_hash=space_hash, folder=folder, refinement=told)

    def finish(self, run_id: str) -> RunRecord:
        """Mark a running run as finished; nobody drives it any more.

        Raises:
            InputError: No such run, or it is not running.
        """
        nobody = {"driver": None, "driver_until": None}
        return self._move(run_id, "finished", ("running",), finished=utc(self._clock()), **nobody)

    def fail(self, run_id: str, reason: str) -> RunRecord:
        """Mark a run as failed. It can be started again.

        Raises:
            InputError: No such run, it is finished, or the reason is empty.
        """
        if not reason.strip():
            raise InputError("reason", "is empty", "say why the run failed")
        return self._move(run_id, "failed", _OPEN, reason=prose(reason), finished=utc(self._clock()))

    def interrupt(self, run_id: str, reason: str) -> RunRecord:
        """Mark a run as interrupted: it was told to stop and can be started again where it stood.

        Raises:
            InputError: No such run, it is finished, or the reason is empty.
        """
        if not reason.strip():
            raise InputError("reason", "is empty", "say why the run was interrupted")
        return self._move(run_id, "interrupted", _OPEN, reason=prose(reason), finished=utc(self._clock()))

    def find_unfinished(self, config_digest: str, model_digest: str, data_digest: str) -> list[RunRecord]:
        """Runs that are not finished and would find the same as one with these digests, newest first.

        Args:
            config_digest: See ``RunSpec``.
            model_digest: See ``RunSpec``.
            data_digest: See ``RunSpec``.
        """

        def operation(session: Session) -> list[RunRecord]:
            query = select(RunRow).where(
                RunRow.status != "finished",
                RunRow.config_digest == config_digest,
                RunRow.model_digest == model_digest,
                RunRow.data_digest == data_digest,
            )
            return [run_of(row) for row in session.scalars(query.order_by(RunRow.created.desc(), RunRow.id.desc()))]

        return self._database.transact(operation)

    def runs(self, *, limit: int | None = None) -> list[RunRecord]:
        """Runs, newest first.

        Args:
            limit: At most so many; None for all.

        Raises:
            InputError: The limit is negative.
        """
        if limit is not None and limit < 0:
            raise InputError("limit", f"{limit} is negative", "give the number of runs to show")

        def operation(session: Session) -> list[RunRecord]:
            rows = session.scalars(select(RunRow).order_by(RunRow.created.desc(), RunRow.id.desc()).limit(limit))
            return [run_of(row) for row in rows]

        return self._database.transact(operation)

    def get(self, prefix: str) -> RunRecord:
        """The run whose id is, or alone begins with, ``prefix``; else the newest one of that name.

        Raises:
            InputError: No run or several runs match.
        """
        if not prefix:
            raise InputError("RUN", "is empty", _SEE)

        def operation(session: Session) -> RunRecord:
            query = select(RunRow).where(RunRow.id.startswith(prefix, autoescape=True)).order_by(RunRow.id)
            # SQLite's LIKE ignores case; ids do not.
            found = [row for row in session.scalars(query) if row.id.startswith(prefix)]
            exact = [row for row in found if row.id == prefix]
            if not found:
                named = select(RunRow).where(RunRow.name == prefix).order_by(RunRow.created.desc(), RunRow.id.desc())
                found = list(session.scalars(named.limit(1)))
            if not found:
                raise InputError("RUN", f"no run {prefix!r} in {self._database.masked}", _SEE)
            if len(found) > 1 and not exact:
                ids = ", ".join(row.id for row in found[:3]) + (", ..." if len(found) > 3 else "")
                raise InputError("RUN", f"{prefix!r} fits {len(found)} runs ({ids})", "give more of the id")
            return run_of((exact or found)[0])

        return self._database.transact(operation)

    def delete(self, run_id: str) -> tuple[str, ...]:
        """Delete a run with everything under it.

        Returns:
            Names of the Optuna studies its trials lived in; they are Optuna's to delete.

        Raises:
            InputError: No such run.
        """
        names: set[str] | None = None

        def operation(session: Session) -> None:
            nonlocal names
            if names is not None and session.get(RunRow, run_id) is None:
                return  # deleted the first time, only the answer was lost
            self._require(session, run_id)
            trials = select(TrialDigestRow.study_name).where(TrialDigestRow.run_id == run_id)
            sites = select(SiteRow.study_name).where(SiteRow.run_id == run_id, SiteRow.study_name.is_not(None))
            names = {name for query in (trials, sites) for name in session.scalars(query) if name is not None}
            session.execute(delete(RunRow).where(RunRow.id == run_id))

        self._database.transact(operation)
        return tuple(sorted(names or ()))

    def add_site(self, run_id: str, site: SiteRecord, trials: Iterable[TrialDigest] = ()) -> None:
        """Store a site with its groups and trials.

        A site of the same name is replaced, so that a step repeated after a crash stores the same thing once.

        Raises:
            InputError: No such run.
            DuplicateError: A trial is stored under another site or run already.
        """
        digests = tuple(trials)

        def operation(session: Session) -> None:
            self._require(session, run_id)
            store_site(session, run_id, site, digests)

        self._database.transact(operation)

    def set_groups(self, run_id: str, groups: Sequence[GroupRecord]) -> None:
        """Store the groups of the whole model (scope ``model``), replacing earlier ones.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> None:
            self._require(session, run_id)
            session.execute(delete(GroupRow).where(GroupRow.run_id == run_id, GroupRow.site_id.is_(None)))
            insert_groups(session, run_id, None, groups)

        self._database.transact(operation)

    def add_trials(self, run_id: str, trials: Iterable[TrialDigest]) -> None:
        """Store trials that belong to no single site (scope ``model``). Those that are stored already, alike, stay as they are.

        Raises:
            InputError: No such run.
            DuplicateError: One of them is stored already, but not alike or elsewhere; none is stored then.
        """
        digests = tuple(trials)

        def operation(session: Session) -> None:
            self._require(session, run_id)
            query = select(TrialDigestRow).where(TrialDigestRow.run_id == run_id, TrialDigestRow.site_id.is_(None))
            named = query.where(TrialDigestRow.study_name.in_({digest.study_name for digest in digests}))
            known = [trial_of(row) for row in session.scalars(named)]
            insert_digests(session, run_id, None, [digest for digest in digests if digest not in known])

        self._database.transact(operation)

    def set_artifacts(self, run_id: str, artifacts: Iterable[ArtifactRecord]) -> None:
        """Store the files of the output folder, replacing earlier ones.

        Raises:
            InputError: No such run.
            DuplicateError: A path occurs twice.
        """
        rows = [{"run_id": run_id, **asdict(artifact)} for artifact in artifacts]

        def operation(session: Session) -> None:
            self._require(session, run_id)
            session.execute(delete(ArtifactRow).where(ArtifactRow.run_id == run_id))
            if rows:
                session.execute(insert(ArtifactRow), rows)

        self._database.transact(operation)

    def sites(self, run_id: str) -> list[SiteRecord]:
        """The sites of a run with their groups, in forward order.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> list[SiteRecord]:
            self._require(session, run_id)
            query = select(SiteRow).where(SiteRow.run_id == run_id).options(selectinload(SiteRow.groups))
            return [site_of(row) for row in session.scalars(query.order_by(SiteRow.position, SiteRow.id))]

        return self._database.transact(operation)

    def groups(self, run_id: str) -> list[GroupRecord]:
        """The groups of the whole model (scope ``model``), in order.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> list[GroupRecord]:
            self._require(session, run_id)
            query = select(GroupRow).where(GroupRow.run_id == run_id, GroupRow.site_id.is_(None))
            return [group_of(row) for row in session.scalars(query.order_by(GroupRow.position))]

        return self._database.transact(operation)

    def trials(self, run_id: str, *, study_name: str | None = None) -> list[TrialDigest]:
        """The trials of a run by study and number.

        Args:
            run_id: The run.
            study_name: Only those of one study.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> list[TrialDigest]:
            self._require(session, run_id)
            query = select(TrialDigestRow).where(TrialDigestRow.run_id == run_id)
            if study_name is not None:
                query = query.where(TrialDigestRow.study_name == study_name)
            rows = session.scalars(query.order_by(TrialDigestRow.study_name, TrialDigestRow.trial_number))
            return [trial_of(row) for row in rows]

        return self._database.transact(operation)

    def find_trial(self, study_name: str, digest: str) -> TrialDigest | None:
        """The first complete trial of a study with the same canonical parameters, or None.

        Args:
            study_name: The study.
            digest: ``params_hash`` of the parameters.
        """

        def operation(session: Session) -> TrialDigest | None:
            row = session.scalar(
                select(TrialDigestRow)
                .where(
                    TrialDigestRow.study_name == study_name,
                    TrialDigestRow.params_hash == digest,
                    TrialDigestRow.state == "complete",
                )
                .order_by(TrialDigestRow.trial_number)
                .limit(1)
            )
            return None if row is None else trial_of(row)

        return self._database.transact(operation)

    def artifacts(self, run_id: str) -> list[ArtifactRecord]:
        """The files of a run's output folder, by path.

        Raises:
            InputError: No such run.
        """

        def operation(session: Session) -> list[ArtifactRecord]:
            self._require(session, run_id)
            rows = session.scalars(select(ArtifactRow).where(ArtifactRow.run_id == run_id).order_by(ArtifactRow.path))
            return [ArtifactRecord(kind=r.kind, path=r.path, sha256=r.sha256, bytes=r.bytes) for r in rows]

        return self._database.transact(operation)

    def _record(self, run_id: str) -> RunRecord:
        return self._database.transact(lambda session: run_of(self._require(session, run_id)))

    def _require(self, session: Session, run_id: str) -> RunRow:
        row = session.get(RunRow, run_id)
        if row is None:
            raise InputError("RUN", f"no run {run_id!r} in {self._database.masked}", _SEE)
        return row

    def _move(self, run_id: str, to: RunStatus, allowed: tuple[RunStatus, ...], **values: object) -> RunRecord:
        # One conditional statement: of two processes that finish a run, one wins and the other is told.
        statement = update(RunRow).where(RunRow.id == run_id, RunRow.status.in_(allowed)).values(status=to, **values)

        def operation(session: Session) -> RunRecord:
            moved = cast("CursorResult[Any]", session.execute(statement)).rowcount
            row = self._require(session, run_id)
            # A repetition finds its own values, down to the microsecond of its clock.
            ours = row.status == to and all(getattr(row, name) == value for name, value in values.items())
            if not moved and not ours:
                raise InputError("RUN", f"{run_id} is {row.status} and cannot become {to}", _REMEDIES[to])
            return run_of(row)

        return self._database.transact(operation)


class _Insertion:
    """Inserts a run, unless its id is taken by another; the same insertion may be made again."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._tried = False

    def __call__(self, session: Session) -> bool:
        found = session.get(RunRow, self._values["id"])
        if found is not None:
            return self._tried and found.created == self._values["created"]
        self._tried = True
        session.execute(insert(RunRow).values(**self._values))
        return True
