"""What must hold for any simulated run block by block, whatever its costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from benchmarks.block_simulation import (
    CHECKED,
    CHECKED_SAMPLES,
    STAGES,
    BlockCosts,
    BlockRun,
    BlockShape,
    Cluster,
    Processor,
    Samples,
    StageCost,
    block_memory,
    block_tasks,
    disk_bytes,
    run_blocks,
    run_sites,
    simulate_blocks,
)
from benchmarks.block_tables import block_figure, run_table, size_table, stage_table
from benchmarks.cluster_events import Steps
from benchmarks.costs import Cost, load_costs

WORKERS = (1, 2, 3, 5, 8, 64)
STEPS = Steps(
    batches=2, begin=0.01, batch=0.005, keep=0.01, claim=0.002, copy=0.1, message=0.001, transfer=0.05, link=0.05
)

stage_costs = st.builds(StageCost, st.floats(0, 2), st.floats(0, 200), st.floats(0, 50))
any_costs = st.builds(
    BlockCosts,
    stages=st.fixed_dictionaries(dict.fromkeys(STAGES, stage_costs)),
    default_trials=st.floats(1, 4),
    cpu=st.just(Processor(memory=1e10, product=5e10)),
    checked=st.just((1.0,) * len(STAGES)),
)
shapes = st.builds(
    BlockShape,
    blocks=st.integers(2, 6),
    hidden=st.sampled_from([512, 4096]),
    intermediate=st.sampled_from([1024, 11_008]),
    heads=st.just(32),
    groups=st.sampled_from([8, 32]),
)
samples = st.builds(
    Samples, length=st.sampled_from([64, 2048]), calibration=st.integers(1, 256), held_out=st.integers(1, 64)
)
clusters = st.builds(Cluster, share=st.floats(0.1, 1), link=st.floats(1e8, 1e10), store=st.floats(1e8, 1e10))


def both(
    shape: BlockShape, data: Samples, costs: BlockCosts, cluster: Cluster, workers: int
) -> tuple[BlockRun, BlockRun]:
    """Both ways of one run."""
    return run_sites(shape, data, costs, cluster, STEPS, workers), run_blocks(shape, data, costs, cluster, workers)


@given(shape=shapes, data=samples, costs=any_costs, cluster=clusters)
@settings(max_examples=25, deadline=None)
def test_more_workers_are_never_slower_and_no_run_beats_its_bounds(
    shape: BlockShape, data: Samples, costs: BlockCosts, cluster: Cluster
) -> None:
    for runs in zip(*(both(shape, data, costs, cluster, n) for n in WORKERS), strict=True):
        assert all(later.seconds <= earlier.seconds * (1 + 1e-9) for earlier, later in pairwise(runs))
        for run in runs:
            bounds = (run.work / run.workers, run.chain, run.store)
            assert all(run.seconds >= bound * (1 - 1e-9) for bound in bounds)


@given(shape=shapes, data=samples, costs=any_costs, cluster=clusters)
@settings(max_examples=25, deadline=None)
def test_one_worker_takes_the_sum_of_all_costs_and_both_ways_do_the_same_work(
    shape: BlockShape, data: Samples, costs: BlockCosts, cluster: Cluster
) -> None:
    built, shared = both(shape, data, costs, cluster, 1)
    parts = ((shape.block, shape.blocks), (shape.around, 1))
    work = sum(n * costs.seconds(stage, part, data, cluster.processor) for part, n in parts for stage in STAGES)
    assert built.work == pytest.approx(work)
    assert shared.work == pytest.approx(work)
    assert built.gpu_hours * 3600 == pytest.approx(built.work + built.store)
    moved = sum(task.bytes for task in block_tasks(shape, data, costs, cluster.processor))
    assert shared.gpu_hours * 3600 == pytest.approx(work + moved / min(cluster.link, cluster.store))
    assert built.network == 0


@given(shape=shapes, data=samples, costs=any_costs, factor=st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_memory_knows_no_number_of_blocks_and_bytes_follow_the_samples(
    shape: BlockShape, data: Samples, costs: BlockCosts, factor: int
) -> None:
    deeper = replace(shape, blocks=factor * shape.blocks)
    more = replace(
        data, calibration=factor * data.calibration, held_out=factor * data.held_out, proof=factor * data.proof
    )
    one, deep = (both(s, data, costs, Cluster(), 4) for s in (shape, deeper))
    for shallow, same in zip(one, deep, strict=True):
        assert (shallow.memory, shallow.site_memory) == (same.memory, same.site_memory)
    # As built, two steps of states are on the disk however many blocks there are; side by side, those of every block.
    assert one[0].disk == deep[0].disk
    assert one[1].disk < deep[1].disk
    for way in ("sites", "blocks"):
        assert disk_bytes(way, shape, more) == pytest.approx(factor * disk_bytes(way, shape, data))
    # What whole blocks read beside weights and results is states.
    tasks = [sum(t.bytes for t in block_tasks(shape, d, costs, costs.cpu)) for d in (data, more)]
    nothing = sum(
        t.bytes for t in block_tasks(shape, replace(data, calibration=0, held_out=0, proof=0), costs, costs.cpu)
    )
    assert tasks[1] - nothing == pytest.approx(factor * (tasks[0] - nothing))


def test_memory_is_what_a_run_predicted() -> None:
    # The model of 6 GiB of docs/memory.md: 1.52 GiB.
    assert block_memory(CHECKED, CHECKED_SAMPLES) / 2**30 == pytest.approx(1.52, rel=0.02)


def test_the_kept_costs_make_the_tables_and_a_missing_one_is_named() -> None:
    kept = load_costs()
    costs = BlockCosts.of(kept)
    shape, data, cluster = BlockShape(blocks=3), Samples(calibration=4, held_out=2), Cluster()
    found = simulate_blocks(shape, data, costs, cluster, STEPS, workers=(1, 4), shares=(0.2, 0.4, 0.6))
    assert run_table(found).count("\n") == 1 + 2 * 3
    assert size_table(found[0.2]).count("\n") == 1 + 2
    assert stage_table(costs, shape, data, cluster).count("\n") == 1 + len(STAGES)
    # Of both ways a band and a line in each of three panels; a faster GPU never takes longer.
    assert len(block_figure(found).data) == 2 * 2 * 3
    for slow, fast in zip(found[0.2], found[0.6], strict=True):
        assert fast.seconds <= slow.seconds
    partial: dict[str, Cost] = {name: cost for name, cost in kept.items() if name != "block.search"}
    with pytest.raises(InputError, match=r"block\.search is missing"):
        BlockCosts.of(partial)
