"""The curve of a training: every look is drawn, and what was best is marked."""

from __future__ import annotations

from typing import Any

import pytest

from alphasmith.dashboards.figures.training import training_curve


def entry(losses: list[float], **values: Any) -> dict[str, Any]:
    curve = [
        {
            "step": 10 * i,
            "train_loss": None if i == 0 else loss,
            "held_out_loss": loss,
            "metric": 0.5,
            "learning_rate": 0.1,
        }
        for i, loss in enumerate(losses)
    ]
    return {
        "curve": curve,
        "best_step": 10 * losses.index(min(losses)),
        "kept": True,
        "metric_name": "accuracy",
        **values,
    }


@pytest.mark.parametrize(("losses", "axis"), [([2.0, 0.5, 0.75], "log"), ([2.0, 0.0, 0.75], None)])
def test_every_look_is_drawn(losses: list[float], axis: str | None) -> None:
    figure = training_curve(entry(losses))
    trained, held_out, best = figure.data
    assert list(held_out.x) == [0, 10, 20]
    assert list(held_out.y) == losses
    assert list(trained.x) == [10, 20]
    assert (list(best.x), list(best.y), best.name) == ([10], [min(losses)], "kept")
    assert figure.layout.yaxis.type == axis
    assert list(held_out.text) == ["accuracy 0.5"] * 3


def test_what_is_kept_is_named() -> None:
    assert training_curve(entry([1.0, 2.0], kept=False)).data[-1].name == "untrained, kept"
    assert training_curve(entry([2.0, 1.9], kept=False)).data[-1].name == "the best, not kept"
