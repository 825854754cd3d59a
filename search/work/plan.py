"""The plan of a run: which sites it will search, stored before the first search so that any process can resume it."""

from __future__ import annotations

from typing import Any

from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.progress import Progress
from alphasmith.search.work._published_site import site_digest
from alphasmith.search.work.session import RunHandle
from alphasmith.search.work.site_sources import PreparedSites, publish_sites
from alphasmith.storage.queue.board import reusable_winners
from alphasmith.storage.queue.records import SiteWinner, TicketSpec


def plan_sites(
    config: RunConfig,
    prepared: PreparedModel,
    source: PreparedSites,
    handle: RunHandle,
    progress: Progress,
    *,
    part: bool = False,
) -> bool:
    """Write the tickets of a run; where its database serves several processes, publish what they need.

    A run that was planned before keeps its plan, the winners that its searches start from included.

    Args:
        config: The run's configuration.
        prepared: Sites and calibration.
        source: The same sites, to be searched.
        handle: The run.
        progress: Receives notes.
        part: Whether these are some of the run's sites only: a run that goes block by block plans each when it comes to it.

    Returns:
        Whether other processes can take part.

    Raises:
        InputError: The run was planned for other sites.
    """
    mine = set(source.order)
    planned = {ticket.site: ticket for ticket in handle.board.tickets() if not part or ticket.site in mine}
    digests = {
        name: planned[name].digest if name in planned else site_digest(source.site(name), source.tensors)
        for name in source.order
    }
    schemes = {name: config.scheme.of(name).name for name in source.order}
    winners: dict[tuple[str, str], SiteWinner] = {}
    for scheme in dict.fromkeys(schemes.values()) if config.search.reuse and not planned else ():
        alike = [digests[name] for name in source.order if schemes[name] == scheme]
        found = reusable_winners(handle.database, alike, scheme, not_run=handle.id)
        winners |= {(scheme, digest): winner for digest, winner in found.items()}
    winner_of = {name: winners.get((schemes[name], digests[name])) for name in source.order}
    shared = handle.shared
    if shared and not planned:
        publish_sites(prepared, source, handle.kept)
    handle.board.plan(
        [
            TicketSpec(
                site=name,
                position=source.first + place,
                depends_on=source.depends_on(name),
                digest=digests[name],
                reused=planned[name].reused if name in planned else _reused(winner_of[name]),
            )
            for place, name in enumerate(source.order)
        ],
        part=part,
    )
    reused = [winner for winner in winner_of.values() if winner is not None]
    if reused:
        runs = ", ".join(sorted({w.run for w in reused}))
        progress.note(
            f"{len(reused)} of {len(digests)} sites start from winners on record (run {runs}); "
            "search.reuse=false starts afresh"
        )
    return shared


def _reused(winner: SiteWinner | None) -> dict[str, Any] | None:
    return None if winner is None else {"run": winner.run, "candidate": dict(winner.winner)}
