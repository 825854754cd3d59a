"""What a run came to, as plain text for a terminal: at its end, and whenever ``alphasmith show`` is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphasmith.dashboards.text import is_outside, verdict_of_refinement
from alphasmith.dashboards.verdict import advice, formats_verdict, run_verdict, swept_alpha, whole_model
from alphasmith.objectives.sites.coverage import Coverage, CoveredWeight, percent
from alphasmith.objectives.text import (
    counted,
    duration,
    listed,
    number,
    size_text,
    told_apart,
    visible,
    with_times,
)
from alphasmith.search.cli._layout import GAP, output_width, sentences, table
from alphasmith.search.cli.answers import trainings_text
from alphasmith.search.cli.watching.status import progress_facts, progress_lines

if TYPE_CHECKING:
    from alphasmith.search.cli.commands import ShownRun
    from alphasmith.search.launch.recorder import RunResult
    from alphasmith.storage.output.entries import PayloadEntry
    from alphasmith.storage.output.manifest import Manifest
    from alphasmith.storage.runs.entries import Group, SearchFacts, SiteRecord

#: Sites shown before a long table is cut; ``--json`` and the report have all of them.
MOST_SITES = 40
#: Layers named per reason why they stay float; ``--json`` has all of them.
MOST_LAYERS = 6
#: Longest name of such a layer [characters].
_LAYER = 34
#: Reasons why sites are not folded.
_MOST_REASONS = 8
#: Room that names of sites get before a column is left out, and the least [characters].
_NAME_WIDTH, _SHORTEST = 28, 8
_NUMBERS = re.compile(r"\d+")
#: Alphas of a site that are written out; of more, the smallest and the largest.
_MOST_ALPHAS = 4


def near(folder: Path) -> Path:
    """A folder relative to the working directory."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # Ray removes the folder of a job when the job lets go of the cluster
        return folder
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def result_text(result: RunResult, width: int | None = None) -> str:
    """The end of ``alphasmith run``.

    Args:
        result: The run.
        width: Most characters of a line; None: those of standard output.
    """
    return finished_text(result.manifest, len(result.trials), result.storage, result.folder.resolve(), width)


def run_text(shown: ShownRun, width: int | None = None) -> str:
    """``alphasmith show RUN``: of a finished run what ``run`` printed at its end, else what is known so far.

    Args:
        shown: The run.
        width: Most characters of a line; None: those of standard output.
    """
    width = width or output_width()
    record = shown.look.record
    if shown.manifest is not None:
        told = finished_text(shown.manifest, shown.trials, shown.storage, Path(record.folder), width)
        return _blocks([told], [trainings_text(shown.trainings)] if shown.trainings else [])
    facts = {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "reason": record.reason,
        "scheme": record.scheme,
        "scope": record.scope,
        "created": record.created.isoformat(timespec="seconds"),
        "finished": "" if record.finished is None else record.finished.isoformat(timespec="seconds"),
        "folder": record.folder,
        "trials": shown.trials,
    }
    lines = [f"{key}: {with_times(str(value))}" for key, value in facts.items() if value != ""]
    if record.status != "finished":
        lines += progress_lines(progress_facts(shown.look))
    lines.append(f"hardware: {record.hardware.get('explanation', '')}")
    if record.status == "finished":
        lines.append("its manifest.json cannot be read from here: the whole model's figures and sizes are in it")
    return _blocks(
        sentences([*lines, *_refinement(record.refinement)], width),
        [sites_table(shown.sites, width, weighted=_weighted(record.config))],
        [groups_table(shown.groups, width)],
    )


def finished_text(manifest: Manifest, trials: int, storage: str, folder: Path, width: int | None = None) -> str:
    """The verdict, the whole model, the sites, what is left to do, where everything lies.

    Args:
        manifest: Of the run.
        trials: All of its trials.
        storage: Address of its database, passwords masked.
        folder: Its output folder, absolute.
        width: Most characters of a line; None: those of standard output.
    """
    width = width or output_width()
    content = manifest.model_dump(mode="json")
    output, refinement, kept = content["output"], content["refinement"], manifest.output.kept
    reasons = [f"kept {kept}: {g.reason}" for g in manifest.guard if g.proposed == "ours"] if kept != "ours" else []
    told = {Coverage(weights=tuple(CoveredWeight(**w.model_dump()) for w in manifest.weights)).account()}
    told.update(guard.reason for guard in manifest.guard)
    rest = [*advice(content), *(note for note in manifest.notes if note not in told)]
    return _blocks(
        sentences([line for line in (run_verdict(content), formats_verdict(content)) if line], width),
        [model_table(output, width), *sentences([swept_alpha(output), *reasons, *_refinement(refinement)], width)],
        [sites_table(manifest.sites, width, weighted=_weighted(manifest.config))],
        [groups_table(manifest.groups, width)],
        sentences(["what is left to do, and what to know:", *(f"- {line}" for line in rest)] if rest else [], width),
        sentences(_facts(manifest, trials, storage, folder), width),
    )


def _weighted(config: Mapping[str, Any]) -> bool:
    """Whether losses of sites are in units of the model's output, by a configuration on record."""
    search = config.get("search")
    return isinstance(search, Mapping) and search.get("objective") == "output" and search.get("scope") == "site"


def _blocks(*blocks: Sequence[str]) -> str:
    """Blocks of lines with an empty line between them; empty ones left out."""
    filled = ("\n".join(filter(None, block)) for block in blocks)
    return "\n\n".join(filter(None, filled))


def _facts(manifest: Manifest, trials: int, storage: str, folder: Path) -> list[str]:
    """How the run went, a line each."""
    run, proof, sites = manifest.run, manifest.proof, manifest.sites
    modes = ", ".join(f"{sum(s.mode == m for s in sites)} {m}" for m in ("fold", "explicit", "left"))
    searched = sum(bool(s.labels) for s in sites)
    name = f" ({run.name})" if run.name else ""
    return [
        f"sites: {len(sites)} ({modes}), {searched} searched, {trials} trials",
        *_noise_model([site.facts for site in sites if site.facts is not None]),
        f"hardware: {manifest.hardware.explanation}",
        "equivalence: nothing was folded"
        if proof is None
        else f"equivalence: relative output error {proof.error:.2g} on fresh data "
        f"({counted(proof.batches, 'batch')}, {counted(max(len(proof.outputs), 1), 'output')}, tolerance {proof.tolerance:.0e})",
        *_weights(manifest),
        _sizes(manifest.payload),
        f"memory: {size_text(manifest.memory.predicted)} predicted, {size_text(manifest.memory.measured or 0)} measured",
        f"run {run.id}{name}, {manifest.scheme.name}, finished {run.finished:%Y-%m-%d %H:%M:%S} UTC, in {storage}",
        f"results in {near(folder)}: smoothed/, quantized/, report.html, manifest.json",
    ]


def _weights(manifest: Manifest) -> list[str]:
    """How much of the model is quantized; what stays float, by reason."""
    found = Coverage(weights=tuple(CoveredWeight(**weight.model_dump()) for weight in manifest.weights))
    if not found.weights:  # not recorded
        return []
    quantized = len(found.weights) - len(found.left)
    lines = [f"weights: {percent(found.quantized)} quantized ({quantized} of {len(found.weights)})"]
    for reason, share, layers in found.reasons():
        lines.append(f"  {percent(share)} float: {listed(told_apart(layers, _LAYER), MOST_LAYERS)}: {reason}")
    return lines


def _sizes(payload: PayloadEntry) -> str:
    """Size of the whole model before and after, and what the quantized part of it became."""
    parts = f"quantized weights {size_text(payload.weights_float)} -> {size_text(payload.weights_quantized)}"
    after = payload.weights_quantized + payload.other
    if payload.model_float is None or payload.model_given is None:
        return f"size: {parts}, other {size_text(payload.other)}"
    given = payload.model_given
    share = f"{after / max(payload.model_float, 1):.2g} of the whole model in float32"
    if given != payload.model_float:
        share += f", {after / max(given, 1):.2g} of it as it came"
    return f"size: {size_text(given)} -> {size_text(after)} ({share}): {parts}, other {size_text(payload.other)}"


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column of the sites' table.

    Attributes:
        heading: Its heading.
        cell: Its text at a site.
        rank: The higher, the sooner it is left out where there is no room; 0: never.
    """

    heading: str
    cell: Callable[[SiteRecord], str]
    rank: int = 0


def _held_out(name: str) -> Callable[[SiteRecord], str]:
    """A loss on held-out rows, empty where there is none."""

    def cell(site: SiteRecord) -> str:
        value = None if site.losses is None else getattr(site.losses.held_out, name)
        return "" if value is None else number(value)

    return cell


def _single_alpha(site: SiteRecord) -> str:
    return "" if site.losses is None else f"{site.losses.held_out.best_single_alpha:.2f}"


def _share(site: SiteRecord) -> float | None:
    """Its part of the output error, predicted where it was, else measured; None where neither is known."""
    return site.share_measured if site.share is None else site.share


def _share_text(site: SiteRecord) -> str:
    share = _share(site)
    return "" if share is None else f"{100 * share:.1f} %"


def _choices(site: SiteRecord) -> str:
    """What was chosen, e.g. ``.55 .60 .71 .85 shift x1.1``: the alphas of its groups, a shift, another range."""
    alphas = [f"{group.alpha:.2f}".removeprefix("0") for group in site.groups if group.alpha is not None]
    told = list(dict.fromkeys(alphas))
    if len(told) > _MOST_ALPHAS:
        told = [f"{min(told, key=float)} to {max(told, key=float)}"]
    parts = [" ".join(told) if told else "none" if site.groups else ""]
    parts += ["shift"] if site.shift else []
    parts += [f"x{number(site.range_factor)}"] if site.range_statistic != "absmax" else []
    return " ".join(filter(None, parts))


_CHOSEN = "alphas, shift, range"
_COLUMNS = (
    _Column(heading="treated", cell=lambda site: site.mode, rank=6),
    _Column(heading="channels", cell=lambda site: str(site.channels), rank=7),
    _Column(heading="share", cell=_share_text),
    _Column(heading="none", cell=_held_out("identity"), rank=1),
    _Column(heading="alpha 0.5", cell=_held_out("alpha_half"), rank=2),
    _Column(heading="single", cell=_held_out("best_single")),
    _Column(heading="alpha", cell=_single_alpha, rank=4),
    _Column(heading="ours", cell=_held_out("ours")),
    _Column(heading="limit", cell=_held_out("limit"), rank=5),
    _Column(heading=_CHOSEN, cell=_choices, rank=3),
)


def sites_table(sites: Sequence[SiteRecord], width: int | None = None, *, weighted: bool = False) -> str:
    """Held-out losses per site and what was chosen there, those of the largest share of the output error first.

    Args:
        sites: In forward order, which stays where no shares are known.
        width: Most characters of a line; None: those of standard output. Where it is short, columns are left out.
        weighted: Whether the losses weigh rows and outputs by what the model's output feels (``search.objective``).

    Returns:
        Empty without sites; sites that are not folded follow with their reasons.
    """
    width = width or output_width()
    shares = [share for site in sites if (share := _share(site)) is not None]
    found = [site for site in sites if site.losses is not None or _share(site) is not None]
    if shares:
        found.sort(key=lambda site: -(_share(site) or 0.0))
    shown = found[:MOST_SITES]
    names = [visible(site.name) for site in shown]
    filled = [column for column in _COLUMNS if any(map(column.cell, shown))]
    columns = _fitting(filled, shown, names, width)
    cells = [[column.cell(site) for column in columns] for site in shown]
    room = width - _room_of(columns, shown)
    short = told_apart(names, room)
    order = "sites by share of the output error" if shares else "sites"
    lines = []
    if shown:
        body = [[name, *row] for name, row in zip(short, cells, strict=True)]
        losses = f"{'weighted' if weighted else 'relative'} squared error on held-out rows"
        title = f"{order}; {losses}" if any(site.losses is not None for site in shown) else order
        headings = ["site", *(column.heading for column in columns)]
        lines += [*sentences([title], width), table(headings, body, width=width, texts=(_CHOSEN,))]
    if len(found) > MOST_SITES:
        lines.append(f"... and {len(found) - MOST_SITES} more sites, see the report")
    return "\n".join([*lines, *sentences(_reasons(sites), width)])


def _fitting(
    columns: Sequence[_Column], sites: Sequence[SiteRecord], names: Sequence[str], width: int
) -> list[_Column]:
    """The columns that leave enough room for the names."""
    needed = min(max([_SHORTEST, *map(len, names)]), _NAME_WIDTH)
    kept = list(columns)
    while width - _room_of(kept, sites) < needed and (least := max(kept, key=lambda column: column.rank)).rank:
        kept.remove(least)
    return kept


def _room_of(columns: Iterable[_Column], sites: Sequence[SiteRecord]) -> int:
    """Characters that columns take with the gaps before them."""
    return sum(GAP + max([len(column.heading), *(len(column.cell(site)) for site in sites)]) for column in columns)


def _reasons(sites: Iterable[SiteRecord]) -> list[str]:
    """Why sites are not folded, those of one reason in a line; reasons that differ in numbers only are one."""
    reasons: dict[str, tuple[str, list[str]]] = {}
    for site in sites:
        if site.reason:
            why = f"{site.mode}: {site.reason}"
            reasons.setdefault(_NUMBERS.sub("0", why), (why, []))[1].append(site.name)
    lines = [f"{listed(names, 1)} {why}" for why, names in reasons.values()]
    more = len(lines) - _MOST_REASONS
    return [*lines[:_MOST_REASONS], *([f"... and {more} more reasons, see the report"] if more > 0 else [])]


def model_table(output: dict[str, Any], width: int | None = None) -> str:
    """Whole-model figures: output loss on held-out data and the task metric under every variant.

    Args:
        output: The manifest's ``output`` as JSON values.
        width: Most characters of a line; None: those of standard output.
    """
    found = whole_model(output)
    if not found.rows:
        return ""
    headings = ["whole model", *(column.heading for column in found.columns)]
    rows = [[name, *values] for name, values in found.rows]
    return table(headings, rows, width=width or output_width(), wrapped=True)


def groups_table(groups: Sequence[Group], width: int | None = None) -> str:
    """Groups over the whole model (scope ``model``) and the alphas that won; empty without groups."""
    body = [
        [
            str(group.index),
            str(group.size),
            f"{group.magnitude:.4g}",
            f"{group.low:.3f} to {group.high:.3f}",
            "" if group.alpha is None else f"{group.alpha:.3f}{_beyond(group)}",
        ]
        for group in groups
    ]
    headings = ("group", "channels", "magnitude", "range", "alpha")
    return table(headings, body, title="groups of the whole model", width=width or output_width()) if body else ""


def _beyond(group: Group) -> str:
    return " (outside)" if is_outside(group.alpha, group.low, group.high) else ""


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
    """What the output decided after the sites, and every study of it in a line where one changed something."""
    if entry is None:
        return []
    found = (entry.get("steps") or ()) if entry.get("accepted") else ()
    steps = [f"  {step['name']}: {verdict_of_refinement(step)}" for step in found]
    return [f"refinement at the output: {verdict_of_refinement(entry)}", *steps]
