"""The verdict and the advice: the figures of the manifest, in the words of the field, nothing invented."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.dashboards.verdict import advice, run_verdict, swept_alpha, training_verdict, whole_model

PAYLOAD = {"weights_float": 400, "weights_quantized": 100, "other": 30, "model_float": 500, "model_given": 500}
METRIC = {
    "name": "perplexity",
    "higher_is_better": False,
    "float": 48.24,
    "naive": 99.3,
    "alpha_0.5": 58.65,
    "one_alpha": 49.8,
    "best_single": 56.1,
    "ours": 49.31,
}
LOSSES = {"loss": "kl", "naive": 0.2527, "alpha_0.5": 0.0687, "best_single": 0.0267, "ours": 0.0096}


def test_the_verdict_is_one_sentence() -> None:
    content = {"payload": PAYLOAD, "output": LOSSES | {"kept": "ours", "metrics": [METRIC]}}
    figures = "99.3 without smoothing, 58.6 at alpha 0.5, 49.8 with one swept alpha, 49.3 ours, 48.2 float"
    assert run_verdict(content) == f"26 % of the size; perplexity {figures}"


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            LOSSES,
            "output loss (KL, nats) 0.253 without smoothing, 0.0687 at alpha 0.5, 0.0267 with the best single alpha, 9.60e-3 ours",
        ),
        (
            LOSSES | {"one_alpha": 0.0092, "naive": None, "kept": "one_alpha"},
            "output loss (KL, nats) failed without smoothing, 0.0687 at alpha 0.5, 9.20e-3 with one swept alpha, 9.60e-3 "
            + "ours; kept: one swept alpha",
        ),
        (
            {"metrics": [{"name": "a", "float": 1.0, "ours": None}, METRIC | {"float": None}]},
            "perplexity 99.3 without smoothing, 58.6 at alpha 0.5, 49.8 with one swept alpha, 49.3 ours",
        ),
        ({"loss": "mse", "metrics": []}, ""),
    ],
)
def test_what_was_not_measured_is_left_out(output: dict[str, Any], sentence: str) -> None:
    assert run_verdict({"output": output}) == sentence
    assert run_verdict({"output": output, "payload": PAYLOAD | {"model_given": None}}) == sentence


def test_the_table_has_the_variants_that_were_scored() -> None:
    found = whole_model(LOSSES | {"metrics": [METRIC, METRIC | {"name": "accuracy", "float": 0.97, "ours": None}]})
    headings = ["float", "none", "alpha 0.5", "one alpha", "best single", "ours"]
    assert [column.heading for column in found.columns] == headings
    (loss, of_loss), (first, of_first), (_, of_second) = found.rows
    assert loss == "output loss (KL, nats)"
    assert of_loss == ("0", "0.253", "0.0687", "failed", "0.0267", "9.60e-3")
    assert (first, of_first[0], of_first[-1]) == ("perplexity (lower is better)", "48.24", "49.31")
    assert (of_second[0], of_second[-1]) == ("0.9700", "failed")
    assert [column.heading for column in whole_model(LOSSES).columns] == [*headings[:3], *headings[4:]]


def test_the_swept_alpha_is_told() -> None:
    assert (
        swept_alpha({"sweep": {"alpha": 0.85, "trials": 10}})
        == "one alpha for the model: 0.85, the best of 10 at its output"
    )
    assert swept_alpha({"sweep": None}) == swept_alpha({}) == ""


def shares(*values: float | None, key: str = "share") -> list[dict[str, Any]]:
    """Sites with these shares of the output error."""
    return [{"name": f"layers.{i}.fc2", key: value} for i, value in enumerate(values)]


def test_few_sites_that_make_most_of_the_error_are_named() -> None:
    parts = (0.015, 0.5, *[0.015] * 9, 0.35, None)
    sites = shares(*parts)
    (told,) = advice({"sites": sites, "scheme": {"activations": "int8", "activation_granularity": "static"}})
    assert told.startswith("2 of 13 sites make 85 % of the predicted output error: layers.1.fc2, layers.11.fc2; ")
    assert "per token" in told
    (told,) = advice({"sites": sites, "scheme": {"activations": "int8", "activation_granularity": "token"}})
    assert "per token" not in told
    assert "sites.skip" in told
    (told,) = advice({"sites": shares(*parts, key="share_measured")})
    assert told.startswith("2 of 13 sites make 85 % of the measured output error: ")


@given(st.lists(st.none() | st.floats(1e-6, 10), max_size=30))
def test_few_sites_are_few_and_most_is_most(values: list[float | None]) -> None:
    total = sum(value for value in values if value is not None)
    parts = [value and value / total for value in values]
    told = advice({"sites": shares(*parts)})
    known = sorted((part for part in parts if part is not None), reverse=True)
    if told:
        few, of = int(told[0].split()[0]), int(told[0].split()[2])
        assert of == len(values)
        assert 4 * few <= of
        assert sum(known[:few]) >= 2 / 3 - 1e-9
        assert sum(known[: few - 1]) < 2 / 3 + 1e-9
    else:
        assert sum(known[: len(values) // 4]) < 2 / 3 + 1e-9


def test_errors_that_are_spread_name_nobody() -> None:
    assert advice({"sites": shares(0.3, 0.3, 0.3, 0.1)}) == []
    assert advice({"sites": shares(*[0.0] * 8)}) == []
    assert advice({"sites": shares(None, None)}) == []
    assert advice({"sites": shares(0.5, *[None] * 8, key="share_measured")}) == []


def test_sites_far_above_their_limit_are_named() -> None:
    def at(name: str, ours: float, limit: float | None) -> dict[str, Any]:
        return {"name": name, "losses": {"held_out": {"ours": ours, "limit": limit}}}

    sites = [
        at("a", 2e-4, 1e-4),
        at("b", 1e-4, 1e-4),
        at("c", 9e-4, 2e-4),
        at("d", 1e-3, None),
        {"name": "e", "losses": None},
    ]
    (told,) = advice({"sites": sites})
    assert told.startswith("at 2 of 3 sites the loss is more than 1.1 times that of scales chosen freely")
    assert "c (4.5 times), a (2 times)" in told
    assert advice({"sites": sites[1:2]}) == []


def test_what_stays_float_is_named_where_it_is_large() -> None:
    weight = {"aliases": (), "shape": (2, 2), "share": 0.4, "status": "float", "reason": "an embedding"}
    weights = [weight | {"name": "embed.weight"}, weight | {"name": "fc.weight", "status": "quantized", "reason": ""}]
    content = {"weights": weights, "payload": PAYLOAD | {"other": 300}}
    assert advice(content) == ["75 % of the size that is left is not quantized weights: embed (an embedding)"]
    assert advice(content | {"payload": PAYLOAD}) == []


def test_a_model_without_a_metric_is_told_so() -> None:
    (told,) = advice({"output": LOSSES | {"metrics": []}})
    assert "data.metric" in told
    assert advice({"output": LOSSES | {"metrics": [METRIC]}}) == []
    assert advice({}) == []


def trained(losses: list[float], metrics: list[float | None], *, kept: bool) -> dict[str, Any]:
    """A training whose looks had these held-out losses and values of a metric."""
    curve = [
        {"step": step, "held_out_loss": loss, "metric": metric}
        for step, (loss, metric) in enumerate(zip(losses, metrics, strict=True))
    ]
    best = losses.index(min(losses))
    return {
        "training": {
            "id": "t-1",
            "curve": curve,
            "best_step": best,
            "kept": kept,
            "metric_name": "accuracy",
            "held_out": [1, 5, 9],
        }
    }


def test_a_training_is_told_before_its_run() -> None:
    learned = training_verdict(trained([2.0, 1.5, 1.75], [0.25, 0.5, 0.75], kept=True))
    assert (
        learned == "trained further: accuracy 0.25 before, 0.5 after, on 3 held-out samples; the trained model is kept"
    )
    assert "accuracy" not in training_verdict(trained([2.0, 1.5], [None, None], kept=True))
    values = training_verdict(trained([2.0, 1.5], [None, None], kept=False))
    assert "loss 2 before, 1.5 after" in values
    assert values.endswith("the untrained model is kept")
    assert "loss 2 before, and never better" in training_verdict(trained([2.0, 2.5], [None, None], kept=False))
    of_run = {"output": {"loss": "mse", "held_out": {}, "naive": 0.5, "ours": 0.25}}
    both = training_verdict({**trained([2.0, 1.5], [0.25, 0.5], kept=True), **of_run})
    assert both == f"{learned}; before it: {run_verdict(of_run)}"
    assert run_verdict(of_run)
    assert training_verdict(of_run) == ""
