"""Output loss against cost: the front falls, what was picked is marked, names cannot break out."""

from __future__ import annotations

import itertools
from typing import Any

from alphasmith.dashboards.figures.formats import loss_against_cost


def point(number: int, cost: float, loss: float | None, *, front: bool, formats: dict[str, str]) -> dict[str, Any]:
    return {
        "number": number,
        "formats": formats,
        "cost": cost,
        "share_of_macs": cost,
        "predicted": loss,
        "loss": loss,
        "on_front": front,
        "reason": "",
    }


ENTRY: dict[str, Any] = {
    "own": "int8-static",
    "sites": 3,
    "cost_unit": "share of multiply-adds",
    "picked": 2,
    "points": [
        point(0, 0.0, 4e-3, front=True, formats={}),
        point(1, 0.4, 3e-3, front=False, formats={"a": "float"}),
        point(2, 0.3, 2e-3, front=True, formats={"<b>": "int8-token"}),
        point(3, 0.9, 1e-3, front=True, formats={"a": "float", "<b>": "float"}),
        point(4, 0.2, None, front=False, formats={"a": "int8-token"}),
    ],
}


def test_the_front_falls_and_the_picked_point_is_marked() -> None:
    traces = {trace.name: trace for trace in loss_against_cost(ENTRY).data}
    front = list(zip(traces["front"].x, traces["front"].y, strict=True))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
    assert list(traces["picked"].x) == [0.3]
    assert list(traces["measured"].x) == [0.4], "a point without a loss is not drawn"
    assert not any("<b>" in label for trace in traces.values() for label in trace.text or ())
