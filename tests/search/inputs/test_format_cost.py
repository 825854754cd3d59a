"""What formats cost on a machine: which of them are equal, which one is dearer, and where that comes from."""

from __future__ import annotations

import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.scheme import FLOAT, Scheme
from alphasmith.search.inputs.format_cost import FormatCost, SiteShape, format_cost, relative_costs
from alphasmith.search.inputs.hardware import HardwareBudget

GPU = HardwareBudget(gpu_threads=100_000, bandwidth=10**12)
ONE, MANY = (SiteShape(rows=rows, inputs=1024, outputs=4096, weights=1024 * 4096) for rows in (1, 65_536))


def cost(name: str, shape: SiteShape = MANY, hardware: HardwareBudget = GPU) -> FormatCost:
    return format_cost(shape, Scheme.parse(name), hardware)


@pytest.mark.parametrize("shape", [ONE, MANY])
def test_a_static_zero_point_costs_nothing(shape: SiteShape) -> None:
    assert cost("w8au8-channel-static", shape) == cost("w8a8-channel-static", shape)


def test_many_rows_are_computed_and_few_are_moved() -> None:
    names = [
        "w8a8-channel-static",
        "w8a8-channel-token",
        "w8au8-channel-token",
        "w8ai16-channel-static",
        "w8a16-channel",
    ]
    many = [cost(name).amount for name in names]
    assert many == sorted(many)
    assert len(set(many)) == len(many)
    assert many[3] == pytest.approx(2 * many[0], rel=0.02)
    one = relative_costs([ONE], [Scheme.parse(name) for name in names], GPU)
    assert max(one.values()) < 1.01
    assert cost("w4a16-g128", ONE).amount < 0.6 * cost("w8a16-channel", ONE).amount
    assert format_cost(ONE, FLOAT, GPU).amount > 3.9 * cost("w8a16-channel", ONE).amount


def test_what_is_unknown_stands_in_the_usual_ratio_to_what_is_known() -> None:
    names = ["w8a8-channel-static", "w8ai16-channel-static", "w8a16-channel", "float"]
    nothing = cost(names[0], hardware=HardwareBudget())
    assert nothing.seconds is None
    known = HardwareBudget(gpu_threads=80_000, bandwidth=10**12)
    for shape in (ONE, MANY):
        costs = [
            relative_costs([shape], [Scheme.parse(name) for name in names], hardware)
            for hardware in (
                known,
                HardwareBudget(gpu_threads=80_000),
                HardwareBudget(bandwidth=10**12),
                HardwareBudget(),
            )
        ]
        for found in costs[1:]:
            assert found == pytest.approx(costs[0])
    of_bandwidth = cost(names[0], hardware=HardwareBudget(bandwidth=10**12)).seconds
    assert of_bandwidth == pytest.approx(cost(names[0], hardware=known).seconds)


def test_a_slower_machine_takes_longer() -> None:
    for shape, slower in (
        (ONE, HardwareBudget(gpu_threads=100_000, bandwidth=10**9)),
        (MANY, HardwareBudget(gpu_threads=1000, bandwidth=10**12)),
    ):
        assert cost("w8a8-channel-static", shape, slower).amount > 10 * cost("w8a8-channel-static", shape).amount


def test_held_bytes_are_those_of_the_weights() -> None:
    assert cost("w8a8-channel-static").held == MANY.weights + 4 * MANY.outputs
    assert cost("w4a16-g128").held == MANY.weights / 2 + 4 * MANY.weights / 128
    assert format_cost(MANY, FLOAT, GPU).held == 4 * MANY.weights


def test_what_has_no_size_is_refused() -> None:
    with pytest.raises(InputError, match="rows: 0 is below 1"):
        SiteShape(rows=0, inputs=1, outputs=1, weights=1)
    with pytest.raises(InputError, match="nothing to compare"):
        relative_costs([], [Scheme()], GPU)
