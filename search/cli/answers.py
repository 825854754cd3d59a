"""What the smaller commands answer, as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alphasmith.objectives.text import counted, duration, number, one_line, size_text, with_times
from alphasmith.search.cli._layout import table

if TYPE_CHECKING:
    from alphasmith.search.launch.worker import WorkSummary
    from alphasmith.storage.output.format_entries import FormatsEntry

#: Longest name or reason in the table of runs: a longer one would squeeze the ids [characters].
_LONGEST_CELL = 100
#: Looks at held-out samples that are shown of a training, its last ones.
_MOST_POINTS = 8


def runs_table(rows: Sequence[Mapping[str, Any]], compressions: Sequence[Mapping[str, Any]] = ()) -> str:
    """``alphasmith list``."""
    if not rows:
        return compressions_text(compressions) if compressions else "no runs yet; `alphasmith run` makes one"
    columns = ("id", "name", "status", "scheme", "scope", "created", "reason")
    told = table(columns, ([_state(row) if c == "status" else _cell(row[c]) for c in columns] for row in rows))
    trainings = [training for row in rows for training in row.get("trainings", ())]
    told += f"\n\n{trainings_text(trainings)}" if trainings else ""
    return f"{told}\n\n{compressions_text(compressions)}" if compressions else told


def compressions_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Joint compressions, a line each; of one alone all that is known."""
    columns = ("id", "status", "created", "reason")
    cells = ([_state(row) if c == "status" else _cell(row[c]) for c in columns] for row in rows)
    made = table(columns, cells, texts=("reason",))
    if len(rows) != 1 or rows[0].get("manifest") is None:
        return made
    return f"{made}\n\n{compression_text(rows[0]['manifest'], rows[0]['folder'])}"


def formats_text(entry: FormatsEntry) -> str:
    """``alphasmith formats RUN``.

    Args:
        entry: What the run could choose from.
    """
    from alphasmith.dashboards.verdict import format_grid, formats_verdict

    content = {"formats": entry.model_dump(mode="json")}
    columns, rows = format_grid(content["formats"])
    lines = [f"{formats_verdict(content)}; {entry.reason}"]
    lines += [table(columns, rows, title="the front: no other choice is as cheap and as good", texts=("formats",))]
    lines += ["any of these can be written: alphasmith formats RUN --pick POINT --out DIR"]
    return "\n\n".join(lines)


def compression_text(values: Mapping[str, Any], folder: str) -> str:
    """What a compression came to.

    Args:
        values: Its manifest, as JSON values.
        folder: Its output folder.
    """
    from alphasmith.dashboards.compression_report import compression_sentence, fallen_back, front_grid, metric_grid
    from alphasmith.storage.output.compression_manifest import CompressionManifest

    manifest = CompressionManifest.model_validate(values)
    columns, rows = metric_grid(manifest)
    heads, front = front_grid(manifest)
    lines = [
        compression_sentence(manifest),
        *([] if manifest.rounds is None else [f"rounds: {manifest.rounds.reason}"]),
        *fallen_back(manifest),
        table(columns, rows, title="metrics"),
        table(heads, front, title="the front: no other trial within the limits is as small and as good"),
        f"any of these can be written: alphasmith compress {manifest.run.id} --pick TRIAL --out DIR",
        f"the model is in {folder}",
    ]
    return "\n".join(lines)


def trainings_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Trainings, a line each; of one alone all that is known."""
    columns = ("id", "run", "status", "kept", "created", "reason")
    told = [{**row, "status": _state(row), "kept": {True: "yes", False: "no"}.get(row["kept"])} for row in rows]
    cells = ([_cell(row[c]) for c in columns] for row in told)
    made = table(columns, cells, texts=("run", "reason"))
    if len(rows) != 1 or "training" not in rows[0]:
        return made
    (row,) = rows
    return made if row["training"] is None else f"{made}\n\n{training_text(row['training'], row['folder'])}"


def training_text(entry: Mapping[str, Any], folder: str) -> str:
    """What a training came to.

    Args:
        entry: The section ``training`` of its manifest, as JSON values.
        folder: Its output folder.
    """
    metric = entry["metric_name"]
    columns = ("step", "learning rate", "trained on", "held out", *([metric] if metric else []))
    curve = entry["curve"]
    # The first and the last looks, and the best one.
    shown = [point for place, point in enumerate(curve) if place < 1 or place >= len(curve) - _MOST_POINTS]
    shown += [point for point in curve if point["step"] == entry["best_step"] and point not in shown]
    rows = [
        [
            str(point["step"]),
            number(point["learning_rate"]),
            "" if point["train_loss"] is None else number(point["train_loss"]),
            number(point["held_out_loss"]),
            *([] if not metric else [number(point["metric"])]),
        ]
        for point in sorted(shown, key=lambda point: int(point["step"]))
    ]
    study = entry["study"]
    chosen = (
        ""
        if study is None
        else "; settings by a study: "
        + ", ".join(
            f"{name} {number(value) if isinstance(value, float) else value}" for name, value in study["chosen"].items()
        )
    )
    used = f"{counted(len(entry['trained']), 'sample')} trained on, {len(entry['held_out'])} held out, of {entry['samples']}"
    lines = [
        entry["reason"],
        f"{used}; {counted(entry['steps'], 'update')}, {duration(entry['seconds'])}{chosen}",
        table(columns, rows, title="losses by updates"),
        f"{'the trained' if entry['kept'] else 'the untrained'} integer model is in {folder}",
    ]
    if entry["kept"]:
        lines.append("equivalence with the float model does not apply: training is meant to change it")
    return "\n".join(lines)


def worker_text(done: WorkSummary) -> str:
    """``alphasmith worker RUN``: what it did and where the run stands."""
    searched = f"{counted(done.searched, 'site')} of {done.run} searched here; {done.note}"
    if done.finished:
        return f"{searched}\nresults in {done.folder}"
    return f"{searched}\nits result is, or will be, in {done.folder}"


def verify_text(answer: Mapping[str, Any]) -> str:
    """``alphasmith verify DIR``."""
    first = f"{answer['artifacts']} files have the digests of the manifest"
    if "compression" in answer:
        return f"{first}\n{answer['tensors']} tensors of compression {answer['compression']} are read back"
    if "format" in answer:
        told = "on record" if answer["compared"] == "record" else f"of {answer['run']}"
        return f"{first}\ncodes and scales of {answer['operators']} operators are those {told}"
    if "training" in answer:
        told = answer.get("skipped") or "the integer model has the same bits when it is loaded again"
        return f"{first}\n{told}\nequivalence does not apply: training {answer['training']} changed the model"
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
    kernels = [[k["library"], k["version"] or "-", k["kernel"] or "-", k["told"]] for k in answer.get("kernels", [])]
    title = "products of u8 activations and s8 weights on this machine"
    probed = [table(("library", "version", "kernel", "computes"), kernels, title=title)] if kernels else []
    ranges = [
        [f"{r['position']:.2f}", f"{r['low']:.3f}", f"{r['high']:.3f}", r["explanation"]] for r in answer["ranges"]
    ]
    return "\n".join(
        [
            table(("budget", "memory", "threads", "bandwidth"), rows),
            answer["explanation"],
            table(
                ("format", *(f"{rows} row{'s' * (rows != '1')}" for rows in answer["formats"][0]["cost"])),
                [[f["name"], *(f"{cost:.2f}" for cost in f["cost"].values())] for f in answer["formats"]],
                title="cost of a forward on the target, over that of static int8",
            ),
            *probed,
            table(("group at", "alpha from", "to", "because"), ranges, title="alpha ranges"),
            "0 is the group of smallest, 1 that of largest magnitude; a run places its groups by what it measures",
        ]
    )


def _cell(value: Any) -> str:
    return one_line(with_times(str(value or "")), _LONGEST_CELL)


def _budget_cells(budget: Mapping[str, Any]) -> list[str]:
    memory, threads, bandwidth = budget["memory"], budget["gpu_threads"], budget["bandwidth"]
    return [
        "" if memory is None else size_text(memory),
        "" if threads is None else str(threads),
        "" if bandwidth is None else f"{size_text(bandwidth)}/s",
    ]


def _state(row: Mapping[str, Any]) -> str:
    """Status of a run or training, and whether it only seems to run."""
    return "running (no live driver)" if row["status"] == "running" and row.get("driver") is None else row["status"]
