from __future__ import annotations

import json
import math

import optuna
import pytest
from optuna_dashboard import get_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

from alphasmith.dashboards.study_views import HISTORY_ID, LOSSES_ID, annotate_study, study_note
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.text import number
from tests.support.dashboard_frames import group_frame, site_frame, trial_frame


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(study_name="one", storage=optuna.storages.InMemoryStorage())


def _attributes(study: optuna.Study) -> dict[str, object]:
    attributes: dict[str, object] = study._storage.get_study_system_attrs(study._study_id)
    return attributes


def test_a_study_gets_two_figures_and_a_note(study: optuna.Study) -> None:
    annotate_study(study, sites=site_frame(40), trials=trial_frame(64), note="**hello**")
    figures = get_plotly_graph_objects(_attributes(study))
    assert set(figures) == {LOSSES_ID, HISTORY_ID}
    assert "Quantization loss of every site" in figures[LOSSES_ID]
    # Higher figures are cut off by the dashboard's cards.
    assert all(json.loads(figure)["layout"]["height"] == 450 for figure in figures.values())
    assert get_note(study) == "**hello**"
    assert sum(len(str(value)) for value in _attributes(study).values()) < 100_000


def test_repeating_replaces(study: optuna.Study) -> None:
    annotate_study(study, sites=site_frame(40), trials=trial_frame(500), note="a" * 5000)
    first = len(_attributes(study))
    annotate_study(study, sites=site_frame(3), trials=trial_frame(5), note="b")
    annotate_study(study, sites=site_frame(40), trials=trial_frame(500), note="c" * 5000)
    assert len(_attributes(study)) == first
    assert get_note(study) == "c" * 5000


def test_nothing_is_written_when_something_is_refused(study: optuna.Study) -> None:
    with pytest.raises(InputError, match="note: has 100001 characters"):
        annotate_study(study, sites=site_frame(3), trials=trial_frame(5), note="x" * 100_001)
    with pytest.raises(NonFiniteError):
        annotate_study(study, sites=site_frame(3), trials=trial_frame(5).assign(loss=math.inf), note="x")
    with pytest.raises(InputError, match="sites: has no column"):
        annotate_study(study, sites=group_frame(3), trials=trial_frame(5), note="x")
    assert _attributes(study) == {}


def test_the_note_tells_the_result() -> None:
    sites = site_frame(30)
    note = study_note("run", sites, {"scheme": "w8a8", "storage": "mysql://u:secret@h/d"})
    done = sites[sites["mode"] != "left"]
    best = done["site"].tolist()[int((done["ours"] / done["best_single"]).argmin())]
    table = [line for line in note.splitlines() if line.startswith("| model")]
    assert len(table) == 20
    assert table[0].startswith(f"| {best.replace('_', chr(92) + '_')} |")
    assert f"Held-out loss of the {len(done)} searched sites: **" in note
    assert "| scheme | w8a8 |" in note
    first = done.iloc[int((done["ours"] / done["best_single"]).argmin())]
    told = f": best single alpha {number(first['best_single'])}, ours {number(first['ours'])}, limit "
    assert sum(told in line for line in note.splitlines()) == 1
    assert note.count("(stopped: within 1 % of the limit)") == 20
    assert "K 4 (kmeans, absmax), shift" in note
    assert "secret" not in note


def test_an_unsearched_study_has_a_note_too() -> None:
    assert "No site has been searched yet." in study_note("run", site_frame(2).assign(mode="left"))


def test_names_cannot_break_the_note() -> None:
    sites = site_frame(1).assign(site="a|b\n| c | `x` [l](javascript:alert(1)) <b>")
    lines = study_note("t\n# big", sites).splitlines()
    assert lines[0] == "## t # big"
    row = next(line for line in lines if line.startswith("| a"))
    assert row.replace("\\|", "").count("|") == 9
    assert "[l]" not in row
    assert " <b>" not in row
