"""Records of runs from rows of tables, and rows from records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any, cast

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from alphasmith.storage.record_types import (
    GroupRecord,
    Losses,
    RunRecord,
    RunSpec,
    RunStatus,
    SiteRecord,
    TrialDigest,
)
from alphasmith.storage.tables import GroupRow, RunRow, SiteRow, TrialDigestRow

_SPEC = tuple(item.name for item in fields(RunSpec))
_LOSSES = tuple(item.name for item in fields(Losses))
_SITE = (
    "name",
    "position",
    "mode",
    "reason",
    "channels",
    "study_name",
    "winner",
    "trials",
    "exact_evaluations",
    "shift",
    "range_statistic",
    "range_factor",
    "grouping",
    "statistic",
)
_TRIAL = tuple(item.name for item in fields(TrialDigest))


def store_site(session: Session, run_id: str, site: SiteRecord, trials: Iterable[TrialDigest]) -> None:
    """Store a site with its groups and trials in a transaction; one of the same name is replaced, trials included."""
    drop_site(session, run_id, site.name)
    row = SiteRow(
        run_id=run_id,
        operators=list(site.operators),
        seconds=float(site.seconds),
        facts=None if site.facts is None else dict(site.facts),
        **_loss_columns("search", site.search),
        **_loss_columns("held_out", site.held_out),
        **_plain(site, _SITE),
    )
    session.add(row)
    session.flush()
    insert_groups(session, run_id, row.id, site.groups)
    insert_digests(session, run_id, row.id, trials)


def drop_site(session: Session, run_id: str, name: str) -> None:
    """Remove a site with its groups and trials in a transaction, if it is there; its study stays."""
    old = session.scalar(select(SiteRow.id).where(SiteRow.run_id == run_id, SiteRow.name == name))
    if old is not None:
        session.execute(delete(SiteRow).where(SiteRow.id == old))


def _plain(record: object, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _value(losses: Losses | None, name: str) -> float | None:
    value: float | None = None if losses is None else getattr(losses, name)
    return value


def _loss_columns(prefix: str, losses: Losses | None) -> dict[str, float | None]:
    return {f"{prefix}_{name}": _value(losses, name) for name in _LOSSES}


def _losses(row: SiteRow, prefix: str) -> Losses | None:
    values = {name: getattr(row, f"{prefix}_{name}") for name in _LOSSES}
    # The winner's loss is the one that every measured set has; a baseline may have failed.
    return None if values["ours"] is None else Losses(**values)


def run_of(row: RunRow) -> RunRecord:
    """A run as recorded."""
    return RunRecord(
        id=row.id,
        status=cast(RunStatus, row.status),
        reason=row.reason,
        created=row.created,
        started=row.started,
        finished=row.finished,
        folder=row.folder,
        refinement=row.refinement,
        driver=row.driver,
        driver_until=row.driver_until,
        **{name: getattr(row, name) for name in _SPEC},
    )


def site_of(row: SiteRow) -> SiteRecord:
    """A site with its groups as recorded; inside the session of its row."""
    return SiteRecord(
        operators=tuple(row.operators),
        search=_losses(row, "search"),
        held_out=_losses(row, "held_out"),
        seconds=row.seconds,
        facts=row.facts,
        groups=tuple(group_of(group) for group in row.groups),
        **{name: getattr(row, name) for name in _SITE},
    )


def group_of(row: GroupRow) -> GroupRecord:
    """A group as recorded."""
    return GroupRecord(
        index=row.position,
        size=row.size,
        low=row.low,
        high=row.high,
        alpha=row.alpha,
        magnitude=row.magnitude,
        explanation=row.explanation,
        beta=row.beta,
        offset=row.offset,
    )


def trial_of(row: TrialDigestRow) -> TrialDigest:
    """A trial as recorded."""
    return TrialDigest(**{name: getattr(row, name) for name in _TRIAL})


def insert_groups(session: Session, run_id: str, site_id: int | None, groups: Sequence[GroupRecord]) -> None:
    """Store groups of a site, or of the whole model where there is no site, in a transaction."""
    rows = []
    for group in groups:
        values = asdict(group)
        rows.append({"run_id": run_id, "site_id": site_id, "position": values.pop("index"), **values})
    if rows:
        session.execute(insert(GroupRow), rows)


def insert_digests(session: Session, run_id: str, site_id: int | None, trials: Iterable[TrialDigest]) -> None:
    """Store trials of a site, or of the whole model where there is no site, in a transaction."""
    rows = [
        {"run_id": run_id, "site_id": site_id, **_plain(trial, _TRIAL), "params": dict(trial.params)}
        for trial in trials
    ]
    if rows:
        session.execute(insert(TrialDigestRow), rows)
