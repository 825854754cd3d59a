"""A run on a cluster as a discrete-event simulation: who waits for whom, with a measured cost for every step.

Two ways to run: one *driver* prepares site work, sends it to workers and records all trials through one writer; or
*autonomous* workers claim tickets in a database, read site work from the artifact store and record their own trials.

What is simulated: one driver loop, one writer, one database and one link out of the driver or the store, each first come,
first served. Left out: failures, results on the wire (kilobytes), and that a worker could receive its next site while it searches.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

#: Jobs that may wait for the writer before the driver does (search/study/writer.py).
_WRITER_DEPTH = 128


@dataclass(frozen=True)
class SimSite:
    """One site.

    Attributes:
        seconds: What its search takes on one worker [s].
        after: Positions of the sites that must be done before; all smaller than its own.
    """

    seconds: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What every step of a run costs, in seconds unless said otherwise.

    Attributes:
        batches: How often a search tells of trials (one message, one transaction each).
        begin: Recording that a study begins, with its space and first facts; the writer or the database is busy for it.
        batch: Recording one batch of trials.
        keep: Recording a finished site: result, groups, trial digests, its ticket.
        claim: Claiming a ticket, or finding that there is none.
        open: Reading what is on record of a study.
        copy: Turning one piece of site work into bytes.
        message: The driver takes one message.
        finish: The driver takes one result.
        transfer: One piece of site work over the link out of the driver, or out of the store.
        link: The same over the link into a worker; it overlaps with ``transfer``.
        renew: Renewing the leases of a worker.
        poll: How long a worker that found no ticket waits.
        beat: How often a worker renews its leases.
        served: Share of a transaction's time for which it occupies the database, so that no other worker's goes on; for the
            rest it travels, or the worker makes and reads it.
    """

    batches: int = 1
    begin: float = 0.0
    batch: float = 0.0
    keep: float = 0.0
    claim: float = 0.0
    open: float = 0.0
    copy: float = 0.0
    message: float = 0.0
    finish: float = 0.0
    transfer: float = 0.0
    link: float = 0.0
    renew: float = 0.0
    poll: float = 1.0
    beat: float = 15.0
    served: float = 1.0

    @property
    def submit(self) -> float:
        """What the driver does to hand out one site."""
        return self.claim + self.open + self.copy

    @property
    def recording(self) -> float:
        """All that is recorded of one site."""
        return self.begin + self.batches * self.batch + self.keep

    @property
    def arrival(self) -> float:
        """From the start of sending to the arrival of site work, on an idle link."""
        return max(self.transfer, self.link)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """How the search stage of a run went.

    Attributes:
        workers: GPUs that search.
        sites: Sites searched.
        seconds: From the first step to the last record [s].
        work: Seconds of all searches together.
        chain: The longest chain of dependent searches, with the steps between them [s].
        busy: Shared resource -> seconds for which it was busy.
    """

    workers: int
    sites: int
    seconds: float
    work: float
    chain: float
    busy: Mapping[str, float]

    @property
    def efficiency(self) -> float:
        """Share of the GPUs' time in which they search."""
        return self.work / (self.workers * self.seconds)

    @property
    def throughput(self) -> float:
        """Sites per second."""
        return self.sites / self.seconds

    @property
    def bound(self) -> str:
        """What keeps the run from being faster: the largest of the lower bounds on its time."""
        bounds = {"GPUs": self.work / self.workers, "dependent sites": self.chain, **self.busy}
        return max(bounds, key=lambda name: bounds[name])


class Server:
    """A resource that does one thing at a time, first come, first served. Must be asked in the order of time.

    Attributes:
        free: When it has done all it was asked so far.
        busy: Seconds it worked.
    """

    def __init__(self) -> None:
        self.free = 0.0
        self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Ask for ``seconds`` of work at time ``now``; returns when it is done."""
        self.free = max(self.free, now) + seconds
        self.busy += seconds
        return self.free


class Events:
    """What happens, in the order of time; at equal times in the order in which it was announced."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()

    def at(self, time: float, action: Callable[[float], None]) -> None:
        """Announce ``action``; it is called with its time."""
        heapq.heappush(self._heap, (time, next(self._order), action))

    def run(self) -> None:
        """Let everything happen."""
        while self._heap:
            time, _, action = heapq.heappop(self._heap)
            action(time)


class Plan:
    """The tickets of a run: lowest position first among those whose dependencies are done."""

    def __init__(self, sites: Sequence[SimSite]) -> None:
        self._blocked = [len(site.after) for site in sites]
        self._dependants: list[list[int]] = [[] for _ in sites]
        for position, site in enumerate(sites):
            for before in site.after:
                self._dependants[before].append(position)
        self._ready = [position for position, count in enumerate(self._blocked) if not count]
        self.untaken = len(sites)

    def take(self) -> int | None:
        """The next site that can be searched, or None."""
        if not self._ready:
            return None
        self.untaken -= 1
        return heapq.heappop(self._ready)

    def done(self, position: int) -> None:
        """A site is done; what depends on it alone becomes ready."""
        for dependant in self._dependants[position]:
            self._blocked[dependant] -= 1
            if not self._blocked[dependant]:
                heapq.heappush(self._ready, dependant)


def block_sites(count: int, seconds: Sequence[float], *, mean: float, seed: int = 0) -> tuple[SimSite, ...]:
    """Sites of ``count // 4`` blocks of a LLaMA: ``o_proj`` before the site of q, k, v and ``down_proj`` before that of gate and up.

    Args:
        count: Number of sites.
        seconds: Measured seconds per site [s]; times are drawn from their distribution.
        mean: What the drawn times are on average [s].
        seed: Seed of the draw.
    """
    drawn = np.random.default_rng(seed).choice(np.asarray(seconds, dtype=float), size=count)
    drawn *= mean / drawn.mean()
    first = (count + 1) // 2
    return tuple(
        SimSite(float(taken), () if position < first else (position - first,)) for position, taken in enumerate(drawn)
    )


def longest_chain(sites: Sequence[SimSite], *, between: float = 0.0) -> float:
    """Seconds of the longest chain of dependent searches, with ``between`` seconds before or after each."""
    ends: list[float] = []
    for site in sites:
        ends.append(max((ends[before] for before in site.after), default=0.0) + site.seconds + between)
    return max(ends, default=0.0)


def with_driver(sites: Sequence[SimSite], workers: int, steps: Steps) -> Simulated:
    """One driver sends site work to ``workers`` workers and records everything through one writer."""
    events, plan = Events(), Plan(sites)
    driver, link, writer = Server(), Server(), Server()
    idle, sending, written = workers, False, deque[float]()

    def record(now: float, seconds: float) -> float:
        done = writer.serve(now, seconds)
        written.append(done)
        if len(written) > _WRITER_DEPTH:
            # The queue is full: the driver waits until there is room.
            driver.free = max(driver.free, written.popleft())
        return done

    def dispatch(now: float) -> None:
        # One piece at a time: what workers tell meanwhile is taken in between.
        nonlocal idle, sending
        if sending or not idle or (position := plan.take()) is None:
            return
        idle, sending = idle - 1, True
        sent = driver.serve(now, steps.submit)
        arrived = max(link.serve(sent, steps.transfer), sent + steps.link)
        events.at(arrived, partial(told, steps.begin))
        for batch in range(1, steps.batches + 1):
            events.at(arrived + sites[position].seconds * (batch / steps.batches), partial(told, steps.batch))
        events.at(arrived + sites[position].seconds, partial(ended, position))
        events.at(sent, submitted)

    def submitted(now: float) -> None:
        nonlocal sending
        sending = False
        dispatch(now)

    def told(seconds: float, now: float) -> None:
        record(driver.serve(now, steps.message), seconds)

    def ended(position: int, now: float) -> None:
        taken = driver.serve(now, steps.finish)
        kept = record(taken, steps.keep)
        events.at(taken, freed)
        events.at(kept, partial(unblocked, position))

    def freed(now: float) -> None:
        nonlocal idle
        idle += 1
        dispatch(now)
        if idle and not sending and plan.untaken:
            # Nothing to hand out: what is being recorded may unblock a site, so the driver waits for it and asks again.
            driver.free = max(driver.free, writer.free)
            driver.serve(now, steps.claim)

    def unblocked(position: int, now: float) -> None:
        plan.done(position)
        dispatch(now)

    dispatch(0.0)
    events.run()
    between = steps.submit + steps.arrival + steps.message + max(steps.batch, steps.finish) + steps.keep
    return Simulated(
        workers=workers,
        sites=len(sites),
        seconds=max(driver.free, writer.free),
        work=sum(site.seconds for site in sites),
        chain=longest_chain(sites, between=between),
        busy={"driver": driver.busy, "link": link.busy, "writer": writer.busy},
    )


def autonomous(sites: Sequence[SimSite], workers: int, steps: Steps) -> Simulated:
    """``workers`` workers share one database, which serves one transaction at a time, and one artifact store."""
    events, plan = Events(), Plan(sites)
    database, store = Server(), Server()
    told = [0.0] * len(sites)
    left, last = len(sites), 0.0

    def transact(now: float, seconds: float) -> float:
        return database.serve(now, steps.served * seconds) + (1 - steps.served) * seconds

    def ask(now: float) -> None:
        events.at(transact(now, steps.claim), claimed)

    def claimed(now: float) -> None:
        position = plan.take()
        if position is not None:
            events.at(transact(now, steps.open), partial(load, position))
        elif plan.untaken:
            events.at(transact(now, steps.claim) + steps.poll, ask)  # it looks twice, then waits

    def load(position: int, now: float) -> None:
        arrived = max(store.serve(now, steps.transfer), now + steps.link)
        taken = sites[position].seconds
        events.at(arrived, partial(tell, position, steps.begin))
        for batch in range(1, steps.batches + 1):
            # The share first, which is 1 for the last batch: it is told at the very end, never a rounding error after it.
            events.at(arrived + taken * (batch / steps.batches), partial(tell, position, steps.batch))
        events.at(arrived + taken, partial(ended, position))

    def tell(position: int, seconds: float, now: float) -> None:
        told[position] = max(told[position], transact(now, seconds))

    def ended(position: int, now: float) -> None:
        # A site is kept only after its trials are recorded; the worker records them while it searches on.
        events.at(max(now, told[position]), partial(keep, position))

    def keep(position: int, now: float) -> None:
        events.at(transact(now, steps.keep), partial(done, position))

    def done(position: int, now: float) -> None:
        nonlocal left, last
        left, last = left - 1, now
        plan.done(position)
        ask(now)

    def beat(now: float) -> None:
        if left:
            transact(now, steps.renew)
            events.at(now + steps.beat, beat)

    for _ in range(workers):
        events.at(0.0, ask)
        events.at(steps.beat, beat)
    events.run()
    # Not the claim: one that began before a site was kept may end in time to take what it unblocked.
    between = steps.open + steps.arrival + steps.batch + steps.keep
    return Simulated(
        workers=workers,
        sites=len(sites),
        seconds=last,
        work=sum(site.seconds for site in sites),
        chain=longest_chain(sites, between=between),
        busy={"database": database.busy, "store": store.busy},
    )
