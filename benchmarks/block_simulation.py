"""A run block by block on GPUs: time, GPU hours, memory, network and disk of a model of any shape, from measured costs.

Part of ``benchmarks.cluster_simulation --blocks``. Two ways to share out the work:

- *sites of a block*, as the program does it: one driver goes from block to block, workers search the sites of the one it is at.
- *whole blocks*, which the program does not do: float states of all blocks are made first; since they depend on no winner, blocks are
  then searched side by side, and only the states of quantized blocks go from block to block once more.

What a stage costs was measured on a CPU (``benchmarks.block_costs``) as a fixed time, passes over the block's weights and multiples of
the products that are counted for it. What a GPU makes of passes and products is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias, get_args

from alphasmith.objectives.errors import InputError
from benchmarks.cluster_events import Events, Plan, Server, SimSite, Steps, with_driver
from benchmarks.costs import Cost

#: Stages of one block, in the order of a run: the first five of the search pass, the last two of the pass that makes the models.
StageName: TypeAlias = Literal["folds", "calibration", "held_out", "search", "pass_on", "quantizing", "proof"]
STAGES: tuple[StageName, ...] = get_args(StageName)
_MAKING: tuple[StageName, ...] = ("quantizing", "proof")
_SEARCHING: tuple[StageName, ...] = ("folds", "calibration", "held_out", "search")

#: How the work is shared out.
WayName: TypeAlias = Literal["sites", "blocks"]
WAYS: dict[WayName, str] = {"sites": "sites of a block, as built", "blocks": "whole blocks, not built"}

WORKERS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.2, 0.4, 0.6)
#: Trials of the runs that costs were fitted to.
FITTED_TRIALS = 4
#: Streams of held-out states through quantized blocks.
VARIANTS = 4
_FLOAT, _STORED, _QUANTIZED, _DOUBLE = 4, 2, 1, 8
#: What a site's result and its trials take on the wire [bytes]: assumed.
_RESULT_PER_CHANNEL, _RESULT = 16, 2**15
#: As objectives/judge/memory.py counts: rows of the judge and of the noise model, candidates at a time and what these may take,
#: elements calibration copies at a time and their bytes, the largest float64 copy, what libraries keep, a row's own bytes.
_JUDGE_ROWS, _NOISE_ROWS, _CANDIDATES, _CANDIDATE_BYTES = 1024, 512, 24, 2**28
_CHUNK, _CHUNK_BYTES, _LARGEST_DOUBLE, _LIBRARIES, _ROW = 2**18, 32, 2**30, 2**25, 24


@dataclass(frozen=True)
class SiteShape:
    """A site: channels into it, outputs of its matrices together."""

    channels: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Elements of its matrices."""
        return self.channels * self.outputs


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is in memory at a time: a block, or what is around the blocks.

    Attributes:
        sites: In the order of the search; of a block the third waits for the first and the fourth for the second.
        hidden: Width of the states.
        attention: Width of the attention, 0 where there is none.
    """

    sites: tuple[SiteShape, ...]
    hidden: int
    attention: int = 0

    @property
    def parameters(self) -> int:
        """Elements of all matrices."""
        return sum(site.parameters for site in self.sites)

    @property
    def weight_bytes(self) -> int:
        """In float32, as they are worked on."""
        return _FLOAT * self.parameters

    @property
    def stored_bytes(self) -> int:
        """In bfloat16, as they are stored."""
        return _STORED * self.parameters

    def forward(self, samples: float, length: int) -> float:
        """FLOP of samples of ``length`` tokens: matrices, and scores and sums of the attention."""
        return samples * (2.0 * self.parameters * length + 4.0 * self.attention * length**2)


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Shape of a LLaMA.

    Attributes:
        blocks: How many there are.
        hidden: Width of the states.
        intermediate: Width of the MLP.
        heads: Heads of the attention.
        groups: Heads of keys and values.
        vocabulary: Tokens of the embedding and of the head.
    """

    blocks: int = 32
    hidden: int = 4096
    intermediate: int = 11_008
    heads: int = 32
    groups: int = 32
    vocabulary: int = 32_000

    @property
    def block(self) -> Part:
        """One block: ``o_proj``, ``down_proj``, then q, k, v and gate, up."""
        narrow = self.hidden * self.groups // self.heads
        sites = (
            SiteShape(self.hidden, self.hidden),
            SiteShape(self.intermediate, self.hidden),
            SiteShape(self.hidden, self.hidden + 2 * narrow),
            SiteShape(self.hidden, 2 * self.intermediate),
        )
        return Part(sites=sites, hidden=self.hidden, attention=self.hidden)

    @property
    def around(self) -> Part:
        """The head; an embedding is looked up."""
        return Part(sites=(SiteShape(self.hidden, self.vocabulary),), hidden=self.hidden)

    @property
    def parameters(self) -> int:
        """Of the whole model, norms left out."""
        return self.blocks * self.block.parameters + 2 * self.around.parameters


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What goes through the model.

    Attributes:
        length: Tokens of a sample.
        calibration: Samples that calibrate.
        held_out: Samples that judge.
        proof: Samples of the proof.
        batch: Samples of a forward call.
        rows: Rows kept per site and split at most.
    """

    length: int = 2048
    calibration: int = 128
    held_out: int = 32
    proof: int = 8
    batch: int = 8
    rows: int = 1024

    @property
    def kept_rows(self) -> int:
        """Rows of a site in both splits together."""
        return sum(min(self.rows, count * self.length) for count in (self.calibration, self.held_out))

    @property
    def floats(self) -> int:
        """Samples whose float states are passed on."""
        return self.calibration + self.held_out + self.proof

    @property
    def variants(self) -> int:
        """Samples whose states go through quantized blocks."""
        return VARIANTS * self.held_out


#: The model of 6 GiB of docs/memory.md, whose stages were timed.
CHECKED = BlockShape(blocks=47, hidden=2560, intermediate=6912, heads=20, groups=5, vocabulary=4096)
CHECKED_SAMPLES = Samples(length=64, calibration=8, held_out=4, proof=2, batch=4, rows=128)


def counted(stage: StageName, part: Part, samples: Samples) -> float:
    """FLOP counted for a stage; what it really does is a measured multiple of them.

    A forward of the samples it sends through the part; of the search, one product of all kept rows with the weights of their site.
    """
    passed: dict[StageName, int] = {
        "folds": 2,
        "calibration": samples.calibration,
        "held_out": samples.held_out,
        "pass_on": samples.floats + samples.variants,
        "quantizing": 0,
        "proof": samples.proof,
    }
    if stage == "search":
        return 2.0 * part.parameters * samples.kept_rows
    return part.forward(passed[stage], samples.length)


@dataclass(frozen=True)
class StageCost:
    """What a stage costs: seconds whatever the size, passes over the float32 weights, multiples of what is counted."""

    fixed: float
    passes: float
    products: float


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What does the work.

    Attributes:
        memory: Of its memory, read and written together [bytes/s].
        product: Of its float32 products [FLOP/s].
    """

    memory: float
    product: float

    def seconds(self, cost: StageCost, weight_bytes: float, flop: float) -> float:
        """Time of a stage [s]."""
        return cost.fixed + cost.passes * weight_bytes / self.memory + cost.products * flop / self.product


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """Everything measured.

    Attributes:
        stages: Costs of the stages, at 4 trials a site.
        default_trials: Trials that a site takes by default over those of the fitted runs; the search takes as many times as long.
        cpu: The processor they were measured on.
        checked: Seconds of the stages of a block of the larger model that they are checked with, in order.
    """

    stages: Mapping[StageName, StageCost]
    default_trials: float
    cpu: Processor
    checked: tuple[float, ...]

    @classmethod
    def of(cls, costs: Mapping[str, Cost]) -> BlockCosts:
        """From a file of costs.

        Raises:
            InputError: A cost was not measured.
        """

        def cost(name: str) -> Cost:
            if name not in costs:
                raise InputError(
                    "--costs", f"{name} is missing", "run benchmarks.site_costs and benchmarks.block_costs"
                )
            return costs[name]

        return cls(
            stages={stage: StageCost(*cost(f"block.{stage}").numbers) for stage in STAGES},
            default_trials=cost("site.trials").number / FITTED_TRIALS,
            cpu=Processor(memory=cost("block.memory_rate").number, product=cost("block.product_rate").number),
            checked=cost("block.checked").numbers,
        )

    def seconds(self, stage: StageName, part: Part, samples: Samples, processor: Processor) -> float:
        """Time of a stage of a part [s], with the default trials."""
        taken = processor.seconds(self.stages[stage], part.weight_bytes, counted(stage, part, samples))
        return taken * (self.default_trials if stage == "search" else 1.0)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is assumed of the machines: by default GPUs as an A100 of 80 GB, and 25 Gbit/s.

    Attributes:
        peak: float32 products of a GPU [FLOP/s].
        memory: Memory of a GPU [bytes/s].
        share: What is reached of both.
        link: Into a worker [bytes/s].
        store: Where weights and states lie, to all workers together [bytes/s].
    """

    peak: float = 19.5e12
    memory: float = 2.0e12
    share: float = 0.4
    link: float = 25e9 / 8
    store: float = 25e9 / 8

    @property
    def processor(self) -> Processor:
        """A GPU at this share of its peaks."""
        return Processor(memory=self.share * self.memory, product=self.share * self.peak)


@dataclass(frozen=True)
class BlockTask:
    """One piece of work of a worker.

    Attributes:
        seconds: It works for so long [s].
        bytes: It reads and writes so much first and last.
        after: Positions of what must be done before; all smaller than its own.
    """

    seconds: float
    bytes: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockRun:
    """How a run went.

    Attributes:
        way: How the work was shared out.
        workers: GPUs at most.
        seconds: From the first step to the last [s].
        work: Time in which GPUs work, of all together [s].
        chain: Time of the longest chain of steps that wait for each other [s].
        store: Time for which the store is busy [s].
        network: Bytes between machines: weights and rows or states, and results.
        disk: States between blocks that lie on the disk at a time [bytes].
        memory: Peak of the process that has a block in memory [bytes].
        site_memory: Peak of a process that searches one site [bytes]; 0: there is none.
    """

    way: WayName
    workers: int
    seconds: float
    work: float
    chain: float
    store: float
    network: float
    disk: float
    memory: float
    site_memory: float

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that are held for the whole run."""
        return self.workers * self.seconds / 3600

    @property
    def busy(self) -> float:
        """Share of them in which they work."""
        return self.work / (self.workers * self.seconds)

    @property
    def bound(self) -> str:
        """The largest lower bound on the time."""
        waiting = "one driver" if self.way == "sites" else "block after block"
        bounds = {"GPUs": self.work / self.workers, waiting: self.chain, "store": self.store}
        return max(bounds, key=lambda name: bounds[name])


def stream_bytes(shape: BlockShape, samples: Samples, count: int) -> float:
    """States of ``count`` samples before one block [bytes], in float32."""
    return float(_FLOAT * count * samples.length * shape.hidden)


def disk_bytes(way: WayName, shape: BlockShape, samples: Samples) -> float:
    """States that lie on the disk at a time [bytes]: of two steps; of every block where these are searched side by side."""
    steps = 2 if way == "sites" else shape.blocks + 1
    floats, variants = (stream_bytes(shape, samples, n) for n in (samples.floats, samples.variants))
    return steps * floats + 2 * variants


def site_bytes(part: Part, samples: Samples) -> float:
    """Site work of all sites of a part on the wire [bytes]: weights, rows of both splits, and results back."""
    channels = sum(site.channels for site in part.sites)
    results = _RESULT_PER_CHANNEL * channels + _RESULT * len(part.sites)
    return float(part.weight_bytes + _FLOAT * samples.kept_rows * channels + results)


def evaluator_bytes(site: SiteShape, rows: int) -> int:
    """What scoring a site keeps [bytes], int8 weights: judges of both splits, the noise model, candidates of one call."""
    weights, chunk, sampled = site.parameters, min(rows, _JUDGE_ROWS), min(rows, _NOISE_ROWS)
    judges = 2 * _FLOAT * (rows * site.outputs + weights) + 12 * chunk * (site.channels + site.outputs)
    candidates = min(_CANDIDATES * weights, max(_CANDIDATE_BYTES, weights)) + 3 * _FLOAT * weights
    noise = 4 * _DOUBLE * (sampled * site.channels + min(site.outputs, 2 * _NOISE_ROWS) * site.channels)
    return judges + candidates + noise


def block_memory(shape: BlockShape, samples: Samples) -> float:
    """Predicted peak of a process with one block in memory, beyond the libraries [bytes]; counted as ``MemoryPlan`` does."""
    part, tokens = shape.block, samples.batch * samples.length
    widest = max(shape.intermediate, shape.hidden)
    rows = [samples.rows * (_FLOAT * site.channels + _ROW) for site in part.sites]
    reservoirs = 2 * sum(rows) + max(rows)
    outputs = stream_bytes(shape, samples, samples.held_out + 4 * samples.batch)
    forward = _FLOAT * tokens * (2 * shape.hidden + 3 * shape.intermediate)
    copies = _FLOAT * tokens * widest + _CHUNK * _CHUNK_BYTES
    double = _DOUBLE * part.parameters
    kept = double if double <= _LARGEST_DOUBLE else 0
    proof = part.parameters + kept + (2 if kept else 1) * forward
    working = max(forward + copies, max(evaluator_bytes(site, samples.rows) for site in part.sites), proof)
    return (part.weight_bytes + reservoirs + outputs + working) * 9 / 8 + _LIBRARIES


def site_memory(shape: BlockShape, samples: Samples) -> float:
    """The same of a process that searches the largest site [bytes]: what it was sent, and what scores it."""
    site = max(shape.block.sites, key=lambda one: one.parameters)
    sent = _FLOAT * (site.parameters + samples.kept_rows * site.channels)
    return (sent + evaluator_bytes(site, samples.rows)) * 9 / 8 + _LIBRARIES


def site_seconds(costs: BlockCosts, part: Part, samples: Samples, processor: Processor) -> tuple[float, ...]:
    """Time of the search at each site [s]: what it takes whatever the size is shared out alike, the rest by weights."""
    whole = costs.seconds("search", part, samples, processor)
    fixed = costs.stages["search"].fixed * costs.default_trials
    return tuple(fixed / len(part.sites) + (whole - fixed) * site.parameters / part.parameters for site in part.sites)


def run_sites(
    shape: BlockShape, samples: Samples, costs: BlockCosts, cluster: Cluster, steps: Steps, workers: int
) -> BlockRun:
    """As built: the driver does everything but the searches, one part after the other; alone it does these, too.

    Args:
        shape: The model.
        samples: Its data.
        costs: Of the stages.
        cluster: The machines.
        steps: Of one driver and its writer (``benchmarks.cluster_simulation.steps_of``).
        workers: GPUs; the driver works on one of those that search.
    """
    processor, floats = cluster.processor, samples.floats
    work = chain = network = moved = 0.0
    for part, times in ((shape.block, shape.blocks), (shape.around, 1)):
        alone = sum(costs.seconds(s, part, samples, processor) for s in STAGES if s != "search")
        # Both passes read the weights; float states are read to calibrate and to be passed on, and written.
        states = stream_bytes(shape, samples, 3 * floats + 2 * samples.variants)
        io = states + 2 * part.stored_bytes + (_QUANTIZED + _STORED) * part.parameters
        seconds = site_seconds(costs, part, samples, processor)
        half = (len(seconds) + 1) // 2
        sites = [SimSite(s, () if n < half else (n - half,)) for n, s in enumerate(seconds)]
        searching = sum(seconds)
        if workers > 1:
            # Workers stay idle where there are more than sites, or where sending takes longer than the search.
            helped = range(2, min(workers, len(sites)) + 1)
            searching = min((searching, *(with_driver(sites, count, steps).seconds for count in helped)))
            network += times * site_bytes(part, samples)
        work += times * (alone + sum(seconds))
        chain += times * (alone + searching + io / cluster.store)
        moved += times * io
    return BlockRun(
        way="sites",
        workers=workers,
        seconds=chain,
        work=work,
        chain=chain,
        store=moved / cluster.store,
        network=network,
        disk=disk_bytes("sites", shape, samples),
        memory=block_memory(shape, samples),
        site_memory=site_memory(shape, samples) if workers > 1 else 0.0,
    )


def block_tasks(shape: BlockShape, samples: Samples, costs: BlockCosts, processor: Processor) -> list[BlockTask]:
    """Whole blocks as pieces of work: float states, search, states of the variants, the two models.

    Work is the same as in ``run_sites``; weights and states are read by whoever needs them.
    """
    parts = [*[shape.block] * shape.blocks, shape.around]
    streams = partial(stream_bytes, shape, samples)
    tasks: list[BlockTask] = []
    floats: list[int] = []
    for part in parts:
        # Of passing states on, products go by the samples; what builds quantized weights is not for the float ones.
        cost = replace(costs.stages["pass_on"], fixed=0.0, passes=0.0)
        taken = processor.seconds(cost, 0.0, part.forward(samples.floats, samples.length))
        after = tuple(floats[-1:])
        floats.append(len(tasks))
        tasks.append(BlockTask(taken, part.stored_bytes + streams(2 * samples.floats), after))
    judged: list[int] = []
    for number, part in enumerate(parts):
        taken = sum(costs.seconds(stage, part, samples, processor) for stage in _SEARCHING)
        read = part.stored_bytes + streams(samples.calibration + samples.held_out)
        searched = len(tasks)
        results = _RESULT_PER_CHANNEL * sum(s.channels for s in part.sites) + _RESULT * len(part.sites)
        tasks.append(BlockTask(taken, read + results, (floats[number - 1],) if number else ()))
        taken = processor.seconds(
            costs.stages["pass_on"], part.weight_bytes, part.forward(samples.variants, samples.length)
        )
        after = (*judged[-1:], searched)
        judged.append(len(tasks))
        tasks.append(BlockTask(taken, part.stored_bytes + streams(2 * samples.variants), after))
    for part in parts:
        taken = sum(costs.seconds(stage, part, samples, processor) for stage in _MAKING)
        moved = (2 * _STORED + _QUANTIZED) * part.parameters + streams(samples.proof)
        tasks.append(BlockTask(taken, moved, (judged[-1],)))
    return tasks


def run_blocks(shape: BlockShape, samples: Samples, costs: BlockCosts, cluster: Cluster, workers: int) -> BlockRun:
    """Whole blocks shared out, first come, first served; what was not built."""
    tasks = block_tasks(shape, samples, costs, cluster.processor)
    moved = sum(task.bytes for task in tasks)
    chains: list[float] = []
    for task in tasks:
        before = max((chains[n] for n in task.after), default=0.0)
        chains.append(before + task.bytes / min(cluster.store, cluster.link) + task.seconds)
    return BlockRun(
        way="blocks",
        workers=workers,
        # With more workers than help, some stay idle.
        seconds=min(_scheduled(tasks, count, cluster) for count in range(1, workers + 1)),
        work=sum(task.seconds for task in tasks),
        chain=max(chains),
        store=moved / cluster.store,
        network=moved,
        disk=disk_bytes("blocks", shape, samples),
        memory=block_memory(shape, samples),
        site_memory=0.0,
    )


def _scheduled(tasks: Sequence[BlockTask], workers: int, cluster: Cluster) -> float:
    """Time until all is done [s]: the lowest position first, and one store for all."""
    plan = Plan([SimSite(task.seconds, task.after) for task in tasks])
    events, store = Events(), Server()
    idle, last = workers, 0.0

    def dispatch(now: float) -> None:
        nonlocal idle
        while idle and (position := plan.take()) is not None:
            idle -= 1
            task = tasks[position]
            ready = max(store.serve(now, task.bytes / cluster.store), now + task.bytes / cluster.link)
            events.at(ready + task.seconds, partial(done, position))

    def done(position: int, now: float) -> None:
        nonlocal idle, last
        idle, last = idle + 1, now
        plan.done(position)
        dispatch(now)

    dispatch(0.0)
    events.run()
    return last


def simulate_blocks(
    shape: BlockShape,
    samples: Samples,
    costs: BlockCosts,
    cluster: Cluster,
    steps: Steps,
    *,
    workers: Sequence[int] = WORKERS,
    shares: Sequence[float] = SHARES,
) -> dict[float, list[BlockRun]]:
    """Both ways with every number of workers, for each share of its peaks that a GPU may reach."""
    found: dict[float, list[BlockRun]] = {}
    for share in shares:
        of = replace(cluster, share=share)
        found[share] = [run_sites(shape, samples, costs, of, steps, n) for n in workers]
        found[share] += [run_blocks(shape, samples, costs, of, n) for n in workers]
    return found
