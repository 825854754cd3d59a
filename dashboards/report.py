"""One self-contained HTML page that explains a run: no network, no rights, readable on a phone and on paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from alphasmith.dashboards._page import Section, render, shown
from alphasmith.dashboards.checked_frames import checked_groups, checked_sites, geometric_mean, ratio
from alphasmith.dashboards.figures.formats import loss_against_cost
from alphasmith.dashboards.figures.sites import (
    alpha_heatmap,
    alphas_by_group,
    gain_by_site,
    losses_by_site,
    shares_of_output,
    trial_history,
)
from alphasmith.dashboards.figures.training import training_curve
from alphasmith.dashboards.site_table import BASELINES, SITE_TABLE, site_rows
from alphasmith.dashboards.text import Facts, facts_of, value_text, verdict_of_refinement
from alphasmith.dashboards.verdict import (
    OUTPUT_COLUMNS,
    VARIANT_NAMES,
    advice,
    format_grid,
    formats_verdict,
    run_verdict,
    swept_alpha,
    training_verdict,
    whole_model,
)
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.text import duration, listed, number
from alphasmith.storage.output.manifest import Manifest
from alphasmith.storage.runs.data_frames import AT_OUTPUT, WHOLE_MODEL, groups_frame, sites_frame, trials_frame
from alphasmith.storage.runs.records import TrialRecord

#: Key of a variant's figure -> that of its loss in a search over the whole model.
_SEARCHED = {"naive": "identity"}
_CAPTIONS = {
    "formats": "Every mark is a choice of formats for all sites, measured on the tuning samples; lower and further left is better. Of the front "
    "any point can be written (alphasmith formats); the diamond is the model in this folder, a cross what was predicted.",
    "training": "The compressed model trained further through its quantizers. The first point is the untrained model; what is kept is "
    "decided on held-out samples, beyond their paired standard error.",
    "shares": "What quantizing one site adds to the loss at the model's output, predicted from gradients on calibration samples, as a part "
    "of the sum over all sites. A diamond is the loss measured with only that site quantized, over the same sum. Smoothing pays where "
    "the bars are long.",
    "losses": "Each line spans the losses of one site; further left (or down) is better. Scales differ between sites "
    "because every loss is relative to that site's own output.",
    "gain": "1 is the best alpha that the whole site could share. Green marks are the limit of a free scale per "
    "channel: what no choice of alphas can beat by much. Sites that were left alone are not shown.",
    "alphas": "A bar is the range a group was given from its magnitude and the hardware; the dot is the alpha that won. An open diamond "
    "is an alpha outside that range: a baseline won, or the refinement at the output moved it. A "
    "group's own factor, where it has one, stands beside the dot or shows when pointed at: its scales are that much larger than "
    "the alpha alone would make them.",
    "heatmap": "One row per site, one column per group, from small to large activations.",
    "history": "The searches start with the baselines, then the optimum of the noise model, then sampled trials.",
}


#: Manifest key, heading, explanation.
_SECTIONS = (
    (
        "hardware",
        "Ranges and hardware",
        (
            "A group's range follows its magnitude: 0.1 to 0.5 for the smallest values, 0.5 to 0.9 for the largest. Where "
            "the machine that will run the model is short of memory, threads or bandwidth, the lower ends rise by the "
            "scarcity rho (0: plenty, 1: none) times the width of the range."
        ),
    ),
    (
        "proof",
        "Proof of equivalence",
        "The float model before and after folding, compared on data that neither calibration nor search has seen.",
    ),
    (
        "training",
        "Training",
        "Of the compressed model, further than the run. All else on this page is about the run; its proof does not apply here.",
    ),
    (
        "guard",
        "Guard",
        "Every winner is scored again on held-out data against its baselines and loses to them if it is worse.",
    ),
    (
        "payload",
        "Payload",
        "What the weights cost before and after; scales, norms, biases and skipped layers are counted apart.",
    ),
    ("skipped", "Left in float", "Operators that are not quantized, and why."),
    ("memory", "Memory", "Peak memory of the search: predicted before the run, measured during it."),
    ("seeds", "Seeds", "With the same inputs and seeds one worker finds the same result."),
    ("versions", "Versions", "An alpha means nothing without the code that made it."),
    ("config", "Configuration", "Everything that was asked for, defaults included."),
    ("artifacts", "Files", "What was written, with the digests to check it by."),
)


def render_report(manifest: Manifest, trials: Iterable[TrialRecord]) -> str:
    """The report of a run as one HTML document, see :func:`render_page`.

    Args:
        manifest: Of the run; its sites and groups are shown.
        trials: All trials of the run.

    Raises:
        NonFiniteError: A trial has an infinite loss.
    """
    sites, groups = sites_frame(manifest.sites), groups_frame(manifest.sites, manifest.groups)
    return render_page(manifest.model_dump(mode="json"), sites, groups, trials_frame(trials))


def render_page(
    manifest: Mapping[str, Any], sites: pd.DataFrame, groups: pd.DataFrame, trials: pd.DataFrame | None = None
) -> str:
    """A report as one HTML document.

    Everything the reader's browser needs is in the page (plotly.js included, about 5 MB); its policy forbids every
    request and every script but the page's own. All texts are escaped, passwords in addresses are masked.

    Args:
        manifest: The run's manifest as a mapping. Every key is optional; what is missing is left out of the page.
        sites: Site frame (columns in ``checked_frames``), held-out losses (relative squared error). Optional columns:
            ``reason``, ``winner`` and ``stopped``, and what was chosen, see ``text.choices_of_site``.
        groups: Group frame.
        trials: Trial frame of one study, or of all sites with a ``site`` column.

    Returns:
        The document, UTF-8 when encoded.

    Raises:
        InputError: A frame lacks a column or holds text where a number belongs.
        NonFiniteError: A frame holds an infinite loss.
    """
    if not isinstance(manifest, Mapping):
        raise InputError("manifest", "is not a mapping", "give the parsed manifest.json")
    site_frame = checked_sites(sites)
    group_frame = checked_groups(groups)
    output = manifest.get("output") or {}
    figures = [
        shown("shares", _CAPTIONS["shares"], shares_of_output(site_frame)),
        shown("losses", _CAPTIONS["losses"], losses_by_site(site_frame)),
        shown("gain", _CAPTIONS["gain"], gain_by_site(site_frame)),
        shown("alphas", _CAPTIONS["alphas"], alphas_by_group(group_frame)),
        shown("heatmap", _CAPTIONS["heatmap"], alpha_heatmap(group_frame)),
    ]
    if trials is not None:
        # Trials of the refinement have losses of the model's output, not of a site.
        of_sites = trials[~trials["site"].isin(AT_OUTPUT)] if "site" in trials.columns else trials
        figures.append(shown("history", _CAPTIONS["history"], trial_history(of_sites)))
    if manifest.get("formats"):
        figures.insert(0, shown("formats", _CAPTIONS["formats"], loss_against_cost(manifest["formats"])))
    if manifest.get("training"):
        figures.insert(0, shown("training", _CAPTIONS["training"], training_curve(manifest["training"])))
    rows = site_rows(site_frame)
    return render(
        "report.html",
        title=_title(manifest),
        notes=[value_text(note) for note in manifest.get("notes") or ()],
        verdict=training_verdict(manifest) or run_verdict(manifest),
        sentence=_at_sites(site_frame, output),
        tiles=_tiles(site_frame, manifest, trials),
        asked=_asked(manifest, site_frame),
        metrics=_metrics(output),
        advice=advice(manifest),
        refinement=_refinement(manifest.get("refinement")),
        formats=_formats(manifest),
        figures=figures,
        columns=SITE_TABLE,
        rows=rows,
        sections=_sections(manifest),
    )


def _title(manifest: Mapping[str, Any]) -> str:
    run, training = manifest.get("run") or {}, manifest.get("training") or {}
    name = run.get("name") or run.get("id")
    of_run = f"run {name}" if name else "run"
    return f"Alphasmith training {training['id']} of {of_run}" if training else f"Alphasmith {of_run}"


def _searched(sites: pd.DataFrame) -> pd.DataFrame:
    return sites[(sites["mode"] != "left") & (sites["ours"] > 0)]


def _at_sites(sites: pd.DataFrame, output: Mapping[str, Any]) -> str:
    """The result at the sites in one or two sentences, with numbers. Ratios are geometric means over the searched sites."""
    done = _searched(sites)
    if done.empty:
        return _at_output(output.get("held_out") or {})
    against = [
        (label, geometric_mean(ratio(done["ours"], done[column])))
        for column, label in (
            ("identity", "the loss without smoothing"),
            ("alpha_half", "that at alpha 0.5"),
            ("best_single", "that at the best single alpha"),
        )
    ]
    parts = [f"{100 * value:.3g} % of {label}" for label, value in against if math.isfinite(value)]
    where = "Its one searched site has" if len(done) == 1 else f"Its {len(done)} searched sites have"
    mean = "" if len(done) == 1 else " (geometric mean)"
    text = f"{where} a held-out quantization loss of {number(geometric_mean(done['ours']))}{mean}"
    text += f": {_listed(parts)}."
    if "winner" in done.columns and done["winner"].notna().any():
        kept = int(done["winner"].isin(BASELINES).sum())
    else:
        kept = int((done["ours"] >= done["best_single"] * (1 - 1e-9)).sum())
    if kept:
        text += f" {kept} of them kept a baseline, because on held-out data no grouping was better."
    return text


def _at_output(losses: Mapping[str, Any]) -> str:
    """The result where only the output of the whole model was scored."""
    ours = losses.get("ours")
    if ours is None:
        return "No site has been searched: nothing could be folded, or the run has not got that far."
    parts = [
        f"{100 * ours / losses[key]:.3g} % of {label}"
        for key, label in (
            ("identity", "the loss without smoothing"),
            ("alpha_0.5", "that at alpha 0.5"),
            ("best_single", "that at the best single alpha"),
        )
        if losses.get(key)
    ]
    return f"The model has a held-out quantization loss of {number(ours)} at its output: {_listed(parts)}."


def _listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts) or "no baseline was scored"


def _tiles(sites: pd.DataFrame, manifest: Mapping[str, Any], trials: pd.DataFrame | None) -> list[tuple[str, str]]:
    done = _searched(sites)
    tiles: list[tuple[str, str]] = []
    for column, label in (("identity", "of the loss without smoothing"), ("best_single", "of the best single alpha")):
        value = geometric_mean(ratio(done["ours"], done[column]))
        if math.isfinite(value):
            tiles.append((f"{100 * value:.3g} %", label))
    gap = done["best_single"] - done["limit"]
    closed = ((done["best_single"] - done["ours"]) / gap.where(gap > 0)).median()
    if math.isfinite(closed):
        tiles.append((f"{100 * closed:.0f} %", "of the way from best single alpha to the limit (median site)"))
    folded = int((sites["mode"] == "fold").sum())
    tiles.append((f"{folded} of {len(sites)}", "sites folded: no work at run time"))
    return [*tiles, _effort(sites, manifest, trials)]


def _effort(sites: pd.DataFrame, manifest: Mapping[str, Any], trials: pd.DataFrame | None) -> tuple[str, str]:
    """Time of all searches and their trials: at the sites, over the whole model, and of sweep and refinement at the output."""
    seconds, count = float(sites["seconds"].sum()), int(pd.to_numeric(sites["trials"]).sum())
    if trials is not None and {"site", "seconds"} <= set(trials.columns):
        whole = trials[trials["site"] == WHOLE_MODEL]
        seconds, count = seconds + float(whole["seconds"].sum()), count + len(whole)
    sweep = (manifest.get("output") or {}).get("sweep")
    parts_at_output = [part for part in (sweep, manifest.get("refinement")) if part]
    at_output = sum(float(part.get("seconds") or 0) for part in parts_at_output)
    total = seconds + at_output
    count += sum(int(part.get("trials") or 0) for part in parts_at_output)
    parts = f" ({duration(at_output)} of it at the output)" if at_output else ""
    return duration(total), f"of search{parts}, {count} trials"


def _asked(manifest: Mapping[str, Any], sites: pd.DataFrame) -> Facts:
    wanted = {key: manifest.get(key) for key in ("run", "model", "data_digest", "scheme", "conventions", "scope")}
    facts = facts_of(wanted) + facts_of({"search_space_digest": manifest.get("space_hash")})
    # The manifest has the digests in full; here they only need to tell two runs apart.
    facts = [(label, f"{text[:16]}…" if "digest" in label and len(text) > 17 else text) for label, text in facts]
    return [*facts, ("sites", f"{len(sites)} with {int(sites['channels'].sum()):,} channels")]


def _metrics(output: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whole-model results: one row per loss or metric, only the columns that some row has."""
    found, kept = whole_model(output), str(output.get("kept") or "ours")
    searched = [(label, output.get(split)) for split, label in (("held_out", "held-out"), ("search", "calibration"))]
    keys = [_SEARCHED.get(column.key, column.key) for column in found.columns or OUTPUT_COLUMNS]
    rows = list(found.rows)
    rows += [
        (f"searched loss, {label}", tuple(value_text(of.get(key)) for key in keys)) for label, of in searched if of
    ]
    if not rows:
        return None
    return {
        "columns": [column.heading for column in found.columns or OUTPUT_COLUMNS],
        "rows": rows,
        "swept": swept_alpha(output),
        "kept": "" if kept == "ours" else VARIANT_NAMES.get(kept, kept),
    }


def _refinement(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The sentence and the facts of the refinement; sites that changed alike share a line."""
    if not entry:
        return None
    sentence = verdict_of_refinement(entry)
    alike: dict[str, list[str]] = {}
    for site, change in (entry.get("changed") or {}).items():
        alike.setdefault(str(change), []).append(str(site))
    facts = facts_of({"reason": entry.get("reason")}) if entry.get("accepted") else []  # the sentence has it otherwise
    facts += [(f"study of {step['name']}", verdict_of_refinement(step)) for step in entry.get("steps") or ()]
    facts += [(f"alphas of {kind}", f"{delta:+.3f}") for kind, delta in (entry.get("deltas") or {}).items()]
    facts += [(f"now {change}", listed(sites, 8)) for change, sites in alike.items()]
    facts += facts_of({key: entry.get(key) for key in ("trials", "seconds")})
    return {"sentence": f"{sentence[0].upper()}{sentence[1:]}.", "facts": facts}


def _formats(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sentence, the front as a table, and how it came about."""
    entry = manifest.get("formats")
    if not entry:
        return None
    columns, rows = format_grid(entry)
    told = {
        key: entry.get(key)
        for key in ("reason", "target", "limit", "before", "after", "standard_error", "passes", "seconds")
    }
    return {"sentence": f"{formats_verdict(manifest)}.", "columns": columns, "rows": rows, "facts": facts_of(told)}


def _decisions(guard: Sequence[Mapping[str, Any]]) -> Facts:
    return [(str(entry.get("site") or "whole model"), value_text(entry.get("reason"))) for entry in guard]


def _trained(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A training without what the figure shows and with numbers of samples in place of long lists."""
    if not entry:
        return None
    told = {key: value for key, value in entry.items() if key not in ("curve", "classes")}
    return told | {key: f"{len(entry[key])} samples, numbered in manifest.json" for key in ("trained", "held_out")}


def _sections(manifest: Mapping[str, Any]) -> list[Section]:
    sections = []
    for key, heading, intro in _SECTIONS:
        facts = (
            _decisions(manifest.get(key) or ())
            if key == "guard"
            else facts_of(_trained(manifest.get(key)))
            if key == "training"
            else facts_of(manifest.get(key), unit="bytes" if key in {"payload", "memory"} else "")
        )
        if facts:
            sections.append(Section(key=key, heading=heading, intro=intro, facts=facts))
    return sections
