"""Results as text: every width is kept, what is cut is said, numbers are the given ones, failures are words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.objectives.text import number
from alphasmith.search.cli import answers
from alphasmith.search.cli import tables as texts
from alphasmith.search.cli._layout import PLAIN_WIDTH, output_width
from alphasmith.storage.output.manifest import Manifest
from alphasmith.storage.runs.entries import Group, Losses, LossPair, SiteRecord
from tests.support.dashboard_frames import manifest, site_frame

WIDTHS = (80, 120)


def group(index: int, alpha: float | None, **changes: Any) -> Group:
    """A group of sixteen channels."""
    values = {"index": index, "size": 16, "magnitude": 1.0 + index, "low": 0.1, "high": 0.9, "alpha": alpha}
    return Group(**values | changes)


def site(
    name: str, *, alphas: tuple[float | None, ...] = (0.65,), limit: float | None = None, **changes: Any
) -> SiteRecord:
    """A site that was searched."""
    losses = Losses(identity=8e-3, alpha_half=4e-4, best_single=2.5e-4, best_single_alpha=0.65, ours=2e-4, limit=limit)
    values: dict[str, Any] = {
        "name": name,
        "position": 0,
        "mode": "fold",
        "channels": 64,
        "losses": LossPair(search=losses, held_out=losses),
        "groups": tuple(group(i, alpha) for i, alpha in enumerate(alphas)),
    }
    return SiteRecord(**values | changes)


def left(name: str, reason: str) -> SiteRecord:
    """A site that was not searched."""
    return SiteRecord(name=name, position=0, mode="left", reason=reason, channels=64)


def rows(text: str, start: str) -> list[list[str]]:
    """Words of the lines that begin so."""
    return [line.split() for line in text.splitlines() if line.startswith(start)]


#: Names as models have them.
MODULES = st.builds(
    "{}.{}.{}.{}".format,
    st.sampled_from(["model", "model.encoder", "model.decoder", "vision_model.transformer.resblocks"]),
    st.sampled_from(["layers", "layer", "h"]),
    st.integers(0, 130),
    st.sampled_from(["self_attn.q_proj", "encoder_attn.out_proj", "attention.output.dense", "mlp.experts.7.down_proj"]),
)


@settings(deadline=None, max_examples=40)
@given(
    names=st.lists(MODULES, min_size=1, max_size=texts.MOST_SITES, unique=True),
    alphas=st.lists(st.none() | st.floats(0, 1.2), max_size=9).map(tuple),
    limit=st.none() | st.floats(0, 1e9),
    factor=st.floats(1e-3, 1e3),
    width=st.sampled_from(WIDTHS),
)
def test_the_table_of_sites_fits(
    names: list[str], alphas: tuple[float | None, ...], limit: float | None, factor: float, width: int
) -> None:
    chosen: dict[str, Any] = {"alphas": alphas, "shift": True, "range_statistic": "percentile", "range_factor": factor}
    text = texts.sites_table([site(name, limit=limit, channels=10**6, **chosen) for name in names], width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text, "what there is no room for is left out, not cut"
    shown = [line.split()[0] for line in lines[3:]]
    assert len(set(shown)) == len(names)
    assert all(a == b for a, b in zip(shown, names, strict=True) if len(b) <= len(a))


@given(
    name=st.sampled_from(["perplexity", "accuracy", "word error rate of the transcribed clips", "recall@1"]),
    figures=st.lists(st.none() | st.floats(1e-9, 1e9), min_size=11, max_size=11),
    width=st.sampled_from(WIDTHS),
)
def test_the_table_of_the_model_fits(name: str, figures: list[float | None], width: int) -> None:
    keys = ("naive", "alpha_0.5", "one_alpha", "best_single", "ours")
    metric = {"name": name, "higher_is_better": False, **dict(zip(("float", *keys), figures, strict=False))}
    text = texts.model_table({"loss": "mse", "metrics": [metric], **dict(zip(keys, figures[6:], strict=True))}, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text


@pytest.mark.parametrize("width", WIDTHS)
def test_every_line_of_a_result_fits(width: int) -> None:
    found = finished(share_of(site_frame(12)))
    lines = texts.finished_text(found, 12, "sqlite:///runs.db", Path.cwd() / "out", width).splitlines()
    assert max(map(len, lines)) <= width


def share_of(sites: Any) -> dict[str, Any]:
    """A manifest for a site frame."""
    return json.loads(json.dumps(manifest(sites)))  # type: ignore[no-any-return]


def finished(content: dict[str, Any]) -> Manifest:
    """The same, parsed."""
    return Manifest.model_validate_json(json.dumps(content))


def test_a_result_begins_with_its_verdict() -> None:
    content = share_of(site_frame(3))
    content["payload"] |= {"model_given": 4_878_920}
    first, *rest = texts.finished_text(finished(content), 96, "sqlite:///runs.db", Path.cwd() / "out", 200).splitlines()
    figures = "0.902 without smoothing, 0.953 at alpha 0.5, 0.956 with the best single alpha, 0.958 ours, 0.961 float"
    assert first == f"26 % of the size; top-1 accuracy {figures}"
    whole = next(i for i, line in enumerate(rest) if line.startswith("whole model"))
    left_to_do = next(i for i, line in enumerate(rest) if line.startswith("what is left to do"))
    assert whole < left_to_do
    assert "- 48 of 64 texts were shorter than 128 tokens; padding is masked" in rest[left_to_do:]
    assert rest[-1] == "results in out: smoothed/, quantized/, report.html, manifest.json"
    assert rest[-2].startswith(
        "run r-20250301-7f3a (tiny-llama w8a8), w8a8-channel-static, finished 2025-03-01 10:04:10"
    )


@pytest.mark.parametrize("objective", ["site", "output"])
def test_losses_in_units_of_the_output_are_said_to_be_weighted(objective: str) -> None:
    content = share_of(site_frame(3))
    losses = {"identity": 8e-3, "alpha_0.5": 4e-4, "best_single": 2.5e-4, "best_single_alpha": 0.65, "ours": 2e-4}
    content["sites"][0]["losses"] = {"search": losses, "held_out": losses}
    content["config"]["search"] = {"scope": "site", "objective": objective}
    text = texts.finished_text(finished(content), 1, "sqlite:///runs.db", Path.cwd() / "out", 80)
    assert ("weighted squared error on held-out rows" in text) == (objective == "output")
    assert ("relative squared error on held-out rows" in text) == (objective == "site")


@pytest.mark.parametrize("accepted", [True, False])
def test_studies_at_the_output_are_told_where_one_changed_something(accepted: bool) -> None:
    content = share_of(site_frame(3))
    content["refinement"] |= {"accepted": accepted}
    step = {"before": 1e-3, "after": 9e-4, "difference": 1e-4, "standard_error": 1e-5, "reason": "it falls"}
    content["refinement"]["steps"] = [
        {"name": "kinds", "accepted": True, **step},
        {"name": "sites", "accepted": False, **step},
    ]
    lines = texts.finished_text(finished(content), 1, "sqlite:///runs.db", Path.cwd() / "out", 200).splitlines()
    told = [line for line in lines if line.startswith(("  kinds: ", "  sites: "))]
    if accepted:
        kinds, sites = told
        assert kinds == "  kinds: accepted: output loss 1.00e-3 -> 9.00e-4 (difference 1.00e-4 +- 1.00e-5)"
        assert sites.startswith("  sites: not accepted: it falls")
    else:
        assert told == []


def test_what_the_guard_decided_is_said_once() -> None:
    content = share_of(site_frame(3))
    content["output"]["kept"] = "alpha_0.5"
    content["guard"] = [{"site": None, "proposed": "ours", "kept": "alpha_0.5", "reason": "six samples cannot tell"}]
    content["notes"] = ["six samples cannot tell", "a seventh would"]
    text = texts.finished_text(finished(content), 96, "sqlite:///runs.db", Path.cwd() / "out", 200)
    assert text.splitlines()[0].endswith("0.961 float; kept: alpha 0.5")
    assert text.count("six samples cannot tell") == 1
    assert "kept alpha_0.5: six samples cannot tell" in text
    assert "- a seventh would" in text


def test_a_row_per_searched_site() -> None:
    text = texts.sites_table([site("fc1"), left("gate", "it feeds experts")], 200)
    (row,) = rows(text, "fc1")
    assert row == ["fc1", "fold", "64", "8.00e-3", "4.00e-4", "2.50e-4", "0.65", "2.00e-4", ".65"]
    assert "gate left: it feeds experts" in text


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"alphas": (0.55, 0.55, 0.71, 1.0)}, ".55 .71 1.00"),
        ({"alphas": (0.2, 0.5, 0.3, 0.6, 0.9)}, ".20 to .90"),
        ({"alphas": (None, None)}, "none"),
        ({"alphas": ()}, ""),
        ({"shift": True, "range_statistic": "margin", "range_factor": 1.1}, ".65 shift x1.1"),
    ],
)
def test_a_row_says_what_was_chosen(chosen: dict[str, Any], told: str) -> None:
    (row,) = (line for line in texts.sites_table([site("fc1", **chosen)], 200).splitlines() if line.startswith("fc1"))
    assert row.endswith(f"  {number(2e-4)}  {told}".rstrip())


def test_sites_come_by_their_share_of_the_output_error() -> None:
    shares: list[dict[str, Any]] = [{"share": 0.1}, {"share": 0.25}, {"share_measured": 0.2}, {}]
    text = texts.sites_table([site(f"fc{i}", **share) for i, share in enumerate(shares)], 80)
    assert text.splitlines()[0].startswith("sites by share of the output error")
    assert [row[:2] for row in rows(text, "fc")] == [
        ["fc1", "25.0"],
        ["fc2", "20.0"],
        ["fc0", "10.0"],
        ["fc3", "8.00e-3"],
    ]
    assert "share" not in texts.sites_table([site("fc0"), site("fc1")], 80)
    only_shares = texts.sites_table([site("fc0", losses=None, share=1.0)], 80)
    assert only_shares.splitlines()[0] == "sites by share of the output error", (
        "nothing is said of losses that are not there"
    )


def test_columns_are_left_out_where_there_is_no_room() -> None:
    chosen: dict[str, Any] = {
        "alphas": (0.5, 0.6, 0.7, 0.8),
        "shift": True,
        "range_statistic": "margin",
        "range_factor": 1.1,
    }
    sites = [site(f"model.layers.{i}.self_attn.q_proj", limit=1e-4, share=0.1, **chosen) for i in range(3)]
    narrow, wide, widest = (texts.sites_table(sites, width).splitlines()[1].split() for width in (80, 120, 200))
    assert set(narrow) < set(wide) < set(widest)
    assert {"share", "none", "single", "ours"} <= set(narrow)
    assert {"limit", "alpha", "alphas,"} <= set(wide)


def test_long_tables_are_cut_and_say_so() -> None:
    found = [site(f"layer.{i}") for i in range(texts.MOST_SITES + 7)]
    found += [left(f"left.{i}", f"reason {'abcdefghijk'[i % 11]}") for i in range(22)]
    text = texts.sites_table(found, 120)
    assert f"layer.{texts.MOST_SITES - 1}" in text
    assert f"layer.{texts.MOST_SITES} " not in text
    assert "and 7 more sites" in text
    assert "left.0 and 1 more left: reason a" in text
    assert "and 3 more reasons" in text
    assert "reason j" not in text


def test_reasons_that_differ_in_a_number_are_one() -> None:
    found = [left(f"layers.{i}.fc2", f"made by gelu in layers.{i}.act") for i in range(12)]
    assert texts.sites_table(found, 120) == "layers.0.fc2 and 11 more left: made by gelu in layers.0.act"


def test_nothing_searched_is_an_empty_table() -> None:
    assert texts.sites_table([]) == ""
    assert texts.groups_table([]) == ""
    assert texts.model_table({}) == ""
    assert "no runs yet" in answers.runs_table([])


def test_groups_of_the_whole_model_have_their_alphas() -> None:
    text = texts.groups_table([group(0, 0.5), group(1, 0.95), group(2, None)], 80)
    assert [row[-1] for row in rows(text, "0 ")] == ["0.500"]
    assert rows(text, "1 ")[0][-2:] == ["0.950", "(outside)"]
    assert rows(text, "2 ")[0][-1] == "0.900"


def test_failed_variants_are_words() -> None:
    losses = {"naive": None, "alpha_0.5": 0.25, "best_single": 0.125, "ours": 0.0625}
    metric = {"name": "accuracy", "higher_is_better": True, "float": 0.9, "naive": 0.5, **losses}
    text = texts.model_table(
        losses | {"loss": "kl", "metrics": [metric | {"naive": None}, metric | {"naive": 0.5}]}, 120
    )
    accuracy, other = (line for line in text.splitlines() if "accuracy" in line)
    assert accuracy.split()[-5:] == ["0.9000", "failed", "0.2500", "0.1250", "0.0625"]
    assert other.split()[-4] == "0.5000"
    assert "(higher is better)" in accuracy
    assert "KL" in text


def test_one_alpha_has_a_column_where_it_was_scored() -> None:
    losses = {"naive": 0.5, "alpha_0.5": 0.25, "best_single": 0.125, "ours": 0.0625}
    assert "one alpha" not in texts.model_table(losses | {"one_alpha": None}, 80)
    text = texts.model_table(losses | {"one_alpha": 0.03125}, 80)
    assert text.splitlines()[0].endswith("alpha 0.5  one alpha  best single    ours")
    (row,) = rows(text, "output loss")
    assert row[-3:] == ["0.0312", "0.125", "0.0625"]


def test_verify_says_what_it_could_not_check() -> None:
    text = answers.verify_text({"artifacts": 7, "skipped": "the model was handed over by a script"})
    assert text.startswith("7 files")
    assert "equivalence not checked: the model was handed over" in text


def test_the_width_is_that_of_the_terminal_or_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output_width() == PLAIN_WIDTH
    for asked, width in (("97", 97), ("20", 60), ("0", PLAIN_WIDTH), ("wide", PLAIN_WIDTH)):
        monkeypatch.setenv("COLUMNS", asked)
        assert output_width() == width
    monkeypatch.delenv("COLUMNS")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours):
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setattr("os.get_terminal_size", lambda fd: os.terminal_size((93, 24)) if fd == theirs else None)
        assert output_width() == 93
