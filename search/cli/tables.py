"""Results as plain text for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from alphasmith.dashboards.text import choices_of_site, is_outside, verdict_of_refinement, verdict_of_site
from alphasmith.objectives.sites.coverage import Coverage, CoveredWeight, percent
from alphasmith.objectives.text import (
    counted,
    duration,
    listed,
    number,
    one_line,
    shortened,
    size_text,
    visible,
    with_times,
)
from alphasmith.search.cli._status import progress_lines

if TYPE_CHECKING:
    from alphasmith.search.launch.recorder import RunResult
    from alphasmith.search.launch.worker import WorkSummary
    from alphasmith.storage.output.entries import PayloadEntry
    from alphasmith.storage.runs.entries import SearchFacts

#: Sites shown before a long table is cut; ``--json`` and the report have all of them.
MOST_SITES = 40
#: Longest name or reason in the table of runs: a longer one would squeeze the ids [characters].
_LONGEST_CELL = 100
#: Layers named per reason why they stay float; ``--json`` has all of them.
MOST_LAYERS = 6
#: What was chosen at a site, as far as a line of a terminal holds it.
_CHOSEN = ("groups", "coefficients", "shift", "range_statistic", "range_factor")
_LOSS_NAMES = {"mse": "relative MSE", "kl": "KL, nats", "task": "from the metric"}


def near(folder: Path) -> Path:
    """A folder relative to the working directory."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # Ray removes the folder of a job when the job lets go of the cluster
        return folder
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def result_text(result: RunResult) -> str:
    """The end of ``alphasmith run``: sites, whole model, where everything lies."""
    # Not for `list` and `show`: pandas takes longer to import than they do to run.
    from alphasmith.storage.runs.data_frames import site_rows

    manifest = result.manifest
    sites = sites_table(site_rows(manifest.sites))
    searched = sum(bool(s.labels) for s in manifest.sites)
    modes = ", ".join(f"{sum(s.mode == m for s in manifest.sites)} {m}" for m in ("fold", "explicit", "left"))
    proof = manifest.proof
    payload = manifest.payload
    lines = [
        sites,
        *([groups_table([g.model_dump(mode="json") for g in manifest.groups])] if manifest.groups else []),
        model_table(manifest.model_dump(mode="json")),
        *_fallback(manifest.output.kept, [g.reason for g in manifest.guard if g.proposed == "ours"]),
        *_refinement(None if manifest.refinement is None else manifest.refinement.model_dump(mode="json")),
        f"sites: {len(manifest.sites)} ({modes}), {searched} searched, {len(result.trials)} trials",
        *_noise_model([site.facts for site in manifest.sites if site.facts is not None]),
        f"hardware: {manifest.hardware.explanation}",
        "equivalence: nothing was folded"
        if proof is None
        else f"equivalence: relative output error {proof.error:.2g} on fresh data "
        f"({counted(proof.batches, 'batch')}, {counted(max(len(proof.outputs), 1), 'output')}, tolerance {proof.tolerance:.0e})",
        *weights_lines([weight.model_dump() for weight in manifest.weights]),
        *_sizes(payload),
        f"memory: {size_text(manifest.memory.predicted)} predicted, {size_text(manifest.memory.measured or 0)} measured",
        f"run {result.id} in {result.storage}",
        f"results in {near(result.folder)}: smoothed/, quantized/, report.html, manifest.json",
    ]
    return "\n".join(lines)


def weights_lines(weights: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much of the model is quantized; what stays float, by reason."""
    found = Coverage(weights=tuple(CoveredWeight(**weight) for weight in weights))
    if not found.weights:  # not recorded
        return []
    quantized = len(found.weights) - len(found.left)
    lines = [f"weights: {percent(found.quantized)} quantized ({quantized} of {len(found.weights)})"]
    for reason, share, layers in found.reasons():
        lines.append(f"  {percent(share)} float: {listed([shortened(name) for name in layers], MOST_LAYERS)}: {reason}")
    return lines


def _sizes(payload: PayloadEntry) -> list[str]:
    """Size of the whole model before and after, and what the quantized part of it became."""
    parts = f"quantized weights {size_text(payload.weights_float)} -> {size_text(payload.weights_quantized)}"
    after = payload.weights_quantized + payload.other
    if payload.model_float is None or payload.model_given is None:
        return [f"size: {parts}, other {size_text(payload.other)}"]
    given = payload.model_given
    share = f"{after / max(payload.model_float, 1):.2g} of the whole model in float32"
    if given != payload.model_float:
        share += f", {after / max(given, 1):.2g} of it as it came"
    return [f"size: {size_text(given)} -> {size_text(after)} ({share}): {parts}, other {size_text(payload.other)}"]


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``alphasmith list``."""
    if not rows:
        return "no runs yet; `alphasmith run` makes one"
    columns = ("id", "name", "status", "scheme", "scope", "created", "reason")
    return _table(columns, ([_state(row) if c == "status" else _cell(row[c]) for c in columns] for row in rows))


def _cell(value: Any) -> str:
    return one_line(with_times(str(value or "")), _LONGEST_CELL)


def run_text(details: Mapping[str, Any]) -> str:
    """``alphasmith show RUN``."""
    keys = ("id", "name", "status", "reason", "scheme", "scope", "created", "finished", "folder", "trials")
    facts = [f"{key}: {with_times(str(details[key]))}" for key in keys if details[key] not in (None, "")]
    if details["status"] != "finished" and "progress" in details:
        facts += progress_lines(details["progress"])
    facts.append(f"hardware: {details['hardware'].get('explanation', '')}")
    facts += weights_lines(details.get("weights") or ())
    return "\n".join([*facts, *_refinement(details.get("refinement")), sites_table(details["sites"])])


def worker_text(done: WorkSummary) -> str:
    """``alphasmith worker RUN``: what it did and where the run stands."""
    searched = f"{counted(done.searched, 'site')} of {done.run} searched here; {done.note}"
    if done.finished:
        return f"{searched}\nresults in {done.folder}"
    return f"{searched}\nits result is, or will be, in {done.folder}"


def sites_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Held-out losses per site, and what was chosen there; ours/single is the gain over the best single alpha."""
    shown = [row for row in rows if row["ours"] is not None]
    columns = ("site", "mode", "C", "no smoothing", "alpha 0.5", "(alpha)", "reached", "ours/single", "chosen")
    body = [
        [
            shortened(row["site"]),
            row["mode"],
            str(row["channels"]),
            *(_loss(row[k]) for k in ("identity", "alpha_half")),
            f"{row['best_single_alpha']:.2f}",
            verdict_of_site(row),
            f"{row['ours'] / row['best_single']:.3f}" if row["best_single"] else "",
            choices_of_site({key: row.get(key) for key in _CHOSEN}),
        ]
        for row in shown[:MOST_SITES]
    ]
    lines = [_table(columns, body, title="relative squared error on held-out rows")] if body else []
    if len(shown) > MOST_SITES:
        lines.append(f"... and {len(shown) - MOST_SITES} more sites, see the report")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:
            reasons.setdefault(f"{row['mode']}: {row['reason']}", []).append(row["site"])
    for reason, names in list(reasons.items())[:8]:
        lines.append(f"{listed([shortened(name) for name in names], 1)} {reason}")
    if len(reasons) > 8:
        lines.append(f"... and {len(reasons) - 8} more reasons, see the report")
    return "\n".join(lines)


def model_table(manifest: Mapping[str, Any]) -> str:
    """Whole-model figures: output loss on held-out data and the task metric."""
    output = manifest["output"]
    rows = [
        [
            f"output loss ({_LOSS_NAMES[output['loss']]})",
            "1" if output["loss"] == "task" else "0",
            *(_loss(output[k]) for k in ("naive", "alpha_0.5", "best_single", "ours")),
        ]
    ]
    for metric in output["metrics"]:
        arrow = "higher" if metric["higher_is_better"] else "lower"
        values = (metric[k] for k in ("float", "naive", "alpha_0.5", "best_single", "ours"))
        rows.append([f"{metric['name']} ({arrow} is better)", *("failed" if v is None else f"{v:.4f}" for v in values)])
    return _table(("whole model", "float", "naive", "alpha 0.5", "best single", "ours"), rows)


def groups_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Groups over the whole model (scope ``model``) and the alphas that won."""
    body = [
        [
            str(row["index"]),
            str(row["size"]),
            f"{row['magnitude']:.4g}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            "" if row["alpha"] is None else f"{row['alpha']:.3f}{_beyond(row)}",
        ]
        for row in rows
    ]
    return _table(("group", "channels", "magnitude", "range", "alpha"), body, title="groups of the whole model")


def _beyond(group: Mapping[str, Any]) -> str:
    return " (outside)" if is_outside(group["alpha"], group["low"], group["high"]) else ""


def verify_text(answer: Mapping[str, Any]) -> str:
    """``alphasmith verify DIR``."""
    first = f"{answer['artifacts']} files have the digests of the manifest"
    if "skipped" in answer:
        return f"{first}\nequivalence not checked: {answer['skipped']}"
    return (
        f"{first}\nsmoothed and original model agree on {answer['samples']} samples: relative output error "
        f"{answer['error']:.2g} (tolerance {answer['tolerance']:.0e})\nthe quantized model loads"
    )


def hardware_text(answer: Mapping[str, Any]) -> str:
    """``alphasmith hardware``."""
    rows = [
        [name, *_budget_cells(answer[key])]
        for name, key in (("this machine", "detected"), ("target, as given", "given"), ("model requires", "required"))
        if key in answer
    ]
    ranges = [
        [f"{r['position']:.2f}", f"{r['low']:.3f}", f"{r['high']:.3f}", r["explanation"]] for r in answer["ranges"]
    ]
    return "\n".join(
        [
            _table(("budget", "memory", "threads", "bandwidth"), rows),
            answer["explanation"],
            _table(("group at", "alpha from", "to", "because"), ranges, title="alpha ranges"),
            "0 is the group of smallest, 1 that of largest magnitude; a run places its groups by what it measures",
        ]
    )


def _budget_cells(budget: Mapping[str, Any]) -> list[str]:
    memory, threads, bandwidth = budget["memory"], budget["gpu_threads"], budget["bandwidth"]
    return [
        "" if memory is None else size_text(memory),
        "" if threads is None else str(threads),
        "" if bandwidth is None else f"{size_text(bandwidth)}/s",
    ]


def _state(row: Mapping[str, Any]) -> str:
    """Status of a run, and whether it only seems to run."""
    return "running (no live driver)" if row["status"] == "running" and row.get("driver") is None else row["status"]


def _fallback(kept: str, reasons: Sequence[str]) -> list[str]:
    return [] if kept == "ours" else [f"kept {kept}: {reason}" for reason in reasons]


def _noise_model(facts: Sequence[SearchFacts]) -> list[str]:
    """What the noise model bought over all sites, and where it failed."""
    known = [f.noise_model for f in facts if f.noise_model is not None]
    failed = [f.noise_reason for f in facts if f.noise_reason]
    lines = [f"noise model: failed at {len(failed)} sites, losses there are exact only ({failed[0]})"] if failed else []
    if known:
        seconds, saved = (sum(getattr(k, name) for k in known) for name in ("seconds", "seconds_saved"))
        lines.append(
            f"noise model: {sum(k.proposals for k in known)} proposals in {duration(seconds)}; spared about "
            f"{sum(k.evaluations_saved for k in known)} exact evaluations of grid and sampler ({saved:+.1f} s)"
        )
    return lines


def _refinement(entry: Mapping[str, Any] | None) -> list[str]:
    return [] if entry is None else [f"refinement at the output: {verdict_of_refinement(entry)}"]


def _loss(value: float | None) -> str:
    return "" if value is None else number(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> str:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, title_style="")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(visible, row))  # a table drops control characters instead of showing them
    stream = io.StringIO()
    Console(file=stream, width=240, color_system=None, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())
