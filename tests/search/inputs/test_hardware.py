"""The hardware budget and rho (formula fA7)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.quantization.scheme import FLOAT, Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.sites.types import Operator, Site
from alphasmith.search.config import HardwareConfig
from alphasmith.search.inputs.hardware import HardwareBudget, detect, required_budget, scarcity, target_budget

NEED = HardwareBudget(memory=1000, gpu_threads=64, bandwidth=10_000)


def test_no_budget_is_rho_zero_exactly() -> None:
    assert scarcity(target_budget(HardwareConfig()), NEED).rho == 0.0


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(1, 10**6))
def test_the_tightest_resource_decides(memory: int, threads: int, bandwidth: int) -> None:
    found = scarcity(HardwareBudget(memory=memory, gpu_threads=threads, bandwidth=bandwidth), NEED)
    assert found.rho == pytest.approx(1 - min(1, memory / 1000, threads / 64, bandwidth / 10_000))
    assert 0 <= found.rho < 1


def test_only_given_resources_count() -> None:
    assert scarcity(HardwareBudget(memory=500), NEED).rho == 0.5
    assert "memory" in scarcity(HardwareBudget(memory=500), NEED).explanation


def test_detection_fills_what_is_not_given() -> None:
    budget = target_budget(HardwareConfig(memory=2**30, detect=True))
    assert budget.memory == 2**30
    assert (budget.gpu_threads is not None) == torch.cuda.is_available()
    assert budget.bandwidth
    assert detect("cpu").memory


def test_the_cores_of_a_cpu_are_not_gpu_threads() -> None:
    """Else every machine without a GPU would be scarce: two cores beside the channels of the widest operator."""
    assert detect("cpu").gpu_threads is None
    plenty = HardwareBudget(memory=1, gpu_threads=10**6, bandwidth=1)
    assert scarcity(detect("cpu"), plenty).rho == 0.0


def test_requirements_follow_the_scheme() -> None:
    operator = Operator(
        name="a",
        weight="a.weight",
        bias=None,
        kind="linear",
        transposed=False,
        raw=False,
        in_channels=8,
        out_channels=16,
    )
    site = Site(
        name="a",
        operators=(operator,),
        channels=8,
        mode="left",
        reason="",
        ties=torch.arange(8),
        edits=(),
        producers=(),
    )

    def need(scheme: Scheme) -> HardwareBudget:
        schemes = SiteSchemes.build(Scheme(), {"a": scheme})
        return required_budget([site], schemes=schemes, parameters=150, activation_bytes=10, forwards_per_second=2.0)

    assert need(Scheme()) == HardwareBudget(memory=128 + 4 * 22 + 10, gpu_threads=16, bandwidth=2 * (128 + 88))
    assert need(Scheme(weights="int4")).memory == 64 + 88 + 10
    assert need(FLOAT).memory == 4 * 128 + 88 + 10
