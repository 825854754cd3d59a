"""What the steps of a run cost, for the simulation of a cluster: searches, messages, claims, records, what one process does alone.

    python -m benchmarks.site_costs [--hidden C] [--layers N] [--backends NAME ...] [--costs FILE.json]

Sites of a LLaMA-shaped model are searched as a worker does. What the searches tell is then recorded as a driver does it, under claims
of a real board, on every backend; and one whole run shows what share of it one process does alone. Everything is measured on one
thread without other load on the driver: figures of a busy machine are too large.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import optuna
import psutil
import torch
from sqlalchemy import text
from torch import nn

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.judge.site_objective import linear_site_data
from alphasmith.search import RunConfig, run
from alphasmith.search.engines.local.worker_loop import dump
from alphasmith.search.engines.perform import perform
from alphasmith.search.engines.types import SiteWork
from alphasmith.search.interruption import never
from alphasmith.search.site.result import SiteResult, candidate_json, result_state
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.study_record import SentLog, StoredLog, StudyMessage, StudyPast, StudyTrials
from alphasmith.storage.artifacts.store import ArtifactStore
from alphasmith.storage.database.connection import Database, initialise, open_database, optuna_storage
from alphasmith.storage.queue.board import Board
from alphasmith.storage.queue.records import Claim, SiteWinner, StoredArtifact, TicketSpec
from alphasmith.storage.runs.run_store import RunStore
from benchmarks.costs import COSTS, Cost, save_costs
from benchmarks.databases import BACKENDS, fresh_database
from benchmarks.layers import Size
from benchmarks.llama import llama, token_batches
from benchmarks.searching import settings
from benchmarks.shared_sites import ModelSite, model_sites
from benchmarks.timing import machine, parser, seconds_of, torch_threads
from tests.support.stored_records import run_spec, site_name, site_record

T = TypeVar("T")

#: A layer of a model of 7 billion parameters.
_COPIED = Size(1024, 4096, 4096)
#: Stages whose candidates the workers share.
_SHARED = "refining at the output"


@dataclass(frozen=True, eq=False)
class SiteTiming:
    """One site as it was searched.

    Attributes:
        result: What was found.
        messages: What the search told, in order.
        seconds: Wall time of the search [s].
        payload: Size of the site work [bytes].
        taken: Seconds that reading the result took.
    """

    result: SiteResult
    messages: tuple[StudyMessage, ...]
    seconds: float
    payload: int
    taken: float

    @property
    def batches(self) -> tuple[StudyTrials, ...]:
        """The messages that hold trials."""
        return tuple(message for message in self.messages if isinstance(message, StudyTrials))


class Stages:
    """A ``Progress`` that keeps the seconds of every stage.

    Attributes:
        seconds: Stage -> seconds, the last one until ``end``.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._begun = "before", time.perf_counter()

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins."""
        self.end()
        self._name = name

    def end(self) -> None:
        """The last stage has ended."""
        now = time.perf_counter()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._begun
        self._begun = now

    def expect(self, costs: Sequence[float]) -> None:
        """Nothing."""

    def advance(self, detail: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def timed(work: Callable[[], T], into: list[float]) -> T:
    """``work()``, its seconds added to ``into``."""
    start = time.perf_counter()
    found = work()
    into.append(time.perf_counter() - start)
    return found


def searched(site: ModelSite, name: str, config: RunConfig) -> SiteTiming:
    """Search one site as a worker does, with messages and result as bytes.

    Raises:
        AlphasmithError: The search failed.
    """
    work = SiteWork(
        site=name,
        study_name=name,
        data=site.data,
        held_out=site.held_out,
        settings=SiteSettings(
            scheme=config.scheme.build(), groups=config.groups, search=config.search, shiftable=site.shiftable
        ),
    )
    taken, read = list[float](), list[float]()
    told: list[StudyMessage] = []
    log = SentLog(StudyPast(), told.append)
    ended = timed(partial(perform, work, log, device=None, stop=never), taken)
    if ended.result is None:
        raise AlphasmithError(f"site {name}: {ended.reason}")
    timed(partial(pickle.loads, dump(ended)), read)
    return SiteTiming(ended.result, tuple(told), taken[0], len(dump(work)), read[0])


def of_searches(found: Sequence[SiteTiming], where: str) -> dict[str, Cost]:
    """Costs of searching and of what travels."""
    source = f"benchmarks.site_costs, {len(found)} sites of a LLaMA-shaped model. {where}"
    messages = [message for one in found for message in one.messages]
    passed: list[float] = []
    for message in messages:
        timed(partial(pickle.loads, dump(message)), passed)
    return {
        "site.seconds": Cost(tuple(round(one.seconds, 4) for one in found), "s", source),
        "site.batches": Cost(statistics.mean(len(one.batches) for one in found), "1", source),
        "site.trials": Cost(statistics.mean(len(one.result.results) for one in found), "1", source),
        "site.payload": Cost(statistics.mean(one.payload for one in found), "bytes", source),
        "driver.message": Cost(statistics.median(passed), "s", source),
        "driver.finish": Cost(statistics.median(one.taken for one in found), "s", source),
    }


def of_copying(where: str) -> dict[str, Cost]:
    """How quickly site work of the size of real ones becomes bytes; small ones cost more for each of theirs."""
    x, w = torch.ones(_COPIED.rows, _COPIED.channels), torch.ones(_COPIED.outputs, _COPIED.channels)
    data = linear_site_data(x, w, name="copied")
    size, taken = len(dump(data)), seconds_of(lambda: dump(data), 3)
    source = f"benchmarks.site_costs, {size / 1e6:.0f} MB of rows and weights. {where}"
    return {"driver.copy": Cost(size / taken, "bytes/s", source)}


def of_records(
    backend: str, database: Database, found: Sequence[SiteTiming], folder: Path, where: str
) -> dict[str, Cost]:
    """Costs of handing out the sites and recording all that was told of them."""
    store, storage = RunStore(database), optuna_storage(database)
    run_id = store.create(run_spec("costs")).id
    store.start(run_id)
    board = Board(database, run_id, role="driver")
    board.join()
    board.drive()
    board.plan([TicketSpec(site=site_name(n), position=n) for n in range(len(found))])
    artifacts = ArtifactStore.open(str(folder))
    taken: dict[str, list[float]] = {name: [] for name in ("claim", "open", "begin", "batch", "keep", "renew")}
    processor, begun = _server_seconds(database), time.perf_counter()
    for position, one in enumerate(found):
        claim = timed(board.claim, taken["claim"])
        if claim is None:
            raise AlphasmithError("the board handed out fewer sites than it was given")
        study = f"{run_id}/{claim.site}"
        log = timed(partial(StoredLog, storage, study, fence=board.fence(claim)), taken["open"])
        first: list[float] = []
        for message in one.messages:
            timed(partial(log.tell, message), taken["batch"] if isinstance(message, StudyTrials) else first)
        taken["begin"].append(sum(first))
        timed(board.renew, taken["renew"])
        timed(partial(_keep, board, artifacts, claim, one, position, run_id), taken["keep"])
    seconds, computed = time.perf_counter() - begun, _server_seconds(database)
    source = f"benchmarks.site_costs, one process, {len(found)} sites. {where}"
    costs = {
        f"{backend}.{name}": Cost(statistics.median(values), "s", f"median; {source}") for name, values in taken.items()
    }
    if processor is not None and computed is not None:
        share = min(1.0, (computed - processor) / seconds)
        costs[f"{backend}.served"] = Cost(share, "1", f"processor time of the server over wall time; {source}")
    board.stop_driving()
    board.leave()
    return costs


def of_run(model: nn.Module, where: str) -> dict[str, Cost]:
    """What one process does alone, per second of searching; the refinement is not, its candidates are shared out."""
    stages = Stages()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.build({"storage": f"sqlite:///{folder}/run.db", "out": f"{folder}/out"})
        run(config, model=model, batches=list(token_batches(16)), progress=stages)
    stages.end()
    searching = stages.seconds.pop("searching sites")
    share = sum(seconds for name, seconds in stages.seconds.items() if name != _SHARED) / searching
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.seconds.items() if seconds > 0.05)
    source = f"benchmarks.site_costs, one run in one process: searching sites {searching:.1f} s, {parts}. {where}"
    return {"site.serial_share": Cost(share, "1", source)}


def _keep(board: Board, artifacts: ArtifactStore, claim: Claim, one: SiteTiming, position: int, run_id: str) -> None:
    """Keep a result as ``search.site_keeper`` does."""
    result = one.result
    kept = artifacts.put(result_state(result))
    artifact = StoredArtifact(
        kind="result", name=claim.site, artifact_id=kept.path, sha256=kept.sha256, bytes=kept.bytes
    )
    winner = SiteWinner(
        site=claim.site,
        attempt=claim.attempt,
        worker=board.worker,
        digest=claim.ticket.digest,
        scheme="w8a8-channel-static",
        winner=candidate_json(result.candidate),
        loss=result.held_out_loss,
        artifact_id=kept.path,
        sha256=kept.sha256,
    )
    count = len(result.results)
    record = site_record(run_id, position, groups=4, trials=count, generator=np.random.default_rng(position))
    board.complete(claim, record, winner, artifact)


def _server_seconds(database: Database) -> float | None:
    """Processor seconds of the PostgreSQL processes that serve this database; None where there are none on this machine."""
    if database.backend != "postgresql":
        return None
    with database.engine.connect() as connection:
        query = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
        pids = connection.execute(query).scalars().all()
    try:
        servers = [psutil.Process(pid) for pid in pids]
        if not all(server.name().startswith("postgres") for server in servers):
            return None
        return float(sum(server.cpu_times().user + server.cpu_times().system for server in servers))
    except psutil.Error:
        return None


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--hidden", type=int, default=256)
    arguments_of.add_argument("--layers", type=int, default=4)
    arguments_of.add_argument("--backends", nargs="+", choices=BACKENDS, default=("sqlite", "postgresql"))
    arguments_of.add_argument("--costs", type=Path, default=COSTS)
    arguments = arguments_of.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with torch_threads(1):
        where = machine()
        model = llama(hidden=arguments.hidden, layers=arguments.layers)
        sites = model_sites(model, list(token_batches(16)))
        found = [searched(site, f"site {n}", settings()) for n, site in enumerate(sites)]
        costs = of_searches(found, where) | of_copying(where)
        save_costs(costs, arguments.costs)
        for backend in arguments.backends:
            with fresh_database(backend) as url, tempfile.TemporaryDirectory() as folder:
                if url is None:
                    print(f"no {backend} server: left out")
                    continue
                database = open_database(url)
                initialise(database)
                costs |= of_records(backend, database, found, Path(folder), where)
                database.close()
                save_costs(costs, arguments.costs)
        costs |= of_run(model, where)
    save_costs(costs, arguments.costs)
    for name, cost in sorted(costs.items()):
        mean = statistics.mean(cost.numbers)
        print(f"{name}: {mean:.4g} {cost.unit}")


if __name__ == "__main__":
    main()
