"""How a run scales with GPUs and sites: simulated from measured costs, with what saturates, a table and a figure.

    python -m benchmarks.cluster_simulation [--costs FILE.json] [--seconds S ...] [--gpus N ...] [--sites N ...]
        [--bandwidth GBIT] [--store GBIT] [--hidden C] [--measured FILE.json] [--json FILE] [--image FILE.png] [--out docs/scaling.md]
    python -m benchmarks.cluster_simulation --blocks [--layers N] [--hidden C] [--intermediate C] [--heads N] [--length TOKENS]
        [--samples N] [--peak TFLOPS] [--memory GB] [--out docs/scaling.md]

Costs come from ``benchmarks/cluster_costs.json`` (written by ``benchmarks.site_costs``). What a
search takes on a GPU was not measured: it is assumed, and shown for several values. The shape of its distribution over sites is
the measured one. ``--measured`` compares the simulation with real runs, see ``compare``. ``--blocks`` simulates a run block by block
instead, see ``benchmarks.block_simulation``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from alphasmith.objectives.errors import InputError
from benchmarks.block_simulation import (
    SHARES,
    BlockCosts,
    BlockShape,
    Cluster,
    Samples,
    simulate_blocks,
)
from benchmarks.block_tables import block_figure, run_table, size_table, stage_table
from benchmarks.cluster_events import SimSite, Simulated, Steps, autonomous, block_sites, with_driver
from benchmarks.costs import COSTS, Cost, load_costs
from benchmarks.scaling import photograph
from benchmarks.timing import parser, publish, table

EngineName: TypeAlias = Literal["driver", "autonomous"]
ENGINES: dict[EngineName, str] = {
    "driver": "one driver, one writer (SQLite)",
    "autonomous": "autonomous workers (PostgreSQL)",
}
GPUS = (8, 16, 32, 64, 128, 256, 512)
SITES = (100, 300, 1000, 10_000)
SECONDS = (0.2, 1.0, 5.0)
IMAGE = Path("docs/images/scaling_cluster.png")
BLOCK_IMAGE = Path("docs/images/scaling_blocks.png")
#: Width of one block's MLP over that of its channels, and rows kept per site and split (search.rows).
_MLP, _ROWS, _FLOAT = 8 / 3, 1024, 4


@dataclass(frozen=True)
class Setting:
    """What is assumed of the cluster.

    Attributes:
        bandwidth: Of the link out of the driver, and of the link into a worker [bytes/s].
        store: What the artifact store delivers to all workers together [bytes/s].
        hidden: Channels of the model whose site work travels.
        poll: How long an autonomous worker that found no ticket waits [s].
        beat: How often it renews its leases [s].
    """

    bandwidth: float = 25e9 / 8
    store: float = 25e9 / 8
    hidden: int = 4096
    poll: float = 1.0
    beat: float = 15.0

    @property
    def payload(self) -> float:
        """Mean size of site work over the four sites of a LLaMA block [bytes]: weights, and rows of both splits, in fp32."""
        wide = round(self.hidden * _MLP)
        weights = self.hidden * (4 * self.hidden + 3 * wide)
        rows = 2 * _ROWS * (3 * self.hidden + wide)
        return _FLOAT * (weights + rows) / 4


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """A real run to hold the simulation against; everything of its search stage alone.

    Attributes:
        engine: How it was run.
        workers: Workers that searched.
        seconds: Wall time of the search stage [s].
        site_seconds: Seconds of every site's search, in the order of the search [s].
        after: Per site, the positions of the sites before it; empty: as in the blocks of a LLaMA.
    """

    engine: EngineName
    workers: int
    seconds: float
    site_seconds: tuple[float, ...]
    after: tuple[tuple[int, ...], ...] = ()

    @property
    def sites(self) -> tuple[SimSite, ...]:
        """What is to be simulated."""
        first = (len(self.site_seconds) + 1) // 2
        blocks = tuple(() if n < first else (n - first,) for n in range(len(self.site_seconds)))
        return tuple(map(SimSite, self.site_seconds, self.after or blocks))


def steps_of(costs: Mapping[str, Cost], engine: EngineName, setting: Setting, *, local: bool = False) -> Steps:
    """Measured costs as steps of a run.

    Args:
        costs: See ``benchmarks.costs``.
        engine: ``driver`` records in SQLite, ``autonomous`` workers in PostgreSQL.
        setting: The cluster.
        local: Workers on the machine of the driver: site work passes no link and is as small as measured.

    Raises:
        InputError: A cost was not measured.
    """

    def cost(name: str) -> float:
        if name not in costs:
            raise InputError("--costs", f"{name} is missing", "run benchmarks.site_costs")
        return costs[name].number

    backend = "sqlite" if engine == "driver" else "postgresql"
    payload = cost("site.payload") if local else setting.payload
    shared = setting.bandwidth if engine == "driver" else setting.store
    return Steps(
        batches=max(1, round(cost("site.batches"))),
        copy=payload / cost("driver.copy"),
        message=cost("driver.message"),
        finish=cost("driver.finish"),
        transfer=0.0 if local else payload / shared,
        link=0.0 if local else payload / setting.bandwidth,
        poll=setting.poll,
        beat=setting.beat,
        served=cost("postgresql.served"),
        **{name: cost(f"{backend}.{name}") for name in ("begin", "batch", "keep", "claim", "open", "renew")},
    )


def simulate(engine: EngineName, sites: Sequence[SimSite], workers: int, steps: Steps) -> Simulated:
    """One run."""
    return with_driver(sites, workers, steps) if engine == "driver" else autonomous(sites, workers, steps)


@dataclass(frozen=True)
class Line:
    """Runs of one engine, number of sites and seconds per site over growing numbers of GPUs."""

    engine: EngineName
    sites: int
    seconds: float
    runs: tuple[Simulated, ...]

    @property
    def saturated(self) -> Simulated | None:
        """The first run that keeps its GPUs busy for less than half of the time."""
        return next((run for run in self.runs if run.efficiency < 0.5), None)


def lines(
    costs: Mapping[str, Cost],
    setting: Setting,
    *,
    gpus: Sequence[int] = GPUS,
    sites: Sequence[int] = SITES,
    seconds: Sequence[float] = SECONDS,
) -> list[Line]:
    """Every combination, simulated."""
    made = []
    for engine in ENGINES:
        steps = steps_of(costs, engine, setting)
        for mean in seconds:
            for count in sites:
                graph = block_sites(count, costs["site.seconds"].numbers, mean=mean)
                runs = tuple(simulate(engine, graph, workers, steps) for workers in gpus)
                made.append(Line(engine, count, mean, runs))
    return made


def compare(costs: Mapping[str, Cost], runs: Sequence[MeasuredRun]) -> list[tuple[MeasuredRun, Simulated]]:
    """Every real run beside its simulation, with workers on the machine of the driver."""
    setting = Setting()
    return [
        (run, simulate(run.engine, run.sites, run.workers, steps_of(costs, run.engine, setting, local=True)))
        for run in runs
    ]


def load_measured(file: Path) -> list[MeasuredRun]:
    """Real runs from a JSON list of objects with the fields of ``MeasuredRun``.

    Raises:
        InputError: The file is missing or holds something else.
    """
    try:
        return [
            MeasuredRun(
                engine=run["engine"],
                workers=int(run["workers"]),
                seconds=float(run["seconds"]),
                site_seconds=tuple(map(float, run["site_seconds"])),
                after=tuple(tuple(map(int, before)) for before in run.get("after", ())),
            )
            for run in json.loads(file.read_text(encoding="utf-8"))
        ]
    except OSError as error:
        raise InputError("--measured", f"{file} cannot be read ({error.strerror})", "give a JSON file") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("--measured", f"{file} does not hold runs ({error!r})", "see MeasuredRun") from error


def compare_table(found: Sequence[tuple[MeasuredRun, Simulated]]) -> str:
    """Real and simulated times."""
    header = ("engine", "workers", "sites", "real [s]", "simulated [s]", "simulated / real")
    rows = [
        (
            ENGINES[run.engine],
            f"{run.workers}",
            f"{made.sites}",
            f"{run.seconds:.1f}",
            f"{made.seconds:.1f}",
            f"{made.seconds / run.seconds:.2f}",
        )
        for run, made in found
    ]
    return table(header, rows)


def line_table(every: Sequence[Line]) -> str:
    """Efficiency of the search stage, and what bounds it."""
    gpus = [run.workers for run in every[0].runs]
    header = ("engine", "search [s]", "sites", *(f"{n} GPUs" for n in gpus), "below 50 % at", "bound there by")
    rows = []
    for line in every:
        end = line.saturated
        shares = [f"{run.efficiency:.0%}" for run in line.runs]
        where = ("never", "") if end is None else (f"{end.workers}", end.bound)
        rows.append((ENGINES[line.engine], f"{line.seconds:g}", f"{line.sites}", *shares, *where))
    return table(header, rows)


def time_table(every: Sequence[Line], serial: float) -> str:
    """Minutes and sites per second of the search stage, and of the run with the stages that one process does alone."""
    gpus = [run.workers for run in every[0].runs]
    shown = [gpus[0], gpus[len(gpus) // 2], gpus[-1]]
    header = ["engine", "search [s]", "sites"]
    header += [f"{n} GPUs: sites/s, search [min], run [min]" for n in shown]
    rows = []
    for line in every:
        alone = serial * line.runs[0].work
        cells = [
            f"{run.throughput:.1f}, {run.seconds / 60:.1f}, {(run.seconds + alone) / 60:.1f}"
            for run in line.runs
            if run.workers in shown
        ]
        rows.append((ENGINES[line.engine], f"{line.seconds:g}", f"{line.sites}", *cells))
    return table(header, rows)


def ceilings(costs: Mapping[str, Cost], setting: Setting, seconds: Sequence[float]) -> str:
    """Sites per second that each shared resource can carry, and the GPUs it keeps busy."""
    header = ("engine", "shared", "per site [ms]", "sites/s at most", *(f"GPUs at {s:g} s a site" for s in seconds))
    rows = []
    for engine, name in ENGINES.items():
        steps = steps_of(costs, engine, setting)
        shares = {"link" if engine == "driver" else "store": steps.transfer}
        if engine == "driver":
            shares["driver"] = steps.submit + (1 + steps.batches) * steps.message + steps.finish
            shares["writer"] = steps.recording
        else:
            shares["database"] = steps.served * (steps.claim + steps.open + steps.recording)
        for what, taken in shares.items():
            fed = [f"{s / taken:.0f}" for s in seconds]
            rows.append((name, what, f"{1e3 * taken:.1f}", f"{1 / taken:.1f}", *fed))
    return table(header, rows)


def cost_table(costs: Mapping[str, Cost]) -> str:
    """Every cost with its source."""
    rows = []
    for name, cost in sorted(costs.items()):
        if name.startswith("block."):
            continue  # shown with the run that they are for
        values = cost.numbers
        shown = (
            f"{values[0]:.3g}" if len(values) == 1 else f"{len(values)} values, mean {sum(values) / len(values):.3g}"
        )
        rows.append((name, shown, cost.unit, cost.source))
    return table(("cost", "value", "unit", "source"), rows)


def figure(every: Sequence[Line]) -> go.Figure:
    """Efficiency against GPUs: a panel per engine and the larger two seconds per site, a line per number of sites."""
    shown = sorted({line.seconds for line in every})[-2:]
    colours = ("#b3cde3", "#6baed6", "#2171b5", "#08306b", "#000000")
    panels = [(engine, seconds) for engine in ENGINES for seconds in shown]
    titles = [f"{ENGINES[engine].partition(' (')[0]},<br>{seconds:g} s a search" for engine, seconds in panels]
    made = make_subplots(rows=1, cols=len(panels), subplot_titles=titles, horizontal_spacing=0.03, shared_yaxes=True)
    for column, panel in enumerate(panels, 1):
        chosen = [line for line in every if (line.engine, line.seconds) == panel]
        for colour, line in zip(colours, chosen, strict=False):
            made.add_scatter(
                x=[run.workers for run in line.runs],
                y=[run.efficiency for run in line.runs],
                mode="lines+markers",
                line={"color": colour, "width": 2.5},
                marker={"size": 5},
                name=f"{line.sites:,} sites",
                showlegend=column == 1,
                row=1,
                col=column,
            )
        marked = [line.saturated for line in chosen if line.saturated is not None]
        made.add_scatter(
            x=[run.workers for run in marked],
            y=[run.efficiency for run in marked],
            mode="markers",
            marker={"size": 13, "symbol": "circle-open", "color": "#d73a49", "line": {"width": 2}},
            name="first below 50 %",
            showlegend=column == len(panels),
            row=1,
            col=column,
        )
    gpus = [run.workers for run in every[0].runs]
    ticks = gpus[::2] if len(gpus) > 4 else gpus
    made.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{n}" for n in ticks], title="GPUs")
    made.update_yaxes(range=[0, 1.05], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    made.update_yaxes(title="GPU time spent searching", row=1, col=1)
    made.update_layout(
        template="plotly_white",
        font={"size": 14},
        width=1280,
        height=380,
        margin={"t": 60, "b": 60, "l": 75, "r": 10},
        legend={"x": 1.01, "y": 0.95},
    )
    return made


def publish_blocks(
    costs: Mapping[str, Cost], shape: BlockShape, samples: Samples, cluster: Cluster, *, image: Path, out: Path | None
) -> None:
    """Tables and figure of a run block by block.

    Raises:
        InputError: A cost was not measured, or ``out`` has no place for the tables.
    """
    measured = BlockCosts.of(costs)
    steps = steps_of(costs, "driver", Setting(bandwidth=cluster.link, store=cluster.store, hidden=shape.hidden))
    found = simulate_blocks(shape, samples, measured, cluster, steps)
    if not photograph(block_figure(found), image):
        print("no chromium: the figure was not drawn")
    publish(
        "BLOCK_COSTS",
        f"{costs['block.product_rate'].source} One thread: {measured.cpu.product / 1e9:.0f} GFLOP/s, "
        f"{measured.cpu.memory / 1e9:.1f} GB/s. By default {costs['site.trials'].number:.1f} trials a site, {measured.default_trials:.2f} times those fitted.\n\n"
        f"{stage_table(measured, shape, samples, cluster)}",
        out,
    )
    assumed = (
        f"{shape.parameters / 1e9:.2f} thousand million parameters, {samples.calibration} + {samples.held_out} + {samples.proof} samples "
        f"of {samples.length} tokens. Assumed: GPUs of {cluster.peak / 1e12:g} TFLOP/s and {cluster.memory / 1e9:g} GB/s, links and "
        f"a store of {cluster.link * 8e-9:g} and {cluster.store * 8e-9:g} Gbit/s."
    )
    publish("BLOCKS", f"{assumed}\n\n{run_table(found)}\n\n{size_table(found[SHARES[0]])}", out)


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--costs", type=Path, default=COSTS, help="measured costs")
    arguments_of.add_argument("--seconds", type=float, nargs="+", default=SECONDS, help="seconds of a search on a GPU")
    arguments_of.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    arguments_of.add_argument("--sites", type=int, nargs="+", default=SITES)
    arguments_of.add_argument("--bandwidth", type=float, default=25.0, help="of a link [Gbit/s]")
    arguments_of.add_argument("--store", type=float, default=25.0, help="of the artifact store in all [Gbit/s]")
    arguments_of.add_argument("--hidden", type=int, default=4096, help="channels of the model")
    arguments_of.add_argument("--measured", type=Path, help="real runs to compare with")
    arguments_of.add_argument("--json", type=Path, help="write every simulated run")
    arguments_of.add_argument("--image", type=Path)
    blocks = arguments_of.add_argument_group("a run block by block")
    blocks.add_argument("--blocks", action="store_true", help="simulate that instead")
    blocks.add_argument("--layers", type=int, default=32)
    blocks.add_argument("--intermediate", type=int, default=11_008, help="width of the MLP")
    blocks.add_argument("--heads", type=int, default=32)
    blocks.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    blocks.add_argument("--samples", type=int, default=128, help="samples that calibrate")
    blocks.add_argument("--peak", type=float, default=19.5, help="float32 products of a GPU [TFLOP/s]")
    blocks.add_argument("--memory", type=float, default=2000.0, help="of a GPU [GB/s]")
    arguments = arguments_of.parse_args()
    costs = load_costs(arguments.costs)
    if arguments.blocks:
        shape = BlockShape(
            blocks=arguments.layers,
            hidden=arguments.hidden,
            intermediate=arguments.intermediate,
            heads=arguments.heads,
            groups=arguments.heads,
        )
        cluster = Cluster(
            peak=1e12 * arguments.peak,
            memory=1e9 * arguments.memory,
            link=arguments.bandwidth * 1e9 / 8,
            store=arguments.store * 1e9 / 8,
        )
        samples = Samples(length=arguments.length, calibration=arguments.samples)
        publish_blocks(costs, shape, samples, cluster, image=arguments.image or BLOCK_IMAGE, out=arguments.out)
        return
    setting = Setting(bandwidth=arguments.bandwidth * 1e9 / 8, store=arguments.store * 1e9 / 8, hidden=arguments.hidden)
    every = lines(costs, setting, gpus=arguments.gpus, sites=arguments.sites, seconds=arguments.seconds)
    if arguments.json is not None:
        kept = [
            {**asdict(run), "engine": line.engine, "search": line.seconds, "bound": run.bound}
            for line in every
            for run in line.runs
        ]
        arguments.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    if not photograph(figure(every), arguments.image or IMAGE):
        print("no chromium: the figure was not drawn")
    assumed = (
        f"Assumed: site work of {setting.payload / 1e6:.0f} MB (hidden size {setting.hidden}, fp32), links of "
        f"{arguments.bandwidth:g} Gbit/s, a store of {arguments.store:g} Gbit/s, the seconds of a search."
    )
    serial = costs["site.serial_share"].number
    publish("CLUSTER_COSTS", cost_table(costs), arguments.out)
    publish("CLUSTER_CEILINGS", f"{assumed}\n\n{ceilings(costs, setting, arguments.seconds)}", arguments.out)
    publish("CLUSTER", f"{assumed}\n\n{line_table(every)}", arguments.out)
    publish("CLUSTER_TIMES", f"{assumed}\n\n{time_table(every, serial)}", arguments.out)
    if arguments.measured is not None:
        publish("CLUSTER_MEASURED", compare_table(compare(costs, load_measured(arguments.measured))), arguments.out)


if __name__ == "__main__":
    main()
