"""The stage that searches all sites of a run, one study each, shared with other workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.types import Site
from alphasmith.search.engines.types import Engine, SearchEnd, SiteWork
from alphasmith.search.interruption import Interrupted
from alphasmith.search.progress import Progress
from alphasmith.search.site.memory import work_memory
from alphasmith.search.site.result import SiteResult, candidate_of
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.study_record import StoredLog, StudyMessage
from alphasmith.search.study.writer import Writer
from alphasmith.search.work.session import RunHandle
from alphasmith.search.work.site_results import SiteResults
from alphasmith.search.work.site_sources import SiteSource
from alphasmith.storage.queue.records import Claim

#: Seconds between two looks at a signal to stop while an engine works, and at what other processes have done, at first and
#: at most: many idle workers must not keep the database busy.
_TICK, _POLL, _LONGEST_POLL = 0.2, 1.0, 5.0


@dataclass(frozen=True)
class _SubmittedWork:
    """A piece of work the engine holds."""

    claim: Claim
    site: Site
    log: StoredLog


class SiteStage:
    """Claims sites, has them searched, keeps what is found.

    Args:
        handle: The run, its tickets and its studies.
        source: Rows and weights.
        settings: What is the same at every site; its scheme is not used.
        scheme: Site -> its scheme.
        engine: Searches.
        keeper: Keeps results.
        writer: The one thread that writes trials and results.
        progress: Called after each site.
        stop: Polled; returns True to stop.
        sleep: Waits a number of seconds.
    """

    def __init__(
        self,
        handle: RunHandle,
        source: SiteSource,
        settings: SiteSettings,
        *,
        scheme: Callable[[str], Scheme],
        engine: Engine,
        keeper: SiteResults,
        writer: Writer,
        progress: Progress,
        stop: Callable[[], bool],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._handle = handle
        self._source = source
        self._settings = settings
        self._scheme = scheme
        self._engine = engine
        self._board = handle.board
        self._keeper = keeper
        self._writer = writer
        self._progress = progress
        self._stop = stop
        self._sleep = sleep
        self._results: dict[str, SiteResult] = {}
        self._held: dict[str, _SubmittedWork] = {}
        # Sites whose result waits to be written: neither held any more nor accepted yet.
        self._ending: set[str] = set()
        self._stopping = False

    def run(self) -> None:
        """Search until every site has a result, here or elsewhere; those on record are not searched again.

        Raises:
            AlphasmithError: A site failed for good, here or elsewhere.
            Interrupted: ``stop`` said so; what ran has ended after its batch and is on record.
        """
        total, done, bad = len(self._source.order), self._done(), list[str]()
        if done and self._board.driving:
            self._results |= self._keeper.recall(done)
            bad = sorted(done - self._done())
            done = self._done()
        to_come = [name for name in self._source.order if name not in done]
        self._progress.stage("searching sites", len(to_come))
        if self._board.driving:  # others would have to fetch the sites for it
            self._progress.expect([self._source.site(name).weight_count for name in to_come])
        if bad:
            sites = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
            self._progress.note(
                f"{len(bad)} recorded results are gone, damaged or of another version ({sites}); their sites are searched again"
            )
        if done or bad:
            self._progress.note(f"{len(done)} of {total} sites are on record and not searched again")
        pause = _POLL
        while True:
            if self._stop() and not self._stopping:
                self._stopping = True
                self._engine.stop()
            if self._fill():
                pause = _POLL
            if self._held:
                for ended in self._engine.wait(self._hear, _TICK):
                    self._end(ended)
                continue
            self._writer.flush()
            if self._stopping:
                raise Interrupted("asked to stop")
            if len(self._done()) == total:
                return
            self._keeper.check()
            self._sleep(pause)  # others hold what is left
            pause = min(_LONGEST_POLL, pause * 1.5)

    def results(self) -> dict[str, SiteResult]:
        """Results of all sites, in search order, once :meth:`run` has returned."""
        self._fetch([name for name in self._source.order if name not in self._results])
        return {name: self._results[name] for name in self._source.order}

    def _done(self) -> frozenset[str]:
        """Sites of the source that are done; the run may have more."""
        return self._board.done() & frozenset(self._source.order)

    def _fill(self) -> bool:
        """Give the engine what it can take; whether it took anything."""
        taken = False
        while not self._stopping and self._engine.slots > 0:
            claim = self._claim()
            if claim is None and self._writer.flush():
                claim = self._claim()  # what was just kept may have unblocked a site
            if claim is None:
                break
            self._begin(claim)
            taken = True
        return taken

    def _claim(self) -> Claim | None:
        # A site whose lease was lost while this process was frozen, and was given back since, is free; yet its old search
        # still runs here, and must end before there can be another.
        return self._board.claim(skip=(*self._held, *self._ending.copy()))

    def _begin(self, claim: Claim) -> None:
        name = claim.site
        self._fetch([d for d in claim.ticket.depends_on if d not in self._results])
        smoothings = {d: self._results[d].smoothing for d in claim.ticket.depends_on}
        data, held_out = self._source.rows(name, smoothings)
        site = self._source.site(name)
        study = self._handle.study_name(name)
        log = StoredLog(self._handle.optuna_storage, study, writer=self._writer, fence=self._board.fence(claim))
        reused = claim.ticket.reused
        work = SiteWork(
            site=name,
            study_name=study,
            data=data,
            held_out=held_out,
            settings=replace(
                self._settings,
                scheme=self._scheme(name),
                shiftable=site.shiftable,
                reused=None if reused is None else candidate_of(reused["candidate"]),
            ),
            memory=work_memory(data, held_out),
            past=log.past,
        )
        self._held[name] = _SubmittedWork(claim, site, log)
        self._engine.submit(work)

    def _hear(self, site: str, message: StudyMessage) -> None:
        held = self._held.get(site)
        if held is not None:
            held.log.tell(message)

    def _end(self, ended: SearchEnd) -> None:
        held = self._held.pop(ended.site)
        if ended.result is not None:
            self._progress.advance(f"best loss {ended.result.held_out_loss:.3g} at the last site")
            self._ending.add(ended.site)
            self._writer.submit(self._keep, held, ended.result)
        elif ended.stopped or ended.lost:
            self._writer.flush()  # the next attempt starts from what this one told
            reason = ended.reason or "asked to stop"
            self._board.give_back(held.claim, reason=reason, counted=ended.lost)
            if ended.lost:
                self._progress.note(f"{ended.site}: {reason}; it is searched again")
        else:
            self._board.fail(held.claim, ended.reason)
            raise AlphasmithError(f"site {ended.site}: {ended.reason}")

    def _keep(self, held: _SubmittedWork, result: SiteResult) -> None:
        """Record a result, in the writer's thread; what is refused is forgotten.

        Where another attempt's result counts, that one is read from the record. Sites that depend on this one can be claimed
        as soon as either is accepted, so nothing is taken for a result before.
        """
        if self._keeper.keep(held.claim, held.site, result):
            self._results[held.site.name] = result
        self._ending.discard(held.site.name)

    def _fetch(self, sites: Sequence[str]) -> None:
        """Read accepted results that another process, or this one before, has found."""
        if sites:
            self._results |= self._keeper.results(sites)
