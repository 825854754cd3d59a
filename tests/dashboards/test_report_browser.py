"""The report in a real browser: every figure is drawn, the policy holds, nothing is logged."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from alphasmith.dashboards.report import render_page
from tests.support.dashboard_frames import group_frame, manifest, site_frame, study_frames, trial_frame

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts have run, and what they wrote to the console."""
    done = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
            *(f"--user-data-dir={profile}", "--virtual-time-budget=15000", "--window-size=1280,2000", "--dump-dom"),
            page.as_uri(),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("count", [5, 300])
def test_all_figures_are_drawn_without_a_word_on_the_console(count: int, tmp_path: Path) -> None:
    sites = site_frame(count)
    sites.loc[0, "site"] = "<script>console.log('ran')</script>"
    trials = trial_frame(40) if count == 5 else study_frames(20)
    page = tmp_path / "report.html"
    page.write_text(render_page(manifest(sites), sites, group_frame(count), trials), encoding="utf-8")
    document, console = browse(page, tmp_path / "profile")
    assert console == []
    for key in ("losses", "gain", "alphas", "heatmap", "history"):
        block = document.partition(f'id="figure-{key}"')[2].partition('class="figure-data"')[0]
        assert '<svg class="main-svg"' in block, key
        # An axis title is drawn last: the figure is not only a frame.
        assert re.search(r'class="[xy]title"', block), key


def test_the_table_sorts_both_ways_and_missing_values_stay_last(tmp_path: Path) -> None:
    sites = site_frame(12)
    text = render_page({}, sites, group_frame(12))
    # Without the policy a script may be added that does what a reader does: click on "limit", once or twice.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    limits = sites["limit"].dropna().sort_values()
    for clicks, expected in ((1, limits.tolist()), (2, limits.tolist()[::-1])):
        click = "document.querySelectorAll('.sortable th')[9].firstElementChild.click();" * clicks
        page = tmp_path / f"report{clicks}.html"
        page.write_text(text.replace("</body>", f"<script>{click}</script></body>"), encoding="utf-8")
        document, _ = browse(page, tmp_path / f"profile{clicks}")
        table = document.partition('<table class="sortable">')[2].partition("</table>")[0]
        rows = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], flags=re.DOTALL)
        keys = [re.findall(r'data-key="([^"]*)"', row)[9] for row in rows]
        assert [float(key) for key in keys if key] == expected
        assert keys[len(expected) :] == [""] * int(sites["limit"].isna().sum())


def test_the_policy_stops_foreign_scripts_and_the_console_is_watched(tmp_path: Path) -> None:
    """Without this the test above could pass because nothing is ever logged."""
    sites = site_frame(2)
    text = render_page({}, sites, group_frame(2))
    page = tmp_path / "report.html"
    page.write_text(text.replace("</body>", "<script>document.title = 'taken'</script></body>"), encoding="utf-8")
    document, console = browse(page, tmp_path / "profile")
    assert "<title>taken" not in document
    assert any("Content Security Policy" in line for line in console)
