"""Candidates scored together: the same as one by one, stopped and compared at any time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphasmith.objectives.calibration.site_data import SiteData, to_device
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.judge.site_objective import SiteObjective, linear_site_data
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from tests.support.naive_site import naive_row_errors
from tests.support.site_cases import KINDS, SCHEMES, identity, outlier_layer, relaxed, small_site

seeds = st.integers(0, 2**31)


def candidates_of(data: SiteData, count: int, seed: int = 0) -> list[Smoothing]:
    """Random scales, every other one with a shift, every third with a clipped range."""
    generator = torch.Generator().manual_seed(seed)
    middle = data.input_range.middle(data.ties)
    return [
        Smoothing(
            scales=torch.randn(data.channels, generator=generator).exp(),
            shift=middle if i % 2 else None,
            range_factor=1.0 if i % 3 else 0.8,
        )
        for i in range(count)
    ]


@relaxed
@given(st.sampled_from(KINDS), st.sampled_from(SCHEMES), seeds)
def test_together_is_one_at_a_time(kind: str, scheme: Scheme, seed: int) -> None:
    data = small_site(kind, seed, skew=1.0)
    objective = SiteObjective(data, scheme)
    candidates = candidates_of(data, 4, seed)
    batch = objective.batch(candidates)
    batch.advance(2)
    batch.advance(objective.rows)
    alone = [objective.loss(candidate) for candidate in candidates]
    assert [batch.loss(i) for i in range(len(batch))] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["w8a8-channel-static", "w4a8-g3-token", "wfp8afp8-tensor-static"])
def test_stacked_candidates_are_one_at_a_time(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stacks are for GPUs; the arithmetic is the same on a CPU.
    data = small_site(kind, 5, skew=1.0)
    objective, stacked = (SiteObjective(data, Scheme.parse(name)) for _ in range(2))
    monkeypatch.setattr(stacked._scorer, "stack", 3)
    monkeypatch.setattr(stacked._scorer, "_chunk", 2)
    candidates = candidates_of(data, 7)
    batch = stacked.batch(candidates)
    batch.advance(1)
    batch.advance(3, [6, 0, 2, 3])
    batch.advance(stacked.rows)
    alone = [objective.loss(candidate) for candidate in candidates]
    assert [batch.loss(i) for i in range(7)] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_row_errors_are_those_of_scalar_loops_in_one_order_for_all(kind: str) -> None:
    data, scheme = small_site(kind, 3), Scheme()
    objective = SiteObjective(data, scheme)
    candidates = candidates_of(data, 2)
    batch = objective.batch(candidates)
    for rows in (1, 3):
        batch.advance(rows, [0])
    batch.advance(objective.rows)
    for index, candidate in enumerate(candidates):
        errors = np.concatenate([errors for errors, _ in naive_row_errors(data, scheme, candidate)])
        assert sorted(batch.row_errors(index).tolist()) == pytest.approx(sorted(errors.tolist()), rel=1e-3, abs=1e-9)
    together = objective.batch(candidates[:1])
    together.advance(objective.rows)
    assert together.row_errors(0).tolist() == pytest.approx(batch.row_errors(0).tolist(), rel=1e-4, abs=1e-12)
    early = objective.batch(candidates[:1])
    early.advance(2)
    beginning = early.row_errors(0)
    assert beginning.tolist() == pytest.approx(together.row_errors(0)[: len(beginning)].tolist(), rel=1e-4, abs=1e-12)


def test_losses_are_sums_of_row_errors() -> None:
    data = small_site("two_parts", 1)
    objective = SiteObjective(data, Scheme())
    assert objective.energy(objective.rows) == objective.reference_energy
    batch = objective.batch(candidates_of(data, 2))
    for rows in (1, 4, 7):
        batch.advance(rows)
        for index in range(2):
            loss = batch.loss(index)
            assert loss == pytest.approx(float(batch.row_errors(index).sum()) / objective.energy(rows), rel=1e-12)


def test_a_pair_is_compared_on_the_rows_both_have() -> None:
    data = small_site("two_parts", 2)
    objective = SiteObjective(data, Scheme())
    batch = objective.batch(candidates_of(data, 3))
    with pytest.raises(InputError, match="no rows"):
        batch.paired(0, 1)
    batch.advance(7, [0])
    batch.advance(4, [1, 2])
    assert batch.rows_scored == (7, 4, 4)
    errors = [batch.row_errors(i).numpy() for i in range(3)]
    energy = objective.energy(4)
    difference = errors[0][: len(errors[1])] - errors[1]
    mean, deviation = batch.paired(0, 1)
    assert mean == pytest.approx(difference.sum() / energy, rel=1e-9)
    assert deviation == pytest.approx(difference.std(ddof=1) * math.sqrt(len(difference)) / energy, rel=1e-9)
    assert mean == pytest.approx(objective.loss(candidates_of(data, 3)[0], rows=4) - (batch.loss(1) or 0.0), rel=1e-4)
    assert batch.paired(1, 0) == pytest.approx((-mean, deviation))
    assert batch.paired(2, 2) == (0.0, 0.0)
    other = objective.batch(candidates_of(data, 2))
    other.advance(4, [1])
    assert paired_difference(batch.row_errors(0), other.row_errors(1), energy) == pytest.approx((mean, deviation))


def test_the_standard_error_covers_what_fresh_rows_show() -> None:
    x, w = outlier_layer(1, rows=4096, channels=32, outputs=32)
    objective = SiteObjective(linear_site_data(x, w), Scheme())
    batch = objective.batch([Smoothing(scales=torch.ones(32)), Smoothing(scales=x.abs().amax(0).sqrt())])
    batch.advance(4096)
    errors = [batch.row_errors(i).view(64, 64) for i in range(2)]
    found = [
        paired_difference(a, b, objective.reference_energy / 64) for a, b in zip(errors[0], errors[1], strict=True)
    ]
    truth = batch.paired(0, 1)[0]
    # 64 subsets: the share within two standard errors is about 0.95 with a deviation of 0.03, less for the long tails of squares.
    assert sum(abs(mean - truth) <= 2 * deviation for mean, deviation in found) >= 0.8 * 64


def test_one_row_says_nothing_about_others() -> None:
    objective = SiteObjective(small_site("linear", 0), Scheme())
    batch = objective.batch(candidates_of(objective.data, 2))
    batch.advance(1)
    assert batch.paired(0, 1)[1] == math.inf
    with pytest.raises(NonFiniteError, match="all zero"):
        paired_difference(torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0.0)
    same = torch.zeros(3, dtype=torch.float64)
    assert paired_difference(same, same, 0.0) == (0.0, 0.0)


def test_a_failed_candidate_stops_nobody_else() -> None:
    data = small_site("linear", 0)
    objective = SiteObjective(data, Scheme())
    bad = Smoothing(scales=torch.tensor([1.0, math.nan, 1.0, 1.0]))
    overflowing = Smoothing(scales=torch.tensor([1e-44, 1.0, 1.0, 1.0]))
    batch = objective.batch([bad, identity(data), overflowing])
    assert batch.failure(0) == "the scales hold NaN or infinity"
    batch.advance(3)
    batch.advance(5)
    assert batch.rows_scored == (0, 5, 3)
    # Rows added in two steps and rows added at once: the same sum in another order.
    assert [batch.loss(i) for i in range(3)] == [None, pytest.approx(objective.loss(identity(data)), rel=1e-12), None]
    assert batch.failure(1) == ""
    assert "nan" in batch.failure(2)
    for pair in ((0, 1), (1, 2)):
        with pytest.raises(NonFiniteError):
            batch.paired(*pair)


def test_a_site_without_output_fails_only_candidates_that_err() -> None:
    data = linear_site_data(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, -0.5, -0.5]]))
    # With activations in float and weights that are codes, nothing is rounded.
    objective = SiteObjective(data, Scheme(activations="none", weight_granularity="group", group_size=3))
    batch = objective.batch([Smoothing(scales=torch.tensor([1.0, 0.3, 0.7]))])
    batch.advance(1)
    assert "all zero" in batch.failure(0)
    dead = SiteObjective(linear_site_data(torch.zeros(3, 2), torch.ones(2, 2)), Scheme())
    batch = dead.batch([identity(dead.data)])
    batch.advance(3)
    assert batch.loss(0) == 0.0


def test_candidates_count_once_and_only_when_scored() -> None:
    objective = SiteObjective(small_site("shared", 0), Scheme())
    batch = objective.batch(candidates_of(objective.data, 4))
    assert objective.exact_evaluations == 0
    batch.advance(2, [0, 1])
    batch.advance(2, [0])  # already there
    batch.advance(5, [0, 1, 2])
    assert objective.exact_evaluations == 3
    assert batch.rows_scored == (5, 5, 5, 0)
    assert batch.loss(3) is None
    assert batch.failure(3) == ""
    assert batch.row_errors(3).shape == (0,)
    assert len(objective.batch([])) == 0


@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=lambda s: s.name)
def test_a_budget_bounds_the_candidates_at_hand_and_changes_no_loss(scheme: Scheme) -> None:
    x, w = outlier_layer(4, rows=300, channels=48, outputs=40)
    data = linear_site_data(x, w)
    candidates = candidates_of(data, 30)
    wide = SiteObjective(data, scheme)
    with pytest.raises(InputError, match=r"^budget: 100 bytes hold no candidate") as refused:
        SiteObjective(data, scheme, budget=100)
    least = int(refused.value.remedy.split()[1])
    tight = SiteObjective(data, scheme, budget=least)
    batches = [objective.batch(candidates) for objective in (wide, tight)]
    for batch in batches:
        batch.advance(50)
        batch.advance(300)
    assert tight._scorer.capacity < len(candidates)
    assert not batches[1]._prepared
    for index in range(30):
        assert batches[1].loss(index) == pytest.approx(batches[0].loss(index), rel=1e-5)


def test_wrong_indices_and_rows_are_named() -> None:
    objective = SiteObjective(small_site("linear", 0), Scheme())
    batch = objective.batch(candidates_of(objective.data, 2))
    for rows in (0, 6):
        with pytest.raises(InputError, match=r"^rows:"):
            batch.advance(rows)
    for which in ([2], [-1, 0]):
        with pytest.raises(InputError, match=r"^which:"):
            batch.advance(1, which)
    with pytest.raises(InputError, match=r"^scales:"):
        objective.batch([Smoothing(scales=torch.zeros(4))])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_gpu_gives_what_the_cpu_gives(scheme: Scheme) -> None:
    for kind in KINDS:
        data = small_site(kind, 6, width=8, skew=1.0)
        candidates = candidates_of(data, 9)
        losses = []
        for device in ("cpu", "cuda"):
            objective = SiteObjective(to_device(data, device), scheme)
            batch = objective.batch(candidates)
            batch.advance(3)
            batch.advance(objective.rows)
            losses.append([batch.loss(i) for i in range(len(batch))])
        # A product in another order may move a value over a rounding tie.
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
