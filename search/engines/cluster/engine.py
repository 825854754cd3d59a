"""The engine of a cluster: Ray Tune schedules the searches of sites as its trials, on every node there is."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.text import one_line
from alphasmith.search.config import WorkersConfig
from alphasmith.search.engines.cluster._connection import connect, import_ray
from alphasmith.search.engines.types import ModelWork, OnMessage, SearchEnd, Work
from alphasmith.search.study.fault_isolation import Racer

if TYPE_CHECKING:
    from alphasmith.search.engines.cluster._racer import RayRacer
    from alphasmith.search.engines.cluster._tune_run import TuneRun

#: Searches that share a GPU at most.
_SHARERS = 16
#: Ray counts resources in these steps.
_STEP = 10_000
#: How long the Tune run may take to end [s].
_END = 20.0
#: Beyond its timeout a call to the mailbox may take so long [s].
_GRACE = 30.0


def gpu_fraction(memory: int, gpu_memory: int, gpus: float) -> float:
    """Share of a GPU that one search asks Ray for: the largest 1/n such that n searches fit into the memory.

    Args:
        memory: Predicted memory of the search at its peak [bytes]; 0: unknown.
        gpu_memory: Memory of one GPU [bytes]; 0: unknown.
        gpus: GPUs of the cluster.

    Returns:
        0 without GPUs; 1 where something is unknown or the search needs more than half of a GPU; 1/16 at least. Cut to
        four digits as Ray counts them, so that n shares are never more than 1.
    """
    if gpus <= 0:
        return 0.0
    if memory <= 0 or gpu_memory <= 0:
        return 1.0
    together = max(1, min(_SHARERS, gpu_memory // memory))
    return (_STEP // together) / _STEP


def searches_at_once(nodes: Iterable[tuple[float, float]], *, cpus: int, gpus: float, most: int) -> int:
    """How many searches a cluster takes at once.

    Args:
        nodes: (CPUs, GPUs) of every node.
        cpus: CPUs of one search.
        gpus: Share of a GPU of one search.
        most: Never more than this; 0: no limit.
    """
    count = 0
    for has_cpus, has_gpus in nodes:
        # A search cannot be spread over GPUs: 1.5 GPUs take one search of 1.0.
        fit = int(has_cpus // cpus)
        count += fit if gpus == 0 else min(fit, int(has_gpus) * int(1 / gpus))
    return min(count, most) if most else count


class RayTune:
    """Searches on a Ray cluster; see :class:`alphasmith.search.engines.types.Engine`.

    Uses the cluster at ``workers.address`` or in ``RAY_ADDRESS``, else starts one on this machine and ends it in
    :meth:`close`. Alphasmith must be installed on every node, in the same version. Workers keep their CPUs and GPUs until
    :meth:`close`, also while there is nothing to search: starting one takes longer than many a search.

    Args:
        workers: Address, searches at once, threads and attempts.
        device: ``cpu`` keeps the searches off the GPUs; None: on GPUs where the cluster has them.
        perform: What does a piece of work on a worker, ``module:function``.

    Raises:
        InputError: Ray is not installed, no cluster answers at the address, or the address cannot be used.
    """

    def __init__(
        self,
        workers: WorkersConfig,
        *,
        device: str | None = None,
        perform: str = "alphasmith.search.engines.perform:perform",
    ) -> None:
        self._ray = import_ray()
        self._workers = workers
        self._perform = perform
        self._started = connect(self._ray, workers)
        self._with_gpus = device is None or not device.startswith("cpu")
        self._cpus = self._cpus_of_one()
        self._gpu_memory: int | None = None
        self._share = 1.0
        self._mailbox_name = f"alphasmith-{uuid.uuid4().hex}"
        self._mailbox = self._open_mailbox()
        self._numbers = itertools.count()
        self._held: dict[str, str] = {}
        self._withdrawn: SimpleQueue[str] = SimpleQueue()
        self._heard = 0
        self._stopped = False
        self._closed = False
        self._run: TuneRun | None = None
        self._racer: RayRacer | None = None

    @property
    def name(self) -> str:
        """Display name."""
        nodes = self._nodes()
        gpus = sum(gpus for _, gpus in nodes)
        parts = [f"{len(nodes)} node{'s' * (len(nodes) != 1)}", f"{sum(cpus for cpus, _ in nodes):g} CPUs"]
        return ", ".join(["ray", *parts, *([f"{gpus:g} GPUs"] if gpus else [])])

    @property
    def slots(self) -> int:
        """Searches that the cluster takes at once, and as many again that wait for them, less those held.

        A search that waits on the cluster begins as soon as another one ends; one that is submitted only then leaves a gap.
        At least one may wait: a cluster that starts nodes on demand must see the demand.
        """
        if self._stopped or self._closed:
            return 0
        at_once = self._at_once()
        return max(0, at_once + max(1, at_once) - len(self._held))

    def submit(self, work: Work) -> None:
        """Put the work into Ray's object store and queue a trial for it.

        Raises:
            AlphasmithError: There is no slot for it, or the cluster is gone.
        """
        if not self.slots:
            raise AlphasmithError(f"the Ray cluster takes no further search now, at site {work.site}")
        if self._racer is not None:
            self._racer.close()  # actors for models hold resources that searches need
        with _answering():
            share = self._share_of(work)
            self._share = max(share, self._share) if self._held else share
            key = f"{next(self._numbers)}"
            # Pickled here, so that a worker gets its own tensors and not read-only views of the object store.
            reference = self._ray.put(cloudpickle.dumps(work))
            self._ray.get(self._mailbox.post.remote(key, [reference]))
            self._held[key] = work.site
            self._tune().submit(key, cpus=self._cpus, gpus=share)

    def wait(self, receive: OnMessage, timeout: float) -> list[SearchEnd]:
        """See :meth:`Engine.wait`.

        Raises:
            AlphasmithError: The cluster is gone.
        """
        until = time.monotonic() + timeout
        ended: list[SearchEnd] = []
        while self._held and not ended:
            ended += self._take_withdrawn()
            left = 0.0 if ended else max(0.0, until - time.monotonic())
            for number, kind, key, content in self._drain(left):
                self._heard = number
                site = self._held.get(key)
                if site is None:
                    continue
                if kind == "told":
                    receive(site, cloudpickle.loads(content))
                    continue
                ended.append(
                    SearchEnd(site=site, reason=content.decode(), lost=True)
                    if kind == "lost"
                    else cloudpickle.loads(content)
                )
                self._forget(key)
            if time.monotonic() >= until:
                break
        return ended

    def racer(self, judge: ModelObjective, work: Callable[[], ModelWork]) -> Racer:
        """Candidate models are scored by one long-lived actor per slot."""
        from alphasmith.search.engines.cluster._racer import RayRacer

        if self._racer is not None:
            self._racer.close()
        gpus = 1.0 if self._gpus() else 0.0
        self._racer = RayRacer(work, self._free_for_models, cpus=self._cpus, gpus=gpus)
        return self._racer

    def stop(self) -> None:
        """See :meth:`Engine.stop`."""
        self._stopped = True
        if self._run is not None:
            for key in self._run.withdraw():
                self._withdrawn.put(key)
        self._mailbox.stop.remote()

    def close(self) -> None:
        """End the searches at once, and Ray if it was started here; may be called again."""
        if self._closed:
            return
        self._closed = True
        self._held.clear()
        if self._racer is not None:
            self._racer.close()
        if self._run is not None:
            self._run.close(_END)
        self._ray.kill(self._mailbox)
        if self._started:
            self._ray.shutdown()

    def _drain(self, timeout: float) -> list[Any]:
        with _answering():
            events = self._mailbox.drain.remote(self._heard, timeout)
            return list(self._ray.get(events, timeout=timeout + _GRACE))

    def _take_withdrawn(self) -> list[SearchEnd]:
        ended = []
        while not self._withdrawn.empty():
            key = self._withdrawn.get()
            if key in self._held:
                ended.append(SearchEnd(site=self._held[key], stopped=True))
                self._forget(key)
        return ended

    def _forget(self, key: str) -> None:
        self._held.pop(key, None)
        if self._run is not None:
            self._run.forget(key)

    def _tune(self) -> TuneRun:
        """The Tune run; a new one where the last one was ended for the sake of candidate models, or failed."""
        if self._run is None or not self._run.alive:
            from alphasmith.search.engines.cluster._tune_run import TuneRun

            self._run = TuneRun(
                self._mailbox,
                self._mailbox_name,
                perform=self._perform,
                attempts=self._workers.attempts,
                at_once=self._at_once(),
            )
        return self._run

    def _free_for_models(self) -> int:
        """Tune keeps actors for the next trial, and with them the resources that candidate models need: end them."""
        if self._held:
            raise AlphasmithError("candidate models cannot be scored while sites are searched")
        if self._run is not None:
            self._run.close(_END)
            self._run = None
        gpus = 1.0 if self._gpus() else 0.0
        return max(1, searches_at_once(self._nodes(), cpus=self._cpus, gpus=gpus, most=self._workers.count))

    def _open_mailbox(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from alphasmith.search.engines.cluster import _mailbox as ray_mailbox
        from alphasmith.search.engines.cluster._actors import NAMESPACE

        here = self._ray.get_runtime_context().get_node_id()
        self._ray.cloudpickle.register_pickle_by_value(ray_mailbox)
        try:
            actor = self._ray.remote(ray_mailbox.Mailbox).options(
                name=self._mailbox_name,
                namespace=NAMESPACE,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            mailbox = actor.remote()
            self._ray.get(mailbox.drain.remote(0, 0.0))  # the class is shipped by the first call
        finally:
            self._ray.cloudpickle.unregister_pickle_by_value(ray_mailbox)
        return mailbox

    def _nodes(self) -> list[tuple[float, float]]:
        """(CPUs, GPUs) of every node that is up; GPUs that must not be used do not count."""
        resources = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [(float(r.get("CPU", 0)), float(r.get("GPU", 0)) if self._with_gpus else 0.0) for r in resources]

    def _gpus(self) -> float:
        return sum(gpus for _, gpus in self._nodes())

    def _at_once(self) -> int:
        share = self._share if self._gpus() else 0.0
        return searches_at_once(self._nodes(), cpus=self._cpus, gpus=share, most=self._workers.count)

    def _cpus_of_one(self) -> int:
        """Threads given, else the cluster's CPUs shared out among the searches asked for; no more than a node has."""
        nodes = [cpus for cpus, _ in self._nodes()]
        if self._workers.threads is None and not self._workers.count:
            return 1
        threads = self._workers.threads or max(1, int(sum(nodes)) // self._workers.count)
        return max(1, min(threads, int(max(nodes, default=1))))

    def _share_of(self, work: Work) -> float:
        gpus = self._gpus()
        if gpus and self._gpu_memory is None:
            self._gpu_memory = self._ask_gpu_memory()
        return gpu_fraction(work.memory, self._gpu_memory or 0, gpus)

    def _ask_gpu_memory(self) -> int:
        """Memory of a GPU of this machine, else of a node [bytes]; 0: unknown."""
        if torch.cuda.is_available():
            return int(torch.cuda.get_device_properties(0).total_memory)
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return int(self._ray.get(self._ray.remote(num_cpus=0, num_gpus=0.01)(_memory_of_gpu).remote(), timeout=60))
        except (GetTimeoutError, RayError):
            return 0


@contextmanager
def _answering() -> Iterator[None]:
    """What Ray says when it does not answer, in one line."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ConnectionError) as error:
        raise AlphasmithError(f"the Ray cluster does not answer: {one_line(error, 300)}") from error


def _memory_of_gpu() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0
