from __future__ import annotations

import base64
import hashlib
import html
import json
import re

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.dashboards.report import render_page, render_report
from alphasmith.dashboards.text import facts_of
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.text import number
from alphasmith.storage.output.manifest import Manifest
from alphasmith.storage.runs.data_frames import groups_frame, sites_frame, trials_frame
from alphasmith.storage.runs.records import TrialRecord
from tests.support.dashboard_frames import group_frame, manifest, site_frame, study_frames, trial_frame


def _without_scripts(page: str) -> str:
    return re.sub(r"<script>.*?</script>|</?span>", "", page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page() -> str:
    sites = site_frame(12)
    return render_page(manifest(sites), sites, group_frame(12), trial_frame(40))


def test_the_manifest_of_these_tests_is_a_real_one() -> None:
    assert len(Manifest.model_validate_json(json.dumps(manifest(site_frame(12)))).sites) == 12


def test_a_manifest_and_trials_give_the_page_of_their_frames(page: str) -> None:
    parsed = Manifest.model_validate_json(json.dumps(manifest(site_frame(12))))
    trials = [
        TrialRecord(
            study_name=f"r-1/{site.name}",
            number=number,
            kind="sampler",
            params={"alpha_0": 0.5},
            state="complete",
            loss=loss,
            seconds=0.1,
        )
        for site in parsed.sites
        for number, loss in enumerate((4e-4, 3e-4))
    ]
    again = render_report(parsed, trials)
    frames = sites_frame(parsed.sites), groups_frame(parsed.sites), trials_frame(trials)
    assert again == render_page(parsed.model_dump(mode="json"), *frames)
    for section in re.findall(r'<(?:section|details) id="(\w+)"', page):
        assert f'id="{section}"' in again


def test_every_part_is_there(page: str) -> None:
    for section in (
        *("asked", "metrics", "figures", "sites", "hardware", "proof", "guard", "payload", "memory", "seeds"),
        *("versions", "config", "artifacts", "skipped", "refinement"),
    ):
        assert f'id="{section}"' in page
    body = html.unescape(_without_scripts(page))
    for text in ("tiny-llama w8a8", "top-1 accuracy (higher is better)", "0.958", "8 GiB", "3.10e-7", "2.13.0", "9f9f"):
        assert text in body
    assert "the producer is a GELU" in body
    assert "padding is masked" in body
    assert "shares its weight with the embedding" in body
    assert "chose a baseline" not in body


def test_every_searched_site_says_what_it_reached(page: str) -> None:
    table = _without_scripts(page).partition('<table class="sortable">')[2].partition("</table>")[0]
    for row in site_frame(12).to_dict("records"):
        sentence = (
            f"best single alpha {number(row['best_single'])}, ours {number(row['ours'])}, limit {number(row['limit'])}"
        )
        assert (sentence in table) == (row["mode"] != "left")
    assert "K 4 (kmeans, absmax), range x0.93 (percentile)" in table
    assert "stopped: within 1 % of the limit" in table


def test_the_refinement_is_told_either_way() -> None:
    sites = site_frame(2)
    facts = manifest(sites)
    accepted = "Accepted: output loss 1.23e-3 -&gt; 1.10e-3 (difference 1.30e-4 +- 2.00e-5)."
    assert accepted in _without_scripts(render_page(facts, sites, group_frame(2)))
    assert "<dt>alphas of q_proj</dt><dd>-0.100</dd>" in _without_scripts(render_page(facts, sites, group_frame(2)))
    many = {"accepted": True, "changed": {f"layer.{i}": "identity" for i in range(11)} | {"head": "alphas +0.100"}}
    body = _without_scripts(render_page(facts | {"refinement": many}, sites, group_frame(2)))
    assert "layer.6, layer.7 and 3 more" in body
    assert "<dt>now alphas +0.100</dt><dd>head</dd>" in body
    nothing = {"accepted": False, "before": 1.23e-3, "after": 1.23e-3, "reason": "every trial failed"}
    body = _without_scripts(render_page(facts | {"refinement": nothing}, sites, group_frame(2)))
    assert "Not accepted: every trial failed; the output loss stays 1.23e-3." in body
    assert 'id="refinement"' not in render_page(facts | {"refinement": None}, sites, group_frame(2))


def test_trials_of_the_refinement_are_not_drawn_with_those_of_the_sites() -> None:
    sites, groups = site_frame(2), group_frame(2)
    trials = study_frames(2)
    extra = trial_frame(16).assign(site="refinement")
    with_extra = render_page({}, sites, groups, pd.concat([trials, extra], ignore_index=True))
    assert with_extra == render_page({}, sites, groups, trials)


def test_a_model_wide_search_is_judged_at_the_output() -> None:
    sites = site_frame(3)
    sites[["identity", "alpha_half", "best_single", "best_single_alpha", "ours", "limit"]] = float("nan")
    facts = manifest(sites) | {
        "output": {"held_out": {"identity": 4e-3, "alpha_0.5": None, "best_single": 2e-3, "ours": 1e-3}}
    }
    body = _without_scripts(render_page(facts, sites, group_frame(1).assign(site="")))
    sentence = "The model has a held-out quantization loss of 1.00e-3 at its output"
    assert f"{sentence}: 25 % of the loss without smoothing and 50 % of that at the best single alpha." in body
    assert "no loss was measured at single sites" in body


def test_a_baseline_kept_at_the_output_is_admitted() -> None:
    facts = {"output": {"naive": 1e-2, "ours": 3e-3, "best_single": 2e-3, "kept": "best_single"}}
    body = _without_scripts(render_page(facts, site_frame(2), group_frame(2)))
    assert "chose a baseline over the searched alphas; kept: the best single alpha of every site." in body


def test_the_sentence_has_the_true_numbers() -> None:
    sites = site_frame(2).assign(mode="fold", identity=8e-3, alpha_half=4e-3, best_single=2e-3, ours=1e-3, limit=5e-4)
    body = _without_scripts(render_page({}, sites, group_frame(2)))
    assert "Its 2 searched sites have a held-out quantization loss of 1.00e-3 (geometric mean)" in body
    assert "12.5 % of the loss without smoothing, 25 % of that at alpha 0.5 and 50 % of that at the best single" in body
    assert "kept a baseline" not in body
    # (2 - 1) / (2 - 0.5) of the way to the limit
    assert "<strong>67 %</strong>" in body


def test_kept_baselines_are_admitted() -> None:
    sites = site_frame(3).assign(mode="fold", winner=["best_single", "sampler", "sampler"])
    sites["ours"] = sites["best_single"] * [1.0, 0.9, 0.8]
    body = _without_scripts(render_page({}, sites, group_frame(3)))
    assert "1 of them kept a baseline" in body
    assert body.count("kept: best single alpha") == 1


def test_nothing_searched_is_said() -> None:
    sites = site_frame(2).assign(mode="left")
    assert "No site has been searched" in render_page({}, sites, group_frame(2).iloc[:0])


def test_an_empty_manifest_and_empty_frames_still_give_a_page() -> None:
    text = render_page({}, site_frame(1).iloc[:0], group_frame(1).iloc[:0], trial_frame(1).iloc[:0])
    assert "<title>Alphasmith run</title>" in text


def test_hostile_names_stay_text() -> None:
    evil = "<script>alert(1)</script>"
    breaker = "</script><img src=x onerror=alert(1)>"
    sites = site_frame(3)
    sites["site"] = [evil, breaker, '" onmouseover="alert(1)']
    groups = group_frame(3).assign(site=evil)
    facts = manifest(sites) | {"run": {"name": evil}, "config": {breaker: evil}, "versions": {"x": breaker}}
    trials = study_frames(3).replace({"site": dict.fromkeys(site_frame(1)["site"], evil)})
    text = _without_scripts(render_page(facts, sites, groups, trials))
    assert "<script>alert" not in text
    assert "<img" not in text
    assert not re.search(r'<[^>]*\sonmouseover="', text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text.replace("<wbr>", "")


def test_passwords_are_masked(page: str) -> None:
    assert "secret-word" not in page
    assert "db.example" in page


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    text = _without_scripts(page)
    assert not re.findall(r'(?:src|href|action)\s*=\s*"(?!data:)', text)
    assert "url(" not in text
    assert "@import" not in text


def test_the_policy_names_exactly_the_scripts_of_the_page(page: str) -> None:
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0])
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digests = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    assert set(re.findall(r"'sha256-([^']*)'", policy)) == digests
    assert len(digests) == 2
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy


def test_figures_are_valid_json_below_the_limit(page: str) -> None:
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        assert len(block) < 100_000
        assert "<" not in block
        assert json.loads(block)["data"]


def test_the_table_has_a_row_per_site_with_sort_keys(page: str) -> None:
    table = re.search(r'<table class="sortable">.*?<tbody>(.*?)</tbody>', page, flags=re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr>(.*?)</tr>", table[1], flags=re.DOTALL)
    assert len(rows) == 12
    identities = [float(re.findall(r'data-key="([^"]*)"', row)[4]) for row in rows]
    assert identities == site_frame(12)["identity"].tolist()


def test_same_input_same_page(page: str) -> None:
    sites = site_frame(12)
    assert render_page(manifest(sites), sites, group_frame(12), trial_frame(40)) == page


def test_bad_frames_are_refused() -> None:
    with pytest.raises(InputError, match="sites: has no column"):
        render_page({}, pd.DataFrame(), group_frame(1))
    with pytest.raises(InputError, match="groups: has no column"):
        render_page({}, site_frame(1), pd.DataFrame())
    with pytest.raises(NonFiniteError):
        render_page({}, site_frame(1).assign(ours=float("inf")), group_frame(1))


def test_facts_carry_units_and_mask_addresses() -> None:
    given_facts = {"memory": 2**30, "bandwidth": 2.0**30, "a": [{"path": "x", "bytes": 10}], "none": None, "on": True}
    assert facts_of(given_facts) == [("memory", "1 GiB"), ("bandwidth", "1 GiB/s"), ("x", "bytes 10 B"), ("on", "yes")]
    assert facts_of({"url": "mysql://u:pw@h/d"}) == [("url", "mysql://u:***@h/d")]
    assert facts_of({"predicted": 2**20}, unit="bytes") == [("predicted", "1 MiB")]


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=12,
    )
)
def test_any_json_becomes_lines(value: object) -> None:
    assert all(isinstance(label, str) and isinstance(text, str) for label, text in facts_of(value, "x"))
