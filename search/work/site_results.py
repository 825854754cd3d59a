"""Accepted results of sites: stored once, read again when the run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Collection

from alphasmith.objectives.errors import AlphasmithError, InputError, IntegrityError
from alphasmith.objectives.sites.types import Site
from alphasmith.search.site.result import SiteResult, candidate_json, result_from_state, result_state
from alphasmith.search.work.site_records import site_record
from alphasmith.storage.artifacts.run_artifacts import RunArtifacts
from alphasmith.storage.queue.board import Board
from alphasmith.storage.queue.records import Claim, SiteWinner, StoredArtifact


class SiteResults:
    """Keeps the result of a site under the claim it was found under.

    Args:
        board: Tickets of the run.
        kept: Objects of the run in the artifact store.
        scheme: Site -> name of its quantization scheme.
        position: Site name -> place in forward order.
    """

    def __init__(
        self, board: Board, kept: RunArtifacts, *, scheme: Callable[[str], str], position: Callable[[str], int]
    ) -> None:
        self._board = board
        self._kept = kept
        self._scheme = scheme
        self._position = position

    def keep(self, claim: Claim, site: Site, result: SiteResult) -> bool:
        """Record a site's result, in one transaction, after its tensors.

        Returns:
            False where another attempt has taken over; then nothing is recorded.
        """
        digest = self._kept.store.put(result_state(result))
        artifact = StoredArtifact(
            kind="result", name=site.name, artifact_id=digest.path, sha256=digest.sha256, bytes=digest.bytes
        )
        winner = SiteWinner(
            site=site.name,
            attempt=claim.attempt,
            worker=self._board.worker,
            digest=claim.ticket.digest,
            scheme=self._scheme(site.name),
            winner=candidate_json(result.candidate),
            loss=result.held_out_loss,
            artifact_id=artifact.artifact_id,
            sha256=artifact.sha256,
        )
        record = site_record(site, self._position(site.name), result)
        return self._board.complete(claim, record, winner, artifact)

    def results(self, sites: Collection[str]) -> dict[str, SiteResult]:
        """Accepted results of some sites.

        Raises:
            AlphasmithError: A site has none, or its tensors are gone or damaged.
        """
        winners = self._board.results()
        if missing := [name for name in sites if name not in winners]:
            raise AlphasmithError(f"site {missing[0]} has no accepted result")
        return {
            name: result_from_state(self._kept.store.get(w.artifact_id, sha256=w.sha256))
            for name in sites
            if (w := winners[name])
        }

    def recall(self, sites: Collection[str]) -> dict[str, SiteResult]:
        """Accepted results of a run that goes on; one that is gone, damaged or of another version is not one any more. For the driver.

        Its site is searched again, from the trials on record.

        Args:
            sites: Those whose results are looked for.

        Raises:
            InputError: Field ``artifacts``: the store cannot be reached.
        """
        found = {}
        for name, winner in self._board.results().items():
            if name not in sites:
                continue
            try:
                state = self._kept.store.get(winner.artifact_id, sha256=winner.sha256)
            except IntegrityError as error:
                self._board.reopen(name, str(error))
                continue
            try:
                found[name] = result_from_state(state)
            except InputError as error:  # an earlier Alphasmith wrote it
                self._board.reopen(name, str(error))
        return found

    def failed(self) -> str:
        """The first site that failed for good, with its reason; empty where there is none."""
        return next((f"site {site}: {reason}" for site, reason in self._board.progress().failed), "")

    def check(self) -> None:
        """Raise what made a site fail for good.

        Raises:
            AlphasmithError: A site failed.
        """
        if reason := self.failed():
            raise AlphasmithError(reason)
