"""The plan of a run: its tickets in order, what they wait for, and whether a stored plan is still the wanted one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from alphasmith.objectives.errors import InputError
from alphasmith.storage.database.tables import TicketRow
from alphasmith.storage.queue.records import TicketSpec


def new_ticket(run_id: str, spec: TicketSpec) -> dict[str, Any]:
    """Columns of a ticket that nobody has worked on."""
    return {
        "run_id": run_id,
        "site": spec.site,
        "position": spec.position,
        "depends_on": list(spec.depends_on),
        "blocked": len(spec.depends_on),
        "digest": spec.digest,
        "reused": None if spec.reused is None else dict(spec.reused),
        "state": "waiting",
        "attempts": 0,
        "tries": 0,
        "reason": "",
    }


def check_order(specs: Sequence[TicketSpec]) -> None:
    """Refuse a plan that cannot be worked off.

    Raises:
        InputError: Field ``RUN``: a site is planned twice, or depends on one that is not planned before it.
    """
    positions: dict[str, int] = {}
    for spec in sorted(specs, key=lambda item: item.position):
        missing = next((site for site in spec.depends_on if site not in positions), None)
        if missing is not None:
            raise InputError(
                "RUN", f"{spec.site} depends on {missing}, which is not planned before it", "order the sites"
            )
        if spec.site in positions:
            raise InputError("RUN", f"{spec.site} is planned twice", "plan every site once")
        positions[spec.site] = spec.position


def difference(rows: Mapping[str, TicketRow], specs: Sequence[TicketSpec]) -> str:
    """The first thing that differs between a stored and a wanted plan, as text; empty: nothing."""
    wanted = {spec.site: spec for spec in specs}
    if added := sorted(set(wanted) - set(rows)):
        return f"{added[0]} is new" + _more(added)
    if missing := sorted(set(rows) - set(wanted)):
        return f"{missing[0]} is missing" + _more(missing)
    if other := [spec.site for spec in specs if spec.digest != rows[spec.site].digest]:
        return f"{other[0]} has another digest" + _more(other)
    if moved := [spec.site for spec in specs if sorted(spec.depends_on) != sorted(rows[spec.site].depends_on)]:
        return f"{moved[0]} depends on other sites" + _more(moved)
    return ""


def _more(sites: Sequence[str]) -> str:
    return f" (and {len(sites) - 1} more)" if len(sites) > 1 else ""


def dependants_of(session: Session, run_id: str) -> Mapping[str, tuple[str, ...]]:
    """Site -> the sites that wait for it."""
    found: dict[str, list[str]] = {}
    rows = session.execute(select(TicketRow.site, TicketRow.depends_on).where(TicketRow.run_id == run_id))
    for site, depends_on in rows:
        for other in depends_on:
            found.setdefault(other, []).append(site)
    return {site: tuple(sorted(waiting)) for site, waiting in found.items()}
