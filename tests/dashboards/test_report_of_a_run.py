"""Every number and figure on the report of a run is what the database has, read here in plain SQL."""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alphasmith.dashboards.verdict import run_verdict
from alphasmith.objectives.text import duration, number
from alphasmith.search.cli import tables as texts
from alphasmith.storage.output.manifest import Manifest
from alphasmith.storage.runs.data_frames import AT_OUTPUT
from tests.support.run_cases import Mlp, launch, rows, seeded, vectors, with_loud_channels

_LOSSES = {
    "no smoothing": "identity",
    "alpha 0.5": "alpha_0.5",
    "best single alpha": "best_single",
    "per-channel limit": "limit",
    "searched alphas": "ours",
}
_TRIALS = (
    "SELECT study_name, number, value, (SELECT value_json FROM trial_user_attributes u WHERE u.trial_id = t.trial_id AND "
    "key = 'candidate') FROM trials t JOIN studies USING (study_id) JOIN trial_values USING (trial_id)"
)


@dataclass(frozen=True)
class Reported:
    """A run as its database and its output folder have it, and its page."""

    page: str
    manifest: dict[str, Any]
    sites: list[dict[str, Any]]
    refinement: dict[str, Any]
    trials: list[tuple[str, int, float, str]]
    all_trials: int

    @property
    def losses(self) -> list[dict[str, float]]:
        """Held-out losses of the sites, in forward order."""
        return [site["losses"]["held_out"] for site in self.sites]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All groups."""
        return [group for site in self.sites for group in site["groups"]]

    @property
    def beyond(self) -> list[dict[str, Any]]:
        """Groups whose alpha lies outside their range."""
        return [g for g in self.groups if g["alpha"] is not None and not g["low"] <= g["alpha"] <= g["high"]]

    def figure(self, key: str) -> dict[str | None, dict[str, Any]]:
        """Traces of a figure by name."""
        found = re.search(rf'data-target="figure-{key}">(.*?)</script>', self.page, flags=re.DOTALL)
        assert found is not None
        return {trace.get("name"): trace for trace in json.loads(found[1])["data"]}

    def facts(self, section: str) -> dict[str, str]:
        """Labels and texts of a section."""
        part = re.search(rf'id="{section}">(.*?)</(?:section|details)>', self.page, flags=re.DOTALL)
        assert part is not None
        return {html.unescape(a): html.unescape(b) for a, b in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", part[1])}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """The first run of a few models at which the guard decided, and an alpha lies outside its range."""
    for seed in range(12):
        found = _made(tmp_path_factory.mktemp("reported"), seed)
        if found.manifest["guard"] and found.beyond:
            return found
    raise RuntimeError("the guard decided nothing at any model, or every alpha lies inside its range")


def _made(folder: Path, seed: int) -> Reported:
    # Strict ranges leave the best single alpha outside at some groups.
    values = {
        "groups": {"ranges": "strict"},
        "data": {"held_out": 16},
        "search": {"trials": 8, "refine": True, "refine_trials": 5},
    }
    result = launch(folder, with_loud_channels(seeded(Mlp, seed)), vectors(), values)
    database = folder / "runs.db"
    ((refinement,),) = rows(database, "SELECT refinement FROM alphasmith_run")
    ((count,),) = rows(database, "SELECT count(*) FROM trials")
    return Reported(
        page=(result.folder / "report.html").read_text(),
        manifest=json.loads((result.folder / "manifest.json").read_text()),
        sites=[json.loads(entry) for (entry,) in rows(database, "SELECT entry FROM alphasmith_site ORDER BY position")],
        refinement=json.loads(refinement),
        trials=[(study, n, loss, json.loads(kind)) for study, n, loss, kind in rows(database, _TRIALS)],
        all_trials=count,
    )


def test_the_first_sentence(reported: Reported) -> None:
    baselines = sum(site["winner"] in ("identity", "alpha_0.5", "best_single") for site in reported.sites)
    assert (f"{baselines} of them kept a baseline" in reported.page) == (baselines > 0)
    mean = math.exp(statistics.fmean(math.log(at["ours"]) for at in reported.losses))
    page = re.sub(r"</?span>", "", reported.page)
    assert f"a held-out quantization loss of {number(mean)} (geometric mean)" in page


def test_the_verdict_is_that_of_the_terminal(reported: Reported) -> None:
    (lead,) = re.findall(r'<p class="lead">(.*?)</p>', reported.page)
    assert html.unescape(re.sub(r"</?span>", "", lead)) == f"{run_verdict(reported.manifest)}."
    told = texts.finished_text(Manifest.model_validate_json(json.dumps(reported.manifest)), 0, "", Path("out"), 10_000)
    assert told.splitlines()[0] == run_verdict(reported.manifest)


def test_the_tiles(reported: Reported) -> None:
    tiles = {
        label.split(",")[0]: value
        for value, label in re.findall(r"<li><strong>(.*?)</strong>(.*?)</li>", reported.page)
    }
    for column, label in (("identity", "of the loss without smoothing"), ("best_single", "of the best single alpha")):
        mean = math.exp(statistics.fmean(math.log(at["ours"] / at[column]) for at in reported.losses))
        assert tiles[label] == f"{100 * mean:.3g} %"
    closed = statistics.median(
        (at["best_single"] - at["ours"]) / (at["best_single"] - at["limit"])
        for at in reported.losses
        if at["best_single"] > at["limit"]
    )
    assert tiles["of the way from best single alpha to the limit (median site)"] == f"{100 * closed:.0f} %"
    folded = sum(site["mode"] == "fold" for site in reported.sites)
    assert tiles["sites folded: no work at run time"] == f"{folded} of {len(reported.sites)}"
    # The refinement is part of the search: it can take most of its time.
    refining = reported.refinement["seconds"] + reported.manifest["output"]["sweep"]["seconds"]
    total = sum(site["seconds"] for site in reported.sites) + refining
    assert tiles[f"of search ({duration(refining)} of it at the output)"] == duration(total)
    assert f"{reported.all_trials} trials</li>" in reported.page


def test_the_table_of_sites(reported: Reported) -> None:
    table = re.search(r'<table class="sortable">.*?<tbody>(.*?)</tbody>', reported.page, flags=re.DOTALL)
    assert table is not None
    lines = re.findall(r"<tr>(.*?)</tr>", table[1], flags=re.DOTALL)
    assert len(lines) == len(reported.sites)
    for line, site, at in zip(lines, reported.sites, reported.losses, strict=True):
        cells = re.findall(r'<td data-key="([^"]*)"', line)
        gain = at["ours"] / at["best_single"]
        expected = [at[k] for k in ("identity", "alpha_0.5", "best_single", "best_single_alpha", "ours", "limit")]
        assert cells[:4] == [str(site["position"]), site["name"], "folded", str(site["channels"])]
        assert [float(cell) for cell in cells[4:]] == [
            *(*expected, gain, site["share"], site["trials"], site["seconds"])
        ]
        shown = re.findall(r"<td[^>]*>([^<]*)", line)
        assert [number(value) for value in (*expected, gain)] == shown[4:11]
        coefficients = {(g["alpha"], g["beta"], g["offset"]) for g in site["groups"]}
        told = html.unescape(re.sub(r"<.*?>", " ", line))
        assert (f"K {len(site['groups'])}" in told) == (len(coefficients) > 1)
        assert ("one alpha" in told) == (len(coefficients) == 1 and None not in {g["alpha"] for g in site["groups"]})


def test_the_figures_of_losses_and_gains(reported: Reported) -> None:
    drawn = reported.figure("losses")
    for name, key in _LOSSES.items():
        assert drawn[name]["x"] == pytest.approx([at[key] for at in reported.losses], rel=1e-3)
    drawn = reported.figure("gain")
    gains = [at["ours"] / at["best_single"] for at in reported.losses]
    assert [1 + x for x in drawn["searched alphas"]["x"]] == pytest.approx(gains, rel=1e-3)
    limits = [at["limit"] / at["best_single"] for at in reported.losses]
    assert drawn["per-channel limit"]["x"] == pytest.approx(limits, rel=1e-3)


def test_the_figures_of_alphas(reported: Reported) -> None:
    drawn = reported.figure("alphas")
    beyond = reported.beyond
    outside = drawn.pop(f"outside its range ({len(beyond)} of {len(reported.groups)})")
    assert sorted(outside["y"]) == pytest.approx(sorted(g["alpha"] for g in beyond), rel=1e-3)
    inside = [g["alpha"] for g in reported.groups if g not in beyond and g["alpha"] is not None]
    assert sorted(y for y in drawn["chosen alpha"]["y"] if y is not None) == pytest.approx(sorted(inside), rel=1e-3)
    ends = sorted(y for y in drawn["range"]["y"] if y is not None)
    assert ends == pytest.approx(sorted(g[end] for g in reported.groups for end in ("low", "high")), rel=1e-3)
    (heat,) = reported.figure("heatmap").values()
    cells = [cell for line in heat["z"] for cell in line if cell is not None]
    assert cells == pytest.approx([g["alpha"] for g in reported.groups if g["alpha"] is not None], abs=6e-4)


def test_the_history(reported: Reported) -> None:
    best: dict[str, dict[int, float]] = {}
    for study, trial, loss, _ in sorted(reported.trials):
        if study.partition("/")[2] not in AT_OUTPUT:
            known = best.setdefault(study, {})
            known[trial] = min([loss, *known.values()])
    single = {study: loss for study, _, loss, kind in reported.trials if kind == "best_single"}
    drawn = reported.figure("history")[f"median of {len(best)} sites"]
    last = max(max(known) for known in best.values())
    assert drawn["x"] == list(range(last + 1))
    for trial, median in zip(drawn["x"], drawn["y"], strict=True):
        # A study that has ended stays where it was.
        reached = [known[min(trial, max(known))] / single[study] for study, known in best.items()]
        assert median == pytest.approx(statistics.median(reached), rel=1e-3)


def test_the_guard_and_the_refinement(reported: Reported) -> None:
    decisions = reported.manifest["guard"]
    told = reported.facts("guard")
    kinds = {(study.rpartition("/")[2], trial): kind for study, trial, _, kind in reported.trials}
    searched = {(study.rpartition("/")[2], trial): loss for study, trial, loss, _ in reported.trials}
    for entry in decisions:
        site, text = entry["site"], told[entry["site"]]
        proposed, kept = (site, entry["proposed_trial"]), (site, entry["kept_trial"])
        assert (kinds[proposed], kinds[kept]) == (entry["proposed"], entry["kept"])
        # It did win the search, and lost where nothing was searched on.
        assert searched[proposed] == min(loss for (name, _), loss in searched.items() if name == site)
        assert entry["kept_loss"] < entry["proposed_loss"]
        assert f"trial {entry['proposed_trial']} (" in text
        assert number(entry["proposed_loss"]) in text
        assert f"trial {entry['kept_trial']} (" in text
        assert number(entry["kept_loss"]) in text
    facts = reported.facts("refinement")
    steps = reported.refinement["steps"]
    assert facts["trials"] == str(reported.refinement["trials"]) == str(sum(step["trials"] for step in steps))
    for step in steps:
        assert step["reason"] in facts[f"study of {step['name']}"] or step["accepted"]
    assert facts["seconds"] == duration(reported.refinement["seconds"])
    assert number(reported.refinement["before"]) in reported.page


def test_the_whole_model(reported: Reported) -> None:
    output = reported.manifest["output"]
    row = re.search(r"output loss \(relative MSE\)</th>(.*?)</tr>", reported.page)
    assert row is not None
    shown = re.findall(r"<td>(.*?)</td>", row[1])
    kept = [output[key] for key in ("naive", "alpha_0.5", "one_alpha", "best_single", "ours") if key in output]
    assert [float(value) for value in shown] == pytest.approx([0.0, *kept], rel=1e-2)
