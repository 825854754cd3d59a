"""Tables and figure of a run block by block, as ``benchmarks.cluster_simulation --blocks`` publishes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.block_simulation import (
    CHECKED,
    CHECKED_SAMPLES,
    STAGES,
    WAYS,
    BlockCosts,
    BlockRun,
    BlockShape,
    Cluster,
    Samples,
    counted,
)
from benchmarks.timing import table


def run_table(found: Mapping[float, Sequence[BlockRun]]) -> str:
    """Time and GPU hours."""
    workers = sorted({run.workers for runs in found.values() for run in runs})
    header = (
        "shared out",
        "share of peak",
        *(f"{n} GPU{'s' if n > 1 else ''}: min, GPU hours" for n in workers),
        "GPUs busy",
        "bound there",
    )
    rows = []
    for way, name in WAYS.items():
        for share, runs in found.items():
            chosen = [run for run in runs if run.way == way]
            cells = [f"{run.seconds / 60:.0f}, {run.gpu_hours:.1f}" for run in chosen]
            last = chosen[-1]
            rows.append((name, f"{share:.0%}", *cells, f"{chosen[0].busy:.0%} to {last.busy:.0%}", last.bound))
    return table(header, rows)


def size_table(runs: Sequence[BlockRun]) -> str:
    """Memory, network and disk, with more than one worker."""
    header = (
        "shared out",
        "a process with a block [GiB]",
        "one that searches a site [GiB]",
        "network [GB]",
        "states on disk [GB]",
    )
    rows = []
    for way, name in WAYS.items():
        run = next(run for run in runs if run.way == way and run.workers > 1)
        site = f"{run.site_memory / 2**30:.1f}" if run.site_memory else ""
        rows.append((name, f"{run.memory / 2**30:.1f}", site, f"{run.network / 1e9:.0f}", f"{run.disk / 1e9:.0f}"))
    return table(header, rows)


def stage_table(costs: BlockCosts, shape: BlockShape, samples: Samples, cluster: Cluster) -> str:
    """What every stage was measured to cost, the check of it, and what that makes of a block here."""
    header = (
        "stage of a block",
        "fixed [s]",
        "passes over weights",
        "products counted",
        f"width {CHECKED.hidden}, CPU: measured [s]",
        "from these costs [s]",
        "TFLOP counted here",
        f"a GPU at {cluster.share:.0%} [s]",
    )
    checked = replace(costs, default_trials=1.0)
    rows = []
    for stage, seen in zip(STAGES, costs.checked, strict=True):
        cost, flop = costs.stages[stage], counted(stage, shape.block, samples)
        told = checked.seconds(stage, CHECKED.block, CHECKED_SAMPLES, costs.cpu)
        taken = costs.seconds(stage, shape.block, samples, cluster.processor)
        fit = (f"{cost.fixed:.2f}", f"{cost.passes:.1f}", f"{cost.products:.2f}")
        rows.append((stage, *fit, f"{seen:.1f}", f"{told:.1f}", f"{flop / 1e12:.1f}", f"{taken:.1f}"))
    return table(header, rows)


def block_figure(found: Mapping[float, Sequence[BlockRun]]) -> go.Figure:
    """Minutes and GPU hours against GPUs, a line for every way, in a band from the lowest to the highest share of the peak."""
    colours = {"sites": "#2171b5", "blocks": "#d94801"}
    shades = {"sites": "rgba(33,113,181,0.15)", "blocks": "rgba(217,72,1,0.15)"}
    shares = sorted(found)
    middle = shares[len(shares) // 2]
    titles = ("Minutes of the run", "GPU hours held", "Share of them in which GPUs work")
    made = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.07)

    def values(run: BlockRun) -> tuple[float, float, float]:
        return run.seconds / 60, run.gpu_hours, run.busy

    for way, name in WAYS.items():
        runs = {share: [run for run in found[share] if run.way == way] for share in shares}
        gpus = [run.workers for run in runs[middle]]
        for column in (1, 2, 3):
            every = {share: [values(run)[column - 1] for run in runs[share]] for share in shares}
            low, high = every[shares[0]], every[shares[-1]]
            made.add_scatter(
                x=[*gpus, *gpus[::-1]],
                y=[*low, *high[::-1]],
                fill="toself",
                fillcolor=shades[way],
                line={"width": 0},
                mode="lines",
                name=f"{shares[0]:.0%} to {shares[-1]:.0%} of<br>a GPU's peaks,<br>line: {middle:.0%}",
                showlegend=column == 1,
                legendrank=2000,
                row=1,
                col=column,
            )
            made.add_scatter(
                x=gpus,
                y=every[middle],
                mode="lines+markers",
                line={"color": colours[way], "width": 2.5},
                marker={"size": 6},
                name=name.replace(", ", ",<br>"),
                showlegend=column == 1,
                row=1,
                col=column,
            )
    workers = sorted({run.workers for run in found[middle]})
    made.update_xaxes(type="log", tickvals=workers, ticktext=[f"{n}" for n in workers], title="GPUs")
    ticks = {1: (5, 10, 15, 20, 30, 50, 70, 100, 150, 200, 500, 1000), 2: (1, 2, 5, 10, 20, 50, 100, 200, 500)}
    for column, shown in ticks.items():
        made.update_yaxes(type="log", tickvals=shown, ticktext=[f"{n}" for n in shown], row=1, col=column)
    made.update_yaxes(range=[0, 1.05], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1], row=1, col=3)
    made.update_layout(
        template="plotly_white",
        font={"size": 14},
        width=1280,
        height=380,
        margin={"t": 60, "b": 60, "l": 60, "r": 10},
        legend={"x": 1.01, "y": 0.95},
    )
    return made
