from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.dashboards.checked_frames import LOSS_COLUMNS, checked_sites, geometric_mean, thinned_sites
from alphasmith.dashboards.figures.sites import (
    alpha_heatmap,
    alphas_by_group,
    gain_by_site,
    losses_by_site,
    shares_of_output,
    trial_history,
)
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.text import number
from tests.support.dashboard_frames import group_frame, site_frame, study_frames, trial_frame

Draw = Callable[[pd.DataFrame], go.Figure]
SITE_FIGURES: list[Draw] = [losses_by_site, gain_by_site]
GROUP_FIGURES: list[Draw] = [alphas_by_group, alpha_heatmap]


def _trace(figure: go.Figure, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name)


def _drawn(figure: go.Figure) -> int:
    return sum(len(trace.x if trace.x is not None else ()) for trace in figure.data)


@pytest.mark.parametrize("count", [1, 5, 48, 49, 300, 3000])
@pytest.mark.parametrize("draw", SITE_FIGURES)
def test_site_figures_stay_small_and_draw_something(draw: Draw, count: int) -> None:
    frame = site_frame(count)
    frame["site"] = "a_rather_long_prefix." * 4 + frame["site"]
    figure = draw(frame)
    assert len(figure.to_json()) < 100_000
    assert _drawn(figure) >= min(count, 300) * 0.8


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (5, 4), (48, 10), (48, 80), (300, 4), (3000, 8), (2, 900)])
@pytest.mark.parametrize("draw", GROUP_FIGURES)
def test_group_figures_stay_small_and_draw_something(draw: Draw, count: int, groups: int) -> None:
    figure = draw(group_frame(count, groups))
    assert len(figure.to_json()) < 100_000
    assert _drawn(figure) > 0


@pytest.mark.parametrize("count", [1, 4, 64, 1500, 20_000])
def test_history_stays_small(count: int) -> None:
    assert len(trial_history(trial_frame(count)).to_json()) < 100_000


def test_history_of_many_sites_stays_small() -> None:
    assert len(trial_history(study_frames(60, 64)).to_json()) < 100_000


@pytest.mark.parametrize("draw", SITE_FIGURES)
def test_order_of_rows_does_not_matter_and_the_frame_is_left_alone(draw: Draw) -> None:
    frame = site_frame(30)
    before = frame.copy(deep=True)
    shuffled = frame.sample(frac=1, random_state=3)
    assert draw(shuffled).to_json() == draw(frame).to_json()
    pd.testing.assert_frame_equal(frame, before)


def test_every_loss_is_drawn_where_it_belongs() -> None:
    frame = site_frame(5)
    figure = losses_by_site(frame)
    ours = _trace(figure, "searched alphas")
    assert list(ours.x) == pytest.approx(frame["ours"].tolist(), rel=1e-3)
    assert list(ours.y) == [0, 1, 2, 3, 4]
    assert figure.layout.yaxis.ticktext[0] == "0.self_attn.q_proj"
    # The axis runs downwards: the first site of the network is the top row.
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]


def test_sites_left_alone_show_no_search() -> None:
    frame = site_frame(9)
    index = int(np.flatnonzero(frame["mode"] == "left")[0])
    figure = losses_by_site(frame)
    assert _trace(figure, "searched alphas").x[index] is None
    assert _trace(figure, "no smoothing").x[index] is not None
    assert len(gain_by_site(frame).data[0].y) == len(frame) - 1


def test_sites_with_equal_short_names_keep_their_rows() -> None:
    frame = site_frame(3)
    frame["site"] = ["same"] * 3
    assert list(_trace(losses_by_site(frame), "searched alphas").y) == [0, 1, 2]


def test_zero_losses_are_announced_not_dropped_in_silence() -> None:
    frame = site_frame(4)
    frame.loc[1, ["ours", "limit"]] = 0.0
    assert "1 site with a loss of exactly 0 not shown" in losses_by_site(frame).layout.title.text
    groups = group_frame(2)
    groups.loc[0, "magnitude"] = 0.0
    assert "1 group of magnitude 0 not shown" in alphas_by_group(groups).layout.title.text


def test_gain_is_the_ratio_and_worse_sites_have_another_colour() -> None:
    frame = site_frame(4)
    frame["ours"] = frame["ours"].where(frame.index != 2, frame["best_single"] * 1.25)
    bars, labels = gain_by_site(frame).data[:2]
    assert [1 + length for length in bars.x] == pytest.approx((frame["ours"] / frame["best_single"]).tolist(), rel=1e-3)
    assert labels.text[2].strip() == "1.250"
    colors = list(bars.marker.color)
    assert len(set(colors)) == 2
    assert colors.count(colors[2]) == 1


def test_a_groups_own_factor_is_told_where_it_has_one() -> None:
    frame = group_frame(2)
    dots = _trace(alphas_by_group(frame), "chosen alpha")
    order = frame.sort_values("magnitude", kind="stable")["offset"].tolist()
    assert list(dots.text) == ["" if math.isnan(offset) else f"x{number(math.exp(offset))}" for offset in order]
    assert sum("own factor x" in hover for hover in dots.customdata) == 4
    many = _trace(alphas_by_group(group_frame(20)), "chosen alpha")
    assert many.mode == "markers"
    assert sum("own factor x" in hover for hover in many.customdata) == 40
    cells = alpha_heatmap(frame).data[0].customdata
    assert ["own factor" in cell for row in cells for cell in row] == [False] * 4 + [True] * 4


def test_frames_without_offsets_are_drawn_as_before() -> None:
    frame = group_frame(2).drop(columns="offset")
    assert not any(_trace(alphas_by_group(frame), "chosen alpha").text)
    assert not any("own factor" in cell for row in alpha_heatmap(frame).data[0].customdata for cell in row)


@pytest.mark.parametrize("count", [1, 5, 20, 21, 3000])
def test_the_largest_shares_have_bars_and_all_bars_make_the_whole(count: int) -> None:
    frame = site_frame(count)
    frame["site"] = "a_rather_long_prefix." * 4 + frame["site"]
    bars = shares_of_output(frame.sample(frac=1, random_state=3)).data[0]
    assert len(bars.x) == min(count, 21)
    assert sum(bars.x) == pytest.approx(1, abs=1e-3)
    largest = frame["share"].sort_values(ascending=False)[:20].tolist()
    assert list(bars.x)[:20] == pytest.approx(largest, abs=1e-4)
    measured = _trace(shares_of_output(frame), "measured with only this site quantized")
    assert [value is not None for value in measured.x] == [True] * min(count, 3) + [False] * (min(count, 20) - 3)


def test_numbers_stand_beyond_the_marks_of_their_rows() -> None:
    frame = site_frame(4).assign(ours=[1.0, 0.5, 1.2, 2.0], best_single=1.0, limit=[0.9, 0.4, 1.1, 1.0])
    gains = gain_by_site(frame)
    labels = next(trace for trace in gains.data if trace.type == "scatter" and trace.mode == "text")
    assert list(labels.x) == [1, 1, 1.2, 2]
    assert labels.textposition == "middle right"
    shares = shares_of_output(frame.assign(share=[0.4, 0.3, 0.2, 0.1], share_measured=[0.41, 0.2, 0.6, math.nan]))
    labels = next(trace for trace in shares.data if trace.type == "scatter" and trace.mode == "text")
    assert labels.x[0] > 0.41, "beyond the diamond that would lie under it"
    assert list(labels.x)[1:] == [0.3, 0.2, 0.1]


def test_measured_shares_stand_for_those_that_were_not_predicted() -> None:
    frame = site_frame(4).assign(share=math.nan, share_measured=[0.5, math.nan, 0.9, 0.1])
    figure = shares_of_output(frame)
    assert list(figure.data[0].x) == [0.9, 0.5, 0.1]
    assert [trace.mode for trace in figure.data[1:]] == ["text"], "no diamonds"
    unknown = shares_of_output(frame.drop(columns=["share", "share_measured"]))
    assert "no share" in unknown.layout.annotations[0].text


@pytest.mark.parametrize("draw", [*SITE_FIGURES, *GROUP_FIGURES, shares_of_output, trial_history])
def test_empty_frames_say_that_there_is_nothing_yet(draw: Draw) -> None:
    full = (
        site_frame(1)
        if draw in (*SITE_FIGURES, shares_of_output)
        else trial_frame(1)
        if draw is trial_history
        else group_frame(1)
    )
    figure = draw(full.iloc[:0])
    assert len(figure.data) == 0
    assert len(figure.layout.annotations) == 1


@pytest.mark.parametrize("draw", [*SITE_FIGURES, *GROUP_FIGURES, trial_history])
def test_missing_columns_are_named(draw: Draw) -> None:
    with pytest.raises(InputError, match="has no column"):
        draw(pd.DataFrame({"x": [1]}))


def test_text_where_a_number_belongs_is_refused() -> None:
    frame = site_frame(3).astype({"ours": object})
    frame.loc[0, "ours"] = "fast"
    with pytest.raises(InputError, match="column ours is not numeric"):
        losses_by_site(frame)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_losses_are_refused(value: float) -> None:
    sites, trials = site_frame(3), trial_frame(8)
    sites.loc[1, "ours"] = value
    trials.loc[5, "loss"] = value
    with pytest.raises(NonFiniteError, match="ours"):
        losses_by_site(sites)
    with pytest.raises(NonFiniteError, match="loss"):
        trial_history(trials)


@pytest.mark.parametrize("draw", [*SITE_FIGURES, shares_of_output])
def test_markup_in_names_is_escaped(draw: Draw) -> None:
    frame = site_frame(3)
    frame.loc[0, "site"] = "<a href='javascript:alert(1)'>x</a>"
    assert "<a " not in draw(frame).to_json()


def test_markup_in_group_names_is_escaped() -> None:
    frame = group_frame(2)
    frame["site"] = "<b>x</b>"
    assert "<b>" not in alphas_by_group(frame).to_json() + alpha_heatmap(frame).to_json()


@given(st.lists(st.floats(1e-9, 10) | st.just(math.nan), min_size=1, max_size=60), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_best_so_far_falls_and_ends_at_the_best_complete_trial(losses: list[float], seed: int) -> None:
    states = np.random.default_rng(seed).choice(["COMPLETE", "FAIL", "PRUNED"], len(losses), p=[0.8, 0.1, 0.1])
    frame = pd.DataFrame({"number": range(len(losses)), "kind": "sampler", "loss": losses, "state": states})
    figure = trial_history(frame)
    done = frame[(frame["state"] == "COMPLETE") & frame["loss"].notna()]
    if done.empty:
        assert not figure.data
        return
    best = _trace(figure, "best so far")
    assert list(best.y) == sorted(best.y, reverse=True)
    assert best.y[-1] == pytest.approx(done["loss"].min(), rel=1e-3)
    assert best.x[0] == done["number"].iloc[0]


def test_failed_and_pruned_trials_have_no_loss() -> None:
    frame = trial_frame(40)
    lost = frame[frame["state"] != "COMPLETE"]["number"]
    figure = trial_history(frame)
    assert not set(_trace(figure, "sampled").x) & set(lost)
    assert set(_trace(figure, f"failed or pruned ({len(lost)})").x) == set(lost)


def test_states_of_optuna_and_of_our_records_mean_the_same() -> None:
    frame = trial_frame(40)
    ours = frame.assign(state=frame["state"].map({"COMPLETE": "complete", "FAIL": "failed", "PRUNED": "pruned"}))
    ours["kind"] = ours["kind"].replace("model", "noise_model")
    assert trial_history(ours).to_json() == trial_history(frame).to_json()


def test_baselines_are_labelled_lines() -> None:
    figure = trial_history(trial_frame(20))
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert [text.split("<br>")[0] for text in texts] == ["no smoothing", "alpha 0.5", "best single"]
    # No smoothing is far above the axis: it keeps its label, with an arrow, and has no line.
    assert texts[0].endswith("↑")
    assert len(figure.layout.shapes) == 2


def test_history_of_many_sites_is_relative_to_their_best_single_alpha() -> None:
    frame = study_frames(6)
    scaled = frame.assign(loss=frame["loss"] * frame["site"].map(lambda name: 1 + len(name) % 5))
    median = _trace(trial_history(scaled), "median of 6 sites")
    assert list(median.y) == pytest.approx(list(_trace(trial_history(frame), "median of 6 sites").y), rel=1e-3)
    assert median.y[-1] < 1
    renamed = frame.rename(columns={"site": "study_name"})
    assert trial_history(renamed).to_json() == trial_history(frame).to_json()


def test_histories_without_a_best_single_alpha_are_relative_to_their_first_trial() -> None:
    frame = study_frames(3, 1200)
    figure = trial_history(frame[frame["kind"] != "best_single"])
    median = _trace(figure, "median of 3 sites")
    assert figure.layout.yaxis.title.text == "best so far / first trial"
    assert median.y[0] == 1
    assert len(median.x) <= 1000


def test_heatmap_of_a_model_wide_search_has_one_row() -> None:
    frame = group_frame(1).assign(site="")
    figure = alpha_heatmap(frame)
    assert list(figure.layout.yaxis.ticktext) == ["whole model"]
    assert list(figure.data[0].z[0]) == pytest.approx(frame["alpha"].tolist(), abs=1e-3)


def test_groups_without_alpha_are_holes_and_not_zeros() -> None:
    frame = group_frame(2).assign(alpha=[0.4, 0.5, 0.6, 0.7, *[np.nan] * 4])
    assert list(alpha_heatmap(frame).data[0].z[1]) == [None] * 4
    dots = _trace(alphas_by_group(frame), "chosen alpha")
    assert sorted(alpha for alpha in dots.y if alpha is not None) == [0.4, 0.5, 0.6, 0.7]
    nothing = alphas_by_group(frame.assign(alpha=np.nan))
    assert all(np.isfinite(nothing.layout.yaxis.range))


def test_heatmap_has_holes_where_a_site_has_fewer_groups() -> None:
    frame = group_frame(2).drop(index=7)
    assert alpha_heatmap(frame).data[0].z[1][3] is None


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_thinning_keeps_every_site_once_and_the_overall_mean(count: int, most: int) -> None:
    frame = checked_sites(site_frame(count))
    thin = thinned_sites(frame, most)
    assert len(thin) == min(count, most)
    assert thin["merged"].sum() == count
    for column in LOSS_COLUMNS:
        assert (
            thin[column].min(skipna=True) >= frame[column].min(skipna=True) * (1 - 1e-9) or frame[column].isna().all()
        )
    weighted = np.exp((np.log(thin["identity"]) * thin["merged"]).sum() / count)
    assert weighted == pytest.approx(geometric_mean(frame["identity"]), rel=1e-9)


@pytest.mark.parametrize("count", [3, 200, 2000])
def test_alphas_outside_their_range_are_marked_and_counted(count: int) -> None:
    frame = group_frame(count, 1)
    frame["alpha"] = (frame["low"] + frame["high"]) / 2
    assert not [t for t in alphas_by_group(frame).data if str(t.name).startswith("outside")]
    frame.loc[:1, "alpha"] = [float(frame["high"][0]) + 0.05, float(frame["low"][1]) - 0.05]
    outside = _trace(alphas_by_group(frame), f"outside its range (2 of {count})")
    assert outside.marker.symbol == "diamond-open"
    assert sorted(outside.y) == ([] if count > 1500 else pytest.approx(sorted(frame["alpha"][:2]), abs=1e-3))
