"""What must hold for any simulated run, whatever its costs; and that real runs can be held against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.objectives.errors import InputError
from benchmarks.cluster_events import SimSite, Simulated, Steps, autonomous, block_sites, longest_chain, with_driver
from benchmarks.cluster_simulation import ENGINES, MeasuredRun, Setting, compare, lines, load_measured, steps_of
from benchmarks.costs import Cost, load_costs, save_costs

Run = Callable[[Sequence[SimSite], int, Steps], Simulated]
RUNS: list[Run] = [with_driver, autonomous]
#: Plausible, and every step costs something.
STEPS = Steps(
    batches=3,
    begin=0.02,
    batch=0.01,
    keep=0.03,
    claim=0.004,
    open=0.002,
    copy=0.05,
    message=0.001,
    finish=0.003,
    transfer=0.02,
    link=0.03,
    renew=0.003,
)
FREE = Steps(batches=2)
COSTS = {
    "site.seconds": Cost((0.5, 1.0, 3.0), "s", "invented"),
    "site.batches": Cost(2.0, "1", "invented"),
    "site.payload": Cost(1e6, "bytes", "invented"),
    "driver.copy": Cost(1e9, "bytes/s", "invented"),
    "driver.message": Cost(1e-3, "s", "invented"),
    "driver.finish": Cost(2e-3, "s", "invented"),
    "postgresql.served": Cost(0.5, "1", "invented"),
    **{
        f"{backend}.{step}": Cost(5e-3, "s", "invented")
        for backend in ("sqlite", "postgresql")
        for step in ("begin", "batch", "keep", "claim", "open", "renew")
    },
}

costs = st.floats(0, 0.5)
any_steps = st.builds(
    Steps,
    batches=st.integers(1, 4),
    begin=costs,
    batch=costs,
    keep=costs,
    claim=costs,
    open=costs,
    copy=costs,
    message=costs,
    finish=costs,
    transfer=costs,
    link=costs,
    renew=st.floats(0, 0.01),
    served=st.floats(0.1, 1),
)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[SimSite, ...]:
    """Up to 20 sites, each after any of those before it."""
    sites = []
    for position in range(draw(st.integers(1, 20))):
        after = draw(st.sets(st.integers(0, position - 1), max_size=2)) if position else set()
        sites.append(SimSite(draw(st.floats(0.01, 5)), tuple(sorted(after))))
    return tuple(sites)


@pytest.mark.parametrize("run", RUNS)
@given(sites=graphs(), workers=st.integers(1, 12), steps=any_steps)
@settings(max_examples=30, deadline=None)
def test_no_run_beats_its_bounds(run: Run, sites: tuple[SimSite, ...], workers: int, steps: Steps) -> None:
    made = run(sites, workers, steps)
    assert made.seconds >= made.work / workers * (1 - 1e-9)
    assert made.seconds >= longest_chain(sites) * (1 - 1e-9)
    assert made.seconds >= made.chain * (1 - 1e-9)
    if run is with_driver:
        assert all(made.seconds >= busy * (1 - 1e-9) for busy in made.busy.values())
    assert 0 < made.efficiency <= 1 + 1e-9


@pytest.mark.parametrize("run", RUNS)
@given(sites=graphs(), workers=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_free_steps_leave_a_greedy_schedule(run: Run, sites: tuple[SimSite, ...], workers: int) -> None:
    # Graham's bound for list scheduling under precedence.
    made = run(sites, workers, replace(FREE, poll=0.05))
    slack = 0.05 * len(sites) if run is autonomous else 0.0
    assert made.seconds <= made.work / workers + (1 - 1 / workers) * longest_chain(sites) + slack + 1e-9


@given(sites=graphs(), steps=any_steps)
@settings(max_examples=30, deadline=None)
def test_one_worker_takes_the_sum_of_all_steps(sites: tuple[SimSite, ...], steps: Steps) -> None:
    # Alone, an autonomous worker does everything one after the other, but for records made while it searches.
    waits = replace(steps, begin=0.0, batch=0.0, renew=0.0)
    each = waits.claim + waits.open + waits.arrival + waits.keep
    expected = sum(site.seconds + each for site in sites)
    assert autonomous(sites, 1, waits).seconds == pytest.approx(expected)
    # The driver records while the worker searches; with nothing to record it is the same sum.
    quiet = replace(steps, begin=0.0, batch=0.0, keep=0.0, claim=0.0, message=0.0)
    each = quiet.submit + quiet.arrival + quiet.finish
    assert with_driver(sites, 1, quiet).seconds == pytest.approx(sum(site.seconds + each for site in sites))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("count", [40, 400])
def test_more_gpus_never_take_longer(run: Run, count: int) -> None:
    sites = block_sites(count, [0.3, 1.0, 2.5], mean=1.0)
    free = [run(sites, 2**n, FREE).seconds for n in range(10)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(free))
    # Steps that cost something come in another order with more workers, which may cost the length of a few steps. Idle workers
    # that ask in vain do slow the others down, so asking is free here.
    steps = replace(STEPS, renew=0.0, poll=0.1, claim=0.0 if run is autonomous else STEPS.claim)
    taken = [run(sites, 2**n, steps).seconds for n in range(10)]
    assert all(later <= earlier + 10 * steps.recording for earlier, later in pairwise(taken))
    assert taken[-1] < taken[0] / 4


@pytest.mark.parametrize(("run", "shared"), [(with_driver, "writer"), (autonomous, "database")])
def test_a_saturated_writer_sets_the_pace_and_is_named(run: Run, shared: str) -> None:
    steps = replace(FREE, begin=0.1, batch=0.1, keep=0.2)
    made = run(block_sites(400, [1.0], mean=1.0), 256, steps)
    assert made.throughput <= 1 / steps.recording * (1 + 1e-9)
    assert made.throughput > 0.9 / steps.recording
    assert made.bound == shared


@pytest.mark.parametrize("run", RUNS)
def test_other_limits_are_named_too(run: Run) -> None:
    sites = block_sites(400, [1.0], mean=1.0)
    assert run(sites, 256, replace(FREE, transfer=0.5)).bound in {"link", "store"}
    assert run(sites, 4, STEPS).bound == "GPUs"
    assert run(block_sites(8, [1.0], mean=1.0), 64, FREE).bound == "dependent sites"


def test_sites_depend_on_each_other_as_in_blocks_of_a_llama() -> None:
    sites = block_sites(9, [0.5, 1.0, 4.0], mean=2.0, seed=1)
    assert [site.after for site in sites] == [(), (), (), (), (), (0,), (1,), (2,), (3,)]
    assert sum(site.seconds for site in sites) == pytest.approx(18.0)
    assert block_sites(9, [0.5, 1.0, 4.0], mean=2.0, seed=1) == sites


def test_costs_survive_their_file_and_what_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    save_costs(COSTS, file)
    save_costs({"site.batches": Cost(3.0, "1", "again")}, file)
    assert load_costs(file) == {**COSTS, "site.batches": Cost(3.0, "1", "again")}
    assert steps_of(load_costs(file), "driver", Setting()).batches == 3
    with pytest.raises(InputError, match=r"sqlite\.keep is missing"):
        steps_of({name: cost for name, cost in COSTS.items() if name != "sqlite.keep"}, "driver", Setting())
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="--costs"):
        load_costs(file)


def test_every_line_is_simulated_and_its_saturation_found() -> None:
    made = lines(COSTS, Setting(), gpus=(8, 512), sites=(40, 100), seconds=(1.0,))
    assert [(line.engine, line.sites) for line in made] == [(engine, n) for engine in ENGINES for n in (40, 100)]
    for line in made:
        assert line.saturated is next((run for run in line.runs if run.efficiency < 0.5), None)


def test_real_runs_are_compared_with_their_simulation(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    run = {"engine": "driver", "workers": 2, "seconds": 4.5, "site_seconds": [1, 2, 3, 2], "after": [[], [], [0], [1]]}
    file.write_text(json.dumps([run, {**run, "workers": 1, "seconds": 8.2}]), encoding="utf-8")
    (two, simulated), (one, alone) = compare(COSTS, load_measured(file))
    assert (two.workers, one.workers) == (2, 1)
    assert 4.0 < simulated.seconds < 4.5
    assert 8.0 < alone.seconds < 8.5
    assert MeasuredRun(engine="driver", workers=1, seconds=1.0, site_seconds=(1.0,) * 4).sites[2].after == (0,)
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError, match="--measured"):
        load_measured(file)
