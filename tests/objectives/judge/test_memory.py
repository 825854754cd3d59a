"""Memory plans: what they count, how they grow, and that budgets are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.judge.memory import (
    MINIMUM_ROWS,
    MemoryDemand,
    MemoryPlan,
    activation_bytes,
    fit_rows,
    measured_peak,
    resident_bytes,
)
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Operator, Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing
from alphasmith.objectives.text import size_text


def _site(name: str, inputs: int, outputs: int, *, kernel: tuple[int, ...] = (), raw: bool = False) -> Site:
    operator = Operator(
        name=name,
        weight=f"{name}.weight",
        bias=None,
        kind="conv" if kernel else "linear",
        transposed=False,
        raw=raw,
        in_channels=inputs,
        out_channels=outputs,
        kernel=kernel,
    )
    return Site(
        name=name,
        operators=(operator,),
        channels=inputs,
        mode="explicit",
        reason="a test site",
        ties=torch.arange(inputs),
        edits=(),
        producers=(),
    )


def _model() -> tuple[nn.Sequential, list[Site], Batch]:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    return model, [_site("0", 16, 64), _site("2", 64, 8)], Batch(args=(torch.zeros(2, 16),))


def test_activations_are_the_tensors_alive_together() -> None:
    model, _, _ = _model()
    # At the ReLU live: the input, its own input and its output; the last product replaces neither of the wide ones.
    assert activation_bytes(model, Batch(args=(torch.zeros(10, 16),))) == 10 * 4 * (16 + 64 + 64)
    in_place = nn.Sequential(nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 8))
    assert activation_bytes(in_place, Batch(args=(torch.zeros(10, 16),))) == 10 * 4 * (16 + 64 + 8)


def test_views_and_parameters_cost_nothing_and_the_model_is_left_alone() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return x.view(-1).view(4, 4).T + self.weight.T

    model = Views()
    for _ in range(2):
        assert activation_bytes(model, Batch(kwargs={"x": torch.zeros(4, 4)})) == 2 * 64
    assert model.training


def _demand(batch: Batch, **values: Any) -> MemoryDemand:
    return MemoryDemand(batch=batch, **values)


def predicted_peak(model: nn.Module, sites: Sequence[Site], *, rows: int, demand: MemoryDemand) -> MemoryPlan:
    """The plan where memory is no matter."""
    return fit_rows(model, sites, rows=rows, budget=2**62, demand=demand)


def test_a_plan_counts_every_part() -> None:
    model, sites, batch = _model()
    plan = predicted_peak(model, sites, rows=100, demand=_demand(batch, model_copies=3))
    assert plan.parameters == 3 * 4 * sum(p.numel() for p in model.parameters())
    assert plan.reservoirs >= 2 * 100 * 4 * (16 + 64)
    assert plan.statistics >= 2 * 4 * (16 + 64)
    assert plan.activations >= activation_bytes(model, batch)
    assert plan.evaluator >= 4 * 100 * (16 + 64)
    assert plan.candidate >= 16 * 64 + 64 * 8  # int8: a byte per weight
    assert plan.working_set == max(plan.activations, plan.evaluator, plan.candidate, plan.proof)
    rest = plan.parameters + plan.reservoirs + plan.statistics
    assert plan.total == rest + plan.working_set + plan.overhead
    assert plan.overhead > 0
    assert size_text(plan.total) in str(plan)


def test_the_quantized_model_is_as_large_as_its_format() -> None:
    model, sites, batch = _model()
    weights = 16 * 64 + 64 * 8

    def candidate(scheme: Scheme) -> int:
        return predicted_peak(model, sites, rows=64, demand=_demand(batch, schemes=SiteSchemes(scheme))).candidate

    integers = candidate(Scheme())
    assert integers - candidate(Scheme(weights="int4")) == weights // 2
    # Outside the integer path, dequantized weights are kept as well; groups have scales of their own.
    assert candidate(Scheme(activations="none")) - integers == 4 * weights
    grouped = candidate(Scheme(weight_granularity="group", group_size=8))
    assert grouped - candidate(Scheme(activations="none")) == 4 * weights // 8


def test_the_float64_copy_is_planned_where_it_is_allowed() -> None:
    model, sites, batch = _model()
    numbers = sum(p.numel() for p in model.parameters())
    with_copy = predicted_peak(model, sites, rows=64, demand=_demand(batch, float64_limit=8 * numbers))
    assert with_copy.float64 == 8 * numbers
    assert with_copy.proof > 8 * numbers
    without = predicted_peak(model, sites, rows=64, demand=_demand(batch, float64_limit=8 * numbers - 1))
    assert without.float64 == 0
    assert without.proof <= with_copy.proof


class _Building(nn.Module):
    """A candidate of a model is built, and run, in every forward."""

    def __init__(self, model: nn.Module, candidate: CandidateModel, smoothings: dict[str, Smoothing]) -> None:
        super().__init__()
        self.float_model = model
        self.__dict__["_of"] = (candidate, smoothings)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        candidate, smoothings = self.__dict__["_of"]
        candidate.apply(smoothings)
        output: torch.Tensor = candidate.model(ids)
        return output


@pytest.mark.parametrize("samples", [2, 64], ids=["weights weigh more", "activations weigh more"])
@pytest.mark.parametrize("scheme", ["w8a8-channel-static", "w8a8-channel-token", "w4a8-channel-static"])
def test_a_candidate_takes_what_was_planned(scheme: str, samples: int) -> None:
    torch.manual_seed(0)  # module initialisers take no generator
    # The embedding is by far the largest tensor, and no candidate builds it anew.
    model = nn.Sequential(
        nn.Embedding(12000, 256), nn.LayerNorm(256), nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256)
    ).eval()
    batch = Batch(args=(torch.arange(samples * 32).reshape(samples, 32),))
    sites = discover(model, batch).sites
    ranges = {
        s.name: ChannelRange(low=torch.full((s.channels,), -4.0), high=torch.full((s.channels,), 4.0)) for s in sites
    }
    schemes = SiteSchemes(Scheme.parse(scheme))
    smoothings = {s.name: Smoothing(scales=torch.full((s.channels,), 2.0)) for s in sites if s.mode != "left"}
    assert smoothings
    candidate = CandidateModel(model, sites, ranges, schemes, ())
    plan = predicted_peak(model, sites, rows=64, demand=_demand(batch, schemes=schemes))
    with candidate.restored():
        measured = activation_bytes(_Building(model, candidate, smoothings), batch)
    assert measured / 1.2 <= plan.candidate <= 1.8 * measured


def test_the_proof_is_planned_for_its_own_batches() -> None:
    model, sites, batch = _model()
    alike = predicted_peak(model, sites, rows=64, demand=_demand(batch, batch_size=200, float64_limit=2**30))
    small = predicted_peak(
        model, sites, rows=64, demand=_demand(batch, batch_size=200, proof_size=2, float64_limit=2**30)
    )
    assert small.proof < alike.proof
    assert replace(small, proof=alike.proof) == alike


def test_what_only_saves_time_is_given_up_before_rows() -> None:
    torch.manual_seed(0)  # module initialisers take no generator
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(100)))
    sites = [_site(str(i), 64, 64) for i in range(100)]
    demand = _demand(
        Batch(args=(torch.zeros(2, 64),)), schemes=SiteSchemes(Scheme(activations="none")), float64_limit=2**30
    )
    full = predicted_peak(model, sites, rows=64, demand=demand)
    assert full.dense > 0
    assert full.float64 > 0
    plans = [fit_rows(model, sites, rows=64, budget=full.total - cut, demand=demand) for cut in (0, 1, full.dense)]
    assert plans[0] == full
    for plan in plans[1:]:
        assert plan.rows == 64
        assert plan.total < full.total
        assert 0 in (plan.dense, plan.float64)


@settings(deadline=None)
@given(samples=st.integers(0, 10**6), spare=st.integers(0, 10**7))
def test_what_is_remembered_takes_memory_that_is_left(samples: int, spare: int) -> None:
    model, sites, batch = _model()
    bare = predicted_peak(model, sites, rows=64, demand=_demand(batch))
    plan = fit_rows(model, sites, rows=64, budget=bare.total + spare, demand=_demand(batch, remembered=samples))
    assert plan.total <= bare.total + spare
    assert (plan.rows, plan.proof, plan.candidate) == (bare.rows, bare.proof, bare.candidate + plan.remembered)
    # Every tensor that an operator takes or returns, and a third for weights.
    assert plan.remembered <= samples * 4 * (16 + 64 + 64 + 8) * 4 // 3
    assert spare or plan.remembered == 0
    if samples and spare > 10**6:
        assert plan.remembered > 0


def test_tied_parameters_are_counted_once_and_buffers_are_counted() -> None:
    model, _, batch = _model()
    tied = nn.Sequential(model[0], model[1], model[2], nn.Identity())
    tied[3].register_module("twin", model[0])
    tied.register_buffer("table", torch.zeros(25))
    a, b = (predicted_peak(m, [], rows=64, demand=_demand(batch)).parameters for m in (model, tied))
    assert b - a == 100


def test_convolutions_count_their_patches_and_raw_sites_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    demand = _demand(Batch(args=(torch.zeros(1, 3, 8, 8),)))
    plan = predicted_peak(model, [_site("0", 3, 5, kernel=(3, 3))], rows=64, demand=demand)
    assert plan.reservoirs >= 2 * 64 * 4 * 27
    raw = predicted_peak(model, [_site("0", 3, 5, kernel=(3, 3), raw=True)], rows=64, demand=demand)
    assert (raw.reservoirs, raw.statistics, raw.evaluator) == (0, 0, 0)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5000), more=st.integers(1, 500))
def test_plans_grow_with_whatever_costs_memory(rows: int, more: int) -> None:
    model, sites, batch = _model()

    def predicted(count: int = rows, **values: Any) -> MemoryPlan:
        return predicted_peak(model, sites, rows=count, demand=_demand(batch, **values))

    plan = predicted()
    assert plan.total < predicted(rows + more).total
    assert plan.total < predicted(splits=3).total
    assert plan.evaluator < predicted(evaluators=2).evaluator
    assert plan.statistics < predicted(percentiles=True).statistics
    bigger = predicted(batch_size=20)
    assert bigger.activations == 10 * plan.activations
    assert replace(bigger, activations=plan.activations, candidate=plan.candidate, proof=plan.proof) == plan


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 3000), share=st.floats(0.0, 1.3))
def test_fitted_rows_are_the_most_that_fit(rows: int, share: float) -> None:
    model, sites, batch = _model()
    demand = _demand(batch)
    least = predicted_peak(model, sites, rows=min(rows, MINIMUM_ROWS), demand=demand).total
    most = predicted_peak(model, sites, rows=rows, demand=demand).total
    budget = least + int(share * (most - least))
    plan = fit_rows(model, sites, rows=rows, budget=budget, demand=demand)
    assert min(rows, MINIMUM_ROWS) <= plan.rows <= rows
    assert plan.total <= budget
    assert plan == predicted_peak(model, sites, rows=plan.rows, demand=demand)
    if plan.rows < rows:
        assert predicted_peak(model, sites, rows=plan.rows + 1, demand=demand).total > budget
    with pytest.raises(InputError, match=r"hardware\.search_memory: .* are too little, the run needs") as caught:
        fit_rows(model, sites, rows=rows, budget=least - 1, demand=demand)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["splits", "model_copies", "evaluators", "batch_size", "proof_size"])
def test_numbers_below_one_are_refused(field: str) -> None:
    model, sites, batch = _model()
    with pytest.raises(InputError) as caught:
        _demand(batch, **{field: 0})
    assert caught.value.field == field
    with pytest.raises(InputError, match="rows"):
        predicted_peak(model, sites, rows=0, demand=_demand(batch))


def test_the_measured_peak_sees_an_allocation_and_never_falls() -> None:
    before = measured_peak()
    assert before >= resident_bytes() * 0.99
    size = before - resident_bytes() + 32 * 2**20  # enough to pass the old mark
    block = bytearray(size)
    block[::4096] = b"\1" * len(block[::4096])
    after = measured_peak(before)
    del block
    assert after >= 16 * 2**20
    assert measured_peak(before) >= after - 2**20  # the kernel counts pages in batches
    assert measured_peak(2 * measured_peak()) == 0


def test_a_plan_is_frozen() -> None:
    plan = MemoryPlan(rows=1, parameters=1, reservoirs=1, statistics=1, activations=5, evaluator=3)
    assert plan.total == 8 + plan.overhead
    with pytest.raises(AttributeError):
        plan.rows = 2  # type: ignore[misc]
