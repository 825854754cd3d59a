"""Sentences: the same words everywhere, missing numbers said, nothing invented."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alphasmith.dashboards.text import choices_of_site, facts_of, offset_text, verdict_of_refinement, verdict_of_site

SITE: dict[str, Any] = {"mode": "fold", "best_single": 2.5e-4, "ours": 2.3e-4, "limit": 2.2e-4}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "best single alpha 2.50e-4, ours 2.30e-4, limit 2.20e-4"),
        ({"limit": math.nan}, "best single alpha 2.50e-4, ours 2.30e-4, limit n/a"),
        ({"limit": None, "best_single": None}, "best single alpha n/a, ours 2.30e-4, limit n/a"),
        ({"mode": "left"}, ""),
        ({"ours": None}, ""),
        ({"ours": math.nan}, ""),
    ],
)
def test_verdict_of_site(changes: dict[str, Any], sentence: str) -> None:
    assert verdict_of_site(SITE | changes) == sentence


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({}, ""),
        ({"groups": 0, "shift": False, "range_statistic": "absmax", "range_factor": 1.0, "grouping": ""}, ""),
        ({"groups": 4, "grouping": "kmeans", "statistic": "rms"}, "K 4 (kmeans, rms)"),
        ({"groups": 4, "shift": True}, "K 4, shift"),
        ({"groups": 4, "coefficients": 3}, "K 4"),
        ({"groups": 4, "coefficients": 1, "grouping": "kmeans", "shift": True}, "one alpha, shift"),
        ({"groups": 4, "coefficients": 0, "grouping": "kmeans"}, "no smoothing"),
        ({"range_statistic": "margin", "range_factor": 1.1}, "range x1.1 (margin)"),
        ({"groups": math.nan, "shift": False, "range_statistic": None}, ""),
    ],
)
def test_choices_of_site(chosen: dict[str, Any], text: str) -> None:
    assert choices_of_site(chosen) == text


def test_verdict_of_refinement_has_its_figures_or_its_reason() -> None:
    figures = {"before": 1.23e-3, "after": 1.1e-3, "difference": 1.3e-4, "standard_error": 2e-5, "reason": "why"}
    assert (
        verdict_of_refinement(figures | {"accepted": True})
        == "accepted: output loss 1.23e-3 -> 1.10e-3 (difference 1.30e-4 +- 2.00e-5)"
    )
    simpler = {"accepted": True, "after": 1.24e-3, "difference": -1e-5}
    assert verdict_of_refinement(figures | simpler).startswith(
        "accepted, being simpler and no worse beyond the noise: output loss 1.23e-3 -> 1.24e-3 ("
    )
    assert verdict_of_refinement(figures | {"accepted": False}) == "not accepted: why; the output loss stays 1.23e-3"
    unknown = dict.fromkeys(("before", "difference", "standard_error"))
    assert verdict_of_refinement(figures | unknown | {"accepted": True}) == "accepted: output loss n/a -> 1.10e-3"
    assert verdict_of_refinement({"accepted": False}) == "not accepted: no reason given"


def test_offsets_are_factors() -> None:
    assert offset_text(math.log(1.25)) == "x1.25"
    assert [offset_text(nothing) for nothing in (0.0, math.nan)] == ["", ""]


def test_names_of_modules_keep_their_underscores() -> None:
    assert facts_of({"scheme": {"weight_granularity": "channel", "sites": {"layers.0.q_proj": "float"}}}) == [
        ("scheme · weight granularity", "channel"),
        ("scheme · sites · layers.0.q_proj", "float"),
    ]
