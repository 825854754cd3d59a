from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphasmith.dashboards.figures._theme import (
    PAPER,
    SERIES,
    WORSE,
    log_axis,
    rounded,
    short_names,
    spread,
)

POSITIVE = st.floats(min_value=1e-12, max_value=1e6)


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("paper", [PAPER, "#14181d"])
@pytest.mark.parametrize("color", [*(series.color for series in SERIES), WORSE])
def test_every_series_stands_out_on_light_and_dark(color: str, paper: str) -> None:
    # WCAG 2.2, 1.4.11: 3:1 for graphical objects.
    assert _contrast(color, paper) >= 3


def test_no_two_series_share_a_symbol_or_a_color() -> None:
    assert len({series.symbol for series in SERIES}) == len({series.color for series in SERIES}) == len(SERIES)


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=12), st.floats(0.01, 10))
def test_spread_keeps_order_and_distance(values: list[float], gap: float) -> None:
    placed = spread(values, gap)
    order = sorted(range(len(values)), key=lambda index: values[index])
    for first, second in pairwise(order):
        assert placed[second] - placed[first] >= gap * (1 - 1e-9) - 1e-9


@settings(deadline=None)
@given(st.permutations(range(6)), st.floats(0.01, 10))
def test_spread_leaves_free_labels_where_they_are(order: list[int], gap: float) -> None:
    apart = [place * 1.5 * gap for place in order]
    assert spread(apart, gap) == pytest.approx(apart)


@settings(deadline=None)
@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_log_axis_shows_all_values_and_names_at_least_two(values: list[float]) -> None:
    axis = log_axis(values, "loss")
    low, high = axis["range"]
    assert all(low - 1e-3 <= math.log10(value) <= high + 1e-3 for value in values)
    assert 2 <= len(axis["tickvals"]) <= 10
    assert len(set(axis["ticktext"])) == len(axis["ticktext"])
    assert all(low - 1e-3 <= math.log10(tick) <= high + 1e-3 for tick in axis["tickvals"])


def test_log_axis_ignores_what_has_no_logarithm() -> None:
    assert log_axis([0.0, math.nan, -1.0, 1e-3, 1e-2], "loss") == log_axis([1e-3, 1e-2], "loss")
    assert log_axis([], "loss")["range"][0] < log_axis([], "loss")["range"][1]


@settings(deadline=None)
@given(st.floats(-1e300, 1e300, allow_subnormal=False))
def test_rounded_is_close_and_nan_is_null(value: float) -> None:
    kept, missing = rounded([value, math.nan])
    assert kept == pytest.approx(value, rel=1e-3)
    assert missing is None


def test_short_names_drop_what_is_shared_and_keep_the_operator() -> None:
    assert short_names(["model.layers.0.q_proj", "model.layers.1.q_proj"]) == ["0.q_proj", "1.q_proj"]
    assert short_names(["model.q_proj", "model.q_proj.inner"]) == ["q_proj", "q_proj.inner"]
    assert short_names(["model.layers.0.q_proj"]) == ["model.layers.0.q_proj"]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=90), min_size=1, max_size=6))
def test_short_names_are_short_and_carry_no_markup(names: list[str]) -> None:
    for label in short_names(names, width=20):
        plain = label.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        assert len(plain) <= 20
        assert "<" not in label
        assert ">" not in label
